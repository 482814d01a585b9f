"""Three steps of retrieval fine-tuning, and its evaluation, agree with the paper's code."""

import pytest
import torch
from safetensors.torch import load_file
from spying import watched

from infogrowth.blip.model import BlipDual
from infogrowth.blip.pretrained import load_blip, load_weights
from infogrowth.blip.retrieval import BlipRetrieval


@pytest.fixture(scope="module", params=["local", "all"])
def run(request, golden, golden_config, retrieval_golden):
    """Outputs and gradients of three steps, with negatives from one rank's batch or from all."""
    model = BlipRetrieval(golden_config, queue_size=32, negative_all_rank=request.param == "all")
    load_weights(model, golden / "retrieval_init.safetensors")
    optimizer = torch.optim.AdamW(
        [p for p in model.train().parameters() if p.requires_grad], lr=1e-3, weight_decay=0.05
    )
    steps, after = [], None
    for step in range(3):
        image_ids = retrieval_golden.values["idx"][step]
        with watched(model) as seen:
            losses = model(*retrieval_golden.batch(step), 0.4, class_ids=image_ids)
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
    return request.param, steps, after


def test_names_and_their_order_are_the_official_ones(golden_config, retrieval_golden):
    model = BlipRetrieval(golden_config, queue_size=32)
    meta = retrieval_golden.meta
    assert [name for name, _ in model.named_parameters()] == meta["parameters"]
    official = [name for name in meta["state_dict_keys"] if not name.endswith("position_ids")]
    assert set(model.state_dict()) == set(official)


@pytest.mark.parametrize("step", range(3))
def test_losses_are_those_of_the_original_in_float64(run, retrieval_golden, step):
    losses = run[1][step][0]
    mine = torch.tensor([losses["ita"].item(), losses["itm"].item()])
    expected = torch.tensor(retrieval_golden.float64["loss_float64"][step])
    torch.testing.assert_close(mine, expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("step", range(3))
def test_features_negatives_and_matching_logits_agree(run, retrieval_golden, step):
    prefix, seen, values = run[0], run[1][step][2], retrieval_golden.values
    for mine, name in (
        (seen.features.image, f"image_feat_{step}"),
        (seen.features.text, f"text_feat_{step}"),
        (seen.features.image_momentum, f"image_feat_m_{step}"),
        (seen.features.text_momentum, f"text_feat_m_{step}"),
        (seen.weights_image_for_text, f"{prefix}_neg_weights_t2i_{step}"),
        (seen.weights_text_for_image, f"{prefix}_neg_weights_i2t_{step}"),
        (seen.itm_logits, f"{prefix}_itm_logits_{step}"),
    ):
        torch.testing.assert_close(mine, values[name], atol=1e-5, rtol=1e-5, msg=name)
    assert torch.equal(seen.negative_image, values[f"{prefix}_neg_image_idx_{step}"])
    assert torch.equal(seen.negative_text, values[f"{prefix}_neg_text_idx_{step}"])


@pytest.mark.parametrize("step", range(3))
def test_gradient_norms_agree_for_every_parameter(run, retrieval_golden, step):
    gradients = run[1][step][1]
    norms = retrieval_golden.meta[f"local_grad_norms_{step}"]
    zero = set(retrieval_golden.float64["zero_gradient_params"])
    assert set(norms) == set(gradients)
    for name, norm in norms.items():
        tolerance = 1e-4 if name in zero else 1e-4 * norm
        assert abs(gradients[name].norm().item() - norm) <= tolerance, name


def test_the_padding_word_is_not_learned(run):
    gradient = run[1][0][1]["text_encoder.embeddings.word_embeddings.weight"]
    assert not gradient[0].any() and gradient[2].any()


def test_state_after_two_optimizer_steps_agrees(run, golden, retrieval_golden, zero_gradient_mask):
    after = run[2]
    for name, expected in load_file(golden / "retrieval_after2.safetensors").items():
        keep = zero_gradient_mask(name, expected)
        torch.testing.assert_close(
            after[name][keep], expected[keep], atol=1e-5, rtol=1e-5, msg=name
        )
    assert after["idx_queue"].tolist() == retrieval_golden.meta["idx_queue_after2"]
    assert after["ptr_queue"].item() == retrieval_golden.meta["ptr_queue_after2"]


@pytest.fixture(scope="module")
def scorer(golden, golden_config):
    return load_blip(
        golden / "retrieval_init.safetensors",
        BlipDual,
        vocabulary=golden / "vocab.txt",
        config=golden_config,
    )[0]


@pytest.fixture(scope="module")
def evaluated(scorer, retrieval_golden):
    values = retrieval_golden.values
    with torch.no_grad():
        tokens, images = scorer.encode_image(values["eval_images"])
        _, texts = scorer.encode_text(values["eval_input_ids"], values["eval_attention_mask"])
    return tokens, images, texts


def test_evaluation_features_and_similarities_agree(evaluated, retrieval_golden):
    _, images, texts = evaluated
    values = retrieval_golden.values
    torch.testing.assert_close(images, values["eval_image_embeds"], atol=1e-5, rtol=0)
    torch.testing.assert_close(texts, values["eval_text_embeds"], atol=1e-5, rtol=0)
    torch.testing.assert_close(images @ texts.T, values["eval_sims_matrix"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("together", [True, False], ids=["one image at a time", "all pairs"])
def test_matching_scores_of_every_pair_agree(scorer, evaluated, retrieval_golden, together):
    tokens, images, texts = evaluated
    values = retrieval_golden.values
    ids, mask = values["eval_input_ids"], values["eval_attention_mask"]
    with torch.no_grad():
        if together:
            rows = torch.zeros(30, dtype=torch.int64)
            scores = [
                scorer.itm_logits(tokens[i : i + 1], ids, mask, rows)[:, 1] for i in range(12)
            ]
        else:
            rows = torch.arange(12).repeat_interleave(30)
            scores = [scorer.itm_logits(tokens, ids.repeat(12, 1), mask.repeat(12, 1), rows)[:, 1]]
    mine = torch.cat([score.flatten() for score in scores]).view(12, 30) + images @ texts.T
    # k = 12 of 12 images: every text was scored against every image.
    torch.testing.assert_close(mine, values["eval_k12_score_t2i"].T, atol=2e-5, rtol=1e-5)
