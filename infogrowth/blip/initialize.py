"""Starting weights: ViT from DeiT or ImageNet-21k (timm), text from BERT, or random.

What is downloaded can as well be a local file or folder of the same, for machines offline.
"""

import logging
import os
from pathlib import Path

import torch
from torch import nn

from infogrowth.blip.checkpoint import LoadReport, load_tensors, summary
from infogrowth.blip.config import BlipConfig
from infogrowth.blip.dual import BlipDual
from infogrowth.blip.hub import download
from infogrowth.blip.momentum import MomentumBlip
from infogrowth.blip.weights_files import WeightFile, locate, read_tensors
from infogrowth.errors import UserError

logger = logging.getLogger(__name__)

# timm's repositories of the weights that BLIP starts its image transformers from.
_VISION_SOURCES = {
    "deit": "timm/deit_base_patch16_224.fb_in1k",
    "imagenet21k": "timm/vit_large_patch16_224.augreg_in21k",
}
_TEXT_SOURCES = {"bert-base-uncased": "google-bert/bert-base-uncased"}
# Parts of those files that BLIP has no use for.
_VISION_UNUSED = ("head.", "head_dist.", "fc_norm.", "dist_token", "pre_logits.")
_WORDS = "embeddings.word_embeddings.weight"


def initialize(
    model: BlipDual, vision: str | os.PathLike[str] = "auto", text: str | os.PathLike[str] = "auto"
) -> list[LoadReport]:
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
    vision = _published_vision(model.config) if vision == "auto" else vision
    text = "bert-base-uncased" if text == "auto" else text
    reports = []
    if vision == "fan_in":
        scale_to_fan_in(model.visual_encoder, model.vision_proj)
    elif vision != "random":
        reports.append(_load(model, _vision_weights(vision), "visual_encoder."))
    if text == "fan_in":
        # BlipPretrain has a decoder as well.
        parts = ("text_encoder", "text_proj", "itm_head", "text_decoder")
        scale_to_fan_in(*(part for name, part in model.named_children() if name in parts))
    elif text != "random":
        reports.append(_load(model, _text_weights(model, text), "text_encoder.", "text_decoder."))
    for report in reports:
        logger.info("starting weights: %s", report)
    if "fan_in" in (vision, text) and isinstance(model, MomentumBlip):
        model.copy_to_momentum()
    return reports


@torch.no_grad()
def scale_to_fan_in(*parts: nn.Module) -> None:
    """Give the weights of all linear layers a standard deviation of fan_in^-0.5, in place.

    The random weights that are there are scaled, so they stay a function of the model's seed. The
    words' embeddings stay as they are, where they serve as an output layer too.
    """
    words = {m.weight for part in parts for m in part.modules() if isinstance(m, nn.Embedding)}
    linear = {m for part in parts for m in part.modules() if isinstance(m, nn.Linear)}
    for layer in linear:
        if layer.weight not in words:
            layer.weight *= layer.in_features**-0.5 / layer.weight.std()


def _published_vision(config: BlipConfig) -> str:
    """BLIP's own choice for a size."""
    for name, shape in (("deit", (768, 12, 16)), ("imagenet21k", (1024, 24, 16))):
        if (config.vision_width, config.vision_depth, config.patch_size) == shape:
            return name
    raise UserError(
        f"no starting weights are published for an image transformer of width "
        f"{config.vision_width} and depth {config.vision_depth}; use `init: random` or a path"
    )


def _file(source: str | os.PathLike[str], published: dict[str, str]) -> Path:
    if str(source) in published:
        return download(published[str(source)], "model.safetensors", "pytorch_model.bin")
    return locate(source)


def _vision_weights(source: str | os.PathLike[str]) -> WeightFile:
    file = _file(source, _VISION_SOURCES)
    tensors = {
        f"visual_encoder.{name}": tensor
        for name, tensor in read_tensors(file).items()
        if not name.startswith(_VISION_UNUSED)
    }
    return WeightFile(tensors, str(file), "timm")


def _text_weights(model: BlipDual, source: str | os.PathLike[str]) -> WeightFile:
    """BERT's weights under the names of the text encoder, and of the decoder where there is one."""
    file = _file(source, _TEXT_SOURCES)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in read_tensors(file).items():
        # Old BERT files call the scale and shift of a layer norm gamma and beta.
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        inner = name.removeprefix("bert.")
        if inner.startswith(("embeddings.", "encoder.")):
            tensors[f"text_encoder.{inner}"] = tensor
            tensors[f"text_decoder.bert.{inner}"] = tensor
        elif name.startswith("cls.predictions.") and "decoder" not in name:
            tensors[f"text_decoder.{name}"] = tensor
    _extend_words(model, tensors)
    own = model.state_dict().keys()
    return WeightFile({k: v for k, v in tensors.items() if k in own}, str(file), "bert")


def _extend_words(model: BlipDual, tensors: dict[str, torch.Tensor]) -> None:
    """Append the model's own (random) rows for the words that BERT does not have, in place."""
    own = model.state_dict()
    for name in (
        f"text_encoder.{_WORDS}",
        f"text_decoder.bert.{_WORDS}",
        "text_decoder.cls.predictions.bias",
    ):
        if name in tensors and name in own and len(tensors[name]) < len(own[name]):
            tensors[name] = torch.cat([tensors[name], own[name][len(tensors[name]) :]])


def _load(model: BlipDual, weights: WeightFile, *parts: str) -> LoadReport:
    """Load one part; what such a file never holds may be missing, nothing else."""
    report = load_tensors(model, weights, strict=False)
    missing = [
        name
        for name in report.missing
        if name.startswith(parts) and ".crossattention." not in name and ".cls." not in name
    ]
    if missing or report.mismatched:
        raise UserError(
            f"{weights.source} does not fit this model; "
            + summary(report.mismatched + [f"{name} is missing" for name in missing])
        )
    report.missing = []
    return report
