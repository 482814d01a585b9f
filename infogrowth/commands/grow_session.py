"""One run of `grow` over the growth folder: restore, read the sources, decide, commit.

Under the launcher every rank runs the same session over the same features, the engine shares out
the search, and rank 0 alone holds the folder's lock, builds the records and writes.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from tqdm import tqdm

from infogrowth.annotations import SPACES
from infogrowth.commands.grow import Config
from infogrowth.data.feature_stream import FeatureStream
from infogrowth.distributed import is_main, on_main
from infogrowth.errors import UserError
from infogrowth.growth import cleaning
from infogrowth.growth.decisions import Decisions, Reason, Recaption
from infogrowth.growth.engine import InfoGrowth
from infogrowth.growth.ledger import GrowthFolder, GrowthLedger
from infogrowth.growth.sources import SourceProgress, plan_seeds, plan_stream
from infogrowth.growth.thresholds import DEFAULT_MIN_ALIGN, Thresholds

log = logging.getLogger(__name__)

COMMIT_SECONDS = 60.0


class GrowSession:
    """The growth folder, opened for one run. Raises UserError: it is in use, is none, or was grown
    with other settings.

    Args:
        config: the options of `grow`.
        device: of this rank.
        features: the samples to process.
        recaptions: the recaption table's stream, or None.
        stack: closes the folder.

    Attributes:
        processed: samples that this run has decided about.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        features: FeatureStream,
        recaptions: FeatureStream | None,
        stack: ExitStack,
    ):
        self.processed = 0
        self._config, self._features = config, features
        self._recaptions = RecaptionTable(recaptions) if recaptions else None
        self._recaptions_digest = recaptions.fingerprint(recaptions.rows) if recaptions else None
        self._ledger: GrowthLedger | None = None
        self._last_commit = time.monotonic()

        def opened() -> GrowthFolder:
            self._ledger = stack.enter_context(GrowthLedger(config.growth))
            return self._ledger.folder()

        folder = on_main(opened)
        self._decided_before = folder.totals["pairs"]
        self._sources = deepcopy(folder.sources)
        self._engine = self._restored(folder, self._measure(folder), device)

    def folder(self) -> GrowthFolder:
        """What is committed (rank 0)."""
        assert self._ledger is not None
        return self._ledger.folder()

    def seed(self, stream: FeatureStream | None, seed_ids: frozenset[str] | None = None) -> None:
        """Insert the clean starting set, if it is not in yet.

        Args:
            stream: where the seeds are; None when the run has none.
            seed_ids: only these samples of the stream; None for all.
        """
        thresholds, digest = self._engine.thresholds, None
        if seed_ids is not None:
            listed = "\n".join(sorted(seed_ids)).encode()
            digest = hashlib.blake2b(listed, digest_size=16).hexdigest()
        for number in plan_seeds(self._sources, stream, digest):
            assert stream is not None
            chosen = None if seed_ids is None else found_seeds(stream, seed_ids)
            alignments = None
            if not thresholds.resolved and thresholds.purity:
                log.info("estimating how many captions of %s are wrong", self._features.path)
                stream_of = self._features, seed_ids or (), self._engine.measure
                alignments = on_main(partial(cleaning.stream_alignments, *stream_of))
            # The thresholds come from all seeds together, so they are inserted in one step.
            size = self._config.batch_size if thresholds.resolved else stream.rows
            insert = partial(self._engine.seed, stream=alignments)
            self._read(number, stream, "seeding", insert, chosen, size)

    def grow(self) -> None:
        """Process the features' new samples, then those that pend on a recaption."""
        todo = plan_stream(self._sources, self._features, self._recaptions_digest)
        if not todo:
            log.info("nothing new in %s: all its samples are decided", self._features.path)
        process = partial(self._engine.process, recaptions=self._recaptions)
        for number in todo:
            source, what = self._sources[number], "processing again"
            if source.kind == "stream":
                source.skipped, what = self._features.skipped, "growing"
            chosen = on_main(partial(self._chosen, number))
            self._read(number, self._features, what, process, chosen, self._config.batch_size)

    # --- underneath ------------------------------------------------------------------------------

    def _read(
        self,
        number: int,
        stream: FeatureStream,
        what: str,
        decide: Callable[..., Decisions],
        chosen: np.ndarray | None,
        batch_size: int,
    ) -> None:
        """Decide the rest of a source, batch by batch: those of its rows that ``chosen``, (stream
        rows,) bool, has; None takes all. Samples without id or caption are dropped."""
        source = self._sources[number]
        quiet = not (is_main() and log.isEnabledFor(logging.INFO))
        with tqdm(
            desc=what, total=source.rows, initial=source.position, unit="pair",
            disable=True if quiet else None,
        ) as bar:  # fmt: skip
            for batch in stream.batches(batch_size, source.position, source.rows, chosen):
                captions, image = batch.captions, batch.image
                if self._config.modality == "image" and "label" in batch.extra:
                    labels = batch.extra["label"]
                    captions = ["" if label is None else str(label) for label in labels]
                names = zip(batch.ids, captions, strict=True)
                complete = np.fromiter(map(all, names), bool, len(batch))
                if not complete.all():
                    assert image is not None
                    image = np.where(complete[:, None], image, np.nan)  # what cannot be used
                decisions = decide(batch.ids, captions, image, batch.text)
                for row in np.flatnonzero(~complete).tolist():
                    reason = Reason.CAPTION_MISSING if batch.ids[row] else Reason.ID_MISSING
                    decisions.reason[row] = reason
                self.processed += len(batch)
                source.position = int(batch.rows[-1]) + 1
                bar.update(source.position - bar.n)
                if self._ledger is not None:
                    self._ledger.record(number, decisions, batch.rows)
                    late = time.monotonic() - self._last_commit >= COMMIT_SECONDS
                    if late or self._ledger.pending_rows >= self._config.commit_rows:
                        self._commit(source, stream)
                kept, decided = len(self._engine), self._decided_before + self.processed
                bar.set_postfix(kept=kept, dropped=decided - kept, refresh=False)
            bar.update(source.rows - bar.n)
        source.position = source.rows
        self._commit(source, stream)

    def _commit(self, source: SourceProgress, stream: FeatureStream) -> None:
        if self._ledger is None:
            return
        source.digest = stream.fingerprint(source.position)
        settings = self._settings | asdict(self._engine.thresholds)  # which may just be found
        if search := self._engine.settings["search"]:
            settings["search"] = search
        self._ledger.commit(settings, self._sources)
        self._last_commit = time.monotonic()

    def _chosen(self, number: int) -> np.ndarray | None:
        """The rows of the features to read for a source, None for all: for a retry those that pend
        and that the table has a caption for, else those that were not taken out as seeds."""
        source, seeds = self._sources[number], self._sources[0]
        is_retry = source.kind == "retry"
        if not is_retry and not (seeds.seed_ids and seeds.is_of(self._features)):
            return None
        table = self.folder().decisions(("source", "source_row", "id"))
        table = table.filter(pc.equal(table["source"], source.retries if is_retry else 0))
        if is_retry:
            pending = self.folder().pending(before_source=number)["id"].to_pylist()
            wanted = set(pending).intersection(self._recaptions or ())
            table = table.filter(pc.is_in(table["id"], pa.array(wanted, pa.string())))
        chosen = np.full(self._features.rows, not is_retry)
        chosen[table["source_row"].to_numpy()] = is_retry
        return chosen

    def _measure(self, folder: GrowthFolder) -> cleaning.Measure:
        """What --clean-by asks for; the reference of a folder that has begun counts, no new one."""
        name = self._config.clean_by
        if name == "cosine":
            return cleaning.cosine
        if name == "negclip":
            path = cleaning.reference_path(self._config.growth)
            if folder.settings and path.is_file():
                return cleaning.NegClip.load(path)
            reference = cleaning.draw_reference(self._features)
            if self._ledger is not None and not folder.settings:
                reference.save(path)
            return reference
        return cleaning.ScoreColumn(
            self._config.scores, name, recaptions=self._recaptions is not None
        )

    def _restored(
        self, folder: GrowthFolder, measure: cleaning.Measure, device: torch.device
    ) -> InfoGrowth:
        """The engine as the folder left it, or a new one; other settings than its own are refused.
        What growth.json is to hold is noted."""
        config, settings, features = self._config, folder.settings, self._features
        # The folder's thresholds, unless others are given.
        requests = Thresholds.of_settings(settings or {"min_align": DEFAULT_MIN_ALIGN}).requests
        requests |= {n: given for n in requests if (given := getattr(config, n)) is not None}
        encoder = features.encoder
        asked = {
            **({"clean_by": measure.about} if measure.about else {}),
            "k": config.k,
            **asdict(Thresholds.requested(**requests)),
            "modality": config.modality,
            "index": config.index,
            "dimension": {space: features.dimensions.get(space) for space in SPACES},
            "encoder": encoder and {name: encoder.get(name) for name in ("name", "fingerprint")},
            "images": features.description.get("images"),
        }
        self._settings = settings or asked
        if settings:
            _refuse_other(folder, asked)
            if settings.get("index") != config.index:
                log.info("note: the dataset was begun with index %s", settings.get("index"))
            if bool(settings.get("encoder")) != bool(encoder):
                log.warning("it is not known whether these features have the dataset's encoder")
        folder = replace(folder, settings=self._settings)
        table = pa.concat_tables(folder.kept_parts())
        if len(table):
            log.info("continuing with %s samples in the dataset", f"{len(table):,}")
        engine = InfoGrowth.restore(
            self._settings,
            table["id"].to_pylist(),
            table["caption"].to_pylist(),
            np.stack([table["gain_image"], table["gain_text"]], axis=1),
            folder.kept_feature_parts("image"),
            folder.kept_feature_parts("text"),
            index=config.index,
            device=device.type,
            memory_mb=config.memory_mb,
        )
        engine.measure = measure
        return engine


class RecaptionTable(Mapping[str, Recaption]):
    """A recaption folder by sample id, rows read when asked for; of two rows the later counts."""

    def __init__(self, stream: FeatureStream):
        self._stream = stream
        about = stream.description
        imported = about.get("captions")
        name = (about.get("captioner") or {}).get("name")
        self._captioner = name or (f"imported from {imported}" if imported else None)
        self._rows: dict[str, int] = {}
        for batch in stream.batches(65536):
            self._rows.update(zip(batch.ids, batch.rows.tolist(), strict=True))

    def __getitem__(self, sample: str) -> Recaption:
        batch = self._stream.row(self._rows[sample])
        assert batch.text is not None
        return Recaption(batch.captions[0], batch.text[0], self._captioner)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def found_seeds(stream: FeatureStream, wanted: frozenset[str]) -> np.ndarray:
    """(rows,) bool: the samples with these ids; logs how many of them the features do not have."""
    missing, chosen = set(wanted), np.zeros(stream.rows, bool)
    for batch in stream.batches(65536):
        chosen[batch.rows] = [name in wanted for name in batch.ids]
        missing.difference_update(batch.ids)
    if not chosen.any():
        raise UserError(f"none of the {len(wanted)} seed ids is in {stream.path}")
    if missing:
        counts = len(missing), len(wanted), stream.path, min(missing)
        log.warning("%d of the %d seed ids are not in %s (for example %r)", *counts)
    return chosen


def _refuse_other(folder: GrowthFolder, settings: dict[str, Any]) -> None:
    """Refuse to continue with other settings; UserError names the first difference. ``index`` may
    change, it is only recorded; an encoder that is not known is no difference."""
    names = ("k", "modality", "dimension", "clean_by", "encoder")
    before, now = (
        {name: s.get(name) for name in names} | Thresholds.of_settings(s).requests
        for s in (folder.settings, settings)
    )
    for name, value in before.items():
        unknown = name == "encoder" and not (value and now[name])
        if value != now[name] and not unknown:
            then, here = (
                ", ".join(f"{k} {v}" for k, v in given.items() if v)
                if isinstance(given, dict)
                else given
                for given in (value, now[name])
            )
            raise UserError(
                f"{folder.directory} was grown with {name} {then}, not {here}; give the same, or "
                "another --growth"
            )
