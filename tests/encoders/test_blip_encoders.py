"""BLIP from a Hugging Face folder, an official .pth and a folder of ours: the same features."""

import json
import shutil

import pytest
import torch
from transformers import BertTokenizer

from infogrowth.blip.model import BlipDual
from infogrowth.blip.pretrained import load_blip, save_folder
from infogrowth.data.text import pre_caption
from infogrowth.data.transforms import EvaluationTransform, normalized
from infogrowth.encoders.loading import load_captioner, load_encoder
from infogrowth.encoders.models import Captioner, DualEncoder
from infogrowth.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def own_folder(blip_folder, tmp_path_factory):
    """A BLIP folder of ours with the same weights."""
    folder = tmp_path_factory.mktemp("own")
    model, tokenizer, _ = load_blip(blip_folder, BlipDual)
    save_folder(model, folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def expected(blip_models, pil_images, captions):
    """Features by transformers' own class, as its forward pass computes its similarity."""
    model, _, vocabulary = blip_models
    tokenizer = BertTokenizer(vocab=str(vocabulary))
    tokens = tokenizer(
        [pre_caption(caption, 30) for caption in captions],
        padding=True, return_token_type_ids=False, return_tensors="pt",
    )  # fmt: skip
    pixels = torch.stack([EvaluationTransform(32)(image) for image in pil_images])
    with torch.no_grad():
        seen = model.vision_model(pixel_values=pixels).last_hidden_state[:, 0]
        read = model.text_encoder(**tokens).last_hidden_state[:, 0]
        rows = model.vision_proj(seen), model.text_proj(read)
    return [row / row.norm(dim=-1, keepdim=True) for row in rows]


@pytest.mark.parametrize("layout", ["blip_folder", "blip_pth", "own_folder"])
def test_features_equal_those_of_transformers_own_class(
    layout, request, expected, pil_images, captions
):
    encoder = load_encoder(str(request.getfixturevalue(layout)))
    assert isinstance(encoder, DualEncoder)
    assert encoder.dimension == 16
    images = encoder.encode_images(torch.stack([encoder.preprocess(p) for p in pil_images]))
    texts = encoder.encode_texts(captions)
    torch.testing.assert_close(images, expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(texts, expected[1], atol=1e-5, rtol=0)


def test_the_same_weights_have_one_fingerprint_in_every_layout(blip_folder, blip_pth, own_folder):
    layouts = blip_folder, blip_pth, own_folder
    assert len({load_encoder(str(layout)).fingerprint for layout in layouts}) == 1


def test_preprocessing_is_the_evaluation_transform(blip_folder, pil_images):
    preprocess = load_encoder(str(blip_folder)).preprocess
    for image in pil_images:
        ours = normalized(preprocess(image))
        assert torch.equal(ours, EvaluationTransform(32)(image))


def test_dropout_in_the_config_does_not_reach_the_features(blip_folder, captions):
    encoder = load_encoder(str(blip_folder))
    assert json.loads((blip_folder / "config.json").read_text())["text_config"][
        "hidden_dropout_prob"
    ]
    assert torch.equal(encoder.encode_texts(captions), encoder.encode_texts(captions))


def test_a_config_beside_a_checkpoint_gives_the_number_of_heads(blip_pth, own_folder, tmp_path):
    shutil.copytree(blip_pth.parent, tmp_path / "run")
    lone = load_encoder(str(tmp_path / "run" / blip_pth.name))
    config = json.loads((own_folder / "config.json").read_text())
    config["text_heads"] = 4
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    other = load_encoder(str(tmp_path / "run" / blip_pth.name))
    assert lone.fingerprint != other.fingerprint
    assert not torch.allclose(lone.encode_texts(["a red cat"]), other.encode_texts(["a red cat"]))


def test_a_training_output_is_found_by_its_model_folder(own_folder, tmp_path):
    shutil.copytree(own_folder, tmp_path / "output" / "model")
    assert (
        load_encoder(str(tmp_path / "output")).fingerprint
        == load_encoder(str(own_folder)).fingerprint
    )


def test_a_vocabulary_can_be_given_for_a_lone_checkpoint(blip_pth, blip_models, tmp_path):
    alone = tmp_path / "model.pth"
    shutil.copy(blip_pth, alone)
    given = load_encoder(str(alone), vocabulary=str(blip_models[2]))
    assert given.fingerprint == load_encoder(str(blip_pth)).fingerprint


def test_a_checkpoint_that_is_no_blip_is_refused(tmp_path, blip_models):
    torch.save({"model": {"weight": torch.zeros(2, 2)}}, tmp_path / "model.pth")
    with pytest.raises(UserError, match="BLIP"):
        load_encoder(str(tmp_path / "model.pth"), vocabulary=str(blip_models[2]))


def test_captions_are_those_of_transformers_own_beam_search(
    blip_captioning_folder, blip_models, pil_images
):
    captioner = load_captioner(str(blip_captioning_folder), beams=3, max_tokens=12)
    assert isinstance(captioner, Captioner)
    _, model, vocabulary = blip_models
    pixels = torch.stack([EvaluationTransform(32)(image) for image in pil_images])
    ids = model.generate(pixels, num_beams=3, do_sample=False, max_length=12)
    texts = BertTokenizer(vocab=str(vocabulary)).batch_decode(
        ids[:, 1:].clamp(max=len(vocabulary.read_text().split()) - 1), skip_special_tokens=True
    )
    written = captioner.caption([captioner.preprocess(image) for image in pil_images])
    assert any(written)
    assert written == [text.strip() for text in texts]


def test_a_blip_without_a_decoder_is_no_captioner(blip_folder):
    with pytest.raises(UserError, match="text_decoder"):
        load_captioner(str(blip_folder))


def test_tiny_is_bundled_and_its_features_differ(pil_images, captions):
    encoder, captioner = load_encoder("tiny"), load_captioner("tiny", beams=1, max_tokens=8)
    assert encoder.name == "tiny"
    images = encoder.encode_images(torch.stack([encoder.preprocess(p) for p in pil_images]))
    texts = encoder.encode_texts(captions)
    for features in (images, texts):
        torch.testing.assert_close(features.norm(dim=1), torch.ones(9))
        assert (features @ features.T).fill_diagonal_(0).max() < 0.9999
    assert any(captioner.caption([captioner.preprocess(image) for image in pil_images]))


def test_a_caption_without_words_is_recorded_as_such(blip_folder, pil_images, tmp_path):
    """A captioner may have nothing to say: no feature of an empty text gets into the table."""
    import io

    from infogrowth.data.feature_writer import FeatureWriter
    from infogrowth.data.features import open_features
    from infogrowth.encoders.dataset import Pairs
    from infogrowth.encoders.embedding import EMPTY_CAPTION, embed_pairs

    class Images:
        def find(self, name):
            buffer = io.BytesIO()
            pil_images["xyz".index(name)].save(buffer, "PNG")
            return buffer.getvalue()

    class Taciturn:
        name, fingerprint = "taciturn", "0"
        preprocess = load_encoder(str(blip_folder)).preprocess

        def caption(self, given):
            return ["a red cat", "", "the sea"][: len(given)]

    encoder = load_encoder(str(blip_folder))
    output = FeatureWriter(tmp_path / "table", {}, rows=3, shard_size=3)
    table = Pairs([(name, "old words", None) for name in "xyz"], Images())
    embed_pairs(table, encoder, output, CPU, batch_size=3, captioner=Taciturn())
    batch = next(open_features(tmp_path / "table", ("text",)).batches(10))
    assert batch.ids == ["x", "z"]
    assert batch.captions == ["a red cat", "the sea"]
    skipped = json.loads((tmp_path / "table" / "skipped.jsonl").read_text())
    assert skipped == {"id": "y", "reason": EMPTY_CAPTION}
