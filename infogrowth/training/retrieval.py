"""Retrieval fine-tuning and evaluation: what train/train_retrieval.py runs."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infogrowth import distributed
from infogrowth.blip.checkpoint import load_blip, open_state, save_folder, shape_of
from infogrowth.blip.config import BlipConfig, preset
from infogrowth.blip.hub import download
from infogrowth.blip.retrieval import BlipRetrieval
from infogrowth.blip.tokenizer import load_tokenizer, save_vocabulary
from infogrowth.data.retrieval import RetrievalEvaluation, RetrievalTrain
from infogrowth.data.transforms import evaluation_transform, training_transform
from infogrowth.errors import UserError
from infogrowth.evaluation.recall import as_text, chance_table, recall_table
from infogrowth.evaluation.rerank import retrieval_scores
from infogrowth.files import atomic_write, atomic_write_json
from infogrowth.growth.sampling import GainSampler
from infogrowth.training.checkpointing import Checkpoints
from infogrowth.training.forward import RetrievalForward
from infogrowth.training.loading import EpochBatches
from infogrowth.training.loop import LoopSettings, Trainer, adamw
from infogrowth.training.precision import Precision
from infogrowth.training.running import carry_out
from infogrowth.training.schedule import Schedule
from infogrowth.training.settings import RetrievalConfig

log = logging.getLogger(__name__)

# The momentum model's share rises over the first epoch, as in BLIP.
RAMP_EPOCHS = 1
Tables = dict[str, dict[str, float]]


def fine_tune_or_evaluate(config: RetrievalConfig) -> int:
    """Fine-tune BLIP for image–text retrieval, or with --evaluate only score a checkpoint."""
    with distributed.process_group(config.device) as device:
        if config.pretrained is None:
            raise UserError("give the checkpoint to start from: --pretrained CHECKPOINT")
        model, tokenizer = open_model(config, config.pretrained)
        model.to(device)
        precision = Precision(config.precision, device)
        evaluation = Evaluation(config, tokenizer, precision, model.config.image_size)
        if config.evaluate:
            evaluation.report(evaluation.tables(model), "evaluation")
            return 0
        _fine_tune(config, model, tokenizer, precision, evaluation)
    return 0


def _fine_tune(
    config: RetrievalConfig,
    model: BlipRetrieval,
    tokenizer: Any,
    precision: Precision,
    evaluation: "Evaluation",
) -> None:
    device = precision.device
    if config.compile:
        model.compile_encoders()
    gathers_texts = config.negative_all_rank and distributed.world_size() > 1
    lengths_may_differ = not (gathers_texts or config.compile)
    trainer = Trainer(
        model=model,
        forward=RetrievalForward(tokenizer, config.max_length, device, longest=lengths_may_differ),
        optimizer=adamw(model, config.init_lr, config.weight_decay),
        schedule=Schedule("cosine", config.init_lr, config.min_lr, config.max_epoch),
        batches=open_batches(config, model.config.image_size, device),
        precision=precision,
        checkpoints=Checkpoints(Path(config.output_dir) / "checkpoints", config.keep_checkpoints),
        settings=LoopSettings(
            seed=config.seed,
            max_epoch=config.max_epoch,
            alpha=config.alpha,
            ramp_epochs=RAMP_EPOCHS,
            part_names=("ita", "itm"),
            gradient_accumulation=config.gradient_accumulation,
            clip_grad_norm=config.clip_grad_norm,
            log_every=config.log_every,
            checkpoint_every=config.checkpoint_every,
            max_steps=config.max_steps,
        ),
        after_epoch=partial(_keep_best, evaluation=evaluation, tokenizer=tokenizer),
    )
    if distributed.is_main():  # beside the checkpoints, so that each is a whole model
        save_vocabulary(tokenizer, trainer.checkpoints.directory)
    carry_out(trainer, config)
    best = trainer.progress.best
    if best:
        log.info("best epoch: %d", best["epoch"])
        evaluation.report(best["tables"], "best")


def open_model(config: RetrievalConfig, pretrained: str) -> tuple[BlipRetrieval, Any]:
    """The retrieval model with the checkpoint's weights, on the CPU, and its tokenizer.

    Raises:
        UserError: a checkpoint that cannot be had or does not fit.
    """
    kind = partial(
        BlipRetrieval,
        queue_size=config.queue_size,
        momentum=config.momentum,
        negative_all_rank=config.negative_all_rank,
        vit_grad_ckpt=config.vit_grad_ckpt,
        vit_ckpt_layer=config.vit_ckpt_layer,
        seed=config.seed,
    )
    with distributed.main_first():  # downloads land in a cache that the others then find
        shape = checkpoint_shape(pretrained, config.vit)
        if config.image_size is not None:
            shape = shape.replace(image_size=config.image_size)
        vocabulary = config.vocabulary
        if vocabulary is not None:
            shape = shape.with_tokenizer(load_tokenizer(vocabulary))
        model: BlipRetrieval
        model, tokenizer, report = load_blip(
            pretrained,
            kind,  # type: ignore[arg-type]  # called with the shape, like the class
            vocabulary=vocabulary,
            config=shape,
        )
    log.info("%s", report)
    return model, tokenizer


def checkpoint_shape(pretrained: str, vit: str | None = None) -> BlipConfig:
    """The shape of a checkpoint: its own where it tells it, else the preset's, else inferred."""
    path = Path(pretrained)
    if path.is_dir():
        return BlipConfig.from_folder(path)
    if not path.exists():
        return BlipConfig.from_folder(download(pretrained, "config.json").parent)
    weights = open_state(path)
    if vit is not None and weights.config is None:
        return preset(vit)
    return shape_of(weights)


def open_batches(config: RetrievalConfig, image_size: int, device: torch.device) -> EpochBatches:
    """The training pairs of this rank, each once per epoch in random order."""
    if not config.train_annotations:
        raise UserError("fine-tuning needs train_annotations; or give --evaluate")
    dataset = RetrievalTrain(
        config.train_annotations,
        config.images,
        training_transform(image_size, min_scale=config.min_crop),
        max_words=config.max_words,
        seed=config.seed,
    )
    sampler = GainSampler(
        np.ones(len(dataset)),
        mode="uniform",
        seed=config.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    return EpochBatches(dataset, sampler, config.batch_size_train, config.num_workers, device)


class Evaluation:
    """The val and test sets of a run, and what is done with their recall tables."""

    def __init__(
        self, config: RetrievalConfig, tokenizer: Any, precision: Precision, image_size: int
    ) -> None:
        self.config, self.tokenizer, self.precision = config, tokenizer, precision
        transform = evaluation_transform(image_size)
        self.sets = {
            name: RetrievalEvaluation(
                path, config.images, transform, max_words=config.max_words, split=name
            )
            for name, path in (("val", config.val_annotations), ("test", config.test_annotations))
            if path
        }
        if config.evaluate and not self.sets:
            raise UserError("evaluation needs val_annotations or test_annotations")

    def tables(self, model: BlipRetrieval) -> Tables:
        """Recall tables of all sets, on all ranks."""
        config = self.config
        found: Tables = {}
        for name, images in self.sets.items():
            scores = retrieval_scores(
                model,
                self.tokenizer,
                images,
                images.texts,
                k_test=config.k_test,
                batch_size=config.batch_size_test,
                max_length=config.max_length,
                workers=config.num_workers,
                autocast=self.precision.autocast,
                progress=log.isEnabledFor(logging.INFO),
            )
            found[name] = recall_table(
                scores.i2t.numpy(), scores.t2i.numpy(), images.img2txt, images.txt2img
            )
        return found

    def report(self, tables: Tables, name: str) -> None:
        """Print the tables beside chance, and save them as NAME.json and NAME.txt."""
        if not tables or not distributed.is_main():
            return
        rows = {}
        for key, table in tables.items():
            images = self.sets[key]
            rows[key] = table
            rows[f"{key} (chance)"] = chance_table(len(images), len(images.texts))
        text = as_text(rows)
        print(text)
        directory = Path(self.config.output_dir)
        atomic_write_json(directory / f"{name}.json", tables, indent=2)
        with atomic_write(directory / f"{name}.txt", "w") as file:
            file.write(f"{text}\n")


def _keep_best(trainer: Trainer, evaluation: Evaluation, tokenizer: Any) -> dict[str, Any]:
    """Evaluate the epoch; best_model/ keeps the best one by the val set's r_mean.

    Without a val set the test set decides, without either the last epoch is the best.
    """
    tables = evaluation.tables(trainer.model)  # type: ignore[arg-type]
    output = Path(evaluation.config.output_dir)
    best = trainer.progress.best
    deciding = (tables.get("val") or tables.get("test") or {}).get("r_mean")
    is_best = not best or deciding is None or deciding > best["r_mean"]
    if distributed.is_main():
        save_folder(trainer.model, output / "model", tokenizer)
        if is_best:
            save_folder(trainer.model, output / "best_model", tokenizer)
    if is_best:
        epoch = trainer.progress.epoch
        trainer.progress.best = {"epoch": epoch, "r_mean": deciding, "tables": tables}
    evaluation.report(tables, f"epoch_{trainer.progress.epoch:02d}")
    return {"recall": tables}
