"""The dataset with its known faults: which captions are swapped, what is a copy, in which order."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from sample_parts.artists import Drawing
from sample_parts.concepts import caption


@dataclass(frozen=True)
class Planned:
    """One place in the stream."""

    drawing: Drawing
    true_caption: str
    caption: str
    original: int | None = None  # for a copy: which drawing (position in the plan's input)
    exact: bool = False

    @property
    def swapped(self) -> bool:
        """Whether the caption belongs to another picture."""
        return self.caption != self.true_caption


@dataclass(frozen=True)
class Plan:
    """The whole stream, and how many of its first places are the trusted seeds."""

    stream: list[Planned]
    seeds: int


def plan(
    drawings: Sequence[Drawing],
    rng: np.random.Generator,
    *,
    pairs: int,
    seeds: int,
    swapped_share: float,
    copied_share: float,
) -> Plan:
    """Lay out ``pairs`` places: the seeds, then everything else in random order.

    Copies follow a long tail, as on the web: few pictures are posted again, some of them often. A
    copy always comes after its original and mostly carries its caption. Seeds, copies and copied
    pictures are never swapped.
    """
    copies = round(pairs * copied_share)
    originals = [
        Planned(drawing, text, text)
        for drawing in drawings[: pairs - copies]
        for text in [caption(drawing.concept, rng, drawing.own_name)]
    ]
    if len(originals) < pairs - copies:
        raise ValueError(f"{len(originals)} drawings are too few for {pairs} pairs")
    repeats = _long_tail(copies, len(originals), rng)
    swappable = [i for i in range(seeds, len(originals)) if i not in repeats]
    chosen = rng.choice(swappable, size=round(pairs * swapped_share), replace=False).tolist()
    originals = _swap(originals, chosen, rng)
    copied = [
        _copy(originals[i], i, exact=bool(rng.random() < 0.5), rng=rng)
        for i, count in repeats.items()
        for _ in range(count)
    ]
    rest = _shuffled(list(enumerate(originals))[seeds:] + [(None, c) for c in copied], rng)
    return Plan(originals[:seeds] + rest, seeds)


def _long_tail(copies: int, candidates: int, rng: np.random.Generator) -> dict[int, int]:
    """Candidate → number of copies (1 to 8, small numbers more often), ``copies`` in all."""
    repeats: dict[int, int] = {}
    order = rng.permutation(candidates).tolist()
    while copies:
        count = min(copies, 8, int(rng.zipf(1.6)))
        repeats[order.pop()] = count
        copies -= count
    return repeats


def _swap(
    originals: list[Planned], chosen: Sequence[int], rng: np.random.Generator
) -> list[Planned]:
    """Permute the chosen pictures' captions so that none shares a word with its own names."""
    result = list(originals)
    takers = list(chosen)
    givers = rng.permutation(takers).tolist()
    for place in range(len(takers)):
        for other in [*range(place, len(givers)), *range(place)]:
            a, b = takers[place], givers[other]
            c, d = takers[other], givers[place]
            if _strangers(originals[a], originals[b]) and (
                other >= place or _strangers(originals[c], originals[d])
            ):
                givers[place], givers[other] = givers[other], givers[place]
                break
        else:
            raise ValueError("the chosen captions are too alike to be swapped")
    for taker, giver in zip(takers, givers, strict=True):
        result[taker] = replace(originals[taker], caption=originals[giver].true_caption)
    return result


def _strangers(one: Planned, other: Planned) -> bool:
    return not _words(one) & _words(other)


def _words(planned: Planned) -> set[str]:
    texts = [planned.true_caption, *planned.drawing.concept.names]
    return {word for text in texts for word in text.replace(",", " ").split()}


def _copy(original: Planned, position: int, exact: bool, rng: np.random.Generator) -> Planned:
    text = original.true_caption
    if rng.random() < 0.3:  # somebody posts it again and writes an own caption
        text = caption(original.drawing.concept, rng, original.drawing.own_name)
    return Planned(original.drawing, text, text, original=position, exact=exact)


def _shuffled(places: list[tuple[int | None, Planned]], rng: np.random.Generator) -> list[Planned]:
    """Random order in which every original precedes its copies."""
    order = [places[i] for i in rng.permutation(len(places))]
    first: dict[int, int] = {}
    for place, (position, planned) in enumerate(order):
        family = planned.original if position is None else position
        if family is None:
            continue
        earliest = first.setdefault(family, place)
        if position is not None and earliest != place:
            order[earliest], order[place] = order[place], order[earliest]
    return [planned for _, planned in order]
