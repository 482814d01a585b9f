"""BLIP pretraining on a grown dataset: what train/pretrain_gain.py runs."""

import logging
from pathlib import Path
from typing import Any

import torch

from infogrowth import distributed
from infogrowth.annotations import gains_array, load_annotations
from infogrowth.blip.checkpoint import load_weights, save_folder
from infogrowth.blip.config import BlipConfig, preset
from infogrowth.blip.initialize import initialize
from infogrowth.blip.pretrain import BlipPretrain
from infogrowth.blip.tokenizer import load_tokenizer, save_vocabulary
from infogrowth.data.pairs import PairDataset
from infogrowth.data.transforms import training_transform
from infogrowth.errors import UserError
from infogrowth.growth.sampling import GainSampler
from infogrowth.training.checkpointing import Checkpoints
from infogrowth.training.forward import PretrainForward
from infogrowth.training.loading import EpochBatches
from infogrowth.training.loop import LoopSettings, Trainer, adamw
from infogrowth.training.precision import Precision
from infogrowth.training.running import carry_out
from infogrowth.training.schedule import Schedule
from infogrowth.training.settings import PretrainConfig

log = logging.getLogger(__name__)

# The momentum model's share rises over the first two epochs, as in BLIP.
RAMP_EPOCHS = 2


def pretrain(config: PretrainConfig) -> int:
    """Train BLIP on a grown dataset, drawing the samples by their gains."""
    with distributed.process_group(config.device) as device:
        batches = open_batches(config, device)
        tokenizer = load_tokenizer(config.vocabulary)
        model = build_model(config, tokenizer).to(device)
        if config.compile:
            model.compile_encoders()
        trainer = Trainer(
            model=model,
            forward=PretrainForward(
                tokenizer, config.max_length, device, longest=not config.compile
            ),
            optimizer=adamw(model, config.init_lr, config.weight_decay),
            schedule=schedule(config),
            batches=batches,
            precision=Precision(config.precision, device),
            checkpoints=Checkpoints(
                Path(config.output_dir) / "checkpoints", config.keep_checkpoints
            ),
            settings=loop_settings(config),
            after_epoch=lambda trainer: _save_model(trainer, config.output_dir, tokenizer),
        )
        if distributed.is_main():  # beside the checkpoints, so that each is a whole model
            save_vocabulary(tokenizer, trainer.checkpoints.directory)
        carry_out(trainer, config)
    return 0


def open_batches(config: PretrainConfig, device: torch.device) -> EpochBatches:
    """The training pairs of this rank, in the order that the gains give.

    Raises:
        UserError: missing files, samples without gains, or zero total gain.
    """
    annotations = load_annotations(config.annotations)
    if not annotations:
        raise UserError(f"the annotation file {config.annotations} holds no samples")
    if config.sampler == "uniform":  # a plain annotation file will do
        gains: Any = [1.0] * len(annotations)
    else:
        gains = gains_array(annotations)
    dataset = PairDataset(
        annotations,
        config.images,
        training_transform(config.image_size, min_scale=config.min_crop),
        max_words=config.max_words,
        seed=config.seed,
    )
    sampler = GainSampler(
        gains,
        mode=config.sampler,
        seed=config.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    return EpochBatches(dataset, sampler, config.batch_size, config.num_workers, device)


def build_model(config: PretrainConfig, tokenizer: Any) -> BlipPretrain:
    """The model with its starting weights, on the CPU.

    Raises:
        UserError: weights that cannot be had or do not fit.
    """
    model = BlipPretrain(
        model_shape(config).with_tokenizer(tokenizer),
        queue_size=config.queue_size,
        momentum=config.momentum,
        label_smoothing=config.label_smoothing,
        id_aware_targets=config.id_aware_targets,
        vit_grad_ckpt=config.vit_grad_ckpt,
        vit_ckpt_layer=config.vit_ckpt_layer,
        seed=config.seed,
    )
    if config.pretrained:
        log.info("%s", load_weights(model, config.pretrained))
    else:
        with distributed.main_first():  # downloads land in a cache that the others then find
            initialize(model, vision=config.vision_init, text=config.text_init)
    return model


def model_shape(config: PretrainConfig) -> BlipConfig:
    """The preset with the keys that the configuration sets."""
    changes = {"image_size": config.image_size, "text_dropout": config.text_dropout}
    optional = {"embed_dim": config.embed_dim, "drop_path": config.drop_path}
    changes |= {key: value for key, value in optional.items() if value is not None}
    return preset(config.vit, **changes)


def schedule(config: PretrainConfig) -> Schedule:
    """The configured learning rate."""
    return Schedule(
        decay=config.lr_decay,
        init_lr=config.init_lr,
        min_lr=config.min_lr,
        max_epoch=config.max_epoch,
        decay_rate=config.lr_decay_rate,
        warmup_lr=config.warmup_lr,
        warmup_steps=config.warmup_steps,
    )


def loop_settings(config: PretrainConfig) -> LoopSettings:
    """The part of the configuration that the loop reads."""
    return LoopSettings(
        seed=config.seed,
        max_epoch=config.max_epoch,
        alpha=config.alpha,
        ramp_epochs=RAMP_EPOCHS,
        part_names=("ita", "itm", "lm"),
        gradient_accumulation=config.gradient_accumulation,
        clip_grad_norm=config.clip_grad_norm,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        max_steps=config.max_steps,
    )


def _save_model(trainer: Trainer, output_dir: str, tokenizer: Any) -> dict[str, Any]:
    if distributed.is_main():
        save_folder(trainer.model, Path(output_dir) / "model", tokenizer)
    return {}
