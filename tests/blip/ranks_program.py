"""Run by test_blip_ranks.py on two ranks: what each rank computed, saved for comparison."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from spying import hardest_negatives, watched
from torch.nn.parallel import DistributedDataParallel

from infogrowth import distributed
from infogrowth.blip.config import BlipConfig
from infogrowth.blip.pretrain import BlipPretrain
from infogrowth.blip.pretrained import load_weights
from infogrowth.blip.retrieval import BlipRetrieval


def matching_over_ranks(config, golden, batch):
    """Matching loss and its gradient with negatives from both ranks, averaged over ranks."""
    model = BlipRetrieval(config, queue_size=32, negative_all_rank=True)
    load_weights(model, golden / "retrieval_init.safetensors")
    image_ids = batch.pop("image_ids")
    with watched(model) as seen:
        itm = model(*batch.values(), 0.4, class_ids=image_ids)["itm"]
    itm.backward()
    results = {"itm": distributed.all_reduce_mean(itm)}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            results[f"grad.{name}"] = distributed.all_reduce_mean(parameter.grad)
    results["negative_image"] = seen.negative_image
    results["idx_queue"] = model.idx_queue
    return results


def pretraining_under_ddp(config, golden, batch):
    """Two optimizer steps under DistributedDataParallel, recomputing image blocks."""
    model = BlipPretrain(config, queue_size=5, vit_grad_ckpt=True, vit_ckpt_layer=2)
    load_weights(model, golden / "pretrain_init.safetensors")
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    results = {}
    for step in range(2):
        with hardest_negatives():
            loss = sum(parallel(*batch.values(), 0.4).values())
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            results = {
                f"grad.{n}": p.grad.clone()
                for n, p in model.named_parameters()
                if p.grad is not None
            }
            results |= {"first_image_queue": model.image_queue.clone(), "loss": loss}
        optimizer.step()
    for name, tensor in model.state_dict().items():
        results[f"state.{name}"] = tensor
    return results


if __name__ == "__main__":
    golden, folder = Path(sys.argv[1]), Path(sys.argv[2])
    config = BlipConfig.from_dict(json.loads((folder / "config.json").read_text()), "config.json")
    with distributed.process_group("cpu"):
        rank = distributed.rank()
        for name, program in (
            ("retrieval", matching_over_ranks),
            ("pretrain", pretraining_under_ddp),
        ):
            rows = slice(2 * rank, 2 * rank + 2)
            whole = load_file(folder / f"{name}_batch.safetensors")
            batch = {key: whole[key][rows] for key in ("images", "ids", "mask")}
            if name == "retrieval":
                batch["image_ids"] = whole["image_ids"][rows]
            results = program(config, golden, batch)
            ready = {key: value.detach().clone().contiguous() for key, value in results.items()}
            save_file(ready, folder / f"{name}_rank{rank}.safetensors")
