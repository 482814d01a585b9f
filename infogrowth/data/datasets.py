"""The datasets of training and retrieval, and the caption files that they are made of, in the forms
that exist:

BLIP's Karpathy JSON   [{"image", "caption": text or [text, …], "image_id"}]
Karpathy's own         {"images": [{"filepath", "filename", "split", "sentences": [{"raw"}]}]}
COCO's official        {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
"""

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from infogrowth.annotations import Annotation, as_id
from infogrowth.data.image_stores import ImageStore, open_images
from infogrowth.data.images import decode_image
from infogrowth.data.text import caption_of, pre_caption
from infogrowth.errors import BadSample, UserError
from infogrowth.files import read_json
from infogrowth.randomness import generator

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]
# "restval" is the part of COCO's validation images that Karpathy's split leaves for training.
_SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
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
        captions_per_visit: int = 1,
        classes: Sequence[int] | None = None,
    ) -> None:
        self._annotations = annotations
        self._images: ImageStore = open_images(images)
        self._transform, self._max_words = transform, max_words
        self._seed = seed
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
            return [pre_caption(str(texts[i]), self._max_words) for i in chosen]
        if not isinstance(caption, str):
            texts = [text for text in caption if text.strip()] or caption
            texts = [texts[int(random.integers(len(texts)))]]
        return pre_caption(str(texts[0]), self._max_words)

    def _image(self, row: int, epoch: int, position: int) -> tuple[Image.Image, int]:
        """The row's image, or a stand-in's, and whose it is."""
        stand_ins = generator(self._seed, "stand-in", epoch, position)
        for _ in range(_MAX_REPLACEMENTS):
            name = self._annotations[row]["image"]
            try:
                needed = getattr(self._transform, "pixels_needed", None)
                return decode_image(self._images.read(name), at_least=needed), row
            except BadSample as error:
                logger.warning("the image %r is replaced by another one: %s", name, str(error))
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


def training_pairs(paths: PathLike | Sequence[PathLike]) -> tuple[list[Annotation], list[int]]:
    """The pairs of caption files, one per caption, file after file; and the number of each one's
    image, from 0 on, the same for all captions of an image (also across files).

    Of Karpathy's own file the training split is taken, unless the path names another.

    Raises:
        UserError: a file that cannot be read as captions.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else paths
    numbers: dict[str, int] = {}
    pairs: list[Annotation] = []
    images: list[int] = []
    for path in paths:
        for entry in read_captioned_images(path, split="train"):
            number = numbers.setdefault(entry.image_id, len(numbers))
            pairs.extend({"image": entry.image, "caption": text} for text in entry.captions)
            images.extend([number] * len(entry.captions))
    return pairs, images


class RetrievalEvaluation(Dataset):
    """Every image once, and all texts: what a recall table is computed from.

    Items are ``{"image": (3, S, S) float32, "index": int}``; the length is the number of images.

    Attributes:
        texts: all captions, cleaned, in the order of their images.
        txt2img: for each text its image's number.
        img2txt: for each image the numbers of its texts, however many there are.
        names: the images as the caption file names them.

    Args:
        annotations: a caption file in any form of the above.
        images: LMDB or folder of the images, as a path or opened.
        transform: normally ``EvaluationTransform(size)``; it alone normalises.
        max_words: words of a caption that are kept.
        split: of Karpathy's own file, where the path names none.

    Raises:
        UserError: a file that cannot be read as captions, or no images at ``images``.
    """

    def __init__(
        self,
        annotations: PathLike,
        images: Any,
        transform: Callable[[Image.Image], torch.Tensor],
        max_words: int = 30,
        split: str | None = None,
    ) -> None:
        self._images: ImageStore = open_images(images)
        self._transform = transform
        self.names: list[str] = []
        self.texts: list[str] = []
        self.txt2img: list[int] = []
        self.img2txt: list[list[int]] = []
        for number, entry in enumerate(read_captioned_images(annotations, split)):
            first = len(self.texts)
            self.names.append(entry.image)
            self.texts.extend(pre_caption(text, max_words) for text in entry.captions)
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
        except BadSample as error:
            raise UserError(
                f"the image {name!r} cannot be evaluated: {error}; replace the file"
            ) from error
        return {"image": self._transform(image), "index": number}


@dataclass(frozen=True)
class CaptionedImage:
    """An image as a caption file names it, its captions, and what identifies it there."""

    image: str
    captions: list[str]
    image_id: str


def read_captioned_images(
    path: str | os.PathLike[str], split: str | None = None
) -> list[CaptionedImage]:
    """All images of a caption file, in its order, entries of one image joined.

    Entries without a caption, and captions of images that the file does not list, are left out
    with a warning.

    Args:
        path: the file. ``dataset_coco.json:test`` names one split of Karpathy's own file.
        split: ``train``, ``val`` or ``test``, where the path names none.

    Raises:
        UserError: unreadable, none of the three forms, no split given where the file holds
            several, or no captions at all.
    """
    file = os.fspath(path)
    stem, _, named = file.rpartition(":")
    if stem and named in _SPLITS and not os.path.exists(file):
        file, split = stem, named
    elif split is not None and split not in _SPLITS:
        raise UserError(f"the split of {file} must be train, val or test, not {split!r}")
    content = read_json(file, "the caption file")
    found: dict[str, CaptionedImage] = {}
    reasons: list[str] = []
    for name, caption, image_id in _entries(content, split, file):
        try:
            if (name := as_id(name)) is None:
                raise BadSample("it names no image")
            texts, _ = caption_of(caption)
        except BadSample as error:
            reasons.append(f"{name!r:.60}: {error}")
            continue
        image = found.setdefault(name, CaptionedImage(name, [], as_id(image_id) or name))
        image.captions.extend([texts] if isinstance(texts, str) else texts)
    if not found:
        part = f" in its split {split!r}" if split else ""
        why = f" ({reasons[0]})" if reasons else ""
        raise UserError(f"the caption file {file} holds no image with a caption{part}{why}")
    if reasons:
        logger.warning("%s: entries left out: %d, the first: %s", file, len(reasons), reasons[0])
    return list(found.values())


def _entries(content: Any, split: str | None, file: str) -> Iterator[tuple[Any, Any, Any]]:
    """Image, caption or captions, and id of the image, of every entry as it stands there."""
    if isinstance(content, list):
        for entry in content:
            row = entry if isinstance(entry, dict) else {}
            yield row.get("image"), row, row.get("image_id")
        return
    listed = content.get("images") if isinstance(content, dict) else None
    if not isinstance(listed, list):
        raise UserError(
            f"the caption file {file} is neither a list of images with captions, Karpathy's "
            "dataset_coco.json, nor an official COCO caption file"
        )
    images = [image for image in listed if isinstance(image, dict)]
    if isinstance(content.get("annotations"), list):
        yield from _official_entries(images, content["annotations"])
        return
    present = {str(image.get("split")) for image in images}
    if split is None and len(present) > 1:
        raise UserError(
            f"the caption file {file} holds the splits {', '.join(sorted(present))}: "
            f"write {file}:train, {file}:val or {file}:test"
        )
    for image in images:
        if split is None or image.get("split") in _SPLITS[split]:
            parts = (image.get("filepath"), image.get("filename"))
            name = "/".join(part for part in parts if isinstance(part, str) and part)
            sentences = image.get("sentences")
            sentences = sentences if isinstance(sentences, list) else []
            raw = [sentence.get("raw") for sentence in sentences if isinstance(sentence, dict)]
            yield name, raw, image.get("cocoid")


def _official_entries(
    images: list[dict[str, Any]], annotations: list[Any]
) -> Iterator[tuple[Any, Any, Any]]:
    from pycocotools.coco import COCO

    coco = COCO()
    # Ids as text, so that 802 and "802" meet; what the index does not need is not asked for.
    coco.dataset = {
        "images": [{**image, "id": as_id(image.get("id"))} for image in images],
        "annotations": [
            {"id": number, "image_id": as_id(row.get("image_id")), "caption": row.get("caption")}
            for number, row in enumerate(annotations)
            if isinstance(row, dict)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress there
        coco.createIndex()
    for image_id, image in coco.imgs.items():
        name, address = image.get("file_name"), str(image.get("coco_url")).split("/")
        # The address names the folder, as in ".../val2017/000000397133.jpg".
        folder = f"{address[-2]}/" if len(address) > 2 and address[-1] == name else ""
        captions = [annotation["caption"] for annotation in coco.imgToAnns.get(image_id, [])]
        yield name and f"{folder}{name}", captions, image_id
    unlisted = [
        a["image_id"] for a in coco.dataset["annotations"] if a["image_id"] not in coco.imgs
    ]
    for image_id in unlisted:
        yield f"image {image_id}, which is not listed", None, None
