"""BLIP as an encoder, a judge of pairs and a captioner, whichever file layout it comes from."""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from infogrowth.blip.model import BlipCaptioner, BlipDual
from infogrowth.blip.pretrained import load_blip
from infogrowth.data.text import pre_caption
from infogrowth.data.transforms import EvaluationTransform, normalized
from infogrowth.encoders.models import (
    Captioner,
    CaptionTokenizer,
    DualEncoder,
    Preprocess,
    Tokenize,
    Tokens,
    fingerprint,
    half_on_cuda,
    half_products,
    moved,
)

logger = logging.getLogger(__name__)

# What BLIP's own retrieval evaluation reads of a caption.
_READING = {"words": 30, "tokens": 35}
# Fields of the config that leave a feature as it is; the last shows in the weights' shapes.
_LEAVES_FEATURES_ALONE = ("drop_path", "text_dropout", "vision_feedforward")


class _Blip:
    """What the three uses share: the model in evaluation mode, how it reads images and captions.

    Args:
        path: a BLIP folder of ours, a checkpoint file, an official .pth, a Hugging Face folder.
        name: what the user called it.
        device: where to run it.
        vocabulary: vocab.txt for a checkpoint that has none beside it; else bert-base-uncased.

    Raises:
        UserError: not a BLIP, weights missing, or no vocabulary to be had.
    """

    kind: type = BlipDual

    def __init__(
        self, path: Path, name: str, device: torch.device, vocabulary: str | None = None
    ) -> None:
        self.name, self.device = name, device
        self._model, self._tokenizer, report = load_blip(path, self.kind, device, vocabulary)
        logger.debug("%s", report)
        self._model.eval().requires_grad_(False)
        self.preprocess: Preprocess = EvaluationTransform(
            self._model.config.image_size, normalize=False
        )
        self.tokenize: Tokenize = CaptionTokenizer(
            self._tokenizer,
            partial(pre_caption, max_words=_READING["words"]),
            padding="longest",
            max_length=_READING["tokens"],
            return_token_type_ids=False,
        )

    def _pixels(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return normalized(images_BCHW.to(self.device, non_blocking=True))

    def _fingerprint(self, reading: Mapping[str, Any]) -> str:
        config = vars(self._model.config)
        sizes = {k: v for k, v in config.items() if k not in _LEAVES_FEATURES_ALONE}
        words = sorted(self._tokenizer.get_vocab().items())
        settings = {"sizes": sizes, "vocabulary": words, **reading}
        return fingerprint(self._model.state_dict(), settings)


class BlipEncoder(_Blip, DualEncoder):
    """The two towers and projections of a BLIP."""

    def __init__(
        self, path: Path, name: str, device: torch.device, vocabulary: str | None = None
    ) -> None:
        _Blip.__init__(self, path, name, device, vocabulary)
        self.dimension = self._model.config.embed_dim
        self.fingerprint = self._fingerprint(_READING)
        DualEncoder.__init__(self, self._model, device)

    def image_features(self, model: Any, images_BCHW: torch.Tensor) -> torch.Tensor:
        return model.encode_image(normalized(images_BCHW))[1]

    def text_features(self, model: Any, tokens: Tokens) -> torch.Tensor:
        return model.encode_text(tokens["input_ids"], tokens["attention_mask"])[1]


class BlipMatcher(_Blip):
    """BLIP's matching head (ITM): how likely a caption belongs to an image, read together."""

    def __init__(
        self, path: Path, name: str, device: torch.device, vocabulary: str | None = None
    ) -> None:
        super().__init__(path, name, device, vocabulary)
        self.fingerprint = self._fingerprint({**_READING, "head": "itm"})

    def match(self, images_BCHW: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """The probability ``(B,) float32`` that each caption belongs to its image, on the CPU."""
        on_device = moved(tokens, self.device)
        with torch.inference_mode(), half_on_cuda(self.device):
            image_tokens_BLW, _ = self._model.encode_image(self._pixels(images_BCHW))
            logits_B2 = self._model.itm_logits(
                image_tokens_BLW, on_device["input_ids"], on_device["attention_mask"]
            )
        return logits_B2.float().softmax(dim=1)[:, 1].cpu()


class BlipDescriber(_Blip, Captioner):
    """BLIP's vision tower and text decoder as a captioner."""

    kind = BlipCaptioner

    def __init__(
        self,
        path: Path,
        name: str,
        device: torch.device,
        vocabulary: str | None,
        prompt: str,
        beams: int,
        max_tokens: int,
    ) -> None:
        super().__init__(path, name, device, vocabulary)
        self._options = {
            "prompt": prompt,
            "beams": beams,
            "max_length": min(max_tokens, self._model.config.text_positions),
            "min_length": 0,
        }
        self.fingerprint = self._fingerprint(self._options)
        if self.device.type == "cuda":
            half_products(self._model)

    def describe(self, images: list[torch.Tensor]) -> list[str]:
        with torch.inference_mode(), half_on_cuda(self.device):
            pixels_BCHW = self._pixels(torch.stack(images))
            return self._model.caption(pixels_BCHW, self._tokenizer, **self._options)
