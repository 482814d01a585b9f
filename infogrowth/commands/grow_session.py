"""One run of `grow` over the growth folder: restore, read the sources, decide, commit.

Under the launcher every rank runs the same session over the same features, the engine shares out
the search, and rank 0 alone holds the folder's lock, builds records and writes.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from infogrowth.annotations import SPACES
from infogrowth.data.features import FeatureBatch, FeatureStream
from infogrowth.distributed import is_main, on_main
from infogrowth.encoders.pending import stream_alignments
from infogrowth.errors import UserError
from infogrowth.growth.decisions import REASON_CODE, Decisions, Reason, Recaption
from infogrowth.growth.engine import DEFAULT_MIN_ALIGN, InfoGrowth
from infogrowth.growth.ledger import GrowthFolder, GrowthPaths, Manifest
from infogrowth.growth.ledger_writer import GrowthLedger, check_settings
from infogrowth.growth.plan import SourceProgress, plan_seeds, plan_stream
from infogrowth.growth.scores import (
    Measure,
    NegClip,
    ScoreColumn,
    cosine,
    draw_reference,
    reference_path,
)
from infogrowth.growth.thresholds import Thresholds

if TYPE_CHECKING:
    from infogrowth.commands.grow import Config

log = logging.getLogger(__name__)
Choose = Callable[[FeatureBatch], np.ndarray]

COMMIT_SECONDS = 60.0


class GrowSession:
    """The growth folder, opened for one run; a context manager.

    Args:
        config: the options of `grow`.
        device: of this rank.
        features: the samples to process.
        recaptions: the recaption table's stream, or None.

    Attributes:
        processed: samples that this run has decided about.

    Raises:
        UserError: the folder is in use, is none, or was grown with other settings.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        features: FeatureStream,
        recaptions: FeatureStream | None,
    ):
        self.processed = 0
        self._config = config
        self._device = device
        self._features = features
        self._recaptions = RecaptionTable(recaptions) if recaptions else None
        self._recaptions_digest = recaptions.fingerprint(recaptions.rows) if recaptions else None
        self._stream_alignments: np.ndarray | None = None
        self._ledger: GrowthLedger | None = None
        self._last_commit = time.monotonic()
        given = config.min_align
        self._requested = Thresholds.requested(
            DEFAULT_MIN_ALIGN if given is None else given, config.min_recaption_align
        )
        try:
            settings, manifest = on_main(self._open_folder)
            self._measure = self._chosen_measure(begun=settings is not None)
            self._sources = manifest.sources if self._ledger is None else self._ledger.sources
            self._engine = self._restore(settings, manifest)
            self._engine.measure = self._measure
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> GrowSession:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._ledger is not None:
            self._ledger.close()

    def folder(self) -> GrowthFolder:
        """What is committed (rank 0)."""
        assert self._ledger is not None
        return self._ledger.folder()

    def seed(self, stream: FeatureStream | None, seed_ids: Collection[str] | None = None) -> None:
        """Insert the clean starting set, if it is not in yet.

        Args:
            stream: where the seeds are; None when the run has none.
            seed_ids: only these samples of the stream; None for all.
        """
        todo = plan_seeds(self._sources, stream, _digest(seed_ids))
        undetermined = not self._engine.thresholds.resolved
        if undetermined and stream is None:
            name = (
                "min_align" if self._engine.thresholds.min_align is None else "min_recaption_align"
            )
            raise UserError(
                f"{name} auto is found from a clean starting set: give --seed-features or "
                "--seed-ids, or a number"
            )
        if not undetermined:
            self._begin()
        if stream is None:
            return
        choose = None
        if todo and seed_ids is not None:
            choose = _with_id(_found_seeds(stream, seed_ids))
        if todo and undetermined and self._engine.thresholds.purity:
            log.info("estimating how many captions of %s are wrong", self._features.path)
            alignments = partial(stream_alignments, self._features, seed_ids or (), self._measure)
            self._stream_alignments = on_main(alignments)
        for number in todo:
            # The thresholds come from all seeds together, so they are inserted in one step.
            size = stream.rows if undetermined else self._config.batch_size
            self._read(number, stream, "seeding", choose, size)
        if undetermined:
            self._begin()

    def grow(self) -> None:
        """Process the features' new samples, then what waits for the recaption table."""
        stream, sources = self._features, self._sources
        todo = plan_stream(sources, stream, self._recaptions_digest)
        if not todo:
            log.info("nothing new in %s: all its samples are decided", stream.path)
        for number in todo:
            if sources[number].kind == "retry":
                pending = on_main(partial(self._pending, number))
                self._read(number, stream, "processing again", _with_id(pending))
            else:
                seeds = on_main(lambda: self.folder().seeded_rows(stream))
                sources[number].skipped = stream.skipped
                self._read(number, stream, "growing", _not_in_rows(seeds) if len(seeds) else None)

    # --- underneath ------------------------------------------------------------------------------

    def _read(
        self,
        number: int,
        stream: FeatureStream,
        what: str,
        choose: Choose | None,
        batch_size: int | None = None,
    ) -> None:
        """Decide the rest of a source, batch by batch."""
        source = self._sources[number]
        size = batch_size or self._config.batch_size
        quiet = not (is_main() and log.isEnabledFor(logging.INFO))
        with tqdm(
            desc=what, total=source.rows, initial=source.position, unit="pair",
            disable=True if quiet else None,
        ) as bar:  # fmt: skip
            for batch in stream.batches(size, source.position, source.rows, choose):
                self._process(number, batch)
                self.processed += len(batch)
                bar.update(int(batch.rows[-1]) + 1 - source.position)
                source.position = int(batch.rows[-1]) + 1
                self._commit(source, stream, even_if_small=False)
                if self._ledger is not None:
                    counts = {"kept": len(self._engine), "dropped": self._ledger.dropped}
                    bar.set_postfix(counts, refresh=False)
            bar.update(source.rows - source.position)
        source.position = source.rows
        self._commit(source, stream, even_if_small=True)

    def _process(self, number: int, batch: FeatureBatch) -> None:
        """Let the engine decide about a batch, and record its decisions."""
        captions = batch.captions
        if self._config.modality == "image" and "label" in batch.extra:
            captions = ["" if label is None else str(label) for label in batch.extra["label"]]
        decided = []
        complete = np.fromiter(map(all, zip(batch.ids, captions, strict=True)), bool, len(batch))
        if not complete.all():
            incomplete = np.flatnonzero(~complete)
            decided.append((_dropped(batch, captions, incomplete), batch.rows[incomplete]))
            batch = batch.take(np.flatnonzero(complete))
            captions = [caption for caption, good in zip(captions, complete, strict=True) if good]
        if len(batch):
            samples = (batch.ids, captions, batch.image, batch.text)
            if self._sources[number].kind == "seed":
                decisions = self._engine.seed(*samples, stream=self._stream_alignments)
            else:
                decisions = self._engine.process(*samples, recaptions=self._recaptions)
            decided.append((decisions, batch.rows))
        if self._ledger is not None:
            self._ledger.record(number, decided)

    def _commit(self, source: SourceProgress, stream: FeatureStream, even_if_small: bool) -> None:
        ledger = self._ledger
        if ledger is None:
            return
        big = ledger.pending_rows >= self._config.commit_rows
        late = time.monotonic() - self._last_commit >= COMMIT_SECONDS
        if not (even_if_small or big or (late and ledger.pending_rows)):
            return
        if ledger.settings is None:
            self._begin()
        source.digest = stream.fingerprint(source.position)
        ledger.record_search(self._engine.settings["search"])
        ledger.commit()
        self._last_commit = time.monotonic()

    def _pending(self, retry: int) -> set[str]:
        """Ids to process again: those that wait for a caption, and that the table has one for."""
        assert self._recaptions is not None
        return self.folder().pending_ids(before_source=retry).intersection(self._recaptions)

    def _open_folder(self) -> tuple[dict[str, Any] | None, Manifest]:
        self._ledger = GrowthLedger(self._config.growth)
        return self._ledger.settings, self._ledger.manifest

    def _chosen_measure(self, begun: bool) -> Measure:
        """What --clean-by asks for; the reference of a folder that has begun counts, no new one."""
        name, scores = self._config.clean_by, self._config.scores
        if name == "cosine":
            return cosine
        if name == "negclip":
            path = reference_path(self._config.growth)
            return (
                NegClip.load(path) if begun and path.is_file() else draw_reference(self._features)
            )
        column = ScoreColumn(scores, name)
        if self._recaptions and not column.has_recaptions:
            raise UserError(
                f"--recaptions with --clean-by {name} needs the column recaption_{name} in "
                "--scores (score --recaptions)"
            )
        return column

    def _restore(self, settings: dict[str, Any] | None, manifest: Manifest) -> InfoGrowth:
        """The engine as the folder left it, or a new one."""
        config = self._config
        common: dict[str, Any] = {"device": self._device.type, "memory_mb": config.memory_mb}
        if settings is not None:
            # Those of the folder, unless others are given.
            before: dict[str, Any] = Thresholds.of_settings(settings).requests
            asked: dict[str, Any] = {name: getattr(config, name) for name in before}
            self._requested = Thresholds.requested(
                **{name: before[name] if value is None else value for name, value in asked.items()}
            )
            wanted = self._settings()
            check_settings(GrowthPaths(config.growth).directory, settings, wanted)
            if settings.get("index") != wanted["index"]:
                log.info("note: the dataset was begun with index %s", settings.get("index"))
            if bool(settings.get("encoder")) != bool(wanted["encoder"]):
                log.warning(
                    "it is not known whether these features have the encoder of the dataset"
                )
        if settings is None or manifest.rows == 0:
            requests: dict[str, Any] = self._requested.requests
            return InfoGrowth(
                config.k, index=config.index, modality=config.modality, **requests, **common
            )
        folder = GrowthFolder(GrowthPaths(config.growth).directory, settings, manifest)
        ids, captions, gains = folder.kept_samples()
        log.info("continuing with %s samples in the dataset", f"{len(ids):,}")
        features = {space: folder.kept_feature_parts(space) for space in folder.spaces}
        return InfoGrowth.restore(
            settings,
            ids,
            captions,
            gains,
            features["image"],
            features.get("text"),
            index=config.index,
            **common,
        )

    def _settings(self) -> dict[str, Any]:
        """The settings of this run, in the form of growth.json."""
        config, features = self._config, self._features
        encoder = features.encoder
        return {
            **({"clean_by": self._measure.about} if self._measure.about else {}),
            "k": config.k,
            **asdict(self._requested),
            "modality": config.modality,
            "index": config.index,
            "dimension": {space: features.dimensions.get(space) for space in SPACES},
            "encoder": encoder and {name: encoder.get(name) for name in ("name", "fingerprint")},
            "images": features.description.get("images"),
        }

    def _begin(self) -> None:
        if self._ledger is None:
            return
        settings = self._settings()
        if self._ledger.settings is None:
            settings |= asdict(self._engine.thresholds)
            if isinstance(self._measure, NegClip):
                self._measure.save(reference_path(self._config.growth))
        self._ledger.begin(settings)


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


def _dropped(batch: FeatureBatch, captions: list[str], rows: np.ndarray) -> Decisions:
    """Samples without an id or a caption: dropped before the engine sees them."""
    chosen = rows.tolist()
    ids = [batch.ids[row] for row in chosen]
    reasons = [Reason.CAPTION_MISSING if name else Reason.ID_MISSING for name in ids]
    codes = np.array([REASON_CODE[reason] for reason in reasons], np.int8)
    return Decisions(ids, [captions[row] for row in chosen], {}, codes, [])


def _with_id(wanted: Collection[str]) -> Choose:
    """Take the samples with these ids."""
    return lambda batch: np.fromiter((i in wanted for i in batch.ids), bool, len(batch))


def _not_in_rows(rows: np.ndarray) -> Choose:
    """Leave out these rows of the features."""
    return lambda batch: ~np.isin(batch.rows, rows)


def _digest(ids: Collection[str] | None) -> str | None:
    if ids is None:
        return None
    return hashlib.blake2b("\n".join(sorted(ids)).encode(), digest_size=16).hexdigest()


def _found_seeds(stream: FeatureStream, wanted: Collection[str]) -> set[str]:
    """The seed ids that the features have; logs how many they do not have."""
    found: set[str] = set()
    for batch in stream.batches(65536):
        found.update(name for name in batch.ids if name in wanted)
    if not found:
        raise UserError(f"none of the {len(wanted)} seed ids is in {stream.path}")
    if len(found) < len(wanted):
        missing = (len(wanted) - len(found), len(wanted), stream.path, min(set(wanted) - found))
        log.warning("%d of the %d seed ids are not in %s (for example %r)", *missing)
    return found
