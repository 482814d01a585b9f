"""Starting weights: ViT from DeiT or ImageNet-21k (timm), text from BERT, or random.

What is downloaded can as well be a local file or folder of the same, for machines offline.
"""

import logging
import os
from pathlib import Path

import torch
from torch import nn

from infogrowth.blip.checkpoint import LoadReport, load_weights
from infogrowth.blip.config import BlipConfig
from infogrowth.blip.dual import BlipDual
from infogrowth.blip.momentum import MomentumBlip
from infogrowth.blip.weights import WORD_EMBEDDINGS, Weights, download, locate, read_file
from infogrowth.errors import UserError

logger = logging.getLogger(__name__)

# What BLIP starts from: published weights by name, and the ViT's width, depth and patch size.
_PUBLISHED = {
    "deit": "timm/deit_base_patch16_224.fb_in1k",
    "imagenet21k": "timm/vit_large_patch16_224.augreg_in21k",
    "bert-base-uncased": "google-bert/bert-base-uncased",
}
_VISION_FOR = {(768, 12, 16): "deit", (1024, 24, 16): "imagenet21k"}
# Parts of those ViTs that BLIP has no use for.
_VISION_UNUSED = ("head.", "head_dist.", "fc_norm.", "dist_token", "pre_logits.")


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
    vision = published_vision(model.config) if vision == "auto" else vision
    text = "bert-base-uncased" if text == "auto" else text
    parts = {  # BlipPretrain has a decoder as well
        "visual_encoder": vision,
        "vision_proj": vision,
        **dict.fromkeys(("text_encoder", "text_proj", "itm_head", "text_decoder"), text),
    }
    scale_to_fan_in(*(m for name, m in model.named_children() if parts.get(name) == "fan_in"))
    reports = []
    if vision not in ("random", "fan_in"):
        reports.append(_load(model, _vision_weights(vision), "visual_encoder."))
    if text not in ("random", "fan_in"):
        reports.append(_load(model, _text_weights(model, text), "text_encoder.", "text_decoder."))
    for report in reports:
        logger.info("starting weights: %s", report)
    if isinstance(model, MomentumBlip):
        model.copy_to_momentum()
    return reports


@torch.no_grad()
def scale_to_fan_in(*parts: nn.Module) -> None:
    """Give the weights of all linear layers a standard deviation of fan_in^-0.5, in place.

    The random weights that are there are scaled, so they stay a function of the model's seed. The
    words' embeddings stay as they are, where they serve as an output layer too.
    """
    modules = {module for part in parts for module in part.modules()}
    words = {module.weight for module in modules if isinstance(module, nn.Embedding)}
    for module in modules:
        if isinstance(module, nn.Linear) and module.weight not in words:
            module.weight *= module.in_features**-0.5 / module.weight.std()


def published_vision(config: BlipConfig) -> str:
    """What BLIP itself starts an image transformer of this size from.

    Raises:
        UserError: nothing is published for it.
    """
    size = (config.vision_width, config.vision_depth, config.patch_size)
    if size not in _VISION_FOR:
        raise UserError(
            f"no starting weights are published for an image transformer of width "
            f"{config.vision_width} and depth {config.vision_depth}; use `random` or a path"
        )
    return _VISION_FOR[size]


def _file(source: str | os.PathLike[str]) -> Path:
    if str(source) in _PUBLISHED:
        return download(_PUBLISHED[str(source)], "model.safetensors", "pytorch_model.bin")
    return locate(source)


def _vision_weights(source: str | os.PathLike[str]) -> Weights:
    file = _file(source)
    tensors = {
        f"visual_encoder.{name}": tensor
        for name, tensor in read_file(file)[0].items()
        if not name.startswith(_VISION_UNUSED)
    }
    return Weights(tensors, str(file), "timm")


def _text_weights(model: BlipDual, source: str | os.PathLike[str]) -> Weights:
    """BERT's weights under the names of the text encoder, and of the decoder where there is one.

    Of words that BERT does not have, the model keeps its own (random) rows.
    """
    file, own = _file(source), model.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in read_file(file)[0].items():
        # Old BERT files call the scale and shift of a layer norm gamma and beta.
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        inner = name.removeprefix("bert.")
        if inner.startswith(("embeddings.", "encoder.")):
            tensors[f"text_encoder.{inner}"] = tensor
            tensors[f"text_decoder.bert.{inner}"] = tensor
        elif name.startswith("cls.predictions.") and "decoder" not in name:
            tensors[f"text_decoder.{name}"] = tensor
    tensors = {name: tensor for name, tensor in tensors.items() if name in own}
    for name, tensor in tensors.items():
        if name.endswith((WORD_EMBEDDINGS, "cls.predictions.bias")):
            tensors[name] = torch.cat([tensor, own[name][len(tensor) :]])
    return Weights(tensors, str(file), "bert")


def _load(model: BlipDual, weights: Weights, *parts: str) -> LoadReport:
    """Load one part; what such a file never holds may be missing, nothing else."""
    report = load_weights(model, weights, strict=False)
    report.missing = [
        name
        for name in report.missing
        if name.startswith(parts) and ".crossattention." not in name and ".cls." not in name
    ]
    report.check()
    return report
