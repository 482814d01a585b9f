"""Fine-tune BLIP for image–text retrieval, or evaluate a checkpoint, and print the recall table.

    python train/train_retrieval.py --config train/configs/retrieval_coco.yaml --pretrained MODEL
    python train/train_retrieval.py --config … --pretrained MODEL --evaluate

MODEL is a BLIP folder or checkpoint of ours, an official .pth, or a Hugging Face folder or
name. Under torch.distributed.run the same file uses all GPUs of all nodes.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import infogrowth.threads  # noqa: F401 - before torch

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from infogrowth import distributed
from infogrowth.blip.config import preset
from infogrowth.blip.model import BlipDual
from infogrowth.blip.pretrained import load_blip, save_folder
from infogrowth.blip.retrieval import BlipRetrieval
from infogrowth.blip.text import save_vocabulary, tokenize
from infogrowth.cli import run_script
from infogrowth.config import option
from infogrowth.data.datasets import PairDataset, RetrievalEvaluation, training_pairs
from infogrowth.data.transforms import EvaluationTransform, TrainingTransform
from infogrowth.errors import UserError
from infogrowth.evaluation.retrieval import retrieval_recall, save_tables
from infogrowth.growth.sampling import GainSampler
from infogrowth.training import checkpoints
from infogrowth.training.epoch import TrainingState, adamw, train_one_epoch
from infogrowth.training.loader import EpochLoader
from infogrowth.training.logger import Logger
from infogrowth.training.options import Precision, RunOptions, Schedule, Vit, share

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=BlipDual)


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(RunOptions):
    """Options of retrieval; configs/retrieval_coco.yaml explains them one by one."""

    pretrained: str | None = option(None, "checkpoint to fine-tune or evaluate: ours or official")
    evaluate: bool = option(False, "only evaluate --pretrained on the val and test sets")
    images: str = option(help="folder or LMDB of the images")
    train_annotations: list[str] = option([], "captions to train on")
    val_annotations: str | None = option(None, "captions that choose the best epoch")
    test_annotations: str | None = option(None, "captions that are reported")
    vit: Vit | None = option(None, "size of a checkpoint without config.json; none: infer it")
    image_size: int | None = option(None, "pixels a side; none: the checkpoint's own", min=1)
    vocabulary: str | None = option(None, "name, folder or vocab.txt; none: the checkpoint's own")
    max_length: int = option(35, "tokens of a caption that are kept", min=3)
    min_crop: float = share(0.5, "smallest part of the image that a random crop keeps")
    batch_size_train: int = option(32, "pairs per rank and forward pass", min=1)
    batch_size_test: int = option(64, "images or texts per forward pass of the evaluation", min=1)
    k_test: int = option(256, "candidates per query that the matching head re-ranks", min=1)
    negative_all_rank: bool = option(True, "matching negatives from all ranks")
    max_epoch: int = option(6, "epochs", min=1)
    init_lr: float = option(1e-5, "learning rate of the first epoch", min=0)
    min_lr: float = option(0.0, "learning rate that the cosine ends in", min=0)


def train_or_evaluate(config: RetrievalConfig) -> int:
    """Fine-tune BLIP for image–text retrieval, or with --evaluate only score a checkpoint."""
    with distributed.process_group(config.device) as device:
        precision = Precision(config.precision, device)
        if config.evaluate:
            model, tokenizer = load_model(config, BlipDual)
            sets = evaluation_sets(config, model)
            if not sets:
                raise UserError("evaluation needs val_annotations or test_annotations")
            tables = evaluate(config, model.to(device), tokenizer, sets, precision)
            save_tables(tables, sets, Path(config.output_dir) / "evaluation")
        else:
            train(config, precision)
    return 0


def train(config: RetrievalConfig, precision: Precision) -> None:
    """Fine-tune, evaluate after every epoch, and keep the best epoch's model and table."""
    build = partial(
        BlipRetrieval,
        queue_size=config.queue_size,
        momentum=config.momentum,
        negative_all_rank=config.negative_all_rank,
        vit_grad_ckpt=config.vit_grad_ckpt,
        vit_ckpt_layer=config.vit_ckpt_layer,
        seed=config.seed,
    )
    model, tokenizer = load_model(config, build)
    sets = evaluation_sets(config, model)
    loader = build_loader(config, model, tokenizer, precision.device)
    model.to(precision.device)
    if config.compile:
        model.compile_encoders()
    optimizer = adamw(model, config.init_lr, config.weight_decay)
    schedule = Schedule(
        "cosine",
        config.init_lr,
        config.min_lr,
        config.max_epoch,
        alpha=config.alpha,
        ramp_epochs=1,  # as in BLIP
    )
    state = TrainingState(model, optimizer, schedule, loader, precision, config)
    output = Path(config.output_dir)
    checkpoints.resume(state)
    save_vocabulary(tokenizer, state.checkpoints)  # so that each is a whole model
    with Logger(state) as log:
        while not state.finished:
            train_one_epoch(state, log)
            if state.epoch_done:
                tables = evaluate(config, model, tokenizer, sets, precision)
                # The val set chooses the best epoch, without one the test set, else the last is.
                deciding = (tables.get("val") or tables.get("test") or {}).get("r_mean")
                epoch, best = state.progress.epoch, state.progress.best
                is_best = not best or deciding is None or deciding > best["r_mean"]
                if is_best:
                    state.progress.best = {"epoch": epoch, "r_mean": deciding, "tables": tables}
                for name in ["model", "best_model"] if is_best else ["model"]:
                    save_folder(model, output / name, tokenizer)
                save_tables(tables, sets, output / f"epoch_{epoch:02d}")
                log.epoch(recall=tables)
                state.next_epoch()
            checkpoints.save(state)
        log.done()
    distributed.barrier()  # no rank leaves before the last checkpoint is on disk
    if state.progress.best:
        logger.info("best epoch: %d", state.progress.best["epoch"])
        save_tables(state.progress.best["tables"], sets, output / "best")


def evaluate(
    config: RetrievalConfig,
    model: BlipDual,
    tokenizer: PreTrainedTokenizerBase,
    sets: dict[str, RetrievalEvaluation],
    precision: Precision,
) -> dict[str, dict[str, float]]:
    """The recall table of each set, on all ranks."""
    return {
        name: retrieval_recall(
            model,
            tokenizer,
            images,
            k_test=config.k_test,
            batch_size=config.batch_size_test,
            max_length=config.max_length,
            workers=config.num_workers,
            autocast=precision.autocast,
            progress=logger.isEnabledFor(logging.INFO),
        )
        for name, images in sets.items()
    }


def load_model(
    config: RetrievalConfig, build: Callable[..., Model]
) -> tuple[Model, PreTrainedTokenizerBase]:
    """The model with the checkpoint's weights, on the CPU, and its tokenizer."""
    if config.pretrained is None:
        raise UserError("give the checkpoint to start from: --pretrained CHECKPOINT")
    with distributed.main_first():  # downloads land in a cache that the others then find
        model, tokenizer, report = load_blip(
            config.pretrained,
            build,
            vocabulary=config.vocabulary,
            config=preset(config.vit) if config.vit else None,
            image_size=config.image_size,
        )
    logger.info("%s", report)
    return model, tokenizer


def build_loader(
    config: RetrievalConfig,
    model: BlipRetrieval,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> EpochLoader:
    """The training pairs of this rank, each once per epoch in random order."""
    if not config.train_annotations:
        raise UserError("fine-tuning needs train_annotations; or give --evaluate")
    pairs, images = training_pairs(config.train_annotations)
    dataset = PairDataset(
        pairs,
        config.images,
        TrainingTransform(model.config.image_size, min_scale=config.min_crop, normalize=False),
        max_words=config.max_words,
        seed=config.seed,
        classes=images,
    )
    sampler = GainSampler(
        np.ones(len(dataset)),
        mode="uniform",
        seed=config.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    # Texts that are gathered from ranks, or compiled, need one length in all batches.
    gathered = config.negative_all_rank and distributed.world_size() > 1
    longest = not (gathered or config.compile)
    return EpochLoader(
        dataset,
        sampler,
        partial(tokenize, tokenizer, max_length=config.max_length, longest=longest),
        config.batch_size_train,
        config.num_workers,
        device,
    )


def evaluation_sets(config: RetrievalConfig, model: BlipDual) -> dict[str, RetrievalEvaluation]:
    """The val and test sets that the configuration names."""
    paths = {"val": config.val_annotations, "test": config.test_annotations}
    transform = EvaluationTransform(model.config.image_size)
    return {
        name: RetrievalEvaluation(path, config.images, transform, config.max_words, split=name)
        for name, path in paths.items()
        if path
    }


if __name__ == "__main__":
    sys.exit(run_script(RetrievalConfig, train_or_evaluate))
