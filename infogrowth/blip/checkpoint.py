"""Loading any BLIP's weights into any model of this package, with a report of what happened."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase

from infogrowth.blip.config import BlipConfig, infer_config
from infogrowth.blip.hub import download
from infogrowth.blip.names import (
    is_known,
    is_momentum,
    is_positions,
    is_queue,
    other_names,
)
from infogrowth.blip.tokenizer import VOCABULARY_FILE, load_tokenizer
from infogrowth.blip.weights_files import WeightFile, open_state, save_folder, save_weights
from infogrowth.errors import UserError

__all__ = [
    "LoadReport",
    "load_blip",
    "load_weights",
    "open_state",
    "save_folder",
    "save_weights",
]

Model = TypeVar("Model", bound=nn.Module)
WORD_EMBEDDINGS = "embeddings.word_embeddings.weight"


@dataclass
class LoadReport:
    """What became of every name of a checkpoint and of the model; ``str()`` is for people.

    Attributes:
        loaded: how many of the model's names got a value from the file.
        missing: names that the model needs and the file lacks.
        unexpected: names in the file that no BLIP has.
        mismatched: "name: file shape, model shape" where the shapes do not fit.
        resized: position embeddings that were interpolated to the model's image size.
        filled: tied names taken from another name, and momentum weights from the online ones.
        conflicting: tied names for which the file holds different values; the first one is used.
        dropped: names of a BLIP's parts that this model does not have or need.
        untouched: optional names (queues, temperature) that keep their initial values.
    """

    source: str
    layout: str
    loaded: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    filled: list[str] = field(default_factory=list)
    conflicting: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    untouched: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.source} ({self.layout} layout): {self.loaded} names loaded"]
        for label, names in (
            ("missing", self.missing),
            ("shapes that do not fit", self.mismatched),
            ("unexpected", self.unexpected),
            ("tied names that differ (first used)", self.conflicting),
            ("resized", self.resized),
            ("filled from another name", self.filled),
            ("kept as initialised", self.untouched),
            ("not part of this model", self.dropped),
        ):
            if names:
                lines.append(f"  {label}: {summary(names)}")
        return "\n".join(lines)


def summary(names: list[str], limit: int = 5) -> str:
    """The first few of many names, and how many there are."""
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def load_weights(model: nn.Module, path: str | os.PathLike[str], strict: bool = True) -> LoadReport:
    """Load ``path`` (see :func:`open_state`) into ``model`` in place.

    Position embeddings are resized to the model's images; tied names may be given once; queues
    and momentum weights are optional (momentum weights then become copies of the online ones).

    Args:
        strict: raise when a needed name is missing, a shape does not fit, or tied names differ;
            otherwise only report it.

    Raises:
        UserError: as above, or a file that cannot be read.
    """
    return load_tensors(model, open_state(path), strict)


def load_tensors(model: nn.Module, weights: WeightFile, strict: bool = True) -> LoadReport:
    """:func:`load_weights` for weights that are already read."""
    report = LoadReport(weights.source, weights.layout)
    own = model.state_dict()
    chosen, used = _choose(own, weights.tensors, report)
    ready = _fit(own, chosen, report)
    _sort_out(own, ready, weights.tensors.keys() - used, report)
    problems = [
        f"{label}: {summary(names)}"
        for label, names in (
            ("missing", report.missing),
            ("shapes that do not fit", report.mismatched),
            ("tied names that differ", report.conflicting),
        )
        if names
    ]
    if strict and problems:
        if report.unexpected:
            problems.append(f"unexpected: {summary(report.unexpected)}")
        raise UserError(f"{weights.source} does not fit this model; {'; '.join(problems)}")
    model.load_state_dict(ready, strict=False)
    report.loaded = len(ready)
    _fill_momentum(model, own, ready, report)
    return report


def _choose(
    own: dict[str, torch.Tensor], given: dict[str, torch.Tensor], report: LoadReport
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """A tensor of the file for each name of the model, tied names from wherever they stand."""
    groups: dict[int, list[str]] = {}
    for name, tensor in own.items():
        groups.setdefault(tensor.data_ptr() if tensor.numel() else id(tensor), []).append(name)
    chosen: dict[str, torch.Tensor] = {}
    used: set[str] = set()
    for names in groups.values():
        candidates = dict.fromkeys([*names, *(o for name in names for o in other_names(name))])
        present = [name for name in candidates if name in given]
        if not present:
            continue
        first = present[0]
        own_present = [name for name in present if name in names]
        used.update(own_present or present[:1])
        report.conflicting.extend(
            f"{other} (differs from {first})"
            for other in own_present
            if other != first and not torch.equal(given[other], given[first])
        )
        report.filled.extend(name for name in names if name not in given)
        chosen.update(dict.fromkeys(names, given[first]))
    return chosen, used


def _fit(
    own: dict[str, torch.Tensor], chosen: dict[str, torch.Tensor], report: LoadReport
) -> dict[str, torch.Tensor]:
    """Those of the chosen tensors that have the model's shapes, after resizing positions."""
    ready: dict[str, torch.Tensor] = {}
    for name, tensor in chosen.items():
        if name.endswith(".pos_embed") and tensor.shape != own[name].shape:
            resized = resize_positions(tensor, own[name].shape[1])
            if resized is not None:
                report.resized.append(f"{name}: {_shape(tensor)} to {_shape(own[name])}")
                tensor = resized
        if tensor.shape == own[name].shape:
            ready[name] = tensor
        elif is_queue(name):
            report.untouched.append(f"{name} (the file's has another size, {_shape(tensor)})")
        else:
            report.mismatched.append(
                f"{name}: {_shape(tensor)} in the file, {_shape(own[name])} in the model"
            )
    if "image_queue" not in ready:  # a pointer belongs to the queue that it points into
        ready.pop("queue_ptr", None)
        ready.pop("ptr_queue", None)
    return ready


def _sort_out(
    own: dict[str, torch.Tensor],
    ready: dict[str, torch.Tensor],
    unused: set[str],
    report: LoadReport,
) -> None:
    """Put every name that was not loaded under its heading."""
    touched = {line.split(":")[0].split(" ")[0] for line in report.mismatched + report.untouched}
    for name in own:
        if name in ready or name in touched or is_momentum(name):
            continue
        optional = is_queue(name) or name == "temp"
        (report.untouched if optional else report.missing).append(name)
    for name in sorted(unused):
        known = is_known(name) or is_positions(name)
        (report.dropped if known else report.unexpected).append(name)


def _fill_momentum(
    model: nn.Module,
    own: dict[str, torch.Tensor],
    ready: dict[str, torch.Tensor],
    report: LoadReport,
) -> None:
    """Momentum weights that the file lacks become copies of the online ones, all together."""
    missing = [name for name in own if is_momentum(name) and name not in ready]
    if missing:
        model.copy_to_momentum()  # type: ignore[operator]
        report.filled.extend(missing)


def resize_positions(positions_1LW: torch.Tensor, length: int) -> torch.Tensor | None:
    """Position embeddings ``(1, 1 + n², W)`` to ``(1, length, W)``, bicubic, class token kept.

    None when either is not a class token and a square of patches.
    """
    old, new = round((positions_1LW.shape[1] - 1) ** 0.5), round((length - 1) ** 0.5)
    if positions_1LW.shape[1] != old * old + 1 or length != new * new + 1 or not old or not new:
        return None
    grid = positions_1LW[:, 1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    patches = grid.permute(0, 2, 3, 1).flatten(1, 2).to(positions_1LW.dtype)
    return torch.cat([positions_1LW[:, :1], patches], dim=1)


def _shape(tensor: torch.Tensor) -> str:
    return "×".join(str(size) for size in tensor.shape) or "scalar"


def load_blip(
    path: str | os.PathLike[str],
    kind: Callable[[BlipConfig], Model],
    device: str | torch.device = "cpu",
    vocabulary: str | os.PathLike[str] | None = None,
    config: BlipConfig | None = None,
    image_size: int | None = None,
) -> tuple[Model, PreTrainedTokenizerBase, LoadReport]:
    """Build a model from a checkpoint, ready to infer (``eval()``); the file is read once.

    Args:
        path: as :func:`open_state`.
        kind: ``BlipDual``, ``BlipCaptioner``, ``BlipPretrain`` or ``BlipRetrieval``, or what builds
            one from a configuration.
        vocabulary: as :func:`load_tokenizer`; default: beside the weights, else
            ``bert-base-uncased``.
        config: of a checkpoint that has none in it or beside it; default: inferred from the
            weights.
        image_size: pixels a side, when not the checkpoint's own; position embeddings are resized.

    Raises:
        UserError: missing files, no network, or weights that do not fit.
    """
    weights = open_state(path)
    folder = Path(weights.source).parent
    local = Path(path).exists()
    if not local:  # a name on the hub: its vocabulary lands beside the weights
        download(str(path), VOCABULARY_FILE)
    if vocabulary is None:
        whole_folder = not local or Path(path).is_dir()
        beside = (folder / VOCABULARY_FILE).is_file()
        vocabulary = folder if beside or whole_folder else "bert-base-uncased"
    tokenizer = load_tokenizer(vocabulary)
    words = [len(t) for name, t in weights.tensors.items() if name.endswith(WORD_EMBEDDINGS)]
    if words and words[0] != len(tokenizer):
        raise UserError(
            f"the vocabulary {vocabulary} makes {len(tokenizer)} tokens with [DEC] and [ENC], "
            f"but {weights.source} has {words[0]}; give the vocabulary it was made with"
        )
    config = weights.config or config or infer_config(weights.tensors)
    if image_size is not None:
        config = config.replace(image_size=image_size)
    model = kind(config.with_tokenizer(tokenizer))
    report = load_tensors(model, weights)
    return model.to(device).eval(), tokenizer, report
