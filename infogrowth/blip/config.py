"""What a BLIP is made of: one frozen dataclass, presets, and ``config.json`` in two dialects."""

import dataclasses
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from infogrowth.errors import UserError
from infogrowth.files import atomic_write_json, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Stem = Literal["patch", "conv"]

# A convolutional stem halves the image's sides four times.
STEM_PATCH = 16

FORMAT = "infogrowth-blip"
CONFIG_FILE = "config.json"


@dataclasses.dataclass(frozen=True)
class BlipConfig:
    """Sizes of the image transformer, the text transformer and the shared feature space.

    The defaults are BLIP with ViT-B/16, as its published checkpoints have it. Token ids live here
    so that a model needs no tokenizer to know which token opens an encoder or a decoder text.
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
        if self.image_size % self.patch_size:
            raise UserError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.vision_stem not in get_args(Stem):
            raise UserError(f"vision_stem must be patch or conv, not {self.vision_stem!r}")
        if self.vision_stem == "conv" and self.patch_size != STEM_PATCH:
            raise UserError(
                f"the conv stem makes one token of {STEM_PATCH} × {STEM_PATCH} pixels; "
                f"patch_size must be {STEM_PATCH}, not {self.patch_size}"
            )
        for side in ("vision", "text"):
            width, heads = getattr(self, f"{side}_width"), getattr(self, f"{side}_heads")
            if width % heads:
                raise UserError(f"{side}_width {width} is not a multiple of {side}_heads {heads}")

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
    def from_folder(cls, directory: str | os.PathLike[str]) -> "BlipConfig":
        """Read ``config.json`` of a BLIP folder, ours or Hugging Face's.

        Raises:
            UserError: no such file, not a BLIP, or a key that does not belong.
        """
        path = Path(directory) / CONFIG_FILE
        return cls.from_dict(read_json(path, "the model configuration"), str(path))

    @classmethod
    def from_dict(cls, values: Any, source: str) -> "BlipConfig":
        """The configuration that ``values`` (of ``source``) describe.

        Raises:
            UserError: not a BLIP, or a key that does not belong.
        """
        if not isinstance(values, dict):
            raise UserError(f"{source} is not a model configuration (a JSON object)")
        if values.get("model_type") == "blip":
            return from_huggingface(values)
        if values.get("format") != FORMAT:
            kind = values.get("model_type", "an unknown format")
            raise UserError(f"{source} describes {kind}, not a BLIP")
        values = {key: value for key, value in values.items() if key != "format"}
        unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"{source} has keys that no BLIP has: {', '.join(unknown)}")
        return cls(**values)


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
    if name not in _PRESETS:
        raise UserError(f"no BLIP preset is called {name!r}; there are {', '.join(_PRESETS)}")
    return BlipConfig(**{**_PRESETS[name], **changes})


def is_blip_config(values: dict[str, Any]) -> bool:
    """Whether ``values`` say that they describe a BLIP, in our dialect or Hugging Face's."""
    return values.get("format") == FORMAT or values.get("model_type") == "blip"


def from_huggingface(values: dict[str, Any]) -> BlipConfig:
    """Translate the ``config.json`` of a Hugging Face BLIP (``model_type: blip``)."""
    from transformers import BlipConfig as HuggingFaceConfig

    # Filled with the defaults of transformers: its files may leave fields out.
    full = HuggingFaceConfig.from_dict(values).to_dict()
    vision, text = full["vision_config"], full["text_config"]
    # [ENC] is not in that file: BLIP appends it right after [DEC].
    return BlipConfig(
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        vision_width=vision["hidden_size"],
        vision_depth=vision["num_hidden_layers"],
        vision_heads=vision["num_attention_heads"],
        vision_feedforward=vision["intermediate_size"],
        vision_norm_eps=vision["layer_norm_eps"],
        text_width=text["hidden_size"],
        text_depth=text["num_hidden_layers"],
        text_heads=text["num_attention_heads"],
        text_feedforward=text["intermediate_size"],
        text_positions=text["max_position_embeddings"],
        text_norm_eps=text["layer_norm_eps"],
        text_dropout=float(text["hidden_dropout_prob"]),
        vocab_size=text["vocab_size"],
        pad_token_id=text["pad_token_id"],
        cls_token_id=values.get("cls_token_id", 101),
        sep_token_id=text["sep_token_id"],
        bos_token_id=text["bos_token_id"],
        enc_token_id=values.get("enc_token_id", text["bos_token_id"] + 1),
        embed_dim=full["image_text_hidden_size"],
    )


def to_huggingface(config: BlipConfig) -> dict[str, Any]:
    """The same as the ``config.json`` that ``transformers`` reads (without architectures)."""
    from transformers import BlipConfig as HuggingFaceConfig

    if config.vision_stem != "patch":
        raise UserError(
            "transformers knows no BLIP with a convolutional stem, so this model has no Hugging "
            "Face form; keep it as an official .pth or a folder of ours"
        )
    vision = {
        "hidden_size": config.vision_width,
        "intermediate_size": config.vision_hidden,
        "num_hidden_layers": config.vision_depth,
        "num_attention_heads": config.vision_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "layer_norm_eps": config.vision_norm_eps,
    }
    text = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.text_width,
        "encoder_hidden_size": config.vision_width,
        "intermediate_size": config.text_feedforward,
        "num_hidden_layers": config.text_depth,
        "num_attention_heads": config.text_heads,
        "max_position_embeddings": config.text_positions,
        "layer_norm_eps": config.text_norm_eps,
        "hidden_dropout_prob": config.text_dropout,
        "attention_probs_dropout_prob": config.text_dropout,
        "label_smoothing": 0.1,
        "pad_token_id": config.pad_token_id,
        "sep_token_id": config.sep_token_id,
        "eos_token_id": config.sep_token_id,
        "bos_token_id": config.bos_token_id,
    }
    values = HuggingFaceConfig(
        vision_config=vision,
        text_config=text,
        image_text_hidden_size=config.embed_dim,
        projection_dim=config.embed_dim,
        label_smoothing=0.1,
    ).to_dict()
    # transformers keeps keys it does not know, so these two travel with the folder.
    return {**values, "cls_token_id": config.cls_token_id, "enc_token_id": config.enc_token_id}


def infer_config(state: dict[str, torch.Tensor], **changes: Any) -> BlipConfig:
    """A BLIP's configuration from its weights under official names (a ``.pth`` has no config file).

    Heads leave no trace in the weights. 64 channels a head are assumed, as in all of BLIP's
    published ones, with a warning where the width is not one of theirs.

    Args:
        changes: fields to set instead of inferring, for example ``vision_heads``.

    Raises:
        UserError: the names are not a BLIP's, or the width is no multiple of 64.
    """
    try:
        conv = "visual_encoder.patch_embed.proj.0.0.weight" in state
        if conv:
            width, patch = state["visual_encoder.pos_embed"].shape[2], STEM_PATCH
        else:
            width, _, patch, _ = state["visual_encoder.patch_embed.proj.weight"].shape
        positions = state["visual_encoder.pos_embed"].shape[1]
        text = "text_encoder." if "text_encoder.embeddings.LayerNorm.bias" in state else None
        text = text or "text_decoder.bert."
        vocab, text_width = state[f"{text}embeddings.word_embeddings.weight"].shape
        inferred: dict[str, Any] = {
            "image_size": round((positions - 1) ** 0.5) * patch,
            "patch_size": patch,
            "vision_stem": "conv" if conv else "patch",
            "vision_width": width,
            "vision_depth": _count(state, "visual_encoder.blocks."),
            "vision_feedforward": state["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
            "text_width": text_width,
            "text_depth": _count(state, f"{text}encoder.layer."),
            "text_feedforward": state[f"{text}encoder.layer.0.intermediate.dense.weight"].shape[0],
            "text_positions": state[f"{text}embeddings.position_embeddings.weight"].shape[0],
            "vocab_size": vocab,
        }
    except (KeyError, ValueError) as error:
        raise UserError(f"these weights are not a BLIP's: no usable {error}") from error
    if "vision_proj.weight" in state:
        inferred["embed_dim"] = state["vision_proj.weight"].shape[0]
    for side in ("vision", "text"):
        inferred[f"{side}_heads"] = changes.get(f"{side}_heads") or _heads(
            side, inferred[f"{side}_width"]
        )
    return BlipConfig(**{**inferred, **changes})


def _heads(side: str, width: int) -> int:
    """BLIP's number of heads at ``width``, with a warning where it is a guess."""
    unknown = f"weights do not show the number of {side} attention heads"
    if width % 64:
        raise UserError(f"{unknown}; put the model's {CONFIG_FILE} beside them")
    if width not in (768, 1024):
        logger.warning(
            "%s, and there is no %s beside: assuming %d", unknown, CONFIG_FILE, width // 64
        )
    return width // 64


def _count(state: dict[str, torch.Tensor], prefix: str) -> int:
    """How many numbered blocks stand under ``prefix``."""
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})
