"""Three steps of pretraining agree with the paper's code, from its own starting weights."""

import pytest
import torch
from safetensors.torch import load_file
from spying import watched

from infogrowth.blip.pretrain import BlipPretrain
from infogrowth.blip.pretrained import load_weights


def fresh(config, golden):
    model = BlipPretrain(config, queue_size=32)
    load_weights(model, golden / "pretrain_init.safetensors")
    return model.train()


@pytest.fixture(scope="module")
def run(golden, golden_config, pretrain_golden):
    """Outputs and gradients of three steps, the first two followed by AdamW, and the state then."""
    model = fresh(golden_config, golden)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.05
    )
    steps, after = [], None
    for step in range(3):
        with watched(model) as seen:
            losses = model(*pretrain_golden.batch(step), 0.4)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        gradients = {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }
        steps.append((losses, gradients, seen))
        if step < 2:
            optimizer.step()
        if step == 1:
            after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return steps, after


def test_names_and_their_order_are_the_official_ones(golden_config, pretrain_golden):
    model = BlipPretrain(golden_config, queue_size=32)
    meta = pretrain_golden.meta
    assert [name for name, _ in model.named_parameters()] == meta["parameters"]
    official = [name for name in meta["state_dict_keys"] if not name.endswith("position_ids")]
    assert set(model.state_dict()) == set(official)


def test_tied_names_are_one_tensor_and_self_attention_is_not_tied(golden_config, pretrain_golden):
    state = BlipPretrain(golden_config, queue_size=32).state_dict()
    for group in pretrain_golden.meta["tied"]:
        assert len({state[name].data_ptr() for name in group}) == 1, group
    mine = "encoder.layer.0.attention.self.query.weight"
    assert state[f"text_encoder.{mine}"].data_ptr() != state[f"text_decoder.bert.{mine}"].data_ptr()


@pytest.mark.parametrize("step", range(3))
def test_losses_are_those_of_the_original_in_float64(run, pretrain_golden, step):
    losses = run[0][step][0]
    mine = torch.tensor([losses[name].item() for name in ("ita", "itm", "lm")])
    expected = torch.tensor(pretrain_golden.float64["loss_float64"][step])
    torch.testing.assert_close(mine, expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("step", range(3))
def test_features_negatives_and_matching_logits_agree(run, pretrain_golden, step):
    seen, values = run[0][step][2], pretrain_golden.values
    for mine, name in (
        (seen.features.image, "image_feat"),
        (seen.features.text, "text_feat"),
        (seen.features.image_momentum, "image_feat_m"),
        (seen.features.text_momentum, "text_feat_m"),
        (seen.weights_image_for_text, "neg_weights_t2i"),
        (seen.weights_text_for_image, "neg_weights_i2t"),
        (seen.itm_logits, "itm_logits"),
    ):
        torch.testing.assert_close(mine, values[f"{name}_{step}"], atol=1e-5, rtol=1e-5, msg=name)
    assert torch.equal(seen.negative_image, values[f"neg_image_idx_{step}"])
    assert torch.equal(seen.negative_text, values[f"neg_text_idx_{step}"])


def test_image_tokens_and_language_logits_agree(run, pretrain_golden):
    seen, values = run[0][0][2], pretrain_golden.values
    torch.testing.assert_close(
        seen.features.image_tokens, values["image_embeds_0"], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(seen.lm_logits, values["lm_logits_0"], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("step", range(3))
def test_gradient_norms_agree_for_every_parameter(run, pretrain_golden, step):
    gradients = run[0][step][1]
    norms = pretrain_golden.meta[f"grad_norms_{step}"]
    zero = set(pretrain_golden.float64["zero_gradient_params"])
    assert set(norms) == set(gradients)
    for name, norm in norms.items():
        tolerance = 1e-4 if name in zero else 1e-4 * norm
        assert abs(gradients[name].norm().item() - norm) <= tolerance, name


def test_gradients_of_the_first_step_agree_element_by_element(run, golden):
    gradients = run[0][0][1]
    for name, expected in load_file(golden / "pretrain_grads_step0.safetensors").items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            gradients[name], expected, atol=max(1e-4 * scale, 1e-5), rtol=1e-4, msg=name
        )


def test_state_after_two_optimizer_steps_agrees(run, golden, zero_gradient_mask):
    after = run[1]
    for name, expected in load_file(golden / "pretrain_after2.safetensors").items():
        keep = zero_gradient_mask(name, expected)
        torch.testing.assert_close(
            after[name][keep], expected[keep], atol=1e-5, rtol=1e-5, msg=name
        )
    assert after["queue_ptr"].item() == 8
