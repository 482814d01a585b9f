"""A very small world to train in: coloured squares, captions of them, a model of 2 layers."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from infogrowth.blip.config import preset
from infogrowth.blip.pretrain import BlipPretrain
from infogrowth.blip.text import load_tokenizer, tokenize
from infogrowth.growth.sampling import GainSampler
from infogrowth.randomness import generator
from infogrowth.training import checkpoints
from infogrowth.training.epoch import TrainingState, adamw, train_one_epoch
from infogrowth.training.loader import EpochLoader
from infogrowth.training.logger import Logger
from infogrowth.training.options import Precision, RunOptions, Schedule

WORDS = ("dog", "cat", "boat", "car", "snow", "bus", "pizza", "horse")


class Squares(torch.utils.data.Dataset):
    """Item (row, epoch, position): a square of the row's colour, with noise of the position."""

    def __init__(self, count=24, size=16):
        self.count, self.size = count, size

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        row, epoch, position = index
        noise = generator(0, "noise", epoch, position).normal(size=(3, self.size, self.size))
        image = torch.from_numpy(noise).float() * 0.1
        image[row % 3, : 4 + row % 9, : 4 + row // 3] += 2.0
        caption = f"a {WORDS[row % 8]} and a {WORDS[row // 8]}"
        return {"image": image, "caption": caption, "index": row}


class SmallRun:
    """A run of train/pretrain_gain.py but for its files: what it builds, and its loop."""

    def __init__(self, directory, model, loader, precision, options):
        config = RunOptions(**{**options, "output_dir": str(directory)})
        self.directory, self.model, self.loader = Path(directory), model, loader
        self.optimizer = adamw(model, 1e-3, 0.05)
        schedule = Schedule("step", 1e-3, 1e-6, 3, 0.9, 1e-6, 4, ramp_epochs=2)
        self.state = TrainingState(model, self.optimizer, schedule, loader, precision, config)

    @property
    def progress(self):
        return self.state.progress

    def train(self):
        with Logger(self.state) as log:
            while not self.state.finished:
                train_one_epoch(self.state, log)
                if self.state.epoch_done:
                    log.epoch()
                    self.state.next_epoch()
                checkpoints.save(self.state)
        return self

    def resume(self):
        checkpoints.resume(self.state)
        return self

    def newest(self):
        """What the newest checkpoint holds."""
        return checkpoints.load_checkpoint(checkpoints.latest(self.state.checkpoints))

    def log(self):
        return records(self.directory)


def records(directory):
    """The records of a run's log without what the clock shows."""
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("time", "samples_per_s")} for r in lines]


@pytest.fixture(scope="session")
def read_log():
    """Of an output folder; see records."""
    return records


@pytest.fixture(scope="session")
def tokenizer(golden):
    return load_tokenizer(golden / "vocab.txt")


@pytest.fixture
def make_run(tmp_path, tokenizer):
    """Runs in the same small world; keyword arguments change one thing at a time."""

    def make(
        directory="run", rows=24, batch_size=4, queue_size=20, mode="two_phase", workers=0,
        precision="fp32", dataset=None, dropout=0.1, longest=True, **options,
    ):  # fmt: skip
        config = preset(
            "tiny", image_size=16, patch_size=8, vision_stem="patch",
            vision_width=32, vision_depth=2, vision_heads=2,
            text_width=32, text_depth=2, text_heads=2, text_feedforward=64, embed_dim=16,
            text_dropout=dropout,
        ).with_tokenizer(tokenizer)  # fmt: skip
        loader = EpochLoader(
            dataset or Squares(rows),
            GainSampler(generator(0, "gains").random((rows, 2)), mode=mode, seed=3),
            partial(tokenize, tokenizer, max_length=12, longest=longest),
            batch_size,
            workers,
        )
        defaults = {
            "seed": 5,
            "max_epoch": 3,
            "log_every": 1,
            "init_lr": 1e-3,
            "tensorboard": False,
        }
        return SmallRun(
            tmp_path / directory,
            BlipPretrain(config, queue_size=queue_size, seed=1),
            loader,
            Precision(precision, torch.device("cpu")),
            {**defaults, **options},
        )

    return make
