"""Which samples a run still has to process: the growth folder's sources against what was given.

The rules, in words:

* Seeds come first. The same seeds given again are done; other seeds for a dataset that has begun
  are refused.
* Features are known by their content (the fingerprint of what was read), else by their path: the
  same ones go on where they were left, also when shards have been added; finished ones are done.
* One source is read with one recaption table. When another table comes, samples that were dropped
  for their alignment before, and that the table knows, are processed again at the end, in their
  old order: a "retry". A table already used on a source starts none.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from infogrowth.errors import UserError


@dataclass
class SourceProgress:
    """Samples that were given to `grow`, in row order, and how far they have been decided.

    Attributes:
        kind: ``"seed"``, ``"stream"``, or ``"retry"`` (dropped samples processed again because a
            recaption table arrived).
        features: the features' path, as it was given.
        start: the first row of the features that belongs to this source.
        position: rows before this one are decided; the next run goes on here.
        rows: where the source ends, as far as was known when it was last opened.
        digest: fingerprint of the features up to ``position``: by it the same ones are known again.
        recaptions: fingerprint of the recaption table in use, or None.
        retries: for ``"retry"``, the number of the source whose samples are processed again.
        seed_ids: fingerprint of the list of seed ids, where seeds are rows of the features.
        skipped: samples that never got features, by reason (recorded by ``embed``).
    """

    kind: str
    features: str
    start: int = 0
    position: int = 0
    rows: int = 0
    digest: str = ""
    recaptions: str | None = None
    retries: int | None = None
    seed_ids: str | None = None
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return self.position >= self.rows

    def is_of(self, features: Any) -> bool:
        """Whether these features were read, wherever they lie now and whatever was added."""
        if self.position == 0:  # nothing was read yet
            return self.has_path_of(features)
        return self.position <= features.rows and self.digest == features.fingerprint(self.position)

    def has_path_of(self, features: Any) -> bool:
        return os.path.abspath(self.features) == os.path.abspath(features.path)


def plan_seeds(
    sources: list[SourceProgress], features: Any, seed_ids: str | None = None
) -> list[int]:
    """Numbers of the seed sources that are to be read now (one or none); may append one. Raises
    UserError: seeding was interrupted and is not continued, or the seeds come too late.

    Args:
        features: the FeatureStream of the seeds, or None when no seeds were given.
        seed_ids: fingerprint of the list of ids that are the seeds, None for all rows.
    """
    seeds = sources[0] if sources and sources[0].kind == "seed" else None
    if features is None:
        if seeds is not None and not seeds.complete:
            raise UserError(f"seeding from {seeds.features} was interrupted: give it again")
        return []
    if not sources:
        seeds = SourceProgress("seed", features.path, rows=features.rows, seed_ids=seed_ids)
        sources.append(seeds)
    if seeds is None or seeds.seed_ids != seed_ids or not seeds.is_of(features):
        raise UserError(
            f"the seeds {features.path} are not those this dataset was begun with, and seeds must "
            "come first; leave them out, give them as --features, or begin another --growth folder"
        )
    if seed_ids is None and seeds.rows != features.rows:
        raise UserError(
            f"the seeds {features.path} had {seeds.rows} rows when the dataset was begun and have "
            f"{features.rows} now; give the new ones as --features"
        )
    return [] if seeds.complete else [0]


def plan_stream(
    sources: list[SourceProgress], features: Any, recaptions: str | None = None
) -> list[int]:
    """Numbers of the sources to be read now, in order: new samples, then retries; may append.
    Raises UserError: the features changed while they were half read.

    Args:
        recaptions: fingerprint of the recaption table, or None.
    """

    def added(kind: str, start: int, rows: int, retries: int | None = None) -> int:
        source = SourceProgress(kind, features.path, start, start, rows, "", recaptions, retries)
        sources.append(source)
        return len(sources) - 1

    begun = [n for n, s in enumerate(sources) if s.kind == "stream" and s.is_of(features)]
    todo = []
    if not begun:
        for source in sources:
            if source.kind == "stream" and not source.complete and source.has_path_of(features):
                raise UserError(
                    f"the features {features.path} have changed since {source.position} of their "
                    f"{source.rows} rows were grown; restore them, or copy the new ones elsewhere"
                )
        todo = [added("stream", 0, features.rows)]
    else:
        latest = max(begun, key=lambda number: sources[number].position)
        source = sources[latest]
        if source.position < features.rows and source.recaptions == recaptions:
            source.rows = features.rows
            todo = [latest]
        elif source.position < features.rows:
            source.rows = source.position  # from here on another table is used: another source
            todo = [added("stream", source.position, features.rows)]
    for number in begun if recaptions is not None else ():
        source = sources[number]  # whose rows may have been read without this recaption table
        if source.recaptions == recaptions or source.position == source.start:
            continue
        retries = [
            n for n, s in enumerate(sources) if (s.retries, s.recaptions) == (number, recaptions)
        ] or [added("retry", source.start, source.position, number)]
        todo += [retry for retry in retries if not sources[retry].complete]
    return todo
