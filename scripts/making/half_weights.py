"""Write a BLIP folder with float16 weights, the mean of one or more models' of the same training.

    python scripts/making/half_weights.py --models FOLDER FOLDER --output FOLDER

Half the bytes, the same figures. The mean of two models on one path of training separates unseen
drawings better than either, as one that was trained longer would.
"""

import sys
from dataclasses import dataclass

import infogrowth.threads  # noqa: F401 - before torch

import torch

from infogrowth.blip.pretrain import BlipPretrain
from infogrowth.blip.pretrained import load_blip, save_folder
from infogrowth.cli import run_script
from infogrowth.config import option


@dataclass(frozen=True, kw_only=True)
class HalfConfig:
    """Options of scripts/making/half_weights.py."""

    models: list[str] = option(help="BLIP folders to read")
    output: str = option(help="folder to write")


def halve(config: HalfConfig) -> int:
    """Write a BLIP folder with float16 weights, the mean of all models."""
    loaded = [load_blip(folder, BlipPretrain)[:2] for folder in config.models]
    model, tokenizer = loaded[-1]
    states = [one.state_dict() for one, _ in loaded]
    mean = {
        name: torch.stack([state[name] for state in states]).mean(dim=0)
        for name, value in states[-1].items()
        if value.is_floating_point()
    }
    model.load_state_dict({**states[-1], **mean})
    save_folder(model.half(), config.output, tokenizer)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(HalfConfig, halve))
