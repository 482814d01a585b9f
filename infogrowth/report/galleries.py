"""Which samples a reader should see: the extremes of each kind, as cards for the template."""

from dataclasses import dataclass, field

import numpy as np

from infogrowth.report.dataset import GrownDataset
from infogrowth.report.numbers import duplicate_groups
from infogrowth.report.pictures import Pictures

GALLERY_SIZE = 60
NEIGHBORS_SHOWN = 3
GROUP_PICTURES = 12
GROUPS_SHOWN = 24


@dataclass(frozen=True)
class NeighborCard:
    """A nearest neighbor beside a sample."""

    id: str
    caption: str
    distance: float
    picture: str | None


@dataclass(frozen=True)
class Card:
    """One sample as the reader sees it. Texts are raw: the template escapes them."""

    row: int
    id: str
    verdict: str
    reason: str
    caption: str
    original_caption: str
    alignment: float
    original_alignment: float
    gain_image: float
    gain_text: float
    picture: str | None
    neighbors: list[NeighborCard] = field(default_factory=list)

    @property
    def gain(self) -> float:
        """Mean of the image and the text gain."""
        return (self.gain_image + self.gain_text) / 2

    @property
    def improvement(self) -> float:
        """How much the new caption aligned better than the old one."""
        return self.alignment - self.original_alignment


@dataclass(frozen=True)
class Gallery:
    """Cards of one kind, with what to sort them by (attribute of Card -> label)."""

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
    """Near-duplicates: how many, and the first few of them."""

    size: int
    gain: float  # mean over the group
    cards: list[Card]


class CardMaker:
    """Makes cards of rows; knows the dataset and where the pictures are."""

    def __init__(self, dataset: GrownDataset, pictures: Pictures):
        self._dataset = dataset
        self._pictures = pictures
        self._captions = dataset.caption_by_id()

    def card(self, row: int, neighbors: int = 0) -> Card:
        """The card of ``row`` with up to ``neighbors`` image neighbors."""
        data = self._dataset
        return Card(
            row=int(row),
            id=data.ids[row],
            verdict=str(data.verdicts[row]),
            reason=str(data.reasons[row]),
            caption=data.captions[row],
            original_caption=data.original_captions[row],
            alignment=float(data.alignment[row]),
            original_alignment=float(data.original_alignment[row]),
            gain_image=float(data.gains[row, 0]),
            gain_text=float(data.gains[row, 1]),
            picture=self._pictures.address(data.ids[row]),
            neighbors=self.neighbor_cards(row, "image", neighbors) if neighbors else [],
        )

    def neighbor_cards(self, row: int, space: str, most: int) -> list[NeighborCard]:
        """The nearest ``most`` neighbors of ``row`` in ``space``."""
        return [
            NeighborCard(name, self._captions.get(name, ""), distance, self._pictures.address(name))
            for name, distance in self._dataset.neighbors(row, space)[:most]
        ]


def galleries(dataset: GrownDataset, maker: CardMaker) -> list[Gallery]:
    """The galleries that have something to show, in reading order."""
    made = [
        _dropped(dataset, maker),
        _recaptioned(dataset, maker),
        _redundant(dataset, maker),
        _novel(dataset, maker),
    ]
    return [gallery for gallery in made if gallery.cards]


def groups(
    dataset: GrownDataset, maker: CardMaker, distance: float
) -> tuple[list[Group], int, int]:
    """The biggest groups of near-duplicates, how many groups there are, and samples in them."""
    found = duplicate_groups(dataset, distance)
    gain = dataset.mean_gain
    shown = [
        Group(
            len(rows), float(np.nanmean(gain[rows])), [maker.card(r) for r in rows[:GROUP_PICTURES]]
        )
        for rows in found[:GROUPS_SHOWN]
    ]
    return shown, len(found), sum(map(len, found))


def _dropped(dataset: GrownDataset, maker: CardMaker) -> Gallery:
    rows = np.flatnonzero(~dataset.kept & np.isfinite(dataset.alignment))
    rows = rows[np.argsort(dataset.alignment[rows], kind="stable")]
    worst, closest = rows[: 2 * GALLERY_SIZE // 3], rows[2 * GALLERY_SIZE // 3 :]
    shown = [*worst, *closest[-GALLERY_SIZE // 3 :]]
    return Gallery(
        key="dropped",
        title="Dropped as noise",
        explanation="Picture and caption do not agree: the worst, and the closest calls just "
        "under the threshold.",
        total=len(rows),
        cards=[maker.card(row) for row in shown],
        sort_keys={"alignment": "alignment", "gain": "gain", "row": "arrival"},
    )


def _recaptioned(dataset: GrownDataset, maker: CardMaker) -> Gallery:
    rows = np.flatnonzero(dataset.recaptioned)
    better = dataset.alignment[rows] - dataset.original_alignment[rows]
    rows = rows[np.argsort(-better, kind="stable")]
    return Gallery(
        key="recaptioned",
        title="Recaptioned",
        explanation="The old caption did not fit, the new one does: the biggest improvements.",
        total=len(rows),
        cards=[maker.card(row) for row in rows[:GALLERY_SIZE]],
        sort_keys={
            "improvement": "improvement",
            "alignment": "new alignment",
            "gain": "gain",
            "row": "arrival",
        },
        largest_first=True,
    )


def _redundant(dataset: GrownDataset, maker: CardMaker) -> Gallery:
    rows = _by_gain(dataset)
    return Gallery(
        key="redundant",
        title="Most redundant",
        explanation="Kept with the smallest gain: the dataset knew them already. Beside each, "
        "the nearest pictures that were there before it.",
        total=len(rows),
        cards=[maker.card(row, NEIGHBORS_SHOWN) for row in rows[: 2 * GALLERY_SIZE // 3]],
        sort_keys={
            "gain": "gain",
            "gain_image": "image gain",
            "gain_text": "text gain",
            "alignment": "alignment",
            "row": "arrival",
        },
        with_neighbors=dataset.has_decisions,
    )


def _novel(dataset: GrownDataset, maker: CardMaker) -> Gallery:
    rows = _by_gain(dataset)[::-1]
    early = novelty_warm_up(len(rows))
    if len(rows):
        rows = rows[rows >= np.sort(rows)[early]]
    return Gallery(
        key="novel",
        title="Most novel",
        explanation="Kept with the largest gain: nothing like them was there."
        + (
            f" The first {early:,} kept samples are left out: then everything is new." * bool(early)
        ),
        total=len(rows),
        cards=[maker.card(row) for row in rows[:GALLERY_SIZE]],
        sort_keys={
            "gain": "gain",
            "gain_image": "image gain",
            "gain_text": "text gain",
            "alignment": "alignment",
            "row": "arrival",
        },
        largest_first=True,
    )


def novelty_warm_up(kept: int) -> int:
    """How many of the first kept samples are not called novel: a tenth, at most a thousand."""
    return min(kept // 10, 1000)


def _by_gain(dataset: GrownDataset) -> np.ndarray:
    """Kept rows with a gain, smallest gain first."""
    rows = np.flatnonzero(dataset.kept & np.isfinite(dataset.mean_gain))
    return rows[np.argsort(dataset.mean_gain[rows], kind="stable")]
