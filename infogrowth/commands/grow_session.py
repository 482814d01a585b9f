"""One run of `grow` over the growth folder: restore, read the sources, decide, commit.

Under the launcher every rank runs the same session over the same features, the engine shares out
the search, and rank 0 alone holds the folder's lock, builds the records and writes.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from infogrowth.annotations import SPACES
from infogrowth.data.feature_stream import FeatureBatch, FeatureStream
from infogrowth.distributed import is_main, on_main
from infogrowth.encoders.pending import stream_alignments
from infogrowth.errors import UserError
from infogrowth.growth.cleaning import (
    Measure,
    NegClip,
    ScoreColumn,
    cosine,
    draw_reference,
    reference_path,
)
from infogrowth.growth.decisions import Decisions, Reason, Recaption
from infogrowth.growth.engine import InfoGrowth
from infogrowth.growth.ledger import GrowthFolder, GrowthLedger
from infogrowth.growth.sources import SourceProgress, plan_seeds, plan_stream
from infogrowth.growth.thresholds import DEFAULT_MIN_ALIGN, Thresholds

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
        self._config, self._features = config, features
        self._recaptions = RecaptionTable(recaptions) if recaptions else None
        self._recaptions_digest = recaptions.fingerprint(recaptions.rows) if recaptions else None
        self._ledger: GrowthLedger | None = None
        self._last_commit = time.monotonic()
        try:
            folder = on_main(self._open)
            self._before = folder.totals["pairs"]
            self._sources, self._settings = deepcopy(folder.sources), folder.settings
            measure = self._chosen_measure()
            # The folder's thresholds, unless others are given.
            begun = folder.settings or {"min_align": DEFAULT_MIN_ALIGN}
            requests = Thresholds.of_settings(begun).requests
            given = {name: getattr(config, name) for name in requests}
            requests |= {name: value for name, value in given.items() if value is not None}
            self._asked = self._settings_asked(measure, Thresholds.requested(**requests))
            self._engine = self._restored(folder, requests, device)
            self._engine.measure = measure
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> GrowSession:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._ledger is not None:
            self._ledger.__exit__(*exception)

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
        thresholds = self._engine.thresholds
        todo = plan_seeds(self._sources, stream, _digest(seed_ids))
        if stream is None and not thresholds.resolved:
            name = "min_align" if thresholds.min_align is None else "min_recaption_align"
            raise UserError(
                f"{name} auto is found from a clean starting set: give --seed-features or "
                "--seed-ids, or a number"
            )
        for number in todo:
            assert stream is not None
            choose = None if seed_ids is None else _with_id(_found_seeds(stream, seed_ids))
            alignments = None
            if not thresholds.resolved and thresholds.purity:
                log.info("estimating how many captions of %s are wrong", self._features.path)
                stream_of = self._features, seed_ids or (), self._engine.measure
                alignments = on_main(partial(stream_alignments, *stream_of))
            # The thresholds come from all seeds together, so they are inserted in one step.
            size = self._config.batch_size if thresholds.resolved else stream.rows
            insert = partial(self._engine.seed, stream=alignments)
            self._read(number, stream, "seeding", choose, size, insert)

    def grow(self) -> None:
        """Process the features' new samples, then those that pend on a recaption."""
        stream, size = self._features, self._config.batch_size
        todo = plan_stream(self._sources, stream, self._recaptions_digest)
        if not todo:
            log.info("nothing new in %s: all its samples are decided", stream.path)

        process = partial(self._engine.process, recaptions=self._recaptions)
        for number in todo:
            if self._sources[number].kind == "retry":
                pending = on_main(partial(self._pending, number))
                self._read(number, stream, "processing again", _with_id(pending), size, process)
            else:
                seeds = on_main(lambda: _seeded_rows(self.folder(), stream))
                self._sources[number].skipped = stream.skipped
                new = partial(_not_in_rows, seeds) if len(seeds) else None
                self._read(number, stream, "growing", new, size, process)

    # --- underneath ------------------------------------------------------------------------------

    def _read(
        self,
        number: int,
        stream: FeatureStream,
        what: str,
        choose: Choose | None,
        batch_size: int,
        decide: Callable[..., Decisions],
    ) -> None:
        """Decide the rest of a source, batch by batch."""
        source = self._sources[number]
        quiet = not (is_main() and log.isEnabledFor(logging.INFO))
        with tqdm(
            desc=what, total=source.rows, initial=source.position, unit="pair",
            disable=True if quiet else None,
        ) as bar:  # fmt: skip
            for batch in stream.batches(batch_size, source.position, source.rows, choose):
                decisions = self._decide(batch, decide)
                self.processed += len(batch)
                source.position = int(batch.rows[-1]) + 1
                bar.update(source.position - bar.n)
                if self._ledger is not None:
                    self._ledger.record(number, decisions, batch.rows)
                    late = time.monotonic() - self._last_commit >= COMMIT_SECONDS
                    if late or self._ledger.pending_rows >= self._config.commit_rows:
                        self._commit(source, stream)
                kept, decided = len(self._engine), self._before + self.processed
                bar.set_postfix(kept=kept, dropped=decided - kept, refresh=False)
            bar.update(source.rows - bar.n)
        source.position = source.rows
        self._commit(source, stream)

    def _decide(self, batch: FeatureBatch, decide: Callable[..., Decisions]) -> Decisions:
        """What the engine decides about a batch; samples without id or caption are dropped."""
        captions, image = batch.captions, batch.image
        if self._config.modality == "image" and "label" in batch.extra:
            captions = ["" if label is None else str(label) for label in batch.extra["label"]]
        complete = np.fromiter(map(all, zip(batch.ids, captions, strict=True)), bool, len(batch))
        if not complete.all():
            assert image is not None
            image = np.where(complete[:, None], image, np.nan)  # what the engine cannot use
        decisions = decide(batch.ids, captions, image, batch.text)
        for row in np.flatnonzero(~complete).tolist():
            reason = Reason.CAPTION_MISSING if batch.ids[row] else Reason.ID_MISSING
            decisions.reason[row] = reason
        return decisions

    def _commit(self, source: SourceProgress, stream: FeatureStream) -> None:
        if self._ledger is None:
            return
        source.digest = stream.fingerprint(source.position)
        if not self._settings:  # the folder begins, with the thresholds that were found
            self._settings = self._asked | asdict(self._engine.thresholds)
            if isinstance(self._engine.measure, NegClip):
                self._engine.measure.save(reference_path(self._config.growth))
        if search := self._engine.settings["search"]:
            self._settings = {**self._settings, "search": search}
        self._ledger.commit(self._settings, self._sources)
        self._last_commit = time.monotonic()

    def _pending(self, retry: int) -> set[str]:
        """Ids to process again: those pending, and that the table has one for."""
        assert self._recaptions is not None
        pending = self.folder().pending(before_source=retry)["id"].to_pylist()
        return set(pending).intersection(self._recaptions)

    def _open(self) -> GrowthFolder:
        self._ledger = GrowthLedger(self._config.growth)
        return self._ledger.folder()

    def _chosen_measure(self) -> Measure:
        """What --clean-by asks for; the reference of a folder that has begun counts, no new one."""
        name = self._config.clean_by
        if name == "cosine":
            return cosine
        if name == "negclip":
            path = reference_path(self._config.growth)
            begun = self._settings and path.is_file()
            return NegClip.load(path) if begun else draw_reference(self._features)
        column = ScoreColumn(self._config.scores, name)
        if self._recaptions and not column.has_recaptions:
            raise UserError(
                f"--recaptions with --clean-by {name} needs the column recaption_{name} in "
                "--scores (score --recaptions)"
            )
        return column

    def _restored(
        self, folder: GrowthFolder, requests: dict[str, Any], device: torch.device
    ) -> InfoGrowth:
        """The engine as the folder left it, or a new one."""
        config, settings = self._config, folder.settings
        if settings:
            _refuse_other(folder, self._asked)
            if settings.get("index") != config.index:
                log.info("note: the dataset was begun with index %s", settings.get("index"))
            if bool(settings.get("encoder")) != bool(self._asked["encoder"]):
                log.warning(
                    "it is not known whether these features have the encoder of the dataset"
                )
        options: dict[str, Any] = {
            "index": config.index,
            "device": device.type,
            "memory_mb": config.memory_mb,
        }
        if folder.rows == 0:
            return InfoGrowth(config.k, modality=config.modality, **requests, **options)
        table = pa.concat_tables(folder.kept_parts())
        log.info("continuing with %s samples in the dataset", f"{len(table):,}")
        ids, captions = table["id"].to_pylist(), table["caption"].to_pylist()
        gains = np.stack([table["gain_image"].to_numpy(), table["gain_text"].to_numpy()], axis=1)
        for space in folder.spaces:
            options[f"{space}_features"] = folder.kept_feature_parts(space)
        return InfoGrowth.restore(settings, ids, captions, gains, **options)

    def _settings_asked(self, measure: Measure, thresholds: Thresholds) -> dict[str, Any]:
        """The settings of this run, in the form of growth.json."""
        features, encoder = self._features, self._features.encoder
        return {
            **({"clean_by": measure.about} if measure.about else {}),
            "k": self._config.k,
            **asdict(thresholds),
            "modality": self._config.modality,
            "index": self._config.index,
            "dimension": {space: features.dimensions.get(space) for space in SPACES},
            "encoder": encoder and {name: encoder.get(name) for name in ("name", "fingerprint")},
            "images": features.description.get("images"),
        }


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


def _with_id(wanted: Collection[str]) -> Choose:
    """Take the samples with these ids."""
    return lambda batch: np.fromiter((i in wanted for i in batch.ids), bool, len(batch))


def _not_in_rows(rows: np.ndarray, batch: FeatureBatch) -> np.ndarray:
    return ~np.isin(batch.rows, rows)


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


def _seeded_rows(folder: GrowthFolder, features: FeatureStream) -> np.ndarray:
    """Rows of the features that were taken out of them as seeds, so are not processed again."""
    seeds = [n for n, s in enumerate(folder.sources) if s.seed_ids and s.is_of(features)]
    if not seeds:
        return np.empty(0, np.int64)
    table = folder.decisions(("source", "source_row"))
    return table["source_row"].to_numpy()[np.isin(table["source"], seeds)]


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
            raise UserError(
                f"{folder.directory} was grown with {name} {_readable(value)}, and this run has "
                f"{_readable(now[name])}; use the same, or another --growth folder"
            )


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items() if part is not None)
    return f"{value:g}" if isinstance(value, float) else str(value)
