"""`infogrowth convert`: write a BLIP checkpoint in the official or the Hugging Face layout."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from infogrowth.config import option
from infogrowth.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Options of ``infogrowth convert``."""

    input: str = option(help="BLIP folder, checkpoint, .pth or Hugging Face name", positional=True)
    output: str = option(help="a .pth file (official) or a folder (huggingface)", positional=True)
    to: Literal["official", "huggingface"] = option(help="the layout that is written")
    task: Literal["auto", "retrieval", "captioning"] = option(
        "auto", "which class of transformers to write for; auto: retrieval where its parts are"
    )
    vocabulary: str | None = option(None, "name, folder or vocab.txt; none: the checkpoint's own")


def run(config: Config) -> int:
    """Convert one checkpoint. Raises UserError: a checkpoint that cannot be had or is not whole, or
    an output that does not fit."""
    from infogrowth.blip.pretrained import load_blip, save_huggingface, save_official
    from infogrowth.blip.text import save_vocabulary
    from infogrowth.blip.weights import read_weights

    output = Path(config.output)
    is_file = config.to == "official"
    if is_file != (output.suffix == ".pth"):
        wanted = "a .pth file" if is_file else "a folder"
        raise UserError(f"the {config.to} layout is {wanted}, which {output} is not by its name")
    if output.resolve() == Path(config.input).resolve():
        raise UserError(f"{output} would be written over what is read; give another output")
    build, momentum = _whole(read_weights(config.input).tensors)
    model, tokenizer, report = load_blip(config.input, build, vocabulary=config.vocabulary)
    logger.info("%s", report)
    if is_file:
        save_official(model, output, momentum)
        save_vocabulary(tokenizer, output.parent)
    else:
        save_huggingface(model, output, tokenizer, None if config.task == "auto" else config.task)
    print(f"wrote {output}")
    return 0


def _whole(tensors: dict[str, Any]) -> tuple[Callable[..., Any], bool]:
    """What builds a model with all parts of a checkpoint; whether momentum is among them."""
    from infogrowth.blip.model import BlipCaptioner, BlipDual
    from infogrowth.blip.pretrain import BlipPretrain
    from infogrowth.blip.retrieval import BlipRetrieval

    parts = {name.partition(".")[0] for name in tensors}
    queue_size = tensors["image_queue"].shape[1] if "image_queue" in parts else 0
    momentum = "visual_encoder_m" in parts
    if "text_encoder" not in parts:
        return BlipCaptioner, momentum
    if "text_decoder" in parts:
        with_ids = "idx_queue" in parts
        return partial(BlipPretrain, queue_size=queue_size, id_aware_targets=with_ids), momentum
    return (
        partial(BlipRetrieval, queue_size=queue_size) if "temp" in parts else BlipDual
    ), momentum
