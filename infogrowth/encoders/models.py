"""What the commands ask of a model (encode pairs, or caption), how it is run and identified.

Shape letters: B batch, C channels, H height, W width, D feature dimension.
"""

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import nn
from torch.nn import functional

Preprocess = Callable[[Image.Image], torch.Tensor]
"""An RGB image to one CHW tensor, the way the model is evaluated. It travels to the workers that
decode, so it is picklable and does not hold the model; uint8 (normalised later, on the device)
costs a quarter of the memory traffic of float32."""

Tokens = dict[str, torch.Tensor]
Tokenize = Callable[[list[str]], Tokens]
"""Captions as people wrote them to what the text encoder reads, in the same workers."""

Result = TypeVar("Result")


class DualEncoder(ABC):
    """An image encoder and a text encoder that share one feature space.

    It is in evaluation mode (no dropout), never augments, and gives one sample the same feature
    wherever it stands in the dataset. It is called from several threads.

    On CUDA it computes in float16 (its rounding is that of the feature files); a batch in which
    float16 overflowed is computed again in float32, so that a sample is never lost to the
    precision. On a CPU everything is float32.

    Args:
        model: any; its parameters will not be trained any more.
        device: where it runs.
    """

    name: str
    """What the user called it: "tiny", a path, a hub name."""
    fingerprint: str
    """Of the weights, configuration and vocabulary that the features depend on, the same on every
    device; an official .pth and the Hugging Face folder of the same model may share it."""
    dimension: int
    """D, the length of a feature."""

    preprocess: Preprocess
    tokenize: Tokenize

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self._model = model.eval().requires_grad_(False).to(device)
        on_cuda = device.type == "cuda"
        self._fast = half_products(copy.deepcopy(self._model)) if on_cuda else self._model

    @abstractmethod
    def image_features(self, model: Any, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Preprocessed images through ``model`` to ``(B, D)``, of any length, all on the device."""

    @abstractmethod
    def text_features(self, model: Any, tokens: Tokens) -> torch.Tensor:
        """Tokenized captions through ``model`` to ``(B, D)``, of any length, all on the device."""

    def encode_images(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """A stack of preprocessed images to ``(B, D) float32`` unit rows, on the CPU; a zero or
        non-finite row stays what it is."""
        images_BCHW = images_BCHW.to(self.device, non_blocking=True)
        return self._unit_rows(lambda model: self.image_features(model, images_BCHW))

    def encode_tokens(self, tokens: Tokens) -> torch.Tensor:
        """Tokenized captions, likewise."""
        on_device = moved(tokens, self.device)
        return self._unit_rows(lambda model: self.text_features(model, on_device))

    def encode_texts(self, captions: list[str]) -> torch.Tensor:
        """Captions, likewise."""
        return self.encode_tokens(self.tokenize(captions))

    def _unit_rows(self, compute: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        with torch.inference_mode():
            with half_on_cuda(self.device):
                rows = functional.normalize(compute(self._fast).float(), dim=-1).cpu()
            if self._fast is not self._model and not torch.isfinite(rows).all():
                rows = functional.normalize(compute(self._model).float(), dim=-1).cpu()
            return rows


class Captioner(ABC):
    """A model that describes an image; the same image always gets the same words."""

    name: str
    fingerprint: str

    preprocess: Preprocess

    def caption(self, images: Sequence[Any] | torch.Tensor) -> list[str]:
        """What ``preprocess`` gave for some images, CHW each (sizes may differ), to one caption
        each; an empty string where the model had nothing to say."""
        tensors = [torch.as_tensor(image) for image in images]
        return halving(self.describe, tensors) if tensors else []

    @abstractmethod
    def describe(self, images: list[torch.Tensor]) -> list[str]:
        """As :meth:`caption`, of at least one image, on a device that has memory for all."""


def fingerprint(weights: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> str:
    """Hash weights and settings into 32 hex digits, so that a changed model is noticed.

    The tensors are hashed, not the files that held them: a momentum copy, an optimizer state or
    another file layout makes no difference, one changed weight does. Nor does the device: what the
    weights are in float32 is hashed, so hash them before they are rounded for a GPU. It costs one
    pass over the weights (about a second for a billion bytes), less than loading them did.

    Args:
        weights: every tensor that takes part, by name; the order of the mapping does not matter.
        settings: what else the feature depends on (sizes, vocabulary, preprocessing), as JSON.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def half_products(model: nn.Module) -> nn.Module:
    """Store as float16 what autocast would convert in every call: the weights of matrix products.

    Under autocast the results are the same to the bit; norms and sums stay float32.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.half()
    return model


def half_on_cuda(device: torch.device) -> torch.autocast:
    """float16 autocast on CUDA, nothing on a CPU (where half precision is slower)."""
    return torch.autocast(device.type, dtype=torch.float16, enabled=device.type == "cuda")


def halving(compute: Callable[[Any], list[Result]], items: Sequence[Any] | torch.Tensor) -> Any:
    """``compute`` of all items, by halves where the device has no memory for all at once."""
    try:
        return compute(items)
    except torch.OutOfMemoryError:
        if len(items) == 1:
            raise
    torch.cuda.empty_cache()
    middle = len(items) // 2
    return halving(compute, items[:middle]) + halving(compute, items[middle:])


TOKENIZING = Lock()  # tokenizers refuse to be shared between threads: one at a time uses them


class CaptionTokenizer:
    """A tokenizer of transformers for many threads and processes.

    Args:
        prepare: what is done to a caption first.
        options: how it is called, as padding and truncation.
    """

    def __init__(self, tokenizer: Any, prepare: Callable[[str], str] = str, **options: Any) -> None:
        self._tokenizer, self._prepare, self._options = tokenizer, prepare, options

    def __call__(self, captions: list[str]) -> Tokens:
        texts = [self._prepare(caption) for caption in captions]
        with TOKENIZING:
            return dict(
                self._tokenizer(texts, truncation=True, return_tensors="pt", **self._options)
            )


def moved(tokens: Tokens, device: torch.device) -> Tokens:
    """Tokens on the device; from page-locked memory they are copied in passing."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tokens.items()}
