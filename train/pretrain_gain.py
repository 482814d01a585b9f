"""Pretrain BLIP on a grown dataset, drawing the samples of every epoch by their gains.

    python train/pretrain_gain.py --config train/configs/pretrain_cc3m_gain.yaml
    python3 -m torch.distributed.run --nproc_per_node=8 train/pretrain_gain.py --config …

One process, several Gloo processes, several GPUs and several nodes run this same file. It goes on
from the last checkpoint of --output_dir; train/README.md explains what it leaves there.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import infogrowth.threads  # noqa: F401 - before torch

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from infogrowth import distributed
from infogrowth.annotations import Annotation, gains_array, load_annotations
from infogrowth.blip.config import Stem, preset
from infogrowth.blip.pretrain import OBJECTIVES, BlipPretrain, Objective
from infogrowth.blip.pretrained import initialize, load_weights, save_folder
from infogrowth.blip.text import load_tokenizer, save_vocabulary, tokenize
from infogrowth.cli import run_script
from infogrowth.config import option
from infogrowth.data.datasets import PairDataset, RetrievalEvaluation, classes_of
from infogrowth.data.transforms import Augment, EvaluationTransform, TrainingTransform
from infogrowth.errors import UserError
from infogrowth.evaluation.retrieval import retrieval_recall
from infogrowth.growth.sampling import GainSampler, Mode
from infogrowth.training import checkpoints
from infogrowth.training.epoch import TrainingState, adamw, train_one_epoch
from infogrowth.training.loader import EpochLoader
from infogrowth.training.logger import Logger
from infogrowth.training.options import Decay, Precision, RunOptions, Schedule, Vit, share

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunOptions):
    """Options of pretraining; configs/pretrain_cc3m_gain.yaml explains them one by one."""

    annotations: str = option(help="result of `infogrowth grow` or `select`, .json or .parquet")
    images: str = option(help="LMDB of the images (or a folder of them)")
    sampler: Mode = option("two_phase", "how an epoch is drawn from the gains")
    vit: Vit = option("base", "size of the model")
    vision_stem: Stem | None = option(None, "patch or conv (small models); none: the size's own")
    image_size: int = option(224, "pixels a side", min=1)
    embed_dim: int | None = option(None, "width of the common feature space; none: the size's own")
    text_dropout: float = share(0.1, "dropout of the text transformers")
    drop_path: float | None = option(None, "stochastic depth; none: the size's own")
    vocabulary: str = option("bert-base-uncased", "name, folder or vocab.txt")
    vision_init: str = option("auto", "random, fan_in, deit, imagenet21k or a file of ViT weights")
    text_init: str = option("auto", "random, fan_in, bert-base-uncased or a folder of BERT's")
    pretrained: str | None = option(None, "start from this BLIP checkpoint instead")
    val_annotations: str | None = option(None, "captions to validate with; none: no validation")
    val_images: str | None = option(None, "folder or LMDB of their images; none: as `images`")
    validate_every: int = option(1000, "optimizer steps between validations", min=1)
    max_length: int = option(30, "tokens of a caption that are kept", min=3)
    min_crop: float = share(0.2, "smallest part of the image that a random crop keeps")
    tint: bool = option(False, "give images without colors random ones")
    augment: Augment = option("blip", "random operations: blip, jitter (for drawings) or none")
    captions_per_visit: int = option(1, "captions of an image in a batch, all its matches")
    class_key: str | None = option(None, "annotation key; samples alike in it match each other")
    class_vectors: bool = option(False, "also learn a vector per class, to classify by")
    batch_size: int = option(75, "pairs per rank and forward pass", min=1)
    objectives: list[Objective] = option([*OBJECTIVES], "losses: ita (contrastive), itm, lm")
    label_smoothing: float = share(0.1, "of the language modelling loss")
    id_aware_targets: bool = option(False, "hide queued copies of a sample from its own negatives")
    max_epoch: int = option(20, "epochs", min=1)
    init_lr: float = option(3e-4, "learning rate after warm-up", min=0)
    min_lr: float = option(1e-6, "learning rate that decay does not go below", min=0)
    warmup_lr: float = option(1e-6, "learning rate at the first step", min=0)
    warmup_steps: int = option(3000, "optimizer steps of warm-up, over the whole run", min=0)
    lr_decay: Decay = option("step", "by epoch")
    lr_decay_rate: float = share(0.9, "factor per epoch of the step decay")

    def __post_init__(self) -> None:
        if not self.objectives:
            raise UserError("objectives must name one or more of ita, itm and lm")
        if self.class_vectors and (self.class_key is None or "ita" not in self.objectives):
            raise UserError("class_vectors needs a class_key, and ita among the objectives")


def pretrain(config: PretrainConfig) -> int:
    """Train BLIP on a grown dataset, drawing the samples by their gains."""
    with distributed.process_group(config.device) as device:
        tokenizer = load_tokenizer(config.vocabulary)
        annotations = load_annotations(config.annotations)
        if not annotations:
            raise UserError(f"the annotation file {config.annotations} holds no samples")
        classes = classes_of(annotations, config.class_key, config.captions_per_visit)
        loader = build_loader(config, annotations, classes, tokenizer, device)
        model = build_model(config, classes, tokenizer).to(device)
        if config.compile:
            model.compile_encoders()
        optimizer = adamw(model, config.init_lr, config.weight_decay)
        schedule = Schedule(
            decay=config.lr_decay,
            init_lr=config.init_lr,
            min_lr=config.min_lr,
            max_epoch=config.max_epoch,
            decay_rate=config.lr_decay_rate,
            warmup_lr=config.warmup_lr,
            warmup_steps=config.warmup_steps,
            alpha=config.alpha,
            ramp_epochs=2,  # as in BLIP
        )
        precision = Precision(config.precision, device)
        state = TrainingState(model, optimizer, schedule, loader, precision, config)
        checkpoints.resume(state)
        save_vocabulary(tokenizer, state.checkpoints)  # so that each is a whole model
        validate = validation(config, model, tokenizer, precision)
        with Logger(state) as log:
            while not state.finished:
                train_one_epoch(state, log, validate, config.validate_every)
                if state.epoch_done:
                    log.epoch()
                    save_folder(model, Path(config.output_dir) / "model", tokenizer)
                    state.next_epoch()
                checkpoints.save(state)
            log.done()
        distributed.barrier()  # no rank leaves before the last checkpoint is on disk
    return 0


def validation(
    config: PretrainConfig,
    model: BlipPretrain,
    tokenizer: PreTrainedTokenizerBase,
    precision: Precision,
) -> Callable[[], dict[str, float]] | None:
    """What computes the recalls on the validation set by cosine alone, if there is a set."""
    if config.val_annotations is None:
        return None
    images = RetrievalEvaluation(
        config.val_annotations,
        config.val_images or config.images,
        EvaluationTransform(config.image_size),
        config.max_words,
        split="val",
    )
    return partial(
        retrieval_recall,
        model,
        tokenizer,
        images,
        k_test=0,
        batch_size=config.batch_size,
        max_length=config.max_length,
        workers=config.num_workers,
        autocast=precision.autocast,
    )


def build_loader(
    config: PretrainConfig,
    annotations: Sequence[Annotation],
    classes: list[int] | None,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> EpochLoader:
    """The batches of this rank, in the order that the gains give."""
    dataset = PairDataset(
        annotations,
        config.images,
        TrainingTransform(
            config.image_size, config.min_crop, config.augment, config.tint, normalize=False
        ),
        max_words=config.max_words,
        seed=config.seed,
        captions_per_visit=config.captions_per_visit,
        classes=classes,
    )
    sampler = GainSampler(
        # Uniform sampling needs no gains: a plain annotation file will do.
        np.ones(len(annotations)) if config.sampler == "uniform" else gains_array(annotations),
        mode=config.sampler,
        seed=config.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    return EpochLoader(
        dataset,
        sampler,
        # Texts as long as the longest of their batch, unless a compiler wants one length.
        partial(tokenize, tokenizer, max_length=config.max_length, longest=not config.compile),
        config.batch_size,
        config.num_workers,
        device,
    )


def build_model(
    config: PretrainConfig, classes: list[int] | None, tokenizer: PreTrainedTokenizerBase
) -> BlipPretrain:
    """The model with its starting weights, on the CPU."""
    names = ("vision_stem", "embed_dim", "drop_path", "image_size", "text_dropout")
    given = {name: getattr(config, name) for name in names}
    size = preset(config.vit, **{k: value for k, value in given.items() if value is not None})
    model = BlipPretrain(
        size.with_tokenizer(tokenizer),
        queue_size=config.queue_size,
        momentum=config.momentum,
        objectives=config.objectives,
        label_smoothing=config.label_smoothing,
        id_aware_targets=config.id_aware_targets,
        class_positives=classes is not None,
        class_vectors=len(set(classes)) if classes and config.class_vectors else 0,
        vit_grad_ckpt=config.vit_grad_ckpt,
        vit_ckpt_layer=config.vit_ckpt_layer,
        seed=config.seed,
    )
    with distributed.main_first():  # downloads land in a cache that the others then find
        if config.pretrained:
            logger.info("%s", load_weights(model, config.pretrained))
        else:
            initialize(model, vision=config.vision_init, text=config.text_init)
    return model


if __name__ == "__main__":
    sys.exit(run_script(PretrainConfig, pretrain))
