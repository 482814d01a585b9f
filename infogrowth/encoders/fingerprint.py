"""One short hash for everything that a feature depends on, so that a changed model is noticed."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch


def fingerprint(weights: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> str:
    """Hash weights and settings into 32 hex digits.

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
