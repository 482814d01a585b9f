"""The sizes of a BLIP: one frozen dataclass, presets, and ``config.json`` in two dialects."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from infogrowth.config import build_config
from infogrowth.errors import UserError
from infogrowth.files import atomic_write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Stem = Literal["patch", "conv"]

# A convolutional stem halves the image's sides four times.
STEM_PATCH = 16

FORMAT = "infogrowth-blip"
CONFIG_FILE = "config.json"

# What transformers calls the fields, in the two parts of its own configuration.
_SIZES = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "feedforward": "intermediate_size",
    "norm_eps": "layer_norm_eps",
}
_VISION_NAMES = {
    **{f"vision_{ours}": theirs for ours, theirs in _SIZES.items()},
    **{name: name for name in ("image_size", "patch_size")},
}
_TEXT_NAMES = {
    **{f"text_{ours}": theirs for ours, theirs in _SIZES.items()},
    "text_positions": "max_position_embeddings",
    "text_dropout": "hidden_dropout_prob",
    **{name: name for name in ("vocab_size", "pad_token_id", "sep_token_id", "bos_token_id")},
}


@dataclasses.dataclass(frozen=True)
class BlipConfig:
    """Sizes of the image transformer, the text transformer and the shared feature space.

    The defaults are BLIP with ViT-B/16, as its published checkpoints have it. Token ids live here
    so that a model needs no tokenizer to know which token opens an encoder or a decoder text.

    Raises:
        UserError: sizes that do not divide.
    """

    image_size: int = 224
    patch_size: int = 16
    vision_stem: Stem = "patch"  # what makes tokens of an image's pixels
    vision_width: int = 768
    vision_depth: int = 12
    vision_heads: int = 12
    vision_feedforward: int | None = None  # None: four times the width
    vision_norm_eps: float = 1e-6
    drop_path: float = 0.0
    text_width: int = 768
    text_depth: int = 12
    text_heads: int = 12
    text_feedforward: int = 3072
    text_positions: int = 512
    text_norm_eps: float = 1e-12
    text_dropout: float = 0.1
    vocab_size: int = 30524
    pad_token_id: int = 0
    cls_token_id: int = 101
    sep_token_id: int = 102
    bos_token_id: int = 30522
    enc_token_id: int = 30523
    embed_dim: int = 256

    def __post_init__(self) -> None:
        for size, part in (
            ("image_size", "patch_size"),
            ("vision_width", "vision_heads"),
            ("text_width", "text_heads"),
        ):
            whole, each = getattr(self, size), getattr(self, part)
            if whole % each:
                raise UserError(f"{size} {whole} is not a multiple of {part} {each}")
        if self.vision_stem == "conv" and self.patch_size != STEM_PATCH:
            raise UserError(f"the conv stem needs patch_size {STEM_PATCH}, not {self.patch_size}")

    @property
    def vision_hidden(self) -> int:
        """Width of the image transformer's feed-forward layer."""
        return self.vision_feedforward or 4 * self.vision_width

    def replace(self, **changes: Any) -> "BlipConfig":
        """This configuration with some fields changed."""
        return dataclasses.replace(self, **changes)

    def with_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> "BlipConfig":
        """This configuration with the tokenizer's vocabulary size and special ids."""
        names = ("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "enc_token_id")
        ids = {name: int(getattr(tokenizer, name)) for name in names}
        return self.replace(vocab_size=len(tokenizer), **ids)

    def as_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    def to_folder(self, directory: str | os.PathLike[str]) -> None:
        """Write ``config.json`` into ``directory``."""
        atomic_write_json(Path(directory) / CONFIG_FILE, self.as_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: object, source: str) -> "BlipConfig | None":
        """The configuration of a ``config.json`` (``source``), in our dialect or Hugging Face's;
        None when it is something else's.

        Raises:
            UserError: a key that does not belong, or a value of the wrong type.
        """
        if not isinstance(values, dict):
            return None
        if values.get("model_type") == "blip":
            values = _from_huggingface(values)
        elif values.get("format") != FORMAT:
            return None
        given = {k: (v, f"key {k!r} in {source}") for k, v in values.items() if k != "format"}
        return build_config(cls, given)

    def text_options(self) -> dict[str, Any]:
        """The text transformers as ``transformers.BlipTextConfig`` takes them; dropout is BLIP's,
        whose default differs from theirs."""
        options = {theirs: getattr(self, ours) for ours, theirs in _TEXT_NAMES.items()}
        return {
            **options,
            "encoder_hidden_size": self.vision_width,
            "attention_probs_dropout_prob": self.text_dropout,
            "eos_token_id": self.sep_token_id,
        }

    def to_huggingface(self) -> dict[str, Any]:
        """What ``transformers.BlipConfig`` takes.

        Raises:
            UserError: a conv stem, which transformers does not have.
        """
        if self.vision_stem != "patch":
            raise UserError(
                "transformers has no BLIP with a convolutional stem: give --to official"
            )
        vision = {theirs: getattr(self, ours) for ours, theirs in _VISION_NAMES.items()}
        return {
            "vision_config": {**vision, "intermediate_size": self.vision_hidden},
            "text_config": {**self.text_options(), "label_smoothing": 0.1},
            "image_text_hidden_size": self.embed_dim,
            "projection_dim": self.embed_dim,
            "label_smoothing": 0.1,
            # transformers keeps keys it does not know, so these two travel with the folder.
            "cls_token_id": self.cls_token_id,
            "enc_token_id": self.enc_token_id,
        }


_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "image_size": 64,
        "vision_stem": "conv",
        "vision_width": 192,
        "vision_depth": 2,
        "vision_heads": 3,
        "text_width": 192,
        "text_depth": 2,
        "text_heads": 3,
        "text_feedforward": 768,
        "text_positions": 64,
        "embed_dim": 128,
    },
    "base": {},
    "large": {"vision_width": 1024, "vision_depth": 24, "vision_heads": 16, "drop_path": 0.1},
}


def preset(name: str, **changes: Any) -> BlipConfig:
    """The configuration ``tiny`` (for a laptop), ``base`` (ViT-B/16) or ``large`` (ViT-L/16)."""
    return BlipConfig(**{**_PRESETS[name], **changes})


def _from_huggingface(values: dict[str, Any]) -> dict[str, Any]:
    """Our fields of the ``config.json`` of a Hugging Face BLIP."""
    from transformers import BlipConfig as HuggingFaceConfig

    # Filled with the defaults of transformers: its files may leave fields out.
    full = HuggingFaceConfig.from_dict(values).to_dict()
    fields = {ours: full["vision_config"][theirs] for ours, theirs in _VISION_NAMES.items()}
    fields |= {ours: full["text_config"][theirs] for ours, theirs in _TEXT_NAMES.items()}
    return {
        **fields,
        "cls_token_id": values.get("cls_token_id", 101),
        # [ENC] is not in their file: BLIP appends it right after [DEC].
        "enc_token_id": values.get("enc_token_id", fields["bos_token_id"] + 1),
        "embed_dim": full["image_text_hidden_size"],
    }
