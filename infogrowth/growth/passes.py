"""Which samples a run still has to offer: the growth folder's sources against what was given.

The rules, in words:

* Seeds come first. The same seeds given again are done; other seeds for a dataset that has begun
  are refused.
* Features are known by their content (the fingerprint of what was read), else by their path: the
  same ones go on where they were left, also when shards have been added; finished ones are done.
* One source is read with one recaption table. When another table comes, samples that were dropped
  for their alignment before, and that the table knows, are offered again at the end, in their old
  order: a "retry". A table already used on a source starts none.
"""

import os
from typing import Protocol

import numpy as np

from infogrowth.errors import UserError
from infogrowth.growth.decisions import Reason
from infogrowth.growth.ledger import GrowthFolder, Source

WAITING_REASONS = frozenset(
    reason.value for reason in Reason if reason.value.startswith("alignment")
)
"""Dropped for one of these, a sample may join later with a (better) caption."""


class Features(Protocol):
    """What is asked of a feature stream here."""

    path: str
    rows: int

    def fingerprint(self, rows: int) -> str: ...


def plan_seeds(
    sources: list[Source], features: Features | None, seed_ids: str | None = None
) -> list[int]:
    """Numbers of the seed sources that are to be read now (one or none); may append one.

    Args:
        features: where the seeds are, or None when no seeds were given.
        seed_ids: fingerprint of the list of ids that are the seeds, None for all rows.

    Raises:
        UserError: seeding was interrupted and is not continued, or the seeds come too late.
    """
    seeds = [number for number, source in enumerate(sources) if source.kind == "seed"]
    if features is None:
        for number in seeds:
            if not sources[number].complete:
                raise UserError(
                    f"seeding from {sources[number].features} was interrupted; "
                    "give the same seeds again to finish it"
                )
        return []
    for number in seeds:
        source = sources[number]
        if source.seed_ids == seed_ids and _is_same(source, features):
            if seed_ids is None and source.rows != features.rows:
                raise UserError(
                    f"the seeds {features.path} had {source.rows} rows when the dataset was begun "
                    f"and have {features.rows} now; offer the new ones as --features"
                )
            return [] if source.complete else [number]
    if sources:
        raise UserError(
            f"the seeds {features.path} are not those this dataset was begun with, and seeds must "
            "come first; leave them out, offer them as --features, or begin another --growth folder"
        )
    sources.append(Source("seed", features.path, rows=features.rows, seed_ids=seed_ids))
    return [len(sources) - 1]


def plan_stream(
    sources: list[Source], features: Features, recaptions: str | None = None
) -> list[int]:
    """Numbers of the sources to be read now, in order: new samples, then retries; may append.

    Args:
        recaptions: fingerprint of the recaption table, or None.

    Raises:
        UserError: the features changed while they were half read.
    """
    streams = [
        number
        for number, source in enumerate(sources)
        if source.kind == "stream" and _is_same(source, features)
    ]
    todo = _plan_new_rows(sources, streams, features, recaptions)
    return todo + _plan_retries(sources, streams, features, recaptions)


def waiting_ids(folder: GrowthFolder, before_source: int) -> set[str]:
    """Ids that wait for a better caption: dropped for their alignment, and never joined since.

    Args:
        before_source: count only what was decided before this source began (a retry that goes on
            must offer the same samples as one that was never interrupted).
    """
    waiting: set[str] = set()
    joined: set[str] = set()
    names = ("source", "id", "verdict", "reason")
    for table in folder.decision_parts(names):
        for source, sample, verdict, reason in zip(
            *(table[name].to_pylist() for name in names), strict=True
        ):
            if source == before_source:
                return waiting - joined
            if verdict != "dropped":
                joined.add(sample)
            elif reason in WAITING_REASONS:
                waiting.add(sample)
    return waiting - joined


def seeded_rows(folder: GrowthFolder, features: Features) -> set[int]:
    """Rows of ``features`` that were taken out of it as seeds, so are not offered again."""
    numbers = [
        number
        for number, source in enumerate(folder.manifest.sources)
        if source.kind == "seed" and source.seed_ids is not None and _is_same(source, features)
    ]
    rows: set[int] = set()
    if numbers:
        for table in folder.decision_parts(("source", "source_row")):
            mask = np.isin(table["source"].to_numpy(), numbers)
            rows.update(table["source_row"].to_numpy()[mask].tolist())
    return rows


def _plan_new_rows(
    sources: list[Source], streams: list[int], features: Features, recaptions: str | None
) -> list[int]:
    """The rows of the features that no source has decided yet."""
    latest = max(streams, key=lambda number: sources[number].position, default=None)
    if latest is None:
        for source in sources:
            if source.kind == "stream" and not source.complete and _same_path(source, features):
                raise UserError(
                    f"the features {features.path} have changed since {source.position} of their "
                    f"{source.rows} rows were grown; restore them, or copy the new ones elsewhere"
                )
        sources.append(Source("stream", features.path, rows=features.rows, recaptions=recaptions))
        return [len(sources) - 1]
    source = sources[latest]
    if source.position >= features.rows:
        return []
    if source.recaptions == recaptions:
        source.rows = features.rows
        return [latest]
    source.rows = source.position  # from here on another table is used: another source
    sources.append(
        Source(
            "stream",
            features.path,
            start=source.position,
            position=source.position,
            rows=features.rows,
            recaptions=recaptions,
        )
    )
    return [len(sources) - 1]


def _plan_retries(
    sources: list[Source], streams: list[int], features: Features, recaptions: str | None
) -> list[int]:
    """Retries for the rows that were read without this recaption table."""
    if recaptions is None:
        return []
    todo = []
    for number in streams:
        source = sources[number]
        if source.recaptions == recaptions or source.position == source.start:
            continue
        retry = _find_retry(sources, number, recaptions)
        if retry is None:
            retry = len(sources)
            sources.append(
                Source(
                    "retry",
                    features.path,
                    start=source.start,
                    position=source.start,
                    rows=source.position,
                    recaptions=recaptions,
                    retries=number,
                )
            )
        if not sources[retry].complete:
            todo.append(retry)
    return todo


def _find_retry(sources: list[Source], number: int, recaptions: str) -> int | None:
    for known, source in enumerate(sources):
        if source.retries == number and source.recaptions == recaptions:
            return known
    return None


def _is_same(source: Source, features: Features) -> bool:
    """Whether ``source`` read these features, wherever they lie now and whatever was added."""
    if source.position == 0:  # nothing was read yet
        return _same_path(source, features)
    return source.position <= features.rows and source.digest == features.fingerprint(
        source.position
    )


def _same_path(source: Source, features: Features) -> bool:
    return os.path.abspath(source.features) == os.path.abspath(features.path)
