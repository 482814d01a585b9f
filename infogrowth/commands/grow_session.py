"""One run of `grow` over the growth folder: restore, read the sources, decide, commit.

Under the launcher every rank runs the same session over the same features, the engine shares out
the search, and rank 0 alone holds the folder's lock and writes.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from infogrowth.commands.recaption_table import RecaptionTable
from infogrowth.data.features import FeatureBatch, FeatureStream
from infogrowth.distributed import is_main, on_main
from infogrowth.errors import UserError
from infogrowth.growth.engine import InfoGrowth
from infogrowth.growth.ledger import GrowthFolder, Layout, Manifest
from infogrowth.growth.ledger_writer import GrowthLedger, check_settings
from infogrowth.growth.passes import plan_seeds, plan_stream, seeded_rows, waiting_ids
from infogrowth.growth.records import decision_table, refusal_table

log = logging.getLogger(__name__)
Choose = Callable[[FeatureBatch], np.ndarray]

COMMIT_SECONDS = 60.0
MISSING_ID = "id is missing"
MISSING_CAPTION = "caption is missing"


class GrowSession:
    """The growth folder, opened for one run; a context manager.

    Args:
        config: the Config of `grow`.
        device: of this rank.
        features: the samples to offer.
        recaptions: the recaption table's stream, or None.

    Raises:
        UserError: the folder is in use, is none, or was grown with other settings.
    """

    def __init__(
        self,
        config: Any,
        device: torch.device,
        features: FeatureStream,
        recaptions: FeatureStream | None,
    ):
        self.offered = 0
        self._config = config
        self._device = device
        self._features = features
        self._recaptions = RecaptionTable(recaptions) if recaptions else None
        self._recaptions_digest = recaptions.fingerprint(recaptions.rows) if recaptions else None
        self._ledger: GrowthLedger | None = None
        self._last_commit = time.monotonic()
        try:
            settings, self._manifest = on_main(self._open_folder)
            if self._ledger is not None:
                self._manifest = self._ledger.manifest
            self._engine = self._restore(settings)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "GrowSession":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._ledger is not None:
            self._ledger.close()

    def folder(self) -> GrowthFolder:
        """What is committed (rank 0)."""
        assert self._ledger is not None
        return self._ledger.folder()

    def seed(self, stream: FeatureStream | None, seed_ids: list[str] | None = None) -> None:
        """Insert the clean starting set, if it is not in yet.

        Args:
            stream: where the seeds are; None when the run has none.
            seed_ids: only these samples of the stream; None for all.
        """
        digest = _digest(seed_ids) if seed_ids is not None else None
        todo = plan_seeds(self._manifest.sources, stream, digest)
        unsettled = self._engine.settings["min_align"] is None
        if unsettled and stream is None:
            raise UserError(
                "min_align auto is found from a clean starting set: give --seed-features or "
                "--seed-ids, or a number"
            )
        if not unsettled:
            self._settle()
        if stream is None:
            return
        choose = None
        if todo and seed_ids is not None:
            choose = with_id(_found_seeds(stream, set(seed_ids)))
        for number in todo:
            # The threshold comes from all seeds together, so they are inserted in one step.
            size = stream.rows if unsettled else self._config.batch_size
            self._read(number, stream, "seeding", choose, size)
        if unsettled:
            self._settle()

    def grow(self) -> None:
        """Offer the features' new samples, then what waits for the recaption table."""
        stream, sources = self._features, self._manifest.sources
        todo = plan_stream(sources, stream, self._recaptions_digest)
        if not todo:
            log.info("nothing new in %s: all its samples are decided", stream.path)
        for number in todo:
            if sources[number].kind == "retry":
                waiting = on_main(partial(self._waiting, number))
                self._read(number, stream, "offering again", with_id(waiting))
            else:
                seeds = on_main(lambda: seeded_rows(self.folder(), stream))
                sources[number].skipped = stream.skipped
                self._read(number, stream, "growing", not_in_rows(seeds) if seeds else None)

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
        source = self._manifest.sources[number]
        size = batch_size or self._config.batch_size
        with self._progress(what, source.rows, source.position) as bar:
            for batch in stream.batches(size, source.position, source.rows, choose):
                self._offer(number, batch, bar)
                self.offered += len(batch)
                bar.update(int(batch.rows[-1]) + 1 - source.position)
                source.position = int(batch.rows[-1]) + 1
                self._commit(number, stream, even_if_small=False)
            bar.update(source.rows - source.position)
        source.position = source.rows
        self._commit(number, stream, even_if_small=True)

    def _offer(self, number: int, batch: FeatureBatch, bar: tqdm) -> None:
        """Put a batch to the engine and its decisions into the ledger."""
        if self._config.modality == "image" and "label" in batch.extra:
            labels = ["" if label is None else str(label) for label in batch.extra["label"]]
        else:
            labels = batch.captions
        fit = np.fromiter(
            (bool(name and label) for name, label in zip(batch.ids, labels, strict=True)),
            bool,
            len(batch),
        )
        tables: list[pa.Table] = []
        kept: dict[str, np.ndarray] = {}
        if not fit.all():
            tables.append(_refusals(batch, labels, np.flatnonzero(~fit)))
        if fit.any():
            fitting = batch if fit.all() else batch.take(np.flatnonzero(fit))
            captions = [label for label, good in zip(labels, fit.tolist(), strict=True) if good]
            given = (fitting.ids, captions, fitting.image, fitting.text)
            decided = (
                self._engine.seed(*given)
                if self._manifest.sources[number].kind == "seed"
                else self._engine.process(*given, recaptions=self._recaptions)
            )
            tables.append(decision_table(decided, fitting.rows))
            kept = {"image": decided.kept_image}
            if decided.kept_text is not None:
                kept["text"] = decided.kept_text
        if self._ledger is None:
            return
        table = pa.concat_tables(tables)
        if len(tables) > 1:
            table = table.sort_by("source_row")
        self._ledger.record(number, table, kept)
        bar.set_postfix(kept=len(self._engine), dropped=self._ledger.dropped, refresh=False)

    def _commit(self, number: int, stream: FeatureStream, even_if_small: bool) -> None:
        ledger = self._ledger
        if ledger is None:
            return
        big = ledger.waiting_rows >= self._config.commit_rows
        late = time.monotonic() - self._last_commit >= COMMIT_SECONDS
        if not (even_if_small or big or (late and ledger.waiting_rows)):
            return
        if ledger.settings is None:
            self._settle()
        source = self._manifest.sources[number]
        source.digest = stream.fingerprint(source.position)
        ledger.commit()
        self._last_commit = time.monotonic()

    def _waiting(self, retry: int) -> set[str]:
        """Ids to offer again: those that wait for a caption and that the table has one for."""
        assert self._recaptions is not None
        return {s for s in waiting_ids(self.folder(), retry) if s in self._recaptions}

    def _open_folder(self) -> tuple[dict[str, Any] | None, Manifest]:
        self._ledger = GrowthLedger(self._config.growth)
        return self._ledger.settings, self._ledger.manifest

    def _restore(self, settings: dict[str, Any] | None) -> InfoGrowth:
        """The engine as the folder left it, or a new one."""
        config = self._config
        common = {"device": str(self._device.type), "memory_mb": config.memory_mb}
        if settings is not None:
            check_settings(Layout(config.growth).directory, settings, self._asked())
            _tell_changes(settings, self._asked())
        if settings is None or self._manifest.rows == 0:
            return InfoGrowth(
                k=config.k,
                min_align=config.min_align,
                index=config.index,
                modality=config.modality,
                **common,
            )
        folder = GrowthFolder(Layout(config.growth).directory, settings, self._manifest)
        ids, captions, gains = folder.kept_samples()
        log.info("continuing with %s samples in the dataset", f"{len(ids):,}")
        features = {space: list(folder.kept_feature_parts(space)) for space in folder.spaces}
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

    def _asked(self) -> dict[str, Any]:
        """The settings of this run, in the form of growth.json."""
        config, features = self._config, self._features
        is_auto = config.min_align == "auto"
        return {
            "k": config.k,
            "min_align": None if is_auto else config.min_align,
            "min_align_rule": "auto" if is_auto else "given",
            "modality": config.modality,
            "index": config.index,
            "dimension": {space: features.dimensions.get(space) for space in ("image", "text")},
            "encoder": _encoder(features),
            "images": features.description.get("images"),
        }

    def _settle(self) -> None:
        if self._ledger is None:
            return
        settings = self._asked()
        if self._ledger.settings is None:
            chosen = self._engine.settings
            settings["min_align"] = chosen["min_align"]
            settings["min_align_rule"] = chosen["min_align_rule"]
        self._ledger.settle(settings)

    def _progress(self, what: str, total: int, initial: int) -> tqdm:
        quiet = not (is_main() and log.isEnabledFor(logging.INFO))
        return tqdm(
            desc=what, total=total, initial=initial, unit="pair", disable=True if quiet else None
        )


def _refusals(batch: FeatureBatch, labels: list[str], rows: np.ndarray) -> pa.Table:
    unfit = batch.take(rows)
    captions = [labels[row] for row in rows.tolist()]
    reasons = [MISSING_CAPTION if name else MISSING_ID for name in unfit.ids]
    return refusal_table(unfit.rows, unfit.ids, captions, reasons)


def with_id(wanted: Collection[str]) -> Choose:
    """Take the samples with these ids."""
    return lambda batch: np.fromiter((i in wanted for i in batch.ids), bool, len(batch))


def not_in_rows(rows: Collection[int]) -> Choose:
    """Leave out these rows of the features."""
    excluded = np.fromiter(rows, np.int64, len(rows))
    return lambda batch: ~np.isin(batch.rows, excluded)


def _digest(ids: list[str]) -> str:
    text = "\n".join(sorted(set(ids)))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _encoder(features: FeatureStream) -> dict[str, Any] | None:
    encoder = features.encoder
    return encoder and {"name": encoder.get("name"), "fingerprint": encoder.get("fingerprint")}


def _found_seeds(stream: FeatureStream, wanted: set[str]) -> set[str]:
    """The seed ids that the features have; tells how many they do not have."""
    found: set[str] = set()
    for batch in stream.batches(65536):
        found.update(wanted.intersection(batch.ids))
    if not found:
        raise UserError(f"none of the {len(wanted)} seed ids is in {stream.path}")
    if len(found) < len(wanted):
        missing = min(wanted - found)
        told = (len(wanted) - len(found), len(wanted), stream.path, missing)
        log.warning("%d of the %d seed ids are not in %s (for example %r)", *told)
    return found


def _tell_changes(have: dict[str, Any], asked: dict[str, Any]) -> None:
    if have.get("index") != asked["index"]:
        log.info("note: the dataset was begun with index %s", have.get("index"))
    if bool(have.get("encoder")) != bool(asked["encoder"]):
        log.warning("it is not known whether these features have the encoder of the dataset")
