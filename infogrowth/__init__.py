"""Grow clean, diverse image–caption datasets and train BLIP on them (InfoGrowth, ECCV 2024).

    from infogrowth import InfoGrowth, Recaption, load_annotations, save_annotations

The names below are loaded when first used, so that ``import infogrowth`` stays quick (no torch).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from infogrowth import threads

if TYPE_CHECKING:
    from infogrowth.annotations import gains_array, load_annotations, save_annotations
    from infogrowth.errors import UserError
    from infogrowth.growth.decisions import Decision
    from infogrowth.growth.engine import InfoGrowth, Recaption
    from infogrowth.growth.sampling import GainSampler, GainShards

threads.set_defaults()  # here, for this runs before anything that loads torch

__version__ = "0.1.0"
__all__ = [
    "Decision",
    "GainSampler",
    "GainShards",
    "InfoGrowth",
    "Recaption",
    "UserError",
    "gains_array",
    "load_annotations",
    "save_annotations",
]

_HOMES = {
    "Decision": "infogrowth.growth.decisions",
    "GainSampler": "infogrowth.growth.sampling",
    "GainShards": "infogrowth.growth.sampling",
    "InfoGrowth": "infogrowth.growth.engine",
    "Recaption": "infogrowth.growth.engine",
    "UserError": "infogrowth.errors",
    "gains_array": "infogrowth.annotations",
    "load_annotations": "infogrowth.annotations",
    "save_annotations": "infogrowth.annotations",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'infogrowth' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
