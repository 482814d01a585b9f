"""Loading and writing weights in every layout: bit-exact round trips, and nothing silent."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from infogrowth.blip.model import BlipCaptioner, BlipDual
from infogrowth.blip.pretrain import BlipPretrain
from infogrowth.blip.pretrained import (
    load_blip,
    load_weights,
    save_folder,
    save_official,
)
from infogrowth.blip.retrieval import BlipRetrieval
from infogrowth.blip.text import save_vocabulary
from infogrowth.blip.weights import Weights, read_weights
from infogrowth.errors import UserError


@pytest.fixture
def pretrained(golden, golden_config):
    model = BlipPretrain(golden_config, queue_size=32)
    load_weights(model, golden / "pretrain_init.safetensors")
    return model


def same(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_official_file_loads_whole(pretrained, golden):
    report = load_weights(pretrained, golden / "pretrain_init.safetensors")
    assert report.loaded == len(pretrained.state_dict()) == 351
    assert not (report.missing or report.unexpected or report.mismatched or report.filled)
    assert len(report.unused) == 3 and all(n.endswith("position_ids") for n in report.unused)


def test_official_files_have_the_official_names_under_the_key_model(
    pretrained, golden, pretrain_golden, golden_config, tmp_path
):
    path = tmp_path / "model.pth"
    save_official(pretrained, path)
    written = torch.load(path, weights_only=True)["model"]
    original = load_file(golden / "pretrain_init.safetensors")
    assert sorted(written) == sorted(pretrain_golden.meta["state_dict_keys"])
    for name, tensor in original.items():
        assert torch.equal(written[name], tensor) and written[name].dtype == tensor.dtype, name
    again = BlipPretrain(golden_config, queue_size=32, seed=1)
    load_weights(again, path)
    assert same(again, pretrained)


def test_a_folder_keeps_each_tensor_once(pretrained, golden_config, golden_tokenizer, tmp_path):
    save_folder(pretrained, tmp_path, golden_tokenizer)
    written = load_file(tmp_path / "model.safetensors")
    assert "text_encoder.embeddings.word_embeddings.weight" in written
    assert "text_decoder.bert.embeddings.word_embeddings.weight" not in written
    again = BlipPretrain(golden_config, queue_size=32, seed=1)
    report = load_weights(again, tmp_path)
    assert "text_decoder.cls.predictions.decoder.weight" in report.filled
    pairs = zip(again.named_parameters(), pretrained.parameters(), strict=True)
    assert all(torch.equal(p, q) for (name, p), q in pairs if "_m." not in name)


def test_a_folder_serves_every_kind_of_model(pretrained, golden_tokenizer, tmp_path):
    save_folder(pretrained, tmp_path, golden_tokenizer)
    assert not any(
        "_m." in name or "queue" in name for name in load_file(tmp_path / "model.safetensors")
    )
    state = pretrained.state_dict()
    for kind in (BlipDual, BlipCaptioner, BlipPretrain, BlipRetrieval):
        model, tokenizer, report = load_blip(tmp_path, kind)
        assert not model.training and len(tokenizer) == 195
        assert not (report.missing or report.unexpected or report.mismatched)
        for name, tensor in model.state_dict().items():
            part, _, rest = name.partition(".")
            if part.endswith("_m"):  # not in the folder: copies of the online weights
                assert torch.equal(tensor, state[f"{part.removesuffix('_m')}.{rest}"])
            elif "queue" not in name:
                assert torch.equal(tensor, state[name]), name


def test_pretraining_weights_start_retrieval(pretrained, golden_config, tmp_path):
    path = tmp_path / "pretrained.pth"
    save_official(pretrained, path)
    model = BlipRetrieval(golden_config, queue_size=32)
    report = load_weights(model, path)
    assert report.untouched == ["idx_queue", "ptr_queue"]
    assert torch.equal(model.image_queue, pretrained.image_queue)
    assert torch.equal(model.vision_proj_m.weight, pretrained.vision_proj_m.weight)
    assert all(name.startswith(("text_decoder", "text_en", "queue_ptr")) for name in report.unused)


def test_queues_of_another_size_are_left_and_reported(pretrained, golden_config, tmp_path):
    path = tmp_path / "pretrained.pth"
    pretrained.queue_ptr.fill_(5)
    save_official(pretrained, path)
    model = BlipPretrain(golden_config, queue_size=3)
    before = model.image_queue.clone()
    report = load_weights(model, path)
    assert torch.equal(model.image_queue, before) and model.queue_ptr.item() == 0
    assert any(re.match("image_queue .*16×32", line) for line in report.untouched)


@pytest.mark.parametrize("side", [16, 24, 48, 64])
def test_position_embeddings_are_resized_bicubically_with_the_class_token_kept(
    pretrained, golden_config, tmp_path, side
):
    path = tmp_path / "pretrained.pth"
    save_official(pretrained, path)
    model = BlipPretrain(golden_config.replace(image_size=side), queue_size=32)
    report = load_weights(model, path)
    old, new = pretrained.visual_encoder.pos_embed, model.visual_encoder.pos_embed
    assert torch.equal(old[:, 0], new[:, 0])
    cells = side // 8
    grid = old[0, 1:].detach().reshape(4, 4, 48).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(
        grid, size=(cells, cells), mode="bicubic", align_corners=False
    )
    patches = new[0, 1:].detach().reshape(cells, cells, 48).permute(2, 0, 1)[None]
    torch.testing.assert_close(patches, expected)
    assert len(report.resized) == 2  # the online encoder's and its momentum encoder's
    assert report.resized[0].startswith("visual_encoder.pos_embed: 1×17×48 to 1×")


@pytest.mark.parametrize("length", [16, 18])
def test_positions_that_are_no_square_are_not_resized(pretrained, golden_config, length):
    state = dict(pretrained.state_dict())
    state["visual_encoder.pos_embed"] = torch.zeros(1, length, 48)
    weights = Weights(state, "odd.pth", "official")
    model = BlipPretrain(golden_config.replace(image_size=16), queue_size=32)
    with pytest.raises(UserError, match="mismatched"):
        load_weights(model, weights)


def test_mismatched_shapes_are_an_error_that_names_them(pretrained, golden_config, tmp_path):
    path = tmp_path / "pretrained.pth"
    save_official(pretrained, path)
    model = BlipPretrain(golden_config.replace(embed_dim=8), queue_size=32)
    before = model.vision_proj.weight.clone()
    with pytest.raises(UserError, match=r"vision_proj\.weight.*16×48.*8×48") as error:
        load_weights(model, path)
    assert str(path) in str(error.value)
    assert torch.equal(model.vision_proj.weight, before)  # nothing was loaded before the error
    report = load_weights(model, path, strict=False)
    assert any(line.startswith("vision_proj.weight") for line in report.mismatched)
    assert "mismatched: vision_proj.weight: 16×48" in str(report)


def test_missing_and_unexpected_names_are_reported(pretrained, golden_config, tmp_path):
    state = dict(pretrained.state_dict())
    del state["itm_head.bias"]
    state["surprise.weight"] = torch.zeros(3)
    torch.save({"model": state}, tmp_path / "odd.pth")
    model = BlipPretrain(golden_config, queue_size=32)
    with pytest.raises(UserError, match=r"missing: itm_head\.bias"):
        load_weights(model, tmp_path / "odd.pth")
    report = load_weights(model, tmp_path / "odd.pth", strict=False)
    assert report.missing == ["itm_head.bias"] and report.unexpected == ["surprise.weight"]
    assert "missing: itm_head.bias" in str(report) and "surprise.weight" in str(report)


def test_a_captioners_file_does_not_pass_for_a_scoring_encoder(golden_config, tmp_path):
    save_official(BlipCaptioner(golden_config), tmp_path / "caption.pth")
    with pytest.raises(UserError, match=r"missing: text_encoder.*\d+ more"):
        load_weights(BlipDual(golden_config), tmp_path / "caption.pth")


def test_tied_names_with_different_values_are_an_error(pretrained, golden_config, tmp_path):
    state = {name: tensor.clone() for name, tensor in pretrained.state_dict().items()}
    state["text_decoder.bert.embeddings.LayerNorm.bias"] += 1
    torch.save({"model": state}, tmp_path / "untied.pth")
    with pytest.raises(UserError, match=r"conflicting: .*LayerNorm\.bias"):
        load_weights(BlipPretrain(golden_config, queue_size=32), tmp_path / "untied.pth")


@pytest.mark.parametrize(
    ("wrapped", "rename"),
    [
        (lambda state: {"model": state}, lambda name: f"module.{name}"),
        (lambda state: {"state_dict": state}, lambda name: f"model.{name}"),  # Lightning
        (lambda state: {"model_state_dict": state}, lambda name: f"_orig_mod.{name}"),  # compiled
        (lambda state: {"module": state}, lambda name: name),  # DeepSpeed
        (lambda state: {"module": {"model": state}}, lambda name: f"module._orig_mod.{name}"),
        (lambda state: state, lambda name: name.replace(".blocks.", "._orig_mod.blocks.")),
        (lambda state: {**state, "n_averaged": torch.ones(())}, lambda name: f"module.{name}"),
    ],
)
def test_what_wrappers_do_to_names_is_undone(pretrained, golden_config, tmp_path, wrapped, rename):
    state = {rename(name): tensor for name, tensor in pretrained.state_dict().items()}
    torch.save(wrapped(state), tmp_path / "wrapped.pth")
    again = BlipPretrain(golden_config, queue_size=32, seed=1)
    load_weights(again, tmp_path / "wrapped.pth")
    assert same(again, pretrained)


def test_an_error_lists_unexpected_names_beside_the_missing_ones(
    pretrained, golden_config, tmp_path
):
    state = {f"net.{name}": tensor for name, tensor in pretrained.state_dict().items()}
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"missing: .*unexpected: net\."):
        load_weights(BlipPretrain(golden_config, queue_size=32), tmp_path / "other.pth")


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_a_lone_file_of_ours_brings_its_config(
    golden, golden_config, golden_tokenizer, tmp_path, name
):
    model = BlipRetrieval(golden_config, queue_size=4)  # 3 heads: nothing to guess from weights
    save_folder(model, tmp_path, golden_tokenizer)
    save_official(model, tmp_path / "model.pth")
    (tmp_path / "config.json").unlink()
    loaded, _, report = load_blip(tmp_path / name, BlipDual, vocabulary=golden / "vocab.txt")
    assert loaded.config == golden_config and not report.missing
    assert torch.equal(loaded.itm_head.weight, model.itm_head.weight)


def test_a_foreign_file_takes_its_config_from_the_one_beside_it(
    golden, golden_config, golden_tokenizer, tmp_path
):
    torch.save({"model": BlipDual(golden_config).state_dict()}, tmp_path / "model.pth")
    save_vocabulary(golden_tokenizer, tmp_path)
    (tmp_path / "config.json").write_text('{"lr": 0.1}')  # some run's settings: no sizes
    with pytest.raises(UserError, match=r"vision attention heads"):
        load_blip(tmp_path / "model.pth", BlipDual)
    golden_config.to_folder(tmp_path)
    assert load_blip(tmp_path / "model.pth", BlipDual)[0].config == golden_config


def test_a_vocabulary_of_another_size_is_an_error(golden, golden_config, tmp_path):
    save_official(BlipDual(golden_config.replace(vocab_size=300)), tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"195 .*300"):
        load_blip(tmp_path / "other.pth", BlipDual, vocabulary=golden / "vocab.txt")


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    path = tmp_path / "evil.pth"
    torch.save({"model": Evil()}, path)
    with pytest.raises(UserError, match=r"evil\.pth .*unpickled"):
        read_weights(path)
    assert "unpickled" not in capsys.readouterr().out


def test_files_that_are_no_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 not a zip")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"epoch": 3}, tmp_path / "nothing.pth")
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.dat")
    (tmp_path / "folder").mkdir()
    for name, complaint in (
        ("cut.safetensors", "cut.safetensors"),
        ("cut.pth", "cut.pth"),
        ("empty.pth", "empty.pth"),
        ("nothing.pth", "no named weights"),
        ("weights.dat", "extension"),
        ("absent.pth", "does not exist"),
        ("absent", "does not exist"),
        ("folder", "holds none"),
    ):
        with pytest.raises(UserError, match=complaint):
            read_weights(tmp_path / name)
    with pytest.raises(UserError, match=r"Salesforce/nowhere.* hub"):
        read_weights("Salesforce/nowhere")
