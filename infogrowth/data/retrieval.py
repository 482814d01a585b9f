"""The datasets of retrieval: pairs to train on, and a set of images and texts to evaluate with."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from infogrowth.data.captions import pre_caption
from infogrowth.data.folders import ImageStore, open_images
from infogrowth.data.images import BadImage, decode_image
from infogrowth.data.pairs import PairDataset, Transform
from infogrowth.data.retrieval_files import read_captioned_images
from infogrowth.errors import UserError

PathLike = str | os.PathLike[str]


class RetrievalTrain(PairDataset):
    """Image–caption pairs with the image's number: one row per caption, file after file.

    Items and the way to ask for them are those of :class:`PairDataset`, and ``image_id``, an int
    from 0 on, the same for all captions of an image (also across files).

    Args:
        annotations: caption files in any form of retrieval_files.py. Of Karpathy's own file the
            training split is taken, unless the path names another.
        images: LMDB or folder of the images, as a path or opened.
        transform, max_words, seed, prompt: as for PairDataset.

    Raises:
        UserError: a file that cannot be read as captions, or no images at ``images``.
    """

    def __init__(
        self,
        annotations: PathLike | Sequence[PathLike],
        images: Any,
        transform: Transform,
        max_words: int = 30,
        seed: int = 0,
        prompt: str = "",
    ) -> None:
        paths = [annotations] if isinstance(annotations, str | os.PathLike) else annotations
        numbers: dict[str, int] = {}
        rows: list[dict[str, Any]] = []
        self._image_ids: list[int] = []
        for path in paths:
            for entry in read_captioned_images(path, split="train"):
                number = numbers.setdefault(entry.image_id, len(numbers))
                rows.extend({"image": entry.image, "caption": text} for text in entry.captions)
                self._image_ids.extend([number] * len(entry.captions))
        super().__init__(rows, images, transform, max_words, seed, prompt)

    def _extra(self, row: int) -> dict[str, Any]:
        return {"image_id": self._image_ids[row]}


class RetrievalEvaluation(Dataset):
    """Every image once, and all texts: what a recall table is computed from.

    Items are ``{"image": (3, S, S) float32, "index": int}``; the length is the number of images.

    Attributes:
        texts: all captions, cleaned, in the order of their images.
        txt2img: for each text its image's number.
        img2txt: for each image the numbers of its texts, however many there are.
        names: the images as the caption file names them.

    Args:
        annotations: a caption file in any form of retrieval_files.py.
        images: LMDB or folder of the images, as a path or opened.
        transform: normally ``evaluation_transform(size)``; it alone normalises.
        max_words: words of a caption that are kept.
        prompt: put before every text.
        split: of Karpathy's own file, where the path names none.

    Raises:
        UserError: as for RetrievalTrain.
    """

    def __init__(
        self,
        annotations: PathLike,
        images: Any,
        transform: Callable[[Image.Image], torch.Tensor],
        max_words: int = 30,
        prompt: str = "",
        split: str | None = None,
    ) -> None:
        is_path = isinstance(images, str | os.PathLike)
        self._images: ImageStore = open_images(images) if is_path else images
        self._transform = transform
        self.names: list[str] = []
        self.texts: list[str] = []
        self.txt2img: list[int] = []
        self.img2txt: list[list[int]] = []
        for number, entry in enumerate(read_captioned_images(annotations, split)):
            first = len(self.texts)
            self.names.append(entry.image)
            self.texts.extend(prompt + pre_caption(text, max_words) for text in entry.captions)
            self.txt2img.extend([number] * len(entry.captions))
            self.img2txt.append(list(range(first, len(self.texts))))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One image.

        Raises:
            UserError: it is missing or cannot be decoded; a table without it would be wrong.
        """
        number = range(len(self))[number]
        name = self.names[number]
        try:
            image = decode_image(self._images.read(name))
        except BadImage as error:
            raise UserError(
                f"the image {name!r} cannot be evaluated: {error.reason}; replace the file"
            ) from error
        return {"image": self._transform(image), "index": number}
