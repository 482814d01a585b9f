"""The samples' pictures, small: re-encoded thumbnails, never the bytes of the web.

Re-encoding drops metadata and whatever else a crafted file may carry.
"""

import base64
import io
import os

from PIL import Image

from infogrowth.data.images import BadImage, decode_image
from infogrowth.data.lmdb_store import LmdbImages
from infogrowth.errors import UserError

THUMBNAIL_SIDE = 128  # pixels, the longer side


class Pictures:
    """Thumbnails by sample id; a sample without a readable picture has None.

    Args:
        path: the LMDB of the pictures, or None when nobody knows it: then no sample has one.
    """

    def __init__(self, path: str | os.PathLike[str] | None):
        self._store = LmdbImages(path) if path is not None else None
        self._addresses: dict[str, str | None] = {}

    @property
    def available(self) -> bool:
        """Whether there is a place to look for pictures at all."""
        return self._store is not None

    def image(self, sample_id: str, side: int = THUMBNAIL_SIDE) -> Image.Image | None:
        """The picture, at most ``side`` pixels wide and high; None if missing or unreadable."""
        if self._store is None:
            return None
        try:
            picture = decode_image(self._store.read(sample_id), at_least=2 * side)
        except (UserError, BadImage):
            return None
        picture.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
        return picture

    def address(self, sample_id: str) -> str | None:
        """The thumbnail as a ``data:`` address for an ``<img>``; the same one every time."""
        if sample_id not in self._addresses:
            picture = self.image(sample_id)
            self._addresses[sample_id] = None if picture is None else _webp_address(picture)
        return self._addresses[sample_id]


def open_pictures(given: str | None, recorded: str | None) -> tuple[Pictures, str | None]:
    """Pictures from the path that the user gave, else from the one the growth folder recorded.

    Returns:
        the pictures, and a sentence for the reader when there are none.

    Raises:
        UserError: the path that the user gave does not hold an LMDB.
    """
    if given is not None:
        return Pictures(given), None
    if recorded is None:
        return Pictures(None), "No pictures: no LMDB is recorded; give it with --lmdb DIR."
    try:
        return Pictures(recorded), None
    except UserError:
        return Pictures(None), f"No pictures: {recorded} is gone; give the LMDB with --lmdb DIR."


def _webp_address(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=68, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
