"""Running a model the same way everywhere: no gradient, half precision on CUDA alone."""

from collections.abc import Callable

import torch
from PIL import Image
from torch.nn import functional


def unit_rows(compute: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
    """Features of one batch, normalised to length one.

    On CUDA the model runs in float16 (its rounding is that of the feature files); a batch in which
    float16 overflowed is computed again in float32, so that a sample is never lost to the
    precision. On a CPU everything is float32.

    Args:
        compute: runs the model, giving ``(B, D)``.
        device: where it runs.

    Returns:
        ``(B, D) float32`` unit rows on the CPU; a zero or non-finite row stays what it is.
    """
    with torch.inference_mode():
        with half_on_cuda(device):
            features_BD = compute()
        if device.type == "cuda" and not torch.isfinite(features_BD).all():
            features_BD = compute()
        return functional.normalize(features_BD.float(), dim=-1).cpu()


def generate(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Token ids of one batch of captions, ``(B, L) int64`` on the CPU."""
    with torch.inference_mode():
        return compute().cpu()


def half_on_cuda(device: torch.device) -> torch.autocast:
    """float16 autocast on CUDA, nothing on a CPU (where half precision is slower)."""
    return torch.autocast(device.type, dtype=torch.float16, enabled=device.type == "cuda")


def pixels(image: Image.Image) -> torch.Tensor:
    """An RGB picture as uint8 ``(3, H, W)``."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.reshape(image.height, image.width, 3).permute(2, 0, 1).contiguous()
