"""The training pairs: an annotation and its image, augmented the same way in any worker."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from infogrowth.annotations import Annotation
from infogrowth.data.captions import pre_caption
from infogrowth.data.image_stores import ImageStore, open_images
from infogrowth.data.images import BadImage, decode_image
from infogrowth.errors import UserError
from infogrowth.randomness import generator

logger = logging.getLogger(__name__)

Transform = Callable[[Image.Image, np.random.Generator], torch.Tensor]
Index = int | tuple[int, int, int]
_MAX_REPLACEMENTS = 20


class PairDataset(Dataset):
    """Image–caption pairs to train on.

    Ask for an item by its row, or by ``(row, epoch, position)`` with the position in the epoch's
    global sequence. The choice among several captions and the augmentation are a function of
    ``(seed, epoch, position)`` alone: the number of workers or ranks, or a resume, changes
    nothing. A plain row stands for ``(row, 0, row)``.

    An image that cannot be decoded does not stop the run: another row, drawn by the same rule,
    takes its place, which the item records (``replaced`` is 1) and a warning names.

    Args:
        annotations: dicts with ``image`` and ``caption`` (text or a list of text).
        images: LMDB or folder of the images, as a path or opened.
        transform: called with an RGB image and a generator; see transforms.py.
        max_words: words of a caption that are kept.
        seed: names the random streams.
        prompt: put before every caption.
        captions_per_visit: captions of an item, different ones as far as there are that many;
            above 1 ``caption`` is a list.
        classes: the class of each row, in retrieval its image; then items have ``class`` too.

    Items are ``{"image": tensor, "caption": str, "index": int, "replaced": 0 or 1}``: what the
    transform gives, ``(3, S, S)``; ``index`` is the row that is really shown.
    """

    def __init__(
        self,
        annotations: Sequence[Annotation],
        images: Any,
        transform: Transform,
        max_words: int = 30,
        seed: int = 0,
        prompt: str = "",
        captions_per_visit: int = 1,
        classes: Sequence[int] | None = None,
    ) -> None:
        self._annotations = annotations
        self._images: ImageStore = open_images(images)
        self._transform, self._max_words = transform, max_words
        self._seed, self._prompt = seed, prompt
        self._captions_per_visit, self._classes = captions_per_visit, classes

    def __len__(self) -> int:
        return len(self._annotations)

    def __getitem__(self, index: Index) -> dict[str, Any]:
        """One pair.

        Raises:
            UserError: an image that is not in the store, or 20 bad images one after the other.
        """
        row, epoch, position = index if isinstance(index, tuple) else (index, 0, index)
        row = range(len(self))[row]  # IndexError where a sequence would raise one
        random = generator(self._seed, "augment", epoch, position)
        image, shown = self._image(row, epoch, position)
        return {
            "caption": self._captions(self._annotations[shown]["caption"], random),
            "image": self._transform(image, random),
            "index": shown,
            "replaced": int(shown != row),
            **({} if self._classes is None else {"class": int(self._classes[shown])}),
        }

    def _captions(
        self, caption: str | Sequence[str], random: np.random.Generator
    ) -> str | list[str]:
        count = self._captions_per_visit
        texts = [caption] if isinstance(caption, str) else caption
        if count > 1:
            chosen = random.choice(len(texts), size=count, replace=len(texts) < count)
            return [self._prompt + pre_caption(str(texts[i]), self._max_words) for i in chosen]
        if not isinstance(caption, str):
            texts = [text for text in caption if text.strip()] or caption
            texts = [texts[int(random.integers(len(texts)))]]
        return self._prompt + pre_caption(str(texts[0]), self._max_words)

    def _image(self, row: int, epoch: int, position: int) -> tuple[Image.Image, int]:
        """The row's image, or a stand-in's, and whose it is."""
        stand_ins = generator(self._seed, "stand-in", epoch, position)
        for _ in range(_MAX_REPLACEMENTS):
            name = self._annotations[row]["image"]
            try:
                needed = getattr(self._transform, "pixels_needed", None)
                return decode_image(self._images.read(name), at_least=needed), row
            except BadImage as error:
                logger.warning("the image %r is replaced by another one: %s", name, error.reason)
                row = int(stand_ins.integers(len(self)))
        raise UserError(
            f"{_MAX_REPLACEMENTS} images in a row could not be decoded, the last one {name!r}; "
            "pack them again with scripts/cc3m_lmdb_writer.py, which leaves bad ones out"
        )


def classes_of(
    annotations: Sequence[Annotation], class_key: str | None, captions_per_visit: int = 1
) -> list[int] | None:
    """The class of each row, numbered from 0: what ``class_key`` says, else each row its own.

    None where no two captions of a batch can match one image but by chance, as in BLIP.

    Raises:
        UserError: a sample without that key.
    """
    if class_key is None:
        return list(range(len(annotations))) if captions_per_visit > 1 else None
    without = [entry["image"] for entry in annotations if class_key not in entry]
    if without:
        raise UserError(
            f"{len(without)} of {len(annotations)} samples have no "
            f"{class_key!r}, for example {without[0]!r}; check class_key"
        )
    labels = [str(entry[class_key]) for entry in annotations]
    number = {label: i for i, label in enumerate(sorted(set(labels)))}
    return [number[label] for label in labels]
