"""A very small world to train in: coloured squares, captions of them, a model of 2 layers."""

import dataclasses

import pytest
import torch

from infogrowth.blip.config import preset
from infogrowth.blip.pretrain import BlipPretrain
from infogrowth.blip.tokenizer import load_tokenizer
from infogrowth.growth.sampling import GainSampler
from infogrowth.randomness import generator
from infogrowth.training.checkpointing import Checkpoints
from infogrowth.training.forward import PretrainForward
from infogrowth.training.journal import Journal
from infogrowth.training.loading import EpochBatches
from infogrowth.training.loop import LoopSettings, Trainer, adamw
from infogrowth.training.precision import Precision
from infogrowth.training.schedule import Schedule

WORDS = ("dog", "cat", "boat", "car", "snow", "bus", "pizza", "horse")


class Squares(torch.utils.data.Dataset):
    """Item (row, epoch, place): a square whose colour is the row's, with noise of the place."""

    def __init__(self, count=24, size=16):
        self.count, self.size = count, size

    def __len__(self):
        return self.count

    def __getitem__(self, place):
        row, epoch, position = place
        noise = generator(0, "noise", epoch, position).normal(size=(3, self.size, self.size))
        image = torch.from_numpy(noise).float() * 0.1
        image[row % 3, : 4 + row % 9, : 4 + row // 3] += 2.0
        caption = f"a {WORDS[row % 8]} and a {WORDS[row // 8]}"
        return {"image": image, "caption": caption, "index": row}


@pytest.fixture(scope="session")
def tokenizer(golden):
    return load_tokenizer(golden / "vocab.txt")


@pytest.fixture
def make_trainer(tmp_path, tokenizer):
    """Trainers on the same small world; keyword arguments change one thing at a time."""

    def make(
        directory="run", rows=24, batch_size=4, queue_size=20, mode="two_phase", workers=0,
        precision="fp32", dataset=None, dropout=0.1, **settings,
    ):  # fmt: skip
        shape = preset(
            "tiny", image_size=16, patch_size=8, vision_width=32, vision_depth=2, vision_heads=2,
            text_width=32, text_depth=2, text_heads=2, text_feedforward=64, embed_dim=16,
            text_dropout=dropout,
        ).with_tokenizer(tokenizer)  # fmt: skip
        model = BlipPretrain(shape, queue_size=queue_size, seed=1)
        device = torch.device("cpu")
        gains = generator(0, "gains").random((rows, 2))
        sampler = GainSampler(gains, mode=mode, seed=3)
        loop = LoopSettings(
            seed=5, max_epoch=3, alpha=0.4, ramp_epochs=2, part_names=("ita", "itm", "lm"),
            log_every=1,
        )  # fmt: skip
        trainer = Trainer(
            model=model,
            forward=PretrainForward(tokenizer, 12, device),
            optimizer=adamw(model, 1e-3, 0.05),
            schedule=Schedule("step", 1e-3, 1e-6, 3, 0.9, 1e-6, 4),
            batches=EpochBatches(dataset or Squares(rows), sampler, batch_size, workers),
            precision=Precision(precision, device),
            checkpoints=Checkpoints(tmp_path / directory / "checkpoints", keep=2),
            settings=dataclasses.replace(loop, **settings),
        )
        trainer.directory = tmp_path / directory
        return trainer

    return make


@pytest.fixture
def run():
    """Train to the end, with a journal as a real run has it."""

    def run(trainer):
        journal = Journal(
            trainer.directory, resumed_at=trainer.progress.step, tensorboard=False,
            planned_batches=trainer.planned_batches(), done_batches=trainer.done_batches(),
        )  # fmt: skip
        try:
            trainer.run(journal)
        finally:
            journal.close()
        return trainer

    return run
