"""Files of weights: every kind is read as one dictionary of tensors, never unpickling code; ours
and the official kind are written."""

import json
import os
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase

from infogrowth.blip.config import CONFIG_FILE, BlipConfig, is_blip_config
from infogrowth.blip.hub import download
from infogrowth.blip.names import is_momentum, is_queue, official_state
from infogrowth.blip.tokenizer import save_vocabulary
from infogrowth.errors import UserError
from infogrowth.files import atomic_write, read_json

Layout = Literal["official", "safetensors", "huggingface"]
_FOLDER_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_PICKLED = (".pth", ".pt", ".bin", ".ckpt")
# Under what training programs keep a model's weights, and what wrappers do to the names.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
_PREFIXES = ("module.", "model.")
_INSERTED = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class WeightFile:
    """Weights as read: tensors under official names, where from, and how they were laid out."""

    tensors: dict[str, torch.Tensor]
    source: str
    layout: str  # "official" or "huggingface"
    config: BlipConfig | None = None  # when the file or a config.json beside it has one


@dataclass(frozen=True)
class _Content:
    tensors: dict[str, torch.Tensor]
    config: object = None  # a configuration as a dictionary, in files of ours


def open_state(path: str | os.PathLike[str]) -> WeightFile:
    """Read weights under official names.

    Args:
        path: an official ``.pth`` (tensors under the key ``model``), a ``.safetensors`` file, a
            BLIP folder of ours or of Hugging Face, or a name on the Hugging Face hub.

    Raises:
        UserError: nothing there, no network for a name, or a file that is not plain weights.
    """
    file = locate(path)
    if not Path(path).exists():  # a name on the hub: its configuration lands beside the weights
        download(str(path), CONFIG_FILE)
    if file.name.endswith(".index.json"):
        shards = sorted(set(read_json(file, "the weight index")["weight_map"].values()))
        raw = {k: v for shard in shards for k, v in read_tensors(file.parent / shard).items()}
        content = _Content(raw)
    else:
        content = _read(file)
    tensors, layout = official_state(content.tensors)
    return WeightFile(tensors, str(file), layout, _config(content, file))


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The named tensors of one file, on CPU, under the names that it has.

    Raises:
        UserError: not a weight file, damaged, or a pickle that holds more than tensors.
    """
    return _read(file).tensors


def _config(content: _Content, file: Path) -> BlipConfig | None:
    """The configuration in the file itself, else by a BLIP's config.json beside it."""
    if content.config is not None:
        return BlipConfig.from_dict(content.config, str(file))
    beside = file.parent / CONFIG_FILE
    if beside.is_file():
        values = read_json(beside, "the model configuration")
        # A run's folder may keep some other config.json beside its checkpoints.
        if isinstance(values, dict) and is_blip_config(values):
            return BlipConfig.from_dict(values, str(beside))
    return None


def locate(path: str | os.PathLike[str]) -> Path:
    """The weight file that ``path`` means; names that are no local path are asked of the hub."""
    local = Path(path)
    if local.is_file():
        return local
    if local.is_dir():
        for name in _FOLDER_FILES:
            if (local / name).is_file():
                return local / name
        raise UserError(f"the folder {local} holds none of {', '.join(_FOLDER_FILES)}")
    if local.is_absolute() or local.suffix in (*_PICKLED, ".safetensors") or len(local.parts) > 2:
        raise UserError(f"the checkpoint {local} does not exist; check the path")
    return download(str(path), "model.safetensors", "pytorch_model.bin")


def _read(file: Path) -> _Content:
    if not file.is_file():
        raise UserError(f"the checkpoint {file} does not exist; check the path")
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return _Content(_unwrapped(tensors), json.loads(metadata.get("config", "null")))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is not a readable safetensors file: {error}") from error
    if file.suffix not in _PICKLED:
        kinds = ", ".join((*_PICKLED, ".safetensors"))
        raise UserError(f"{file} is not a weight file by its extension (known: {kinds})")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} holds more than plain weights (or is damaged), so it is not unpickled"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{file} is not a readable checkpoint: {reason}") from error
    return _tensors_of(content, file)


def _tensors_of(content: object, file: Path) -> _Content:
    described = content.get("config") if isinstance(content, dict) else None
    if not (isinstance(described, dict) and is_blip_config(described)):
        described = None  # official files keep settings of their training there
    while isinstance(content, dict):
        inner = next(
            (content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)), None
        )
        if inner is None:
            break
        content = inner
    tensors = content if isinstance(content, dict) else {}
    tensors = {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        keys = ", ".join(map(repr, _WRAPPERS))
        raise UserError(f"{file} holds no named weights, neither at its top nor under {keys}")
    return _Content(_unwrapped(tensors), described)


def _unwrapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights without what torch.compile, FSDP and activation checkpointing put into names, and
    without what DistributedDataParallel and Lightning put before all of them."""
    names = {name: _INSERTED.sub("", name) for name in tensors}
    dotted = [name for name in names.values() if "." in name]
    for prefix in _PREFIXES * 2:
        if dotted and all(name.startswith(prefix) for name in dotted):
            names = {name: short.removeprefix(prefix) for name, short in names.items()}
            dotted = [name.removeprefix(prefix) for name in dotted]
    return {names[name]: tensor for name, tensor in tensors.items()}


def save_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    layout: Layout = "official",
    tokenizer: PreTrainedTokenizerBase | None = None,
    task: Literal["retrieval", "captioning"] | None = None,
    momentum: bool = True,
) -> None:
    """Write the model's weights, whole or not at all.

    Args:
        path: a ``.pth`` file (``official``), a ``.safetensors`` file, or a folder
            (``huggingface``).
        layout: ``official`` has every name that BLIP's own files have, tied ones and
            ``position_ids`` too, under the key ``model``, and beside it the shape under
            ``config``; ``safetensors`` has each tensor once, and the shape in its metadata;
            ``huggingface`` is a folder that ``transformers`` opens.
        tokenizer: also written to a Hugging Face folder when given.
        task: which Hugging Face class to write for; default: captioning for a model without a
            text encoder, else retrieval.
        momentum: also keep momentum encoders and queues in an official file.
    """
    config = config_of(model)
    if layout == "official":
        with atomic_write(path) as file:
            state = _with_positions(model)
            if not momentum:
                state = {k: v for k, v in state.items() if not (is_momentum(k) or is_queue(k))}
            torch.save({"model": state, "config": config.as_dict()}, file)
    elif layout == "safetensors":
        with atomic_write(path) as file:
            file.write(safetensors_bytes(unique_state(model), config))
    elif layout == "huggingface":
        from infogrowth.blip.huggingface import save_huggingface

        save_huggingface(model, Path(path), tokenizer, task)
    else:
        raise UserError(
            f"weights are written as official, safetensors or huggingface, not {layout}"
        )


def save_folder(
    model: nn.Module,
    directory: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    momentum: bool = False,
) -> None:
    """Write a BLIP folder: ``vocab.txt``, ``model.safetensors``, and last ``config.json``.

    Args:
        momentum: also keep momentum encoders and queues, which only training needs.
    """
    state = unique_state(model)
    if not momentum:
        state = {k: v for k, v in state.items() if not is_momentum(k) and not is_queue(k)}
    save_vocabulary(tokenizer, directory)
    with atomic_write(Path(directory) / "model.safetensors") as file:
        file.write(safetensors_bytes(state, config_of(model)))
    config_of(model).to_folder(directory)


def unique_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors, each once, under the first of its (tied) names."""
    seen: set[int] = set()
    unique: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.numel() and tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        unique[name] = tensor
    return unique


def safetensors_bytes(state: dict[str, torch.Tensor], config: BlipConfig | None = None) -> bytes:
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {"format": "pt"}  # transformers refuses files without this
    if config is not None:
        metadata["config"] = json.dumps(config.as_dict())
    return _in_one_order(safetensors.torch.save(ready, metadata=metadata))


def _in_one_order(file: bytes) -> bytes:
    """The same file with its metadata sorted: safetensors writes them in a random order.

    The header is as long as before, so nothing behind it moves, and equal weights are equal bytes.
    """
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return file[:8] + text.ljust(length) + file[8 + length :]


def _with_positions(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with the constant ``position_ids`` that official files carry."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("embeddings.word_embeddings.weight"):
            prefix = name.removesuffix("word_embeddings.weight")
            length = len(model.get_parameter(f"{prefix}position_embeddings.weight"))
            state[f"{prefix}position_ids"] = torch.arange(length).expand(1, -1).clone()
        state[name] = tensor.detach().cpu()
    return state


def config_of(model: nn.Module) -> BlipConfig:
    """The shape that every model of this package carries."""
    config = model.config
    assert isinstance(config, BlipConfig)
    return config
