"""Running a model the same way everywhere: no gradient, half precision on CUDA alone."""

import copy
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import nn
from torch.nn import functional

Result = TypeVar("Result")


class UnitFeatures:
    """A model that gives features, normalised to length one, on its device.

    On CUDA it computes in float16 (its rounding is that of the feature files); a batch in which
    float16 overflowed is computed again in float32, so that a sample is never lost to the
    precision. On a CPU everything is float32.

    Args:
        model: any; its parameters will not be trained any more.
        device: where it runs.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self.model = model.eval().requires_grad_(False).to(device)
        on_cuda = device.type == "cuda"
        self._fast = half_products(copy.deepcopy(self.model)) if on_cuda else self.model

    def __call__(self, compute: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """``(B, D) float32`` unit rows on the CPU; a zero or non-finite row stays what it is.

        Args:
            compute: runs the model that it is given, to ``(B, D)``.
        """
        with torch.inference_mode():
            with half_on_cuda(self.device):
                rows = _unit_rows(compute(self._fast))
            if self._fast is not self.model and not torch.isfinite(rows).all():
                rows = _unit_rows(compute(self.model))
            return rows


def _unit_rows(features_BD: torch.Tensor) -> torch.Tensor:
    return functional.normalize(features_BD.float(), dim=-1).cpu()


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


class CaptionTokenizer:
    """A tokenizer of transformers for many threads and processes.

    Args:
        tokenizer: refuses to be shared between threads, so one at a time uses it.
        prepare: what is done to a caption first.
        options: how it is called, as padding and truncation.
    """

    def __init__(
        self, tokenizer: Any, prepare: Callable[[str], str] | None = None, **options: Any
    ) -> None:
        self._tokenizer, self._prepare, self._options = tokenizer, prepare, options
        self._lock = Lock()

    def __call__(self, captions: list[str]) -> dict[str, torch.Tensor]:
        texts = [self._prepare(caption) for caption in captions] if self._prepare else captions
        with self._lock:
            return dict(
                self._tokenizer(texts, truncation=True, return_tensors="pt", **self._options)
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())


def moved(tensors: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Tensors by name on the device; from page-locked memory they are copied in passing."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def pixels(image: Image.Image) -> torch.Tensor:
    """An RGB image as uint8 ``(3, H, W)``."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.reshape(image.height, image.width, 3).permute(2, 0, 1).contiguous()
