"""The configuration of a BLIP on disk, and its tokenizer against the original's ids."""

import json

import pytest
import torch

from infogrowth.blip.config import BlipConfig, preset
from infogrowth.blip.model import BlipDual
from infogrowth.blip.pretrain import BlipPretrain
from infogrowth.blip.text import load_tokenizer, save_vocabulary, tokenize
from infogrowth.blip.weights import infer_config, read_weights
from infogrowth.errors import UserError


def test_ids_are_those_of_the_original_tokenizer(golden, golden_tokenizer):
    cases = json.loads((golden / "schedules_tokenizer.json").read_text())
    captions = [case["pre"] for case in cases]
    for length in (30, 35):
        ids, mask = tokenize(golden_tokenizer, captions, max_length=length)
        assert ids.tolist() == [case[f"ids{length}"] for case in cases]
        assert torch.equal(mask, (ids != 0).long())


def test_padding_to_the_longest_cuts_padding_only(golden_tokenizer):
    captions = ["a dog", "the man on the beach near a tree"]
    ids, mask = tokenize(golden_tokenizer, captions, 30)
    short_ids, short_mask = tokenize(golden_tokenizer, captions, 30, longest=True)
    width = mask.sum(1).max()
    assert torch.equal(short_ids, ids[:, :width]) and torch.equal(short_mask, mask[:, :width])


def test_dec_and_enc_follow_the_vocabulary(golden_tokenizer):
    assert (golden_tokenizer.bos_token_id, golden_tokenizer.enc_token_id) == (193, 194)
    assert len(golden_tokenizer) == 195
    config = BlipConfig().with_tokenizer(golden_tokenizer)
    ids = (config.pad_token_id, config.cls_token_id, config.sep_token_id)
    assert ids == (0, 2, 3) and config.bos_token_id == 193 and config.enc_token_id == 194
    assert config.vocab_size == 195


def test_a_saved_vocabulary_makes_the_same_tokenizer(golden, golden_tokenizer, tmp_path):
    save_vocabulary(golden_tokenizer, tmp_path)
    assert (tmp_path / "vocab.txt").read_bytes() == (golden / "vocab.txt").read_bytes()
    assert load_tokenizer(tmp_path).get_vocab() == golden_tokenizer.get_vocab()


def test_a_vocabulary_that_already_lists_dec_and_enc_gets_no_second_ones(golden, tmp_path):
    text = (golden / "vocab.txt").read_text() + "[DEC]\n[ENC]\n"
    (tmp_path / "vocab.txt").write_text(text)
    tokenizer = load_tokenizer(tmp_path)
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.enc_token_id) == (195, 193, 194)


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("a\nb\n", r"\[PAD\]"),
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\na\n", "repeated"),
    ],
)
def test_a_file_that_is_no_vocabulary_is_named(tmp_path, content, complaint):
    path = tmp_path / "vocab.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=complaint) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value)


def test_missing_vocabularies_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        load_tokenizer(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match=r"vocab\.txt"):
        load_tokenizer(tmp_path)


def test_no_network_is_one_clear_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"bert-base-nowhere.* hub"):
        load_tokenizer("bert-base-nowhere")


def test_config_survives_its_folder(tmp_path, golden_config):
    golden_config.to_folder(tmp_path)
    torch.save({"any": torch.zeros(1)}, tmp_path / "model.pth")
    assert read_weights(tmp_path / "model.pth").config == golden_config


@pytest.mark.parametrize(("key", "value"), [("widht", 3), ("image_size", "wide")])
def test_a_config_with_keys_or_values_that_do_not_fit_is_refused(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps({"format": "infogrowth-blip", key: value}))
    torch.save({"any": torch.zeros(1)}, tmp_path / "model.pth")
    with pytest.raises(UserError, match=f"{key}.*config.json"):
        read_weights(tmp_path / "model.pth")


@pytest.mark.parametrize("values", [{"model_type": "clip"}, []])
def test_a_config_of_something_else_is_not_taken_for_a_blips(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps(values))
    torch.save({"any": torch.zeros(1)}, tmp_path / "model.pth")
    assert read_weights(tmp_path / "model.pth").config is None


@pytest.mark.parametrize("key", ["image_size", "vision_width", "text_width"])
def test_sizes_that_do_not_divide_are_refused(key):
    with pytest.raises(UserError, match=f"{key} 100 "):
        BlipConfig(**{key: 100})


def test_presets():
    assert preset("base") == BlipConfig()
    large = preset("large", image_size=384)
    assert (large.vision_width, large.vision_depth, large.vision_heads) == (1024, 24, 16)
    assert (large.drop_path, large.image_size) == (0.1, 384)


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_sizes_are_read_off_official_weights(stem):
    config = preset(
        "tiny", vision_stem=stem, vocab_size=50, text_dropout=0.1, bos_token_id=48, enc_token_id=49
    )
    state = BlipPretrain(config, queue_size=4).state_dict()
    inferred = infer_config(state).replace(bos_token_id=48, enc_token_id=49)
    assert inferred == config.replace(vision_feedforward=768)
    with pytest.raises(UserError, match="not a BLIP's"):
        infer_config({"weight": torch.zeros(3)})


def test_heads_at_widths_that_no_blip_has_are_assumed_aloud_or_refused(caplog, golden_config):
    config = preset("tiny", vocab_size=50)
    inferred = infer_config(BlipDual(config).state_dict())
    assert (inferred.vision_heads, inferred.text_heads) == (3, 3)
    assert "vision attention heads" in caplog.text and "assuming 3" in caplog.text
    with pytest.raises(UserError, match=r"vision attention heads.*config\.json"):
        infer_config(BlipDual(golden_config).state_dict())


def test_published_widths_have_published_heads(caplog):
    config = preset("base", image_size=32, vision_depth=1, text_depth=1, vocab_size=50)
    state = BlipDual(config).state_dict()
    assert infer_config(state) == config.replace(vision_feedforward=3072)
    assert not caplog.text


def test_a_machine_without_a_name_server_does_not_wait(monkeypatch):
    for variable in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)

    def no_name_server(*_):
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", no_name_server)
    with pytest.raises(UserError, match=r"bert-base-nowhere.* hub"):
        load_tokenizer("bert-base-nowhere")
