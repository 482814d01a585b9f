"""Small models and data with classes: conv stem, positives by class, class vectors."""

import pytest
import torch

from infogrowth.blip.config import BlipConfig
from infogrowth.blip.model import BlipDual
from infogrowth.blip.pretrain import BlipPretrain
from infogrowth.blip.pretrained import (
    initialize,
    load_blip,
    load_weights,
    save_folder,
    save_huggingface,
    save_official,
)
from infogrowth.blip.weights import read_weights
from infogrowth.errors import UserError


@pytest.fixture
def conv_config(golden_config: BlipConfig) -> BlipConfig:
    return golden_config.replace(image_size=32, patch_size=16, vision_stem="conv")


def batch(config, rows, texts=None, seed=0):
    random = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, 3, config.image_size, config.image_size, generator=random)
    ids = torch.randint(5, 190, (texts or rows, 7), generator=random)
    ids[:, 0] = config.cls_token_id
    return images, ids, torch.ones_like(ids)


def log_softmax(row):
    return row - row.exp().sum().log()


def test_a_conv_stem_gives_one_token_for_16_pixels_a_side_and_a_class_token(conv_config):
    encoder = BlipDual(conv_config).eval()
    tokens, features = encoder.encode_image(torch.randn(2, 3, 32, 32))
    assert tokens.shape == (2, 1 + 4, 48) and features.shape == (2, 16)


def test_a_conv_stem_of_other_patches_or_another_name_is_refused(conv_config):
    with pytest.raises(UserError, match="patch_size"):
        conv_config.replace(patch_size=8)
    with pytest.raises(UserError, match="vision_stem"):
        BlipConfig.from_dict({**conv_config.as_dict(), "vision_stem": "convolution"}, "x.json")


@pytest.mark.parametrize("half", [False, True])
def test_a_conv_stem_survives_writing_and_loading(conv_config, golden_tokenizer, tmp_path, half):
    model = BlipPretrain(conv_config, queue_size=0, momentum=0.0, class_vectors=3)
    model(*batch(conv_config, 4), 0.0, class_ids=torch.tensor([0, 1, 2, 0]))  # moves statistics
    model.eval()
    images = batch(conv_config, 3, seed=1)[0]
    expected = model.encode_image(images)[1]
    save_official(model, tmp_path / "official.pth")
    save_folder(model.half() if half else model, tmp_path / "folder", golden_tokenizer)
    for path in (tmp_path / "official.pth", tmp_path / "folder"):
        loaded, _, report = load_blip(path, BlipDual, vocabulary=tmp_path / "folder")
        assert not report.missing and not report.unexpected
        assert next(loaded.parameters()).dtype == torch.float32
        got = loaded.encode_image(images)[1]
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-2 if half else 1e-6)


def test_hugging_face_has_no_form_for_a_conv_stem(conv_config, golden_tokenizer, tmp_path):
    with pytest.raises(UserError, match="convolutional"):
        save_huggingface(BlipDual(conv_config), tmp_path / "folder", golden_tokenizer)


def test_momentum_encoders_and_checkpoints_hold_the_statistics_of_batch_norm(conv_config, tmp_path):
    model = BlipPretrain(conv_config, queue_size=4)
    model(*batch(conv_config, 4), 0.0)
    model.update_momentum()
    online = dict(model.visual_encoder.named_buffers())
    assert any("running_mean" in name and value.abs().sum() > 0 for name, value in online.items())
    for name, value in model.visual_encoder_m.named_buffers():
        assert torch.equal(value, online[name]), name
    save_official(model, tmp_path / "model.pth")
    other = BlipPretrain(conv_config, queue_size=4, seed=1)
    load_weights(other, tmp_path / "model.pth")
    for name, value in other.visual_encoder.named_buffers():
        assert torch.equal(value, online[name]), name


def test_all_of_a_class_match_and_texts_may_be_more_than_images(golden_config):
    model = BlipPretrain(
        golden_config, queue_size=0, momentum=0.0, objectives=["ita"], class_positives=True
    )
    images, ids, mask = batch(golden_config, 3, texts=6)
    classes = torch.tensor([5, 9, 5])
    loss = model(images, ids, mask, 0.0, class_ids=classes)["ita"]
    image, text = model.encode_image(images)[1], model.encode_text(ids, mask)[1]
    logits = image @ text.T / model.temp
    of_texts = classes.repeat(2)
    both = []
    for rows, own, other in ((logits, classes, of_texts), (logits.T, of_texts, classes)):
        each = [-log_softmax(row)[other == one].mean() for row, one in zip(rows, own, strict=True)]
        both.append(sum(each) / len(each))
    assert loss.item() == pytest.approx(((both[0] + both[1]) / 2).item(), abs=1e-5)


def test_without_momentum_and_queue_candidates_take_a_gradient_too(golden_config):
    """CLIP's loss: a text's gradient also comes from the images that it is a candidate of."""
    images, ids, mask = batch(golden_config, 4)
    model = BlipPretrain(golden_config, queue_size=0, momentum=0.0, objectives=["ita"])
    model(images, ids, mask, 0.0)["ita"].backward()
    image, text = model.encode_image(images)[1], model.encode_text(ids, mask)[1]
    logits, own = image @ text.T / model.temp, torch.arange(4)
    expected = torch.nn.functional.cross_entropy
    clip = (expected(logits, own) + expected(logits.T, own)) / 2
    weight = model.text_proj.weight
    (wanted,) = torch.autograd.grad(clip, weight)
    torch.testing.assert_close(weight.grad, wanted, rtol=1e-4, atol=1e-6)


def test_wrong_partners_never_share_the_class_and_all_objectives_take_more_texts(golden_config):
    model = BlipPretrain(
        golden_config, queue_size=0, momentum=0.0, class_positives=True, class_vectors=4
    )
    images, ids, mask = batch(golden_config, 4, texts=8)
    losses = model(images, ids, mask, 0.0, class_ids=torch.tensor([3, 3, 3, 3]))
    assert set(losses) == {"ita", "class", "itm", "lm"}
    assert all(torch.isfinite(loss) for loss in losses.values())
    # Nobody is a wrong partner: the matching loss is that of the four own pairs alone.
    logits = model.itm_logits(model.encode_image(images)[0], ids[:4], mask[:4])
    own = torch.nn.functional.cross_entropy(logits, torch.ones(4, dtype=torch.int64))
    assert losses["itm"].item() == pytest.approx(own.item(), abs=1e-5)


def test_class_vectors_stay_in_checkpoints_only(golden_config, golden_tokenizer, tmp_path):
    model = BlipPretrain(golden_config, queue_size=0, class_vectors=7)
    assert model.state_dict()["class_vectors"].shape == (7, golden_config.embed_dim)
    save_folder(model, tmp_path, golden_tokenizer)
    assert "class_vectors" not in read_weights(tmp_path).tensors


def test_fan_in_scales_linear_layers_and_leaves_words_as_they_are(golden_config):
    plain, scaled = (BlipPretrain(golden_config, queue_size=0, seed=4) for _ in range(2))
    initialize(scaled, vision="fan_in", text="fan_in")
    states = plain.state_dict(), scaled.state_dict()
    for name, fan_in in (
        ("visual_encoder.blocks.0.mlp.fc1.weight", 48),
        ("text_encoder.encoder.layer.1.output.dense.weight", 96),
        ("text_decoder.bert.encoder.layer.0.attention.self.query.weight", 48),
        ("vision_proj.weight", 48),
    ):
        assert states[1][name].std().item() == pytest.approx(fan_in**-0.5, rel=1e-4), name
        assert torch.equal(states[0][name].sign(), states[1][name].sign())
    words = "text_encoder.embeddings.word_embeddings.weight"
    assert torch.equal(states[0][words], states[1][words])
    for online, momentum in scaled.momentum_pairs:
        for one, other in zip(online.parameters(), momentum.parameters(), strict=True):
            assert torch.equal(one, other)
