"""What is written for transformers opens there with nothing missing and predicts the same."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertTokenizer,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipModel,
    BlipProcessor,
)

from infogrowth.blip.model import BlipCaptioner, BlipDual
from infogrowth.blip.pretrain import BlipPretrain
from infogrowth.blip.pretrained import load_blip, load_weights, save_folder, save_huggingface
from infogrowth.blip.text import open_with
from infogrowth.blip.weights import read_weights
from infogrowth.errors import UserError


@pytest.fixture(scope="module")
def pretrained(golden, golden_config):
    model = BlipPretrain(golden_config, queue_size=32)
    load_weights(model, golden / "pretrain_init.safetensors")
    return model.eval()


def opened(kind, folder):
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def same_tensors(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@torch.no_grad()
def test_the_retrieval_class_scores_the_same(
    pretrained, pretrain_golden, golden_tokenizer, golden_config, tmp_path
):
    save_huggingface(pretrained, tmp_path, golden_tokenizer)
    theirs = opened(BlipForImageTextRetrieval, tmp_path)
    images, ids, mask = pretrain_golden.batch(0)
    tokens, image = pretrained.encode_image(images)
    _, text = pretrained.encode_text(ids, mask)
    opening = open_with(ids, golden_config.enc_token_id)  # transformers leaves [CLS] there
    matched = theirs(input_ids=opening, pixel_values=images, attention_mask=mask)
    torch.testing.assert_close(
        matched.itm_score, pretrained.itm_logits(tokens, ids, mask), atol=1e-5, rtol=1e-5
    )
    cosines = theirs(
        input_ids=ids, pixel_values=images, attention_mask=mask, use_itm_head=False
    ).itm_score
    torch.testing.assert_close(cosines, image @ text.T, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_captioning_class_predicts_and_writes_the_same(
    pretrained, pretrain_golden, golden_tokenizer, tmp_path
):
    save_folder(pretrained, tmp_path / "ours", golden_tokenizer)
    captioner, tokenizer, _ = load_blip(tmp_path / "ours", BlipCaptioner)
    save_huggingface(captioner, tmp_path / "theirs", tokenizer)
    theirs = opened(BlipForConditionalGeneration, tmp_path / "theirs")
    images, ids, mask = pretrain_golden.batch(0)
    opening = open_with(ids, captioner.config.bos_token_id)
    logits = theirs(input_ids=opening, pixel_values=images, attention_mask=mask).logits
    torch.testing.assert_close(logits, pretrain_golden.values["lm_logits_0"], atol=5e-5, rtol=1e-4)
    prompt = tokenizer("a dog on", add_special_tokens=False)["input_ids"]
    start = torch.tensor([[captioner.config.bos_token_id, *prompt, 3]] * 4)
    written = theirs.generate(
        pixel_values=images, input_ids=start, num_beams=3, max_length=20, min_length=5
    )
    texts = tokenizer.batch_decode(written[:, len(prompt) + 1 :], skip_special_tokens=True)
    assert captioner.caption(images, tokenizer, prompt="a dog on") == [t.strip() for t in texts]


@pytest.mark.parametrize("task", ["retrieval", "captioning"])
def test_the_folder_comes_back_bit_for_bit(
    pretrained, golden_config, golden_tokenizer, tmp_path, task
):
    save_huggingface(pretrained, tmp_path, golden_tokenizer, task)
    kind = BlipDual if task == "retrieval" else BlipCaptioner
    model, tokenizer, report = load_blip(tmp_path, kind)
    assert report.layout == "huggingface" and not report.unexpected
    state = pretrained.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert tokenizer.get_vocab() == golden_tokenizer.get_vocab()
    assert model.config.replace(vision_feedforward=None) == golden_config
    save_huggingface(model, tmp_path / "again", tokenizer)
    assert same_tensors(
        load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "again/model.safetensors")
    )


def test_older_folders_with_a_pickled_state_and_position_ids_open(
    pretrained, golden_tokenizer, tmp_path
):
    save_huggingface(pretrained, tmp_path, golden_tokenizer)
    state = load_file(tmp_path / "model.safetensors")
    state["text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    model, _, report = load_blip(tmp_path, BlipDual)
    assert report.unused == ["text_encoder.embeddings.position_ids"]
    assert torch.equal(model.itm_head.weight, pretrained.itm_head.weight)


def test_sharded_weights_open(pretrained, golden_tokenizer, tmp_path):
    save_huggingface(pretrained, tmp_path, golden_tokenizer)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(state)
    where = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(names)}
    for shard in set(where.values()):
        save_file({n: state[n] for n in names if where[n] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    model, _, report = load_blip(tmp_path, BlipDual)
    assert not report.missing
    assert torch.equal(model.text_proj.weight, pretrained.text_proj.weight)


def test_the_processor_of_transformers_opens_the_folder(pretrained, golden_tokenizer, tmp_path):
    save_huggingface(pretrained, tmp_path, golden_tokenizer)
    processor = BlipProcessor.from_pretrained(tmp_path)
    image = torch.randint(0, 255, (3, 40, 50), dtype=torch.uint8)
    prepared = processor(images=image, text="a dog near the tree", return_tensors="pt")
    assert prepared["pixel_values"].shape == (1, 3, 32, 32)
    expected = golden_tokenizer("a dog near the tree")["input_ids"]
    assert prepared["input_ids"][0].tolist() == expected
    assert BertTokenizer.from_pretrained(tmp_path).bos_token_id == golden_tokenizer.bos_token_id


def test_blip_model_names_and_scale_are_brought_over(golden_config, golden, tmp_path):
    from transformers import BlipConfig as HuggingFaceConfig

    theirs = BlipModel(HuggingFaceConfig(**golden_config.to_huggingface())).eval()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_bytes((golden / "vocab.txt").read_bytes())
    assert read_weights(tmp_path).config.embed_dim == 16
    model = BlipPretrain(golden_config, queue_size=4)
    with pytest.raises(UserError, match="itm_head"):  # BlipModel has no matching head
        load_weights(model, tmp_path)
    report = load_weights(model, tmp_path, strict=False)
    assert sorted(report.unexpected) == [
        "text_encoder.pooler.dense.bias",
        "text_encoder.pooler.dense.weight",
    ]
    assert model.temp.item() == pytest.approx(torch.exp(-theirs.logit_scale).item())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.get_image_features(pixel_values=images)
        expected = getattr(expected, "pooler_output", expected)
        tokens = model.eval().visual_encoder(images)
    assert expected.shape[0] == 2
    torch.testing.assert_close(
        tokens, theirs.vision_model(pixel_values=images).last_hidden_state, atol=1e-5, rtol=1e-5
    )


def test_a_task_that_the_model_has_no_parts_for_is_refused(
    golden_config, golden_tokenizer, tmp_path
):
    with pytest.raises(UserError, match="captioning"):
        save_huggingface(BlipDual(golden_config), tmp_path, golden_tokenizer, "captioning")
    assert not list(tmp_path.iterdir())
