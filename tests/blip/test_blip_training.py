"""What training asks of the models beyond the golden steps: odd batches, precision, memory."""

import copy

import pytest
import torch
from spying import hardest_negatives, watched

from infogrowth.blip.losses import sample_negatives
from infogrowth.blip.model import BlipDual
from infogrowth.blip.pretrain import BlipPretrain
from infogrowth.blip.retrieval import BlipRetrieval


def batch(config, rows, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, 3, config.image_size, config.image_size, generator=generator)
    ids = torch.randint(5, 190, (rows, length), generator=generator)
    ids[:, 0], ids[:, -1] = config.cls_token_id, config.sep_token_id
    return images, ids, torch.ones_like(ids)


def finite_gradients(model):
    return all(
        p.grad is not None and p.grad.isfinite().all()
        for p in model.parameters()
        if p.requires_grad
    )


@pytest.mark.parametrize("rows, queue_size", [(1, 7), (1, 0), (3, 7), (5, 3)])
def test_pretraining_takes_any_batch_with_any_queue(golden_config, rows, queue_size):
    model = BlipPretrain(golden_config, queue_size=queue_size)
    for step in range(3):
        losses = model(*batch(golden_config, rows, seed=step), 0.4)
        total = sum(losses.values())
        total.backward()
        assert total.isfinite() and finite_gradients(model)
    assert model.queue_ptr.item() == (3 * rows % queue_size if queue_size else 0)


def test_a_batch_of_one_is_matched_with_its_own_pair_only(golden_config):
    model = BlipPretrain(golden_config, queue_size=4)
    with watched(model) as seen:
        losses = model(*batch(golden_config, 1), 0.4)
    own = torch.nn.functional.cross_entropy(seen.itm_logits[:1], torch.tensor([1]))
    torch.testing.assert_close(losses["itm"], own)


@pytest.mark.parametrize("all_ranks", [True, False])
def test_a_batch_of_one_image_is_matched_with_its_own_pairs_only(golden_config, all_ranks):
    model = BlipRetrieval(golden_config, queue_size=4, negative_all_rank=all_ranks)
    with watched(model) as seen:
        losses = model(*batch(golden_config, 3), 0.4, class_ids=torch.tensor([5, 5, 5]))
    own = torch.nn.functional.cross_entropy(seen.itm_logits[:3], torch.ones(3).long())
    torch.testing.assert_close(losses["itm"], own)
    sum(losses.values()).backward()
    assert finite_gradients(model)


def test_the_same_generator_gives_the_same_step_and_leaves_global_state(golden_config):
    first = BlipPretrain(golden_config, queue_size=8)
    second = copy.deepcopy(first)
    state = torch.random.get_rng_state()
    for step in range(2):
        inputs = batch(golden_config, 4, seed=step)
        one = first(*inputs, 0.4, generator=torch.Generator().manual_seed(step))
        two = second(*inputs, 0.4, generator=torch.Generator().manual_seed(step))
        assert [v.item() for v in one.values()] == [v.item() for v in two.values()]
    assert torch.equal(state, torch.random.get_rng_state())


def test_building_a_model_depends_on_its_seed_alone(golden_config):
    state = torch.random.get_rng_state()
    first = BlipPretrain(golden_config, queue_size=8, seed=3).state_dict()
    torch.rand(5)
    second = BlipPretrain(golden_config, queue_size=8, seed=3).state_dict()
    other = BlipPretrain(golden_config, queue_size=8, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["visual_encoder.pos_embed"], other["visual_encoder.pos_embed"])
    torch.random.set_rng_state(state)
    BlipDual(golden_config)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_fresh_models_momentum_encoders_equal_the_online_ones(golden_config):
    state = BlipPretrain(golden_config, queue_size=8).state_dict()
    momentum = [name for name in state if name.split(".")[0].endswith("_m")]
    assert len(momentum) > 100
    for name in momentum:
        part, _, rest = name.partition(".")
        assert torch.equal(state[name], state[f"{part.removesuffix('_m')}.{rest}"])


def test_id_aware_targets_make_a_returning_sample_no_enemy(golden_config):
    """A dataset smaller than the queue: the second pass meets its own copies (spec §7, trap 13)."""
    inputs, ids = batch(golden_config, 4), torch.tensor([10, 11, 12, 13])
    plain = BlipPretrain(golden_config, queue_size=8, momentum=1.0)
    aware = BlipPretrain(golden_config, queue_size=8, momentum=1.0, id_aware_targets=True)
    aware.load_state_dict(plain.state_dict(), strict=False)
    for _ in range(2):  # fill the queue of 8 with two copies of the four samples
        plain(*inputs, 0.0)
        aware(*inputs, 0.0, sample_ids=ids)
    assert aware.idx_queue.tolist() == [[10, 11, 12, 13, 10, 11, 12, 13]]
    assert "idx_queue" not in plain.state_dict()
    # Each sample now stands three times among the candidates; of one's own, the aware model
    # counts one, and the paper's counts all three, two of them as wrong answers.
    image, text = aware.encode_image(inputs[0])[1], aware.encode_text(*inputs[1:])[1]
    for model, own_copies, extra in (
        (aware, 1, {"sample_ids": ids}),
        (plain, 3, {}),
    ):
        expected = 0.0
        for logits in (image @ text.T / model.temp, text @ image.T / model.temp):
            counts = torch.full((4, 4), 3.0).fill_diagonal_(own_copies)
            expected += ((logits + counts.log()).logsumexp(1) - logits.diagonal()).mean() / 2
        assert model(*inputs, 0.0, **extra)["ita"].item() == pytest.approx(
            expected.item(), abs=1e-4
        )


def test_id_aware_negatives_are_never_the_same_sample(golden_config):
    model = BlipPretrain(golden_config, queue_size=8, id_aware_targets=True)
    ids = torch.tensor([1, 1, 1, 2])
    for step in range(10):
        with watched(model, draw=sample_negatives) as seen:
            model(*batch(golden_config, 4, seed=step), 0.4, sample_ids=ids)
        assert seen.negative_image[:3].tolist() == seen.negative_text[:3].tolist() == [3, 3, 3]


def test_id_aware_targets_without_ids_is_an_error(golden_config):
    model = BlipPretrain(golden_config, queue_size=8, id_aware_targets=True)
    with pytest.raises(ValueError, match="sample_ids"):
        model(*batch(golden_config, 2), 0.4)


@pytest.mark.parametrize("layers", [0, 2])
def test_recomputing_blocks_changes_neither_names_nor_numbers(golden_config, layers):
    plain = BlipPretrain(golden_config, queue_size=8)
    saving = BlipPretrain(golden_config, queue_size=8, vit_grad_ckpt=True, vit_ckpt_layer=layers)
    saving.load_state_dict(plain.state_dict(), strict=True)
    assert list(saving.state_dict()) == list(plain.state_dict())
    forwards = []
    for index, block in enumerate(saving.visual_encoder.blocks):
        block.norm1.register_forward_hook(lambda *_, index=index: forwards.append(index))
    results = []
    for model in (plain, saving):
        with hardest_negatives():
            total = sum(model(*batch(golden_config, 3), 0.4).values())
        total.backward()
        results.append((total, {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        if gradient is not None:
            torch.testing.assert_close(gradient, results[1][1][name], atol=1e-6, rtol=1e-4)
    twice = [0, 1, 2] if layers == 0 else [1, 2]
    assert sorted(forwards) == sorted([0, 1, 2, *twice])


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16, None])
def test_a_recomputed_block_computes_in_the_format_of_its_forward_pass(golden_config, precision):
    plain = BlipDual(golden_config)
    saving = BlipDual(golden_config, vit_grad_ckpt=True)
    formats, gradients = [], []
    for model in (plain, saving):
        qkv = model.visual_encoder.blocks[0].attn.qkv
        qkv.register_forward_hook(lambda _, __, output: formats.append(output.dtype))
        with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
            features = model.encode_image(batch(golden_config, 3)[0])[1]
        features[:, 0].sum().backward()  # outside autocast, as in training
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert formats == 3 * [precision or torch.float32]  # plain, forward, recomputed
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_drop_path_drops_in_training_only(golden_config):
    model = BlipDual(golden_config.replace(drop_path=0.9))
    images = batch(golden_config, 4)[0]
    with torch.no_grad():
        assert not torch.equal(model.encode_image(images)[0], model.encode_image(images)[0])
        model.eval()
        assert torch.equal(model.encode_image(images)[0], model.encode_image(images)[0])


@pytest.mark.parametrize("kind", [BlipPretrain, BlipRetrieval])
def test_bfloat16_autocast_gives_float32_losses_near_the_full_ones(golden_config, kind):
    full = kind(golden_config, queue_size=8)
    half = copy.deepcopy(full)
    inputs = batch(golden_config, 4)
    results = []
    for model, enabled in ((full, False), (half, True)):
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)
        with hardest_negatives(), autocast:
            losses = model(*inputs, 0.4, class_ids=torch.arange(4))
        total = sum(losses.values())
        total.backward()
        assert {loss.dtype for loss in losses.values()} == {torch.float32}
        assert finite_gradients(model) and model.image_queue.dtype == torch.float32
        results.append(total.item())
    assert results[1] == pytest.approx(results[0], rel=0.02)


def test_compiled_encoders_keep_names_and_numbers(golden_config):
    config = golden_config.replace(vision_depth=1, text_depth=1)
    plain = BlipPretrain(config, queue_size=8)
    compiled = copy.deepcopy(plain)
    # Tracing is what can break (a graph break is an error here); machine code is torch's business.
    compiled.compile_encoders(backend="eager", fullgraph=True)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    totals = []
    for model in (plain, compiled):
        with hardest_negatives():
            total = sum(model(*batch(config, 3), 0.4).values())
        total.backward()
        totals.append(total)
    torch.testing.assert_close(*totals, atol=1e-5, rtol=1e-5)
    for (name, one), two in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("objectives", [["ita"], ["itm"], ["lm"], ["ita", "lm"], ["itm", "lm"]])
def test_objectives_left_out_cost_nothing_and_change_nothing_of_the_others(
    golden_config, objectives
):
    whole = BlipPretrain(golden_config, queue_size=8)
    part = BlipPretrain(golden_config, queue_size=8, objectives=objectives)
    assert list(part.state_dict()) == list(whole.state_dict())
    fused = []
    for layer in part.text_encoder.encoder.layer:  # the decoder's are the same modules
        layer.crossattention.register_forward_hook(lambda *_: fused.append("read an image"))
    with hardest_negatives():
        expected = whole(*batch(golden_config, 4), 0.4)
        losses = part(*batch(golden_config, 4), 0.4)
    assert losses.keys() == set(objectives)
    assert bool(fused) == (objectives != ["ita"])
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], atol=0, rtol=0)
    sum(losses.values()).backward()
    sum(expected[name] for name in objectives).backward()
    for (name, mine), theirs in zip(part.named_parameters(), whole.parameters(), strict=True):
        assert (mine.grad is None) == (not mine.requires_grad), name  # ranks wait for no gradient
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, atol=0, rtol=0, msg=name)
        else:
            assert theirs.grad is None or not theirs.grad.any(), name
