"""What the embed and recaption commands ask of a model: two protocols, and nothing else.

Shape letters: B batch, C channels, H height, W width, D feature dimension.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from PIL import Image

Preprocess = Callable[[Image.Image], torch.Tensor]
"""An RGB image to one CHW tensor, the way the model is evaluated. It travels to the workers that
decode, so it is picklable and does not hold the model; uint8 (normalised later, on the device)
costs a quarter of the memory traffic of float32."""

Tokens = dict[str, torch.Tensor]
Tokenize = Callable[[list[str]], Tokens]
"""Captions as people wrote them to what the text encoder reads, in the same workers."""


@runtime_checkable
class DualEncoder(Protocol):
    """An image encoder and a text encoder that share one feature space.

    Implementations are in evaluation mode (no dropout), never augment, and give one sample the
    same feature wherever it stands in the dataset. They are called from several threads.
    """

    name: str
    """What the user called it: "tiny", a path, a hub name."""
    fingerprint: str
    """Hash of the weights, configuration and vocabulary that the features depend on, the same on
    every device; two places that hold the same model (an official .pth and its Hugging Face
    folder) may share it."""
    dimension: int
    """D, the length of a feature."""

    @property
    def preprocess(self) -> Preprocess: ...

    @property
    def tokenize(self) -> Tokenize: ...

    def encode_images(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """A stack of preprocessed images to ``(B, D) float32`` unit rows, on the CPU."""
        ...

    def encode_tokens(self, tokens: Tokens) -> torch.Tensor:
        """Tokenized captions to ``(B, D) float32`` unit rows, on the CPU."""
        ...

    def encode_texts(self, captions: list[str]) -> torch.Tensor:
        """``encode_tokens(tokenize(captions))``."""
        ...


@runtime_checkable
class Captioner(Protocol):
    """A model that describes an image; the same image always gets the same words."""

    name: str
    fingerprint: str

    @property
    def preprocess(self) -> Preprocess: ...

    def caption(self, images: Sequence[torch.Tensor] | torch.Tensor) -> list[str]:
        """What ``preprocess`` gave for some images (sizes may differ) to one caption each; an empty
        string where the model had nothing to say."""
        ...
