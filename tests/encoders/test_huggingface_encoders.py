"""CLIP, SigLIP and image-to-text models from local folders against transformers' own classes."""

import json
import shutil

import pytest
import torch

from infogrowth.encoders.loading import load_captioner, load_encoder
from infogrowth.encoders.models import Captioner, DualEncoder
from infogrowth.errors import UserError


def _stack(encoder, pil_images):
    return torch.stack([encoder.preprocess(image) for image in pil_images])


def _unit(rows):
    return rows / rows.norm(dim=-1, keepdim=True)


def test_clip_features_equal_those_of_the_model_class(clip_folder, pil_images, captions):
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    encoder = load_encoder(str(clip_folder))
    model = CLIPModel.from_pretrained(clip_folder).eval()
    pixels = AutoImageProcessor.from_pretrained(clip_folder)(pil_images, return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(clip_folder)(
        captions, padding=True, truncation=True, max_length=20, return_tensors="pt"
    )
    with torch.no_grad():
        output = model(**tokens, **pixels)
    assert isinstance(encoder, DualEncoder)
    assert encoder.dimension == 24
    images, texts = (
        encoder.encode_images(_stack(encoder, pil_images)),
        encoder.encode_texts(captions),
    )
    torch.testing.assert_close(images, output.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(texts, output.text_embeds, atol=1e-6, rtol=0)


def test_a_clip_caption_longer_than_the_position_table_is_truncated(clip_folder):
    encoder = load_encoder(str(clip_folder))
    long, longer = encoder.encode_texts(["cat " * 20, "cat " * 60])
    assert torch.isfinite(long).all()
    torch.testing.assert_close(long, longer)


def test_siglip_texts_are_padded_to_full_length_as_it_was_trained(
    siglip_folder, pil_images, captions
):
    from transformers import AutoImageProcessor, AutoTokenizer, SiglipModel

    encoder = load_encoder(str(siglip_folder))
    model = SiglipModel.from_pretrained(siglip_folder).eval()
    pixels = AutoImageProcessor.from_pretrained(siglip_folder)(pil_images, return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(siglip_folder)(
        captions, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        images = _unit(model.get_image_features(**pixels).pooler_output)
        texts = _unit(model.get_text_features(**tokens).pooler_output)
    assert isinstance(encoder, DualEncoder)
    torch.testing.assert_close(
        encoder.encode_images(_stack(encoder, pil_images)), images, atol=1e-6, rtol=0
    )
    torch.testing.assert_close(encoder.encode_texts(captions), texts, atol=1e-6, rtol=0)
    # One at a time gives the same features, so padding does not depend on the neighbors.
    alone = torch.cat([encoder.encode_texts([caption]) for caption in captions])
    torch.testing.assert_close(alone, texts, atol=1e-6, rtol=0)


def test_features_do_not_change_between_calls(clip_folder, pil_images):
    encoder = load_encoder(str(clip_folder))
    stack = _stack(encoder, pil_images)
    assert torch.equal(encoder.encode_images(stack), encoder.encode_images(stack))


def test_fingerprint_follows_the_weights_and_not_the_folder(clip_folder, tmp_path):
    from transformers import CLIPModel

    original = load_encoder(str(clip_folder)).fingerprint
    copy = tmp_path / "copy"
    shutil.copytree(clip_folder, copy)
    assert load_encoder(str(copy)).fingerprint == original
    model = CLIPModel.from_pretrained(copy)
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 1e-3
    model.save_pretrained(copy)
    assert load_encoder(str(copy)).fingerprint != original


def test_fingerprint_follows_the_preprocessing(clip_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(clip_folder, copy)
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    settings["image_mean"] = [0.5, 0.5, 0.5]
    (copy / "preprocessor_config.json").write_text(json.dumps(settings))
    assert load_encoder(str(copy)).fingerprint != load_encoder(str(clip_folder)).fingerprint


@pytest.mark.parametrize("kind", ["git_folder", "llava_folder"])
def test_captioners_give_the_same_captions_alone_and_in_a_batch(kind, request, pil_images):
    captioner = load_captioner(str(request.getfixturevalue(kind)), max_tokens=8)
    assert isinstance(captioner, Captioner)
    prepared = [captioner.preprocess(image) for image in pil_images]
    together = captioner.caption(prepared)
    assert together == [captioner.caption([image])[0] for image in prepared]
    assert all(isinstance(caption, str) for caption in together)
    assert any(together)
    assert not any("[" in caption or "<" in caption for caption in together)


def test_git_caption_is_the_models_own_beam_search(git_folder, pil_images):
    from transformers import AutoProcessor, GitForCausalLM

    captioner = load_captioner(str(git_folder), max_tokens=8, beams=3)
    processor = AutoProcessor.from_pretrained(git_folder)
    model = GitForCausalLM.from_pretrained(git_folder).eval()
    ids = model.generate(
        pixel_values=processor(images=pil_images, return_tensors="pt").pixel_values,
        num_beams=3, do_sample=False, max_new_tokens=8,
    )  # fmt: skip
    expected = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    assert captioner.caption([captioner.preprocess(p) for p in pil_images]) == expected


def test_a_chat_models_caption_does_not_repeat_the_question(llava_folder, pil_images):
    captioner = load_captioner(str(llava_folder), prompt="the dog", max_tokens=4)
    for caption in captioner.caption([captioner.preprocess(p) for p in pil_images]):
        assert len(caption.split()) <= 4


def test_generation_settings_are_part_of_a_captioners_fingerprint(git_folder):
    three, four = (load_captioner(str(git_folder), beams=b).fingerprint for b in (3, 4))
    assert three != four


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("does/not/exist", "exist"),
        ("missing.pth", "exist"),
        ("/nowhere/at/all", "exist"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_clear_sentence(name, part):
    with pytest.raises(UserError, match=part):
        load_encoder(name)


def test_an_unreachable_hub_is_one_clear_sentence(monkeypatch, tmp_path):
    # A cache that is empty and a hub that is switched off: what an offline machine sees.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="network") as error:
        load_encoder("Salesforce/blip-itm-base-coco")
    assert "\n" not in str(error.value)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(UserError, match="config"):
        load_encoder(str(tmp_path))


def test_a_model_without_text_features_is_refused(tmp_path, clip_folder):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    shutil.copytree(clip_folder, tmp_path / "vision")
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        image_size=32, patch_size=8,
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(tmp_path / "vision")
    with pytest.raises(UserError, match="get_image_features"):
        load_encoder(str(tmp_path / "vision"))


def test_missing_weights_are_refused_instead_of_left_random(tmp_path, clip_folder):
    from safetensors.torch import load_file, save_file

    shutil.copytree(clip_folder, tmp_path / "clip")
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="text_projection"):
        load_encoder(str(tmp_path / "clip"))


def test_a_folder_without_a_tokenizer_names_what_is_missing(tmp_path, clip_folder):
    shutil.copytree(clip_folder, tmp_path / "clip")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "clip" / name).unlink()
    with pytest.raises(UserError, match="vocabulary"):
        load_encoder(str(tmp_path / "clip"))


def test_weights_that_would_run_code_are_not_unpickled(tmp_path, clip_folder):
    import pickle

    shutil.copytree(clip_folder, tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (tmp_path / "clip" / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Bomb()}))
    with pytest.raises(UserError, match="weights"):
        load_encoder(str(tmp_path / "clip"))
    assert not (tmp_path / "exploded").exists()
