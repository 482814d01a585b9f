"""Files of weights, on disk or from the Hugging Face hub: every kind is read as one dictionary of
tensors under BLIP's official names, never unpickling code; and how these relate to other names."""

import json
import logging
import os
import pickle
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError, safe_open

from infogrowth.blip.config import CONFIG_FILE, STEM_PATCH, BlipConfig
from infogrowth.errors import UserError, refusing, shorten
from infogrowth.files import read_json

logger = logging.getLogger(__name__)

_FOLDER_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # the first that a repository has
_EXTENSIONS = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
# Under what training programs keep a model's weights, and what wrappers do to the names.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
_PREFIXES = ("module.", "model.")
_INSERTED = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# Parts of official names and what Hugging Face calls them; text and heads are called alike.
_HUGGINGFACE_NAMES = {
    "visual_encoder.cls_token": "vision_model.embeddings.class_embedding",
    "visual_encoder.pos_embed": "vision_model.embeddings.position_embedding",
    "visual_encoder.patch_embed.proj.": "vision_model.embeddings.patch_embedding.",
    "visual_encoder.norm.": "vision_model.post_layernorm.",
    "visual_encoder.blocks.": "vision_model.encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
}
# BlipModel's own names for what the retrieval class calls otherwise.
_BLIP_MODEL_NAMES = {
    "text_encoder.": "text_model.",
    "vision_proj.": "visual_projection.",
    "text_proj.": "text_projection.",
}
WORD_EMBEDDINGS = "embeddings.word_embeddings.weight"
_DECODER = "text_decoder.bert."
_OUTPUT = "text_decoder.cls.predictions."
_PARTS = ("visual_encoder", "text_encoder", "text_decoder", "vision_proj", "text_proj", "itm_head")
_QUEUES = ("image_queue", "text_queue", "idx_queue", "queue_ptr", "ptr_queue", "class_vectors")


@dataclass(frozen=True)
class Weights:
    """Weights as read: tensors under official names, where from, and how they were laid out."""

    tensors: dict[str, torch.Tensor]
    source: str
    layout: str  # "official" or "huggingface"
    config: BlipConfig | None = None  # when the file or a config.json beside it has one


def read_weights(path: str | os.PathLike[str]) -> Weights:
    """Read weights under official names, and the configuration in the file or beside it.

    Args:
        path: an official ``.pth`` (tensors under the key ``model``), a checkpoint of ours, a
            ``.safetensors`` file, a BLIP folder of ours or of Hugging Face, or a name on the
            Hugging Face hub.

    Raises:
        UserError: nothing there, no network for a name, or a file that is not plain weights.
    """
    file = locate(path)
    tensors, config = read_file(file)
    if not Path(path).exists():  # a name on the hub: its configuration lands beside the weights
        download(str(path), CONFIG_FILE)
    known, beside = BlipConfig.from_dict(config, str(file)), file.parent / CONFIG_FILE
    if known is None and beside.is_file():
        # A run's folder may keep some other config.json beside its checkpoints.
        known = BlipConfig.from_dict(read_json(beside, "the model configuration"), str(beside))
    if any(name.startswith("vision_model.") for name in tensors):
        return Weights(_from_huggingface(tensors), str(file), "huggingface", known)
    return Weights(tensors, str(file), "official", known)


def locate(path: str | os.PathLike[str]) -> Path:
    """The weight file that ``path`` means; names that are no local path are asked of the hub."""
    local = Path(path)
    if local.is_dir():
        found = [local / name for name in _FOLDER_FILES if (local / name).is_file()]
        if not found:
            raise UserError(f"the folder {local} holds none of {', '.join(_FOLDER_FILES)}")
        return found[0]
    if local.is_file():
        return local
    if local.is_absolute() or local.suffix in _EXTENSIONS or len(local.parts) > 2:
        raise UserError(f"the checkpoint {local} does not exist; check the path")
    return download(str(path), *_HUB_FILES)


def download(name: str, *filenames: str) -> Path:
    """Path of the first of ``filenames`` that the hub's repository ``name`` has (cached).

    Raises:
        UserError: no network, no such repository, or none of the files in it.
    """
    from huggingface_hub import hf_hub_download

    problem: Exception | None = None
    for filename in filenames:
        try:
            return Path(hf_hub_download(name, filename, local_files_only=not _hub_resolves()))
        except Exception as error:  # the hub client raises many kinds; all mean it is not there
            problem = problem or error
    raise UserError(
        f"{name!r} is not a local path, and the Hugging Face hub did not give "
        f"{' or '.join(filenames)} ({shorten(problem)}); check the name and the network, or give "
        "a local path (`random` where weights are only a starting point)"
    ) from problem


def _hub_resolves() -> bool:
    """Whether the hub can be asked at all: without a name server its client retries for long."""
    from huggingface_hub.constants import ENDPOINT

    if any(key.lower() in ("https_proxy", "all_proxy") for key in os.environ):
        return True  # the proxy resolves names, this machine need not
    try:
        return bool(socket.getaddrinfo(urlsplit(ENDPOINT).hostname, 443))
    except OSError:
        return False


def read_file(file: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """The named tensors of one file, on the CPU, under the names that it has; and the model
    configuration in it, if any.

    Raises:
        UserError: not a weight file, damaged, or a pickle that holds more than tensors.
    """
    if file.name.endswith(".index.json"):
        shards = sorted(set(read_json(file, "the weight index")["weight_map"].values()))
        parts = [read_file(file.parent / shard)[0] for shard in shards]
        return {name: tensor for part in parts for name, tensor in part.items()}, None
    if file.suffix not in _EXTENSIONS:
        known = ", ".join(_EXTENSIONS)
        raise UserError(f"{file} is not a weight file by its extension (known: {known})")
    if file.suffix == ".safetensors":
        with (
            refusing(file, "the checkpoint", SafetensorError, ValueError),
            safe_open(file, "pt") as opened,
        ):
            config = json.loads((opened.metadata() or {}).get("config", "null"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return _unwrapped(tensors), config
    content = read_plain(file)
    content = content if isinstance(content, dict) else {}
    config = content.get("config")
    while inner := [content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)]:
        content = inner[0]
    tensors = {name: each for name, each in content.items() if isinstance(each, torch.Tensor)}
    if not tensors:
        keys = ", ".join(map(repr, _WRAPPERS))
        raise UserError(f"{file} holds no named weights, neither at its top nor under {keys}")
    return _unwrapped(tensors), config


def read_plain(file: str | os.PathLike[str]) -> Any:
    """What ``torch.save`` wrote, tensors on the CPU; nothing in it is executed.

    Raises:
        UserError: no such file, damaged, or more than tensors and plain values.
    """
    with refusing(file, "the checkpoint", RuntimeError, EOFError, ValueError, KeyError):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{file} cannot be read: it is damaged, or holds code, which is never unpickled"
            ) from error


def _unwrapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights without what torch.compile, FSDP and activation checkpointing put into names, and
    without what DistributedDataParallel and Lightning put before all of them."""
    tensors = {_INSERTED.sub("", name): tensor for name, tensor in tensors.items()}
    for prefix in _PREFIXES * 2:
        if all(name.startswith(prefix) for name in tensors if "." in name):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def to_huggingface_name(name: str) -> str:
    """Hugging Face's name of an official one."""
    return _renamed(name, _HUGGINGFACE_NAMES.items())


def _from_huggingface(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under official names. ``BlipModel`` keeps a log scale where BLIP keeps a temperature,
    and its projections have no bias; both are brought over."""
    names = {**_HUGGINGFACE_NAMES, **_BLIP_MODEL_NAMES}
    renames = [(theirs, ours) for ours, theirs in names.items()]
    state = {_renamed(name, renames): tensor for name, tensor in tensors.items()}
    if "logit_scale" in state:
        state["temp"] = torch.exp(-state.pop("logit_scale").float())
        for head in ("vision_proj", "text_proj"):
            if f"{head}.weight" in state:
                weight = state[f"{head}.weight"]
                state.setdefault(f"{head}.bias", weight.new_zeros(len(weight)))
    return state


def _renamed(name: str, parts: Iterable[tuple[str, str]]) -> str:
    for old, new in parts:
        name = name.replace(old, new)
    return name


def tied_name(name: str) -> str:
    """The first of the official names that share a parameter with ``name`` in BLIP pretraining: its
    decoder is the text encoder but for self-attention, its output layer the word embeddings."""
    if name == f"{_OUTPUT}decoder.bias":
        return f"{_OUTPUT}bias"
    if name == f"{_OUTPUT}decoder.weight":
        name = f"{_DECODER}{WORD_EMBEDDINGS}"
    if name.startswith(_DECODER) and ".attention." not in name:
        return f"text_encoder.{name.removeprefix(_DECODER)}"
    return name


def is_momentum(name: str) -> bool:
    """Whether ``name`` belongs to a momentum encoder."""
    return name.split(".")[0].endswith("_m")


def is_queue(name: str) -> bool:
    """Whether ``name`` is a queue, the pointer of one, or the class vectors: only training's."""
    return name in _QUEUES


def is_known(name: str) -> bool:
    """Whether ``name`` belongs to a part that some BLIP has, needed by a model here or not."""
    part = name.split(".")[0].removesuffix("_m")
    return not name.startswith("text_encoder.pooler.") and part in (*_PARTS, "temp", *_QUEUES)


def infer_config(tensors: dict[str, torch.Tensor]) -> BlipConfig:
    """A BLIP's configuration from its weights (an official ``.pth`` comes without one).

    Heads leave no trace in the weights. 64 channels a head are assumed, as in all of BLIP's
    published ones, with a warning where the width is not one of theirs.

    Raises:
        UserError: the names are not a BLIP's, or the width is no multiple of 64.
    """
    try:
        sizes = _sizes(tensors)
    except (KeyError, ValueError) as error:
        raise UserError(f"these weights are not a BLIP's: no usable {error}") from error
    for side in ("vision", "text"):
        width = sizes[f"{side}_width"]
        unknown = f"weights do not show the number of {side} attention heads"
        if width % 64:
            raise UserError(f"{unknown}; put the model's {CONFIG_FILE} beside them")
        if width not in (768, 1024):
            logger.warning("%s: assuming %d (no %s)", unknown, width // 64, CONFIG_FILE)
        sizes[f"{side}_heads"] = width // 64
    return BlipConfig(**sizes)


def _sizes(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The fields of a configuration that show in the sizes of weights."""
    text = "text_encoder." if f"text_encoder.{WORD_EMBEDDINGS}" in tensors else _DECODER

    def count(prefix: str) -> int:
        return len({n[len(prefix) :].split(".")[0] for n in tensors if n.startswith(prefix)})

    stem, patch = "conv", STEM_PATCH
    if "visual_encoder.patch_embed.proj.0.0.weight" not in tensors:
        stem, (_, _, patch, _) = "patch", tensors["visual_encoder.patch_embed.proj.weight"].shape
    _, positions, vision_width = tensors["visual_encoder.pos_embed"].shape
    vocabulary, text_width = tensors[f"{text}{WORD_EMBEDDINGS}"].shape
    sizes = {
        "image_size": round((positions - 1) ** 0.5) * patch,
        "patch_size": patch,
        "vision_stem": stem,
        "vision_width": vision_width,
        "vision_depth": count("visual_encoder.blocks."),
        "vision_feedforward": len(tensors["visual_encoder.blocks.0.mlp.fc1.weight"]),
        "text_width": text_width,
        "text_depth": count(f"{text}encoder.layer."),
        "text_feedforward": len(tensors[f"{text}encoder.layer.0.intermediate.dense.weight"]),
        "text_positions": len(tensors[f"{text}embeddings.position_embeddings.weight"]),
        "vocab_size": vocabulary,
    }
    if "vision_proj.weight" in tensors:
        sizes["embed_dim"] = len(tensors["vision_proj.weight"])
    return sizes
