"""Writing a BLIP's weights for each reader: official ``.pth``, our folder, Hugging Face's."""

import json
import os
import tempfile
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from infogrowth.blip.config import BlipConfig, to_huggingface
from infogrowth.blip.names import is_momentum, is_queue, to_huggingface_name
from infogrowth.blip.tokenizer import save_vocabulary
from infogrowth.errors import UserError
from infogrowth.files import atomic_write, atomic_write_json

Layout = Literal["official", "safetensors", "huggingface"]

_RETRIEVAL_PARTS = ("visual_encoder.", "text_encoder.", "vision_proj.", "text_proj.", "itm_head.")
_GENERATION_PARTS = ("visual_encoder.", "text_decoder.")
_IMAGE_MEAN = [0.48145466, 0.4578275, 0.40821073]
_IMAGE_STD = [0.26862954, 0.26130258, 0.27577711]


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
    config = _config(model)
    if layout == "official":
        with atomic_write(path) as file:
            state = _with_positions(model)
            if not momentum:
                state = {k: v for k, v in state.items() if not (is_momentum(k) or is_queue(k))}
            torch.save({"model": state, "config": config.as_dict()}, file)
    elif layout == "safetensors":
        with atomic_write(path) as file:
            file.write(_safetensors(unique_state(model), config))
    elif layout == "huggingface":
        _save_huggingface(model, Path(path), tokenizer, task)
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
        file.write(_safetensors(state, _config(model)))
    _config(model).to_folder(directory)


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


def _safetensors(state: dict[str, torch.Tensor], config: BlipConfig | None = None) -> bytes:
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


def _save_huggingface(
    model: nn.Module,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    task: str | None,
) -> None:
    parts = {name.split(".")[0] for name in model.state_dict()}
    task = task or ("retrieval" if "text_encoder" in parts else "captioning")
    prefixes = _RETRIEVAL_PARTS if task == "retrieval" else _GENERATION_PARTS
    if not {prefix.rstrip(".") for prefix in prefixes} <= parts:
        raise UserError(f"this model lacks parts that a BLIP for {task} has; it is not written")
    state = {k: v for k, v in model.state_dict().items() if k.startswith(prefixes)}
    once = {v.data_ptr(): k for k, v in reversed(state.items())}
    renamed = {to_huggingface_name(name): state[name] for name in once.values()}
    # transformers ties the output layer itself and wants it under these names only.
    with atomic_write(directory / "model.safetensors") as file:
        file.write(_safetensors(renamed))
    if tokenizer is not None:
        _save_tokenizer(tokenizer, directory)
    config = _config(model)
    atomic_write_json(directory / "preprocessor_config.json", _preprocessor(config), indent=2)
    architecture = {
        "retrieval": "BlipForImageTextRetrieval",
        "captioning": "BlipForConditionalGeneration",
    }[task]
    values = {**to_huggingface(config), "architectures": [architecture]}
    atomic_write_json(directory / "config.json", values, indent=2)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    save_vocabulary(tokenizer, directory)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        for source in sorted(Path(scratch).iterdir()):
            if source.name != "vocab.txt":
                with atomic_write(directory / source.name) as file:
                    file.write(source.read_bytes())


def _config(model: nn.Module) -> BlipConfig:
    """The shape that every model of this package carries."""
    config = model.config
    assert isinstance(config, BlipConfig)
    return config


def _preprocessor(config: BlipConfig) -> dict[str, object]:
    """How ``transformers`` should prepare images for this model."""
    side = config.image_size
    return {
        "image_processor_type": "BlipImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _IMAGE_MEAN,
        "image_std": _IMAGE_STD,
        "do_convert_rgb": True,
    }
