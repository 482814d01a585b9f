"""Piles from what is on disk: an LMDB with its annotations, or a folder of downloaded pairs."""

from typing import Any

from infogrowth.data.folders import ImageStore, open_images
from infogrowth.data.images import BadImage
from infogrowth.data.lmdb_store import image_key
from infogrowth.encoders.pile import Pile, first_caption
from infogrowth.encoders.shards import file_digest
from infogrowth.errors import UserError
from infogrowth.files import read_json

NO_CAPTION = "the caption is missing or empty"
NO_PICTURE = "the image is missing"


class PicturesById:
    """The pictures of some ids, by row number, from an LMDB or a folder of files."""

    def __init__(self, images: ImageStore, ids: list[str]) -> None:
        self._images, self._ids = images, ids

    def read(self, row: int) -> bytes:
        if self._ids[row] not in self._images:
            raise BadImage(NO_PICTURE)
        return self._images.read(self._ids[row])


def pictures_by_id(path: str, ids: list[str]) -> PicturesById:
    """The pictures of some ids, wherever the features that are being recaptioned came from.

    Raises:
        UserError: nothing is at ``path``.
    """
    return PicturesById(open_images(path), ids)


def pile_of_lmdb(lmdb: str, annotations: str) -> Pile:
    """The samples of an annotation JSON, in its order, with pictures from an LMDB.

    An entry with several captions is embedded with the first one that is not blank: a pair is one
    picture and one caption. An entry without a usable caption is skipped and recorded.

    Raises:
        UserError: a file that is missing or no list of samples, or an LMDB that cannot be opened.
    """
    entries = read_json(annotations, "the annotation file")
    if not isinstance(entries, list):
        kind = type(entries).__name__
        raise UserError(f"the annotation file {annotations} must hold a list, not a {kind}")
    ids, captions, problems = [], [], {}
    for row, entry in enumerate(entries):
        name, caption, problem = _checked(entry, row)
        ids.append(name)
        captions.append(caption)
        if problem:
            problems[row] = problem
    return Pile(
        ids, captions, problems, pictures_by_id(lmdb, ids),
        {"images": lmdb, "annotations": annotations, "samples": file_digest(annotations)},
    )  # fmt: skip


def _checked(entry: Any, row: int) -> tuple[str, str, str | None]:
    """Id, caption and what is wrong with an entry; other commands refuse such a file whole, but
    one bad line in a pile of millions is no reason not to embed the others."""
    name = entry.get("image") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name:
        return f"entry {row}", "", "the entry has no image id"
    caption = first_caption(entry.get("caption"))
    return name, caption or "", None if caption else NO_CAPTION


def pile_of_captions(path: str, wanted: list[str] | None) -> Pile:
    """Captions made elsewhere, ``[{"image", "caption"}]``, without pictures.

    Args:
        wanted: the ids to take, in the order to take them (a file ending more or less makes no
            difference, as for an LMDB); None takes every entry.

    Raises:
        UserError: not such a list.
    """
    entries = read_json(path, "the file of captions")
    if not isinstance(entries, list):
        raise UserError(f"the file of captions {path} must hold a list of image and caption")
    found: dict[str, tuple[str, str, str | None]] = {}
    for row, entry in enumerate(entries):
        name, caption, problem = _checked(entry, row)
        key = image_key(name)
        if key not in found or found[key][2]:  # of several captions the first usable one counts
            found[key] = (name, caption, problem)
    if wanted is None:
        chosen = list(found.values())
    else:
        keys = [(sample, image_key(sample)) for sample in wanted]
        chosen = [(sample, *found[key][1:]) for sample, key in keys if key in found]
    problems = {row: problem for row, (_, _, problem) in enumerate(chosen) if problem}
    return Pile([name for name, _, _ in chosen], [text for _, text, _ in chosen], problems, None)
