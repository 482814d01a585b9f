"""Which samples a reader should see: the extremes of each kind, and their images."""

import base64
import io
import os
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from infogrowth.data.image_stores import LmdbImages
from infogrowth.data.images import decode_image
from infogrowth.errors import BadSample, UserError
from infogrowth.report.dataset import GrowthTable

GALLERY_SIZE = 60
THUMBNAIL_SIDE = 128  # pixels, the longer side


class Thumbnails:
    """The samples' images, small and encoded anew: no metadata, and nothing a crafted file carries.
    Raises UserError: what the user gave is no LMDB.

    Args:
        given: the LMDB of the images, from the user.
        recorded: the one that a growth folder recorded, where none is given.

    Attributes:
        note: a sentence for the reader when there are no images.
    """

    def __init__(
        self, given: str | os.PathLike[str] | None = None, recorded: str | None = None
    ) -> None:
        self._store: LmdbImages | None = None
        self._addresses: dict[str, str | None] = {}
        self.note: str | None = None
        path = recorded if given is None else given
        if path is None:
            self.note = "No images: no LMDB is recorded; give it with --lmdb DIR."
            return
        try:
            self._store = LmdbImages(path)
        except UserError:
            if given is not None:
                raise
            self.note = f"No images: {recorded} is gone; give the LMDB with --lmdb DIR."

    def image(self, sample_id: str, side: int = THUMBNAIL_SIDE) -> Image.Image | None:
        """The image, at most ``side`` pixels wide and high; None if missing or unreadable."""
        if self._store is None:
            return None
        try:
            image = decode_image(self._store.read(sample_id), at_least=2 * side)
        except (UserError, BadSample):
            return None
        image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
        return image

    def webp(self, sample_id: str) -> bytes | None:
        """The thumbnail as a file; None if there is no image."""
        image, buffer = self.image(sample_id), io.BytesIO()
        if image is None:
            return None
        image.save(buffer, "WEBP", quality=68, method=4)
        return buffer.getvalue()

    def address(self, sample_id: str) -> str | None:
        """The thumbnail as a ``data:`` address for an ``<img>``; None if there is no image."""
        if sample_id not in self._addresses:
            content = self.webp(sample_id)
            code = base64.b64encode(content or b"").decode("ascii")
            self._addresses[sample_id] = f"data:image/webp;base64,{code}" if content else None
        return self._addresses[sample_id]


def gallery(
    key: str, rows: pd.DataFrame, shown: pd.DataFrame, skipped: int = 0, neighbors: bool = False
) -> dict[str, Any]:
    """Samples of one kind for galleries.html.j2, which knows the words for each ``key``.

    Args:
        rows: all of them.
        shown: those to show.
        skipped: how many samples were not considered.
        neighbors: show the nearest images beside each.
    """
    about = {"key": key, "total": len(rows), "skipped": skipped, "with_neighbors": neighbors}
    return {**about, "samples": samples(shown)}


def samples(rows: pd.DataFrame) -> list[Any]:
    """The rows as named tuples for a template: columns by name, the number of the row as Index."""
    return list(rows.itertuples(name="Sample"))


def galleries(table: GrowthTable) -> list[dict[str, Any]]:
    """The galleries that have something to show, in reading order."""
    rows, size = table.rows, GALLERY_SIZE
    dropped = rows[~table.kept & rows.alignment.notna()].sort_values("alignment", kind="stable")
    worst, others = dropped.iloc[: 2 * size // 3], dropped.iloc[2 * size // 3 :]
    recaptioned = rows[rows.verdict == "recaptioned"]
    recaptioned = recaptioned.sort_values("improvement", ascending=False, kind="stable")
    by_gain = rows[table.kept & rows.gain.notna()].sort_values("gain", kind="stable")
    early = min(len(by_gain) // 10, 1000)  # when everything is new
    later = np.sort(by_gain.index)[early:]
    novel = by_gain[by_gain.index.isin(later)].iloc[::-1]
    with_neighbors = table.neighbors is not None
    made = [
        gallery("dropped", dropped, pd.concat([worst, others.tail(size // 3)])),
        gallery("recaptioned", recaptioned, recaptioned.head(size)),
        gallery("redundant", by_gain, by_gain.head(2 * size // 3), neighbors=with_neighbors),
        gallery("novel", novel, novel.head(size), skipped=early),
    ]
    return [found for found in made if found["samples"]]
