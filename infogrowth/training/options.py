"""The options that both programs in train/ have, and the numbers that no run can use."""

from dataclasses import dataclass
from typing import Literal

from infogrowth.config import option
from infogrowth.errors import UserError
from infogrowth.training.precision import PrecisionName

Vit = Literal["tiny", "base", "large"]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a training run; the names are those of the YAML files and the flags.

    Raises:
        UserError: a number that no run can use.
    """

    output_dir: str = option(help="folder for checkpoints, logs and the trained model")
    resume: str = option("auto", "auto (from the last checkpoint, if any), none, or a checkpoint")
    seed: int = option(0, "names every random stream: weights, order, augmentation, dropout")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    precision: PrecisionName = option("auto", "forward pass; auto is bf16 on a GPU, fp32 on a CPU")
    compile: bool = option(False, "torch.compile the transformers")
    num_workers: int = option(4, "decoding processes per rank; the order does not depend on them")
    vit_grad_ckpt: bool = option(False, "recompute image transformer blocks to save memory")
    vit_ckpt_layer: int = option(0, "how many of its last blocks to recompute; 0 is all of them")
    max_words: int = option(30, "words of a caption that are kept")
    queue_size: int = option(57600, "past features that serve as contrastive candidates")
    momentum: float = option(0.995, "of the momentum encoders")
    alpha: float = option(0.4, "share of the momentum model in the contrastive targets")
    max_epoch: int = option(help="epochs")
    init_lr: float = option(help="learning rate after warm-up")
    min_lr: float = option(0.0, "learning rate that decay does not go below")
    weight_decay: float = option(0.05, "of AdamW")
    gradient_accumulation: int = option(1, "forward passes per optimizer step")
    compress_gradients: bool = option(False, "ranks exchange gradients in bf16: half the traffic")
    clip_grad_norm: float | None = option(None, "largest gradient norm; none does not clip")
    log_every: int = option(50, "optimizer steps between log lines")
    checkpoint_every: int = option(0, "optimizer steps between checkpoints; 0: at epoch ends only")
    keep_checkpoints: int = option(2, "how many of the newest checkpoints stay")
    max_steps: int | None = option(None, "stop after so many optimizer steps of the run")
    tensorboard: bool = option(True, "write TensorBoard events")

    def __post_init__(self) -> None:
        for keys, fits, what in (
            (_AT_LEAST_ONE, lambda value: value >= 1, "at least 1"),
            (_NOT_NEGATIVE, lambda value: value >= 0, "at least 0"),
            (_SHARES, lambda value: 0 <= value <= 1, "between 0 and 1"),
            (("max_length",), lambda value: value >= 3, "at least 3"),
            (("clip_grad_norm",), lambda value: value > 0, "above 0"),
        ):
            for key in keys:
                value = getattr(self, key, None)
                if value is not None and not fits(value):
                    raise UserError(f"{key} must be {what}, not {value}")


_AT_LEAST_ONE = (
    *("batch_size", "batch_size_train", "batch_size_test", "max_epoch", "gradient_accumulation"),
    *("log_every", "keep_checkpoints", "image_size", "max_words", "k_test", "validate_every"),
)
_NOT_NEGATIVE = (
    *("num_workers", "queue_size", "init_lr", "min_lr", "warmup_lr", "warmup_steps"),
    *("weight_decay", "checkpoint_every", "vit_ckpt_layer"),
)
_SHARES = ("momentum", "alpha", "label_smoothing", "text_dropout", "min_crop", "lr_decay_rate")
