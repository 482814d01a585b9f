"""infogrowth convert: official and Hugging Face layouts, there and back without a changed bit."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

from infogrowth.blip.config import BlipConfig
from infogrowth.blip.model import BlipDual
from infogrowth.blip.pretrain import BlipPretrain
from infogrowth.blip.pretrained import load_blip, save_folder
from infogrowth.cli import main

CONFIG = BlipConfig(
    image_size=32, patch_size=8, vision_width=48, vision_depth=3, vision_heads=3, text_width=48,
    text_depth=3, text_heads=3, text_feedforward=96, text_positions=64, text_dropout=0.0,
    vocab_size=195, pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=193,
    enc_token_id=194, embed_dim=16,
)  # fmt: skip
RETRIEVAL_PARTS = ("visual_encoder.", "text_encoder.", "vision_proj.", "text_proj.", "itm_head.")


@pytest.fixture(params=["pretrain", "retrieval"])
def official(request, golden, tmp_path):
    """A checkpoint as BLIP publishes it: every official name under the key model, nothing else."""
    state = load_file(golden / f"{request.param}_init.safetensors")
    torch.save({"model": state}, tmp_path / "published.pth")
    CONFIG.to_folder(tmp_path)  # 3 heads of 16: the weights do not say that
    (tmp_path / "vocab.txt").write_bytes((golden / "vocab.txt").read_bytes())
    return tmp_path / "published.pth", state


def convert(source, target, layout, *more):
    return main(["convert", str(source), str(target), "--to", layout, *more])


def read(path):
    return torch.load(path, weights_only=True)["model"]


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_official_checkpoint_comes_back_from_hugging_face_bit_for_bit(official, tmp_path):
    path, state = official
    assert convert(path, tmp_path / "hf", "huggingface") == 0
    _, info = BlipForImageTextRetrieval.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert convert(tmp_path / "hf", tmp_path / "back" / "again.pth", "official") == 0
    scoring = {name: t for name, t in state.items() if name.startswith(RETRIEVAL_PARTS)}
    assert_same(read(tmp_path / "back" / "again.pth"), scoring)
    assert (tmp_path / "back" / "vocab.txt").is_file()


def test_an_official_checkpoint_stays_whole(official, tmp_path):
    path, state = official
    assert convert(path, tmp_path / "copy.pth", "official") == 0
    assert_same(read(tmp_path / "copy.pth"), state)


def test_captioning_parts_are_written_for_their_own_class(official, tmp_path, capsys):
    path, state = official
    status = convert(path, tmp_path / "hf", "huggingface", "--task", "captioning")
    if "text_decoder.cls.predictions.bias" not in state:
        assert status == 2 and "captioning" in capsys.readouterr().err
        return
    _, info = BlipForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    convert(tmp_path / "hf", tmp_path / "caption.pth", "official")
    parts = ("visual_encoder.", "text_decoder.")
    assert_same(
        read(tmp_path / "caption.pth"), {n: t for n, t in state.items() if n.startswith(parts)}
    )


def test_a_trained_folder_becomes_an_official_file_without_momentum(golden, tmp_path):
    _, tokenizer, _ = load_blip(
        golden / "pretrain_init.safetensors", BlipDual, "cpu", golden / "vocab.txt", CONFIG
    )
    model = BlipPretrain(CONFIG, queue_size=8)
    save_folder(model, tmp_path / "model", tokenizer)
    assert convert(tmp_path / "model", tmp_path / "model.pth", "official") == 0
    written = read(tmp_path / "model.pth")
    kept = {n: t for n, t in model.state_dict().items() if "_m." not in n and "queue" not in n}
    assert_same({n: t for n, t in written.items() if not n.endswith("position_ids")}, kept)


@pytest.mark.parametrize(
    ("target", "layout", "word"),
    [
        ("folder", "official", ".pth"),
        ("x.pth", "huggingface", "folder"),
        (None, "official", "over"),
    ],
)
def test_an_output_that_does_not_fit_is_refused(official, tmp_path, capsys, target, layout, word):
    path, _ = official
    before = path.read_bytes()
    assert convert(path, tmp_path / target if target else path, layout) == 2
    assert word in capsys.readouterr().err and path.read_bytes() == before
