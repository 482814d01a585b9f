"""Between models and their files: any BLIP's weights into any model of this package, with a report
of what happened; and a model into a folder of ours, an official file, or a Hugging Face folder."""

import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import safetensors.torch
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn
from transformers import PreTrainedTokenizerBase

from infogrowth.blip.config import BlipConfig
from infogrowth.blip.tokenizer import VOCABULARY_FILE, load_tokenizer, save_vocabulary
from infogrowth.blip.weights import (
    WORD_EMBEDDINGS,
    Weights,
    download,
    infer_config,
    is_known,
    is_momentum,
    is_queue,
    read_weights,
    tied_name,
    to_huggingface_name,
)
from infogrowth.data.transforms import MEAN, STD
from infogrowth.errors import UserError
from infogrowth.files import atomic_write

if TYPE_CHECKING:
    from infogrowth.blip.captioning import BlipCaptioner
    from infogrowth.blip.dual import BlipDual

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class LoadReport:
    """What became of every name of a checkpoint and of the model; ``str()`` is for people.

    Attributes:
        loaded: how many of the model's names got a value from the file.
        missing: names that the model needs and the file does not have.
        mismatched: "name: file shape, model shape" where the shapes do not fit.
        conflicting: names that are tied in the model and have different values in the file.
        unexpected: names in the file that no BLIP has.
        resized: position embeddings that were interpolated to the model's image size.
        filled: tied names taken from another name, and momentum weights from the online ones.
        untouched: optional names (queues, temperature) that keep their initial values.
        unused: names of a BLIP's parts that this model does not have or need.
    """

    source: str
    layout: str
    loaded: int = 0
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    conflicting: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    filled: list[str] = field(default_factory=list)
    untouched: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        head = f"{self.source} ({self.layout} layout): {self.loaded} names loaded"
        lists = {name: names for name, names in vars(self).items() if isinstance(names, list)}
        return "\n  ".join(
            [head, *(f"{k}: {summary(names)}" for k, names in lists.items() if names)]
        )

    def check(self) -> None:
        """Raise a UserError if the checkpoint does not fit the model."""
        if self.missing or self.mismatched or self.conflicting:
            names = ("missing", "mismatched", "conflicting", "unexpected")
            found = [
                f"{name}: {summary(getattr(self, name))}" for name in names if getattr(self, name)
            ]
            raise UserError(f"{self.source} does not fit this model; {'; '.join(found)}")


def summary(names: list[str], limit: int = 5) -> str:
    """The first few of many names, and how many there are."""
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def load_weights(
    model: nn.Module, source: str | os.PathLike[str] | Weights, strict: bool = True
) -> LoadReport:
    """Load weights (a path as for :func:`read_weights`, or read ones) into ``model`` in place.

    Position embeddings are resized to the model's images; tied names may be given once; queues
    and momentum weights are optional (momentum weights then become copies of the online ones).

    Args:
        strict: raise when a needed name is missing, a shape does not fit, or tied names differ,
            before anything is loaded; otherwise only report it.

    Raises:
        UserError: as above, or a file that cannot be read.
    """
    weights = source if isinstance(source, Weights) else read_weights(source)
    report = LoadReport(weights.source, weights.layout)
    ready = _fitting(model.state_dict(), weights.tensors, report)
    if strict:
        report.check()
    report.loaded = len(ready)
    absent = model.load_state_dict(ready, strict=False).missing_keys
    if momentum := [name for name in absent if is_momentum(name)]:
        model.copy_to_momentum()  # type: ignore[operator]  # all together
        report.filled.extend(momentum)
    return report


def _fitting(
    own: dict[str, torch.Tensor], given: dict[str, torch.Tensor], report: LoadReport
) -> dict[str, torch.Tensor]:
    """A tensor of the file for each name of the model that one fits, tied names from wherever they
    stand; all else is reported."""
    tied: dict[str, list[str]] = defaultdict(list)
    for name in given:
        tied[tied_name(name)].append(name)
    ready: dict[str, torch.Tensor] = {}
    used: set[str] = set()
    for name, target in own.items():
        same = tied[tied_name(name)]
        source = name if name in given else next(iter(same), None)
        if source is None:
            optional = is_queue(name) or name == "temp"
            if not is_momentum(name):
                (report.untouched if optional else report.missing).append(name)
            continue
        tensor = given[source]
        used.add(source)
        if source != name:
            report.filled.append(name)
        elif not all(torch.equal(tensor, given[other]) for other in same if other in own):
            report.conflicting.append(name)
        if name.endswith(".pos_embed") and (resized := _resized(tensor, target)) is not None:
            report.resized.append(f"{name}: {_shape(tensor)} to {_shape(target)}")
            tensor = resized
        if tensor.shape == target.shape:
            ready[name] = tensor
        elif is_queue(name):
            report.untouched.append(f"{name} (the file's has another size, {_shape(tensor)})")
        else:
            shapes = f"{_shape(tensor)} in the file, {_shape(target)} in the model"
            report.mismatched.append(f"{name}: {shapes}")
    if "image_queue" not in ready:  # a pointer belongs to the queue that it points into
        pointers = [
            name for name in ("queue_ptr", "ptr_queue") if ready.pop(name, None) is not None
        ]
        report.untouched.extend(pointers)
    for name in sorted(given.keys() - used):
        (report.unused if is_known(name) else report.unexpected).append(name)
    return ready


def _resized(positions: torch.Tensor, target: torch.Tensor) -> torch.Tensor | None:
    """Position embeddings ``(1, 1 + n², W)`` for as many patches as ``target`` has, bicubic, class
    token kept; None when they fit, or are not a class token and a square of patches."""
    old, new = (round((len(tensor[0]) - 1) ** 0.5) for tensor in (positions, target))
    squares = (len(positions[0]), len(target[0])) == (old * old + 1, new * new + 1)
    if old == new or not squares or not old or not new:
        return None
    return resample_abs_pos_embed(positions, [new, new], antialias=False)


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
        path: as for :func:`read_weights`.
        kind: ``BlipDual``, ``BlipCaptioner``, ``BlipPretrain`` or ``BlipRetrieval``, or what builds
            one from a configuration.
        vocabulary: as for :func:`load_tokenizer`; default: beside the weights, else
            ``bert-base-uncased``.
        config: of a checkpoint that has none in it or beside it; default: inferred from the
            weights.
        image_size: pixels a side, when not the checkpoint's own; position embeddings are resized.

    Raises:
        UserError: missing files, no network, or weights that do not fit.
    """
    weights = read_weights(path)
    if not Path(path).exists():  # a name on the hub: its vocabulary lands beside the weights
        download(str(path), VOCABULARY_FILE)
    if vocabulary is None:
        folder = Path(weights.source).parent
        alone = Path(path).is_file() and not (folder / VOCABULARY_FILE).is_file()
        vocabulary = "bert-base-uncased" if alone else folder
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
    report = load_weights(model, weights)
    return model.to(device).eval(), tokenizer, report


def save_folder(
    model: "BlipDual | BlipCaptioner",
    directory: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write a BLIP folder: ``vocab.txt``, ``model.safetensors`` (each tensor once, none that only
    training needs, the configuration in its metadata), and last ``config.json``."""
    once: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if not is_momentum(name) and not is_queue(name):
            once.setdefault(tensor.data_ptr(), (name, tensor.detach().cpu().contiguous()))
    # transformers refuses files without the format.
    metadata = {"format": "pt", "config": json.dumps(model.config.as_dict())}
    content = safetensors.torch.save(dict(once.values()), metadata=metadata)
    save_vocabulary(tokenizer, directory)
    with atomic_write(Path(directory) / "model.safetensors") as file:
        file.write(_in_one_order(content))
    model.config.to_folder(directory)


def _in_one_order(file: bytes) -> bytes:
    """The same file with its metadata sorted: safetensors writes them in a random order.

    The header is as long as before, so nothing behind it moves, and equal weights are equal bytes.
    """
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return file[:8] + text.ljust(length) + file[8 + length :]


def save_official(
    model: "BlipDual | BlipCaptioner", path: str | os.PathLike[str], momentum: bool = True
) -> None:
    """Write a ``.pth`` with every name that BLIP's own files have, tied ones and the constant
    ``position_ids`` too, under the key ``model``, and the configuration under ``config``.

    Args:
        momentum: also keep momentum encoders and queues.
    """
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not momentum and (is_momentum(name) or is_queue(name)):
            continue
        if name.endswith(WORD_EMBEDDINGS):
            positions = torch.arange(model.config.text_positions).expand(1, -1).clone()
            state[name.replace("word_embeddings.weight", "position_ids")] = positions
        state[name] = tensor.detach().cpu()
    with atomic_write(path) as file:
        torch.save({"model": state, "config": model.config.as_dict()}, file)


def save_huggingface(
    model: "BlipDual | BlipCaptioner",
    directory: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    task: Literal["retrieval", "captioning"] | None = None,
) -> None:
    """Write a folder that ``transformers`` opens: weights, tokenizer, image processor, config.

    Args:
        task: for which of its classes; default: retrieval for a model with a text encoder.

    Raises:
        UserError: the model does not have the parts for the task, or a conv stem.
    """
    import transformers

    task = task or ("retrieval" if hasattr(model, "text_encoder") else "captioning")
    kind: Any = {
        "retrieval": transformers.BlipForImageTextRetrieval,
        "captioning": transformers.BlipForConditionalGeneration,
    }[task]
    with torch.device("meta"):
        theirs = kind(transformers.BlipConfig(**model.config.to_huggingface()))
    state = {to_huggingface_name(name): tensor for name, tensor in model.state_dict().items()}
    if missing := theirs.load_state_dict(state, strict=False, assign=True).missing_keys:
        raise UserError(f"this model has no parts for {task} ({summary(missing)}); not written")
    side = model.config.image_size
    processor = transformers.BlipImageProcessor(
        size={"height": side, "width": side}, image_mean=[*MEAN], image_std=[*STD]
    )
    with tempfile.TemporaryDirectory() as scratch:
        for part in (tokenizer, processor, theirs):
            part.save_pretrained(scratch)
        save_vocabulary(tokenizer, scratch)
        # The configuration last: with it the folder is whole.
        written = sorted(Path(scratch).iterdir(), key=lambda path: path.name == "config.json")
        for source in written:
            with open(source, "rb") as content, atomic_write(Path(directory) / source.name) as file:
                shutil.copyfileobj(content, file)
