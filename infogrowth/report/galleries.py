"""Which samples a reader should see: the extremes of each kind, as cards with thumbnails."""

import base64
import io
import os
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from infogrowth.data.images import BadImage, decode_image
from infogrowth.data.lmdb_store import LmdbImages
from infogrowth.errors import UserError
from infogrowth.growth.decisions import Decision
from infogrowth.report.dataset import GrowthTable, Neighbor
from infogrowth.report.numbers import DuplicateGroups

GALLERY_SIZE = 60
NEIGHBORS_SHOWN = 3
GROUP_IMAGES = 12
GROUPS_SHOWN = 24
THUMBNAIL_SIDE = 128  # pixels, the longer side
SORT_KEYS = {"gain": "gain", "gain_image": "image gain", "gain_text": "text gain"}


class Thumbnails:
    """The samples' images, small and encoded anew: no metadata, and nothing a crafted file carries.

    Args:
        path: the LMDB of the images, or None when nobody knows it: then no sample has one.
    """

    def __init__(self, path: str | os.PathLike[str] | None):
        self._store = LmdbImages(path) if path is not None else None
        self._addresses: dict[str, str | None] = {}

    def image(self, sample_id: str, side: int = THUMBNAIL_SIDE) -> Image.Image | None:
        """The image, at most ``side`` pixels wide and high; None if missing or unreadable."""
        if self._store is None:
            return None
        try:
            image = decode_image(self._store.read(sample_id), at_least=2 * side)
        except (UserError, BadImage):
            return None
        image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
        return image

    def address(self, sample_id: str) -> str | None:
        """The thumbnail as a ``data:`` address for an ``<img>``; None if there is no image."""
        if sample_id not in self._addresses:
            image = self.image(sample_id)
            self._addresses[sample_id] = None if image is None else _webp_address(image)
        return self._addresses[sample_id]


def open_thumbnails(given: str | None, recorded: str | None) -> tuple[Thumbnails, str | None]:
    """Images from the path that the user gave, else from the one the growth folder recorded.

    Returns:
        the thumbnails, and a sentence for the reader when there are none.

    Raises:
        UserError: the path that the user gave does not hold an LMDB.
    """
    if given is not None:
        return Thumbnails(given), None
    if recorded is None:
        return Thumbnails(None), "No images: no LMDB is recorded; give it with --lmdb DIR."
    try:
        return Thumbnails(recorded), None
    except UserError:
        return Thumbnails(None), f"No images: {recorded} is gone; give the LMDB with --lmdb DIR."


@dataclass(frozen=True)
class Card:
    """One sample as the reader sees it. Texts are raw: the template escapes them."""

    row: int
    sample: Decision
    thumbnail: str | None
    neighbors: list[tuple[Neighbor, str | None]] = field(default_factory=list)  # with thumbnails

    @property
    def gain(self) -> float | None:
        """Mean of the image and the text gain; of labeled images the one they have."""
        image, text = self.sample.gain_image, self.sample.gain_text
        return image if image is None or text is None else (image + text) / 2

    @property
    def improvement(self) -> float | None:
        """How much the new caption aligned better than the old one."""
        new, old = self.sample.alignment, self.sample.original_alignment
        return None if new is None or old is None else new - old


@dataclass(frozen=True)
class Gallery:
    """Cards of one kind, with what to sort them by (name of the value -> label)."""

    key: str
    title: str
    explanation: str
    total: int
    cards: list[Card]
    sort_keys: dict[str, str]
    largest_first: bool = False
    with_neighbors: bool = False


@dataclass(frozen=True)
class Group:
    """Near-duplicates: how many, why they count as such, and the first few of them."""

    size: int
    why: str
    gain: float  # mean over the group
    cards: list[Card]


class CardMaker:
    """Makes cards of rows; knows the dataset and where the images are."""

    def __init__(self, table: GrowthTable, thumbnails: Thumbnails):
        self.table = table
        self._thumbnails = thumbnails

    def card(self, row: int, neighbors: int = 0) -> Card:
        """The card of ``row`` with up to ``neighbors`` image neighbors."""
        sample = self.table.decision(row)
        near = self.table.neighbors(row, "image")[:neighbors]
        address = self._thumbnails.address
        return Card(int(row), sample, address(sample.id), [(n, address(n.id)) for n in near])

    def gallery(
        self, key: str, title: str, explanation: str, rows: np.ndarray, shown: np.ndarray,
        sort_keys: dict[str, str], largest_first: bool = False, with_neighbors: bool = False,
    ) -> Gallery:  # fmt: skip
        """The cards of ``shown``, out of ``rows``."""
        near = NEIGHBORS_SHOWN if with_neighbors else 0
        cards = [self.card(row, near) for row in shown]
        keys = {**sort_keys, "row": "arrival"}
        return Gallery(
            key, title, explanation, len(rows), cards, keys, largest_first, with_neighbors
        )


def galleries(maker: CardMaker) -> list[Gallery]:
    """The galleries that have something to show, in reading order."""
    table, size = maker.table, GALLERY_SIZE
    dropped = np.flatnonzero(~table.kept & np.isfinite(table.alignment))
    dropped = dropped[np.argsort(table.alignment[dropped], kind="stable")]
    worst, others = np.split(dropped, [2 * size // 3])
    recaptioned = np.flatnonzero(table.recaptioned)
    better = table.alignment[recaptioned] - table.original_alignment[recaptioned]
    recaptioned = recaptioned[np.argsort(-better, kind="stable")]
    by_gain = np.flatnonzero(table.kept & np.isfinite(table.mean_gain))
    by_gain = by_gain[np.argsort(table.mean_gain[by_gain], kind="stable")]
    early = novelty_warm_up(len(by_gain))
    novel = by_gain[::-1][by_gain[::-1] >= np.sort(by_gain)[early]] if len(by_gain) else by_gain
    with_alignment = {**SORT_KEYS, "alignment": "alignment"}
    made = [
        maker.gallery(
            "dropped",
            "Dropped as noise",
            "Image and caption do not agree: the worst, and the closest calls just under the "
            "threshold.",
            dropped,
            np.concatenate([worst, others[-(size // 3) :]]),
            {"alignment": "alignment", "gain": "gain"},
        ),
        maker.gallery(
            "recaptioned",
            "Recaptioned",
            "The old caption did not fit, the new one does: the biggest improvements.",
            recaptioned,
            recaptioned[:size],
            {"improvement": "improvement", "alignment": "new alignment", "gain": "gain"},
            largest_first=True,
        ),
        maker.gallery(
            "redundant",
            "Most redundant",
            "Kept with the smallest gain: the dataset knew them already. Beside each, the nearest "
            "images that were there before it.",
            by_gain,
            by_gain[: 2 * size // 3],
            with_alignment,
            with_neighbors=table.has_decisions,
        ),
        maker.gallery(
            "novel",
            "Most novel",
            "Kept with the largest gain: nothing like them was there."
            + f" The first {early:,} kept samples are left out: then everything is new."
            * bool(early),
            novel,
            novel[:size],
            with_alignment,
            largest_first=True,
        ),
    ]
    return [gallery for gallery in made if gallery.cards]


def groups(maker: CardMaker, found: DuplicateGroups) -> list[Group]:
    """The biggest groups of near-duplicates."""
    gain = maker.table.mean_gain
    return [
        Group(
            size=len(rows),
            why=found.why(number),
            gain=float(np.nanmean(gain[rows])),
            cards=[maker.card(row) for row in rows[:GROUP_IMAGES]],
        )
        for number, rows in enumerate(found.groups[:GROUPS_SHOWN])
    ]


def novelty_warm_up(kept: int) -> int:
    """How many of the first kept samples are not called novel: a tenth, at most a thousand."""
    return min(kept // 10, 1000)


def _webp_address(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=68, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
