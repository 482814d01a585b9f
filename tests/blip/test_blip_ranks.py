"""Two ranks with half a batch each against one process with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from spying import hardest_negatives, watched

from infogrowth.blip.pretrain import BlipPretrain
from infogrowth.blip.pretrained import load_weights
from infogrowth.blip.retrieval import BlipRetrieval


@pytest.fixture(scope="module")
def ranks(golden, golden_config, pretrain_golden, retrieval_golden, tmp_path_factory):
    """The results of ranks_program.py: {program: [rank 0's, rank 1's]}."""
    folder = tmp_path_factory.mktemp("ranks")
    golden_config.to_folder(folder)
    for name, source in (("pretrain", pretrain_golden), ("retrieval", retrieval_golden)):
        images, ids, mask = source.batch(0)
        batch = {"images": images, "ids": ids, "mask": mask}
        if name == "retrieval":
            batch["image_ids"] = source.values["idx"][0]
        save_file(
            {k: v.contiguous() for k, v in batch.items()}, folder / f"{name}_batch.safetensors"
        )
    program = Path(__file__).with_name("ranks_program.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(program), str(golden), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: [load_file(folder / f"{name}_rank{rank}.safetensors") for rank in (0, 1)]
        for name in ("pretrain", "retrieval")
    }


def test_matching_with_negatives_of_all_ranks_is_matching_of_the_whole_batch(
    ranks, golden, golden_config, retrieval_golden
):
    model = BlipRetrieval(golden_config, queue_size=32)
    load_weights(model, golden / "retrieval_init.safetensors")
    image_ids = retrieval_golden.values["idx"][0]
    with watched(model) as seen:
        itm = model(*retrieval_golden.batch(0), 0.4, class_ids=image_ids)["itm"]
    itm.backward()
    one, two = ranks["retrieval"]
    chosen = torch.cat([one["negative_image"], two["negative_image"]])
    assert torch.equal(chosen, seen.negative_image)
    assert (chosen[:2] >= 2).any() and (chosen[2:] < 2).any()  # negatives did cross ranks
    torch.testing.assert_close(one["itm"], itm.detach())
    for rank in (one, two):
        assert rank["idx_queue"][0, :4].tolist() == image_ids.tolist()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(
                    rank[f"grad.{name}"], parameter.grad, atol=2e-5, rtol=1e-4, msg=name
                )


def test_pretraining_under_ddp_averages_the_ranks_and_keeps_them_equal(
    ranks, golden, golden_config, pretrain_golden
):
    one, two = ranks["pretrain"]
    for name in one:
        if name != "loss":
            assert torch.equal(one[name], two[name]), name
    # One process: the queue of the whole batch, and the mean of the halves' gradients.
    halves = []
    for half in (slice(0, 2), slice(2, 4)):
        model = BlipPretrain(golden_config, queue_size=5)
        load_weights(model, golden / "pretrain_init.safetensors")
        with hardest_negatives():
            losses = model(*(tensor[half] for tensor in pretrain_golden.batch(0)), 0.4)
        sum(losses.values()).backward()
        halves.append(model)
    queue = torch.cat([model.image_queue[:, :2] for model in halves], dim=1)
    torch.testing.assert_close(one["first_image_queue"][:, :4], queue)
    assert one["state.queue_ptr"].item() == 8 % 5
    pairs = zip(halves[0].named_parameters(), halves[1].parameters(), strict=True)
    for (name, first), second in pairs:
        if first.grad is not None:
            torch.testing.assert_close(
                one[f"grad.{name}"],
                (first.grad + second.grad) / 2,
                atol=2e-5,
                rtol=1e-4,
                msg=name,
            )
