"""BLIP as an encoder and as a captioner, whichever of its file layouts it comes from."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from infogrowth.blip.captioning import BlipCaptioner
from infogrowth.blip.checkpoint import load_blip
from infogrowth.blip.dual import BlipDual
from infogrowth.data.captions import pre_caption
from infogrowth.data.transforms import MEAN, STD
from infogrowth.encoders.fingerprint import fingerprint
from infogrowth.encoders.inference import (
    CaptionTokenizer,
    UnitFeatures,
    half_on_cuda,
    half_products,
    halving,
    moved,
    pixels,
)
from infogrowth.encoders.protocols import Tokens

logger = logging.getLogger(__name__)

# What BLIP's own retrieval evaluation reads of a caption.
_MAX_WORDS = 30
_MAX_TOKENS = 35
# Fields of the config that leave a feature as it is; the last shows in the weights' shapes.
_LEAVES_FEATURES_ALONE = ("drop_path", "text_dropout", "vision_feedforward")


class ResizeToSquare:
    """BLIP's evaluation preprocessing as far as uint8 ``(3, S, S)``, before normalisation."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __call__(self, image: Image.Image) -> torch.Tensor:
        resized = image.resize((self._size, self._size), Image.Resampling.BICUBIC)
        return pixels(resized)


class BlipEncoder:
    """The two towers and projections of a BLIP.

    Args:
        path: a BLIP folder of ours, a checkpoint file, an official .pth, a Hugging Face folder.
        name: what the user called it.
        device: where to run it.
        vocabulary: vocab.txt for a checkpoint that has none beside it; else bert-base-uncased.

    Raises:
        UserError: not a BLIP, weights missing, or no vocabulary to be had.
    """

    def __init__(
        self, path: Path, name: str, device: torch.device, vocabulary: str | None = None
    ) -> None:
        self.name = name
        model, tokenizer = _open(path, BlipDual, device, vocabulary)
        self.preprocess = ResizeToSquare(model.config.image_size)
        self.tokenize = CaptionTokenizer(
            tokenizer,
            partial(pre_caption, max_words=_MAX_WORDS),
            padding="longest",
            max_length=_MAX_TOKENS,
            return_token_type_ids=False,
        )
        self.dimension = model.config.embed_dim
        reading = {"words": _MAX_WORDS, "tokens": _MAX_TOKENS}
        self.fingerprint = _blip_fingerprint(model, tokenizer, reading)
        self._features = UnitFeatures(model, device)
        self._normalize = Normalize(device)

    def encode_images(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        pixels_BCHW = self._normalize(images_BCHW)
        return self._features(lambda model: model.encode_image(pixels_BCHW)[1])

    def encode_tokens(self, tokens: Tokens) -> torch.Tensor:
        on_device = moved(tokens, self._features.device)
        ids, mask = on_device["input_ids"], on_device["attention_mask"]
        return self._features(lambda model: model.encode_text(ids, mask)[1])

    def encode_texts(self, captions: list[str]) -> torch.Tensor:
        return self.encode_tokens(self.tokenize(captions))


class BlipMatcher:
    """BLIP's matching head (ITM): how likely a caption belongs to an image, read together.

    Args as for :class:`BlipEncoder`.
    """

    def __init__(
        self, path: Path, name: str, device: torch.device, vocabulary: str | None = None
    ) -> None:
        self.name = name
        self._model, tokenizer = _open(path, BlipDual, device, vocabulary)
        self._model.eval()
        self.preprocess = ResizeToSquare(self._model.config.image_size)
        self.tokenize = CaptionTokenizer(
            tokenizer,
            partial(pre_caption, max_words=_MAX_WORDS),
            padding="longest",
            max_length=_MAX_TOKENS,
            return_token_type_ids=False,
        )
        reading = {"words": _MAX_WORDS, "tokens": _MAX_TOKENS, "head": "itm"}
        self.fingerprint = _blip_fingerprint(self._model, tokenizer, reading)
        self._device = device
        self._normalize = Normalize(device)

    def match(self, images_BCHW: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """The probability ``(B,) float32`` that each caption belongs to its image, on the CPU."""
        on_device = moved(tokens, self._device)
        with torch.inference_mode(), half_on_cuda(self._device):
            image_tokens_BLW, _ = self._model.encode_image(self._normalize(images_BCHW))
            logits_B2 = self._model.itm_logits(
                image_tokens_BLW, on_device["input_ids"], on_device["attention_mask"]
            )
        return logits_B2.float().softmax(dim=1)[:, 1].cpu()


class BlipDescriber:
    """BLIP's vision tower and text decoder as a captioner (beam search, no sampling).

    Args:
        prompt: the words that the caption continues; they are removed from it. Official
            captioning weights were tuned with "a picture of ", pretrained ones without.
        beams: hypotheses kept by beam search.
        max_tokens: longest caption, the prompt included.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        device: torch.device,
        vocabulary: str | None = None,
        prompt: str = "",
        beams: int = 3,
        max_tokens: int = 30,
    ) -> None:
        self.name = name
        self._device = device
        self._model, self._tokenizer = _open(path, BlipCaptioner, device, vocabulary)
        self.preprocess = ResizeToSquare(self._model.config.image_size)
        self._options = {
            "prompt": prompt,
            "beams": beams,
            "max_length": min(max_tokens, self._model.config.text_positions),
            "min_length": 0,
        }
        self.fingerprint = _blip_fingerprint(self._model, self._tokenizer, self._options)
        if device.type == "cuda":
            half_products(self._model)
        self._normalize = Normalize(device)

    def caption(self, images: Sequence[torch.Tensor] | torch.Tensor) -> list[str]:
        stacked = images if isinstance(images, torch.Tensor) else torch.stack(list(images))
        return halving(self._caption, stacked)

    def _caption(self, images_BCHW: torch.Tensor) -> list[str]:
        with torch.inference_mode(), half_on_cuda(self._device):
            pixels_BCHW = self._normalize(images_BCHW)
            return self._model.caption(pixels_BCHW, self._tokenizer, **self._options)


class Normalize:
    """uint8 pixels to normalised float32 on the device, without waiting for it.

    (torchvision's own copies mean and deviation there in every call, and reads one of them back.)
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mean, self._std = (torch.tensor(c, device=device)[:, None, None] for c in (MEAN, STD))

    def __call__(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        pixels = images_BCHW.to(self._device, non_blocking=True).float() / 255
        return pixels.sub_(self._mean).div_(self._std)


def _open(
    path: Path, kind: type, device: torch.device, vocabulary: str | None
) -> tuple[Any, PreTrainedTokenizerBase]:
    model: torch.nn.Module
    model, tokenizer, report = load_blip(path, kind, device, vocabulary)
    logger.debug("%s", report)
    return model.requires_grad_(False), tokenizer


def _blip_fingerprint(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, reading: dict[str, Any]
) -> str:
    sizes = {k: v for k, v in vars(model.config).items() if k not in _LEAVES_FEATURES_ALONE}
    words = sorted(tokenizer.get_vocab().items())
    return fingerprint(model.state_dict(), {"sizes": sizes, "vocabulary": words, **reading})
