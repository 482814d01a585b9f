"""Write a BLIP folder again with float16 weights: half the bytes, the same figures.

python scripts/making/half_weights.py --model FOLDER --output FOLDER
"""

import sys
from dataclasses import dataclass

import infogrowth.threads  # noqa: F401 - before torch

from infogrowth.blip.checkpoint import load_blip, save_folder
from infogrowth.blip.pretrain import BlipPretrain
from infogrowth.cli import run_script
from infogrowth.config import option


@dataclass(frozen=True, kw_only=True)
class HalfConfig:
    """Options of scripts/making/half_weights.py."""

    model: str = option(help="BLIP folder to read")
    output: str = option(help="folder to write")


def halve(config: HalfConfig) -> int:
    """Write a BLIP folder again with float16 weights."""
    model, tokenizer, _ = load_blip(config.model, BlipPretrain)
    save_folder(model.half(), config.output, tokenizer)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(HalfConfig, halve))
