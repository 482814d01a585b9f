"""The keys of train/configs/*.yaml: a frozen dataclass per program, every key read and checked."""

from dataclasses import dataclass
from typing import Literal

from infogrowth.config import option
from infogrowth.errors import UserError
from infogrowth.growth.sampling import Mode
from infogrowth.training.precision import PrecisionName
from infogrowth.training.schedule import Decay

Vit = Literal["tiny", "base", "large"]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every training run has; the words are the YAML's and the flags'."""

    output_dir: str = option(help="folder for checkpoints, logs and the trained model")
    resume: str = option("auto", "auto (from the last checkpoint, if any), none, or a checkpoint")
    seed: int = option(0, "names every random stream: weights, order, augmentation, dropout")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    precision: PrecisionName = option("auto", "forward pass; auto is bf16 on a GPU, fp32 on a CPU")
    compile: bool = option(False, "torch.compile the transformers")
    num_workers: int = option(4, "decoding processes per rank; the order does not depend on them")
    vit_grad_ckpt: bool = option(False, "recompute image transformer blocks to save memory")
    vit_ckpt_layer: int = option(0, "how many of its last blocks to recompute; 0 is all of them")
    gradient_accumulation: int = option(1, "forward passes per optimizer step")
    clip_grad_norm: float | None = option(None, "largest gradient norm; none does not clip")
    log_every: int = option(50, "optimizer steps between log lines")
    checkpoint_every: int = option(0, "optimizer steps between checkpoints; 0: at epoch ends only")
    keep_checkpoints: int = option(2, "how many of the newest checkpoints stay")
    max_steps: int | None = option(None, "stop after so many optimizer steps of the run")
    tensorboard: bool = option(True, "write TensorBoard events")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunOptions):
    """Options of train/pretrain_gain.py."""

    annotations: str = option(help="result JSON of `infogrowth grow`: image, caption, gains")
    images: str = option(help="LMDB of the images (or a folder of them)")
    sampler: Mode = option("two_phase", "how an epoch is drawn from the gains")
    vit: Vit = option("base", "shape of the model")
    image_size: int = option(224, "pixels a side")
    embed_dim: int | None = option(None, "width of the common feature space; none: the shape's own")
    text_dropout: float = option(0.1, "dropout of the text transformers")
    drop_path: float | None = option(None, "stochastic depth; none: the shape's own")
    vocabulary: str = option("bert-base-uncased", "name, folder or vocab.txt")
    vision_init: str = option("auto", "random, deit, imagenet21k or a local file of ViT weights")
    text_init: str = option("auto", "random, bert-base-uncased or a local folder of BERT weights")
    pretrained: str | None = option(None, "start from this BLIP checkpoint instead")
    max_words: int = option(30, "words of a caption that are kept")
    max_length: int = option(30, "tokens of a caption that are kept")
    min_crop: float = option(0.2, "smallest share of the image that a random crop keeps")
    batch_size: int = option(75, "pairs per rank and forward pass")
    queue_size: int = option(57600, "past features that serve as contrastive candidates")
    momentum: float = option(0.995, "of the momentum encoders")
    alpha: float = option(0.4, "share of the momentum model in the contrastive targets")
    label_smoothing: float = option(0.1, "of the language modelling loss")
    id_aware_targets: bool = option(False, "hide queued copies of a sample from its own negatives")
    max_epoch: int = option(20, "epochs")
    init_lr: float = option(3e-4, "learning rate after warm-up")
    min_lr: float = option(1e-6, "learning rate that decay does not go below")
    warmup_lr: float = option(1e-6, "learning rate at the first step")
    warmup_steps: int = option(3000, "optimizer steps of warm-up, counted over the whole run")
    lr_decay: Decay = option("step", "by epoch")
    lr_decay_rate: float = option(0.9, "factor per epoch of the step decay")
    weight_decay: float = option(0.05, "of AdamW")

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(RunOptions):
    """Options of train/train_retrieval.py."""

    pretrained: str | None = option(None, "checkpoint to fine-tune or evaluate: ours or official")
    evaluate: bool = option(False, "only evaluate --pretrained on the val and test sets")
    images: str = option(help="folder or LMDB of the images")
    train_annotations: list[str] = option([], "captions to train on")
    val_annotations: str | None = option(None, "captions that choose the best epoch")
    test_annotations: str | None = option(None, "captions that are reported")
    vit: Vit | None = option(None, "shape of a checkpoint without config.json; none: infer it")
    image_size: int | None = option(None, "pixels a side; none: the checkpoint's own")
    vocabulary: str | None = option(None, "name, folder or vocab.txt; none: the checkpoint's own")
    max_words: int = option(30, "words of a caption that are kept")
    max_length: int = option(35, "tokens of a caption that are kept")
    min_crop: float = option(0.5, "smallest share of the image that a random crop keeps")
    batch_size_train: int = option(32, "pairs per rank and forward pass")
    batch_size_test: int = option(64, "images or texts per forward pass of the evaluation")
    k_test: int = option(256, "candidates per query that the matching head re-ranks")
    queue_size: int = option(57600, "past features that serve as contrastive candidates")
    momentum: float = option(0.995, "of the momentum encoders")
    alpha: float = option(0.4, "share of the momentum model in the contrastive targets")
    negative_all_rank: bool = option(True, "matching negatives from all ranks")
    max_epoch: int = option(6, "epochs")
    init_lr: float = option(1e-5, "learning rate of the first epoch")
    min_lr: float = option(0.0, "learning rate that the cosine ends in")
    weight_decay: float = option(0.05, "of AdamW")

    def __post_init__(self) -> None:
        check_ranges(self)


_AT_LEAST_ONE = (
    *("batch_size", "batch_size_train", "batch_size_test", "max_epoch", "gradient_accumulation"),
    *("log_every", "keep_checkpoints", "image_size", "max_words", "k_test"),
)
_NOT_NEGATIVE = (
    *("num_workers", "queue_size", "init_lr", "min_lr", "warmup_lr", "warmup_steps"),
    *("weight_decay", "checkpoint_every", "vit_ckpt_layer"),
)
_SHARES = ("momentum", "alpha", "label_smoothing", "text_dropout", "min_crop", "lr_decay_rate")


def check_ranges(config: RunOptions) -> None:
    """Refuse numbers that no run can use.

    Raises:
        UserError: naming the key and what it may be.
    """
    for keys, fits, what in (
        (_AT_LEAST_ONE, lambda value: value >= 1, "at least 1"),
        (_NOT_NEGATIVE, lambda value: value >= 0, "at least 0"),
        (_SHARES, lambda value: 0 <= value <= 1, "between 0 and 1"),
        (("max_length",), lambda value: value >= 3, "at least 3"),
        (("clip_grad_norm",), lambda value: value > 0, "above 0"),
    ):
        for key in keys:
            value = getattr(config, key, None)
            if value is not None and not fits(value):
                raise UserError(f"{key} must be {what}, not {value}")
