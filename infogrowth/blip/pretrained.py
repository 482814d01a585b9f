"""Pretrained weights of any BLIP, or of what BLIP starts from, into a model here, with a report of
what happened; and a model into a folder of ours, an official file, or a Hugging Face folder."""

import json
import logging
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import safetensors.torch
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn
from transformers import PreTrainedTokenizerBase

from infogrowth import distributed
from infogrowth.blip.config import BlipConfig
from infogrowth.blip.model import BlipCaptioner, BlipDual
from infogrowth.blip.text import VOCABULARY_FILE, load_tokenizer, save_vocabulary
from infogrowth.blip.weights import (
    WORD_EMBEDDINGS,
    Weights,
    download,
    infer_config,
    is_known,
    is_momentum,
    is_queue,
    locate,
    read_file,
    read_weights,
    tied_name,
    to_huggingface_name,
)
from infogrowth.data.transforms import MEAN, STD
from infogrowth.errors import UserError
from infogrowth.files import atomic_write

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
PathLike = str | os.PathLike[str]

# What BLIP starts from: published weights by name, and the ViT's width, depth and patch size.
_PUBLISHED = {
    "deit": "timm/deit_base_patch16_224.fb_in1k",
    "imagenet21k": "timm/vit_large_patch16_224.augreg_in21k",
    "bert-base-uncased": "google-bert/bert-base-uncased",
}
_VISION_FOR = {(768, 12, 16): "deit", (1024, 24, 16): "imagenet21k"}


class LoadReport:
    """What became of every name of a checkpoint and of the model; ``str()`` is for people."""

    def __init__(self, source: str, layout: str) -> None:
        self.source, self.layout = source, layout
        self.loaded = 0  # how many of the model's names got a value from the file
        self.missing: list[str] = []  # needed by the model, and not in the file
        self.mismatched: list[str] = []  # with both sizes, where these do not fit
        self.conflicting: list[str] = []  # tied in the model, with different values in the file
        self.unexpected: list[str] = []  # in the file, and in no BLIP
        self.resized: list[str] = []  # position embeddings, with both sizes
        self.filled: list[str] = []  # from a name that is tied to it, momentum from online
        self.untouched: list[str] = []  # optional (queues, temperature), as they were
        self.unused: list[str] = []  # of a BLIP's parts that this model does not have or need

    def __str__(self) -> str:
        head = f"{self.source} ({self.layout} layout): {self.loaded} names loaded"
        return "\n  ".join([head, *self._shown(*vars(self))])

    def check(self) -> None:
        """Raise a UserError if the checkpoint does not fit the model."""
        if self.missing or self.mismatched or self.conflicting:
            found = self._shown("missing", "mismatched", "conflicting", "unexpected")
            raise UserError(f"{self.source} does not fit this model; {'; '.join(found)}")

    def _shown(self, *kinds: str) -> list[str]:
        lists = {kind: getattr(self, kind) for kind in kinds}
        return [f"{k}: {summary(n)}" for k, n in lists.items() if n and isinstance(n, list)]


def summary(names: list[str], limit: int = 5) -> str:
    """The first few of many names, and how many there are."""
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def load_weights(model: nn.Module, source: PathLike | Weights, strict: bool = True) -> LoadReport:
    """Load weights (a path as for :func:`read_weights`, or read ones) into ``model`` in place.

    Position embeddings are resized to the model's images; tied names may be given once; queues
    and momentum weights are optional (momentum weights then become copies of the online ones).

    Args:
        strict: raise when a needed name is missing, a size does not fit, or tied names differ,
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
            report.resized.append(f"{name}: {_size(tensor)} to {_size(target)}")
            tensor = resized
        if tensor.shape == target.shape:
            ready[name] = tensor
        elif is_queue(name):
            report.untouched.append(f"{name} (the file's has another size, {_size(tensor)})")
        else:
            sizes = f"{_size(tensor)} in the file, {_size(target)} in the model"
            report.mismatched.append(f"{name}: {sizes}")
    if "image_queue" not in ready:  # a pointer belongs to the queue that it points into
        pointers = ready.keys() & {"queue_ptr", "ptr_queue"}
        report.untouched.extend(pointers)
        ready = {name: tensor for name, tensor in ready.items() if name not in pointers}
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


def _size(tensor: torch.Tensor) -> str:
    return "×".join(str(size) for size in tensor.shape) or "scalar"


def load_blip(
    path: PathLike,
    kind: Callable[[BlipConfig], Model],
    device: str | torch.device = "cpu",
    vocabulary: PathLike | None = None,
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


def initialize(model: BlipDual, vision: PathLike = "auto", text: PathLike = "auto") -> None:
    """Give a freshly built model its starting weights; momentum encoders follow.

    Cross-attention, projections and heads stay random, as in BLIP. BERT's 30522 words are
    extended by random rows for [DEC] and [ENC].

    Args:
        vision: ``deit`` (ViT-B/16), ``imagenet21k`` (ViT-L/16), ``random``, ``fan_in`` (random
            with a standard deviation of fan_in^-0.5 in linear layers, which models much narrower
            than BLIP's need to learn at all), a local file of such weights, or ``auto``: what
            BLIP uses for the model's size.
        text: ``bert-base-uncased``, ``random``, ``fan_in``, a local file or folder of BERT
            weights, or ``auto``: ``bert-base-uncased``.

    Raises:
        UserError: no network, no such file, or weights of another size.
    """
    size = (model.config.vision_width, model.config.vision_depth, model.config.patch_size)
    if vision == "auto" and size not in _VISION_FOR:
        shape = f"width {size[0]} and depth {size[1]}"
        raise UserError(f"no ViT of {shape} is published: --vision_init random, fan_in or FILE")
    vision = _VISION_FOR[size] if vision == "auto" else vision
    text = "bert-base-uncased" if text == "auto" else text
    sources = {  # BlipPretrain has a decoder as well
        **dict.fromkeys(("visual_encoder", "vision_proj"), vision),
        **dict.fromkeys(("text_encoder", "text_proj", "itm_head", "text_decoder"), text),
    }
    _scale_to_fan_in(*(m for name, m in model.named_children() if sources.get(name) == "fan_in"))
    for source, layout, parts in (
        (vision, "timm", ("visual_encoder.",)),
        (text, "bert", ("text_encoder.", "text_decoder.")),
    ):
        if source in ("random", "fan_in"):
            continue
        file = locate(_PUBLISHED.get(str(source), source))
        tensors = read_file(file)[0]
        if layout == "timm":
            tensors = {f"visual_encoder.{name}": tensor for name, tensor in tensors.items()}
        else:
            tensors = _from_bert(tensors, model.state_dict())
        report = load_weights(model, Weights(tensors, str(file), layout), strict=False)
        # What such a file never holds may be missing, nothing else.
        report.missing = [
            name
            for name in report.missing
            if name.startswith(parts) and ".crossattention." not in name and ".cls." not in name
        ]
        report.check()
        logger.info("starting weights: %s", report)
    if hasattr(model, "copy_to_momentum"):
        model.copy_to_momentum()  # type: ignore[operator]


@torch.no_grad()
def _scale_to_fan_in(*parts: nn.Module) -> None:
    """Scale the random weights of linear layers, which stay a function of the model's seed. The
    words' embeddings stay as they are, where they serve as an output layer too."""
    modules = {module for part in parts for module in part.modules()}
    words = {module.weight for module in modules if isinstance(module, nn.Embedding)}
    for module in modules:
        if isinstance(module, nn.Linear) and module.weight not in words:
            module.weight *= module.in_features**-0.5 / module.weight.std()


def _from_bert(
    tensors: dict[str, torch.Tensor], own: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """BERT's weights under the names of the model's text encoder and decoder, as far as it has
    them. Of words that BERT does not have, the model keeps its own (random) rows."""
    named: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        # Old BERT files call the scale and shift of a layer norm gamma and beta.
        inner = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        inner = inner.replace("LayerNorm.beta", "LayerNorm.bias").removeprefix("bert.")
        if inner.startswith(("embeddings.", "encoder.")):
            named[f"text_encoder.{inner}"] = named[f"text_decoder.bert.{inner}"] = tensor
        elif name.startswith("cls.predictions.") and "decoder" not in name:
            named[f"text_decoder.{inner}"] = tensor
    named = {name: tensor for name, tensor in named.items() if name in own}
    for name, tensor in named.items():
        if name.endswith((WORD_EMBEDDINGS, "cls.predictions.bias")):
            named[name] = torch.cat([tensor, own[name][len(tensor) :]])
    return named


def save_folder(
    model: BlipDual | BlipCaptioner, directory: PathLike, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write a BLIP folder, on rank 0: ``vocab.txt``, ``model.safetensors`` (each tensor once, none
    that only training needs, the configuration in its metadata), and last ``config.json``."""
    if not distributed.is_main():
        return
    once: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if not is_momentum(name) and not is_queue(name):
            once.setdefault(tensor.data_ptr(), (name, tensor.detach().cpu().contiguous()))
    # transformers refuses files without the format.
    metadata = {"format": "pt", "config": json.dumps(model.config.as_dict())}
    content = safetensors.torch.save(dict(once.values()), metadata=metadata)
    # safetensors writes its metadata in a random order. Sorted, equal weights are equal bytes; the
    # header stays as long as it was, so nothing behind it moves.
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    save_vocabulary(tokenizer, directory)
    with atomic_write(Path(directory) / "model.safetensors") as file:
        file.write(content[:8] + text.ljust(start - 8) + content[start:])
    model.config.to_folder(directory)


def save_official(
    model: BlipDual | BlipCaptioner, path: PathLike, with_momentum: bool = True
) -> None:
    """Write a ``.pth`` with every name that BLIP's own files have, tied ones and the constant
    ``position_ids`` too, under the key ``model``, and the configuration under ``config``.

    Args:
        with_momentum: also keep momentum encoders and queues.
    """
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not with_momentum and (is_momentum(name) or is_queue(name)):
            continue
        if name.endswith(WORD_EMBEDDINGS):
            positions = torch.arange(model.config.text_positions).expand(1, -1).clone()
            state[name.replace("word_embeddings.weight", "position_ids")] = positions
        state[name] = tensor.detach().cpu()
    with atomic_write(path) as file:
        torch.save({"model": state, "config": model.config.as_dict()}, file)


def save_huggingface(
    model: BlipDual | BlipCaptioner,
    directory: PathLike,
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

    task = task or ("captioning" if isinstance(model, BlipCaptioner) else "retrieval")
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
