"""A BLIP of the golden fixtures' sizes, and their batches as tensors."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from infogrowth.blip.config import BlipConfig
from infogrowth.blip.text import load_tokenizer


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These tensors are tiny: on a busy machine, threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def golden_config() -> BlipConfig:
    return BlipConfig(
        image_size=32,
        patch_size=8,
        vision_width=48,
        vision_depth=3,
        vision_heads=3,
        text_width=48,
        text_depth=3,
        text_heads=3,
        text_feedforward=96,
        text_positions=64,
        text_dropout=0.0,
        vocab_size=195,
        pad_token_id=0,
        cls_token_id=2,
        sep_token_id=3,
        bos_token_id=193,
        enc_token_id=194,
        embed_dim=16,
    )


@pytest.fixture(scope="session")
def golden_tokenizer(golden: Path):
    return load_tokenizer(golden / "vocab.txt")


def _read(golden: Path, kind: str) -> SimpleNamespace:
    with np.load(golden / f"{kind}_arrays.npz") as arrays:
        values = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return SimpleNamespace(
        values=values,
        meta=json.loads((golden / f"{kind}_meta.json").read_text()),
        float64=json.loads((golden / f"{kind}_float64.json").read_text()),
        batch=lambda step: (
            values["images"][step],
            values[f"input_ids_{step}"],
            values[f"attention_mask_{step}"],
        ),
    )


@pytest.fixture(scope="session")
def pretrain_golden(golden: Path) -> SimpleNamespace:
    return _read(golden, "pretrain")


@pytest.fixture(scope="session")
def retrieval_golden(golden: Path) -> SimpleNamespace:
    return _read(golden, "retrieval")


@pytest.fixture(scope="session")
def zero_gradient_mask() -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Where a parameter has a gradient other than rounding noise, which AdamW would blow up."""

    def mask(name: str, tensor: torch.Tensor) -> torch.Tensor:
        keep = torch.ones_like(tensor, dtype=torch.bool)
        if name.endswith("key.bias"):
            keep[:] = False
        if name.endswith("qkv.bias"):
            third = len(tensor) // 3
            keep[third : 2 * third] = False
        return keep

    return mask
