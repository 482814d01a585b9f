"""Caption files for retrieval, in the three forms that exist, as one list of images with captions.

BLIP's Karpathy JSON   [{"image", "caption": text or [text, …], "image_id"}]
Karpathy's own         {"images": [{"filepath", "filename", "split", "sentences": [{"raw"}]}]}
COCO's official        {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
"""

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pycocotools.coco import COCO

from infogrowth.errors import UserError
from infogrowth.files import read_json

log = logging.getLogger(__name__)

# "restval" is the part of COCO's validation images that Karpathy's split leaves for training.
_SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


@dataclass(frozen=True)
class CaptionedImage:
    """An image as a caption file names it, what it shows, and what identifies it there."""

    image: str
    captions: list[str]
    image_id: str


def read_captioned_images(
    path: str | os.PathLike[str], split: str | None = None
) -> list[CaptionedImage]:
    """All images of a caption file, in its order, entries of one image joined.

    Args:
        path: the file. ``dataset_coco.json:test`` names one split of Karpathy's own file.
        split: ``train``, ``val`` or ``test``, where the path names none.

    Raises:
        UserError: unreadable, none of the three forms, an entry that is not what the form asks
            for, no split given where the file holds several, or no captions at all.
    """
    file, split = _split_of(os.fspath(path), split)
    content = read_json(file, "the caption file")
    try:
        images = _joined(_entries(content, split, file))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the caption file {file} has an entry that is not what its form asks for "
            f"({type(error).__name__}: {error})"
        ) from error
    usable = [image for image in images if image.captions]
    if not usable:
        part = f" in its split {split!r}" if split else ""
        raise UserError(f"the caption file {file} holds no image with a caption{part}")
    if len(usable) < len(images):
        log.warning("%s: %d images without a caption left out", file, len(images) - len(usable))
    return usable


def _split_of(path: str, split: str | None) -> tuple[str, str | None]:
    file, colon, named = path.rpartition(":")
    if colon and named in _SPLITS and not os.path.exists(path):
        return file, named
    if split is not None and split not in _SPLITS:
        raise UserError(f"the split of {path} must be train, val or test, not {split!r}")
    return path, split


def _entries(content: Any, split: str | None, file: str) -> Iterator[CaptionedImage]:
    if isinstance(content, list):
        return _blip_entries(content, file)
    if isinstance(content, dict) and "images" in content and "annotations" in content:
        return _official_entries(content, file)
    if isinstance(content, dict) and "images" in content:
        return _karpathy_entries(content["images"], split, file)
    raise UserError(
        f"the caption file {file} is neither a list of images with captions, Karpathy's "
        "dataset_coco.json, nor an official COCO caption file"
    )


def _blip_entries(content: list[Any], file: str) -> Iterator[CaptionedImage]:
    for position, entry in enumerate(content):
        where = f"entry {position} of the caption file {file}"
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise UserError(f"{where} must be an object with image and caption")
        captions = entry.get("caption")
        captions = [captions] if isinstance(captions, str) else captions
        if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
            raise UserError(f"{where} ({entry['image']!r}) must have a caption: text or a list")
        yield CaptionedImage(entry["image"], captions, str(entry.get("image_id", entry["image"])))


def _karpathy_entries(images: list[Any], split: str | None, file: str) -> Iterator[CaptionedImage]:
    present = {image["split"] for image in images}
    if split is None and len(present) > 1:
        raise UserError(
            f"the caption file {file} holds the splits {', '.join(sorted(present))}: "
            f"write {file}:train, {file}:val or {file}:test"
        )
    wanted = present if split is None else _SPLITS[split]
    for image in images:
        if image["split"] in wanted:
            folder = image.get("filepath", "")
            name = f"{folder}/{image['filename']}" if folder else image["filename"]
            captions = [sentence["raw"] for sentence in image["sentences"]]
            yield CaptionedImage(name, captions, str(image.get("cocoid", name)))


def _official_entries(content: dict[str, Any], file: str) -> Iterator[CaptionedImage]:
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress there
        coco.createIndex()
    known = set(coco.getImgIds())
    stray = next((a for a in content["annotations"] if a["image_id"] not in known), None)
    if stray is not None:
        raise UserError(
            f"the caption file {file} has a caption for image {stray['image_id']!r}, "
            "which is not among its images"
        )
    for image_id, image in coco.imgs.items():
        captions = [annotation["caption"] for annotation in coco.imgToAnns.get(image_id, [])]
        # The address tells the folder, as in ".../val2017/000000397133.jpg".
        address = image.get("coco_url", "").split("/")
        folder = f"{address[-2]}/" if len(address) > 2 and address[-1] == image["file_name"] else ""
        yield CaptionedImage(folder + image["file_name"], captions, str(image_id))


def _joined(entries: Iterator[CaptionedImage]) -> list[CaptionedImage]:
    """One entry per image, blank captions left out."""
    found: dict[str, CaptionedImage] = {}
    for entry in entries:
        image = found.setdefault(entry.image, CaptionedImage(entry.image, [], entry.image_id))
        image.captions.extend(caption for caption in entry.captions if caption.strip())
    return list(found.values())
