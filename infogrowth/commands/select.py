"""`infogrowth select`: select by gain (the top N, or at random), by a condition in SQL, or both."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from infogrowth.annotations import Annotation, gains_array, load_annotations
from infogrowth.commands.embed import images_of
from infogrowth.config import option
from infogrowth.data import exports
from infogrowth.data.sample_table import SampleTable, columns_of
from infogrowth.errors import UserError
from infogrowth.growth.ledger import read_growth
from infogrowth.growth.sampling import normalized_gains, select_bernoulli, select_top

log = logging.getLogger(__name__)

# Columns of where a sample comes from and why it was kept, for tables and shards.
_PROVENANCE = ("verdict", "reason", "alignment", "original_alignment", "original_caption")


@dataclass(frozen=True)
class Config:
    """Options of `select`."""

    output: list[str] = option(
        help="files to write: .json, .parquet, .npy (DataComp uids), .jsonl (Hugging Face "
        "metadata); or a folder of webdataset shards"
    )
    annotations: str | None = option(None, "a result (JSON, parquet) of `grow`", excludes="growth")
    growth: str | None = option(None, help="select from a growth folder: all columns of decisions")
    scores: list[str] = option([], "parquet files of ids and columns for --where", needs="where")
    where: str | None = option(
        None, help="condition in SQL: \"gain >= 0.05 and aesthetic > 4.5 and verdict = 'kept'\""
    )
    among: Literal["kept", "dropped", "all"] = option(
        "kept", help="with --growth: which decisions to choose from", needs="growth"
    )
    top: int | None = option(None, help="take this many samples of highest gain")
    bernoulli: bool = option(
        False,
        help="take each sample with its gain (over the 0.99 quantile) as the chance",
        excludes="top",
    )
    seed: int = option(0, help="of the random choice")
    images: str | None = option(None, "for shards: LMDB or folder [those of the growth folder]")
    shard_size: int = option(10_000, min=1, help="samples per webdataset shard")
    legacy_strings: bool = option(False, help="write JSON gains as strings, as the paper's files")
    uid_repeats: int = option(1, min=1, help="repeat a .npy uid up to this often, by its gain")
    file_ending: str = option(".jpg", help="for ids without one, in file_name of a .jsonl")


def run(config: Config) -> int:
    """Choose samples and write them in their order, extra keys and all."""
    _check(config)
    choice = _from_growth(config) if config.growth else _from_annotations(config)
    before = choice.gains
    if config.where is not None:
        choice = _meeting_condition(config.where, choice)
    if config.top is not None:
        rows = select_top(choice.gains, config.top)
    elif config.bernoulli:
        rows = select_bernoulli(choice.gains, config.seed)
        if len(rows) == 0:
            raise UserError("no sample was drawn; give another --seed, or --top N")
    else:
        rows = np.arange(len(choice.gains))
    probability = np.zeros(len(choice.gains))
    # With --top all gains may be zero: then no uid is repeated.
    if (choice.gains.mean(axis=1) > 0).any():
        probability = normalized_gains(choice.gains)
    choice = replace(choice, positions=choice.positions[rows], gains=choice.gains[rows])
    for path in config.output:
        if exports.is_folder_output(path):
            _write_shards(config, Path(path), choice)
            continue
        repeats = partial(exports.uid_repeats, probability[rows], config.uid_repeats)
        # What a result JSON knows is in its entries, unless a condition added to it.
        tables = choice.rows if choice.entries is None or choice.extra else None
        options = config.legacy_strings, repeats, config.file_ending
        exports.write_export(path, choice.samples(), tables, *options)
    log.info(
        "selected %s of %s samples (mean gain %.4f, before %.4f)\nwritten: %s",
        *(f"{len(rows):,}", f"{len(before):,}", choice.gains.mean(), before.mean()),
        ", ".join(config.output),
    )
    return 0


@dataclass
class _Choice:
    """Samples to choose from, or chosen: positions (N,) ascending and gains (N, 2), in order.

    Attributes:
        table: their columns; None when no condition asks for them.
        entries: the samples of a result JSON; None for those of a growth folder.
        extra: columns (SQL) that are written beside the samples.
    """

    positions: np.ndarray
    gains: np.ndarray
    table: SampleTable | None = None
    entries: Sequence[Annotation] | None = None
    extra: list[str] = field(default_factory=list)

    def samples(self) -> Iterable[Annotation]:
        """The samples as a result JSON has them."""
        if self.entries is not None:
            return [self.entries[position] for position in self.positions.tolist()]
        gains = ("gain_image", "gain_text")
        return (
            {"image": r["image"], "caption": r["caption"], "gains": [r[name] for name in gains]}
            for r in self.records()
        )

    def records(self) -> Iterator[dict[str, Any]]:
        """The samples with all that is known of them."""
        if self.entries is None:
            yield from (row for table in self.rows() for row in table.to_pylist())
            return
        for sample in self.samples():
            image, text = sample["gains"]
            others = {key: value for key, value in sample.items() if key != "gains"}
            yield {**others, "gain_image": image, "gain_text": text}

    def rows(self) -> Iterator[pa.Table]:
        """The samples as a table, with the extra columns."""
        assert self.table is not None
        wanted = ["id AS image", "samples.caption AS caption", "gain_image", "gain_text"]
        return self.table.rows(self.positions, [*wanted, *self.extra])


def _check(config: Config) -> None:
    exports.check_outputs(config.output, folders=True)
    if config.annotations is None and config.growth is None:
        raise UserError("give either --annotations FILE.json or --growth DIR to select from")
    if config.top is None and not config.bernoulli and config.where is None:
        raise UserError("give either --top N, --bernoulli (--seed S), or a condition by --where")
    if any(map(exports.is_folder_output, config.output)) and not (config.growth or config.images):
        raise UserError("shards hold images: give --images, the LMDB or folder that has them")


def _from_annotations(config: Config) -> _Choice:
    annotations = load_annotations(str(config.annotations))
    if not annotations:
        raise UserError(f"{config.annotations} holds no samples to select from")
    gains = gains_array(annotations)
    choice = _Choice(np.arange(len(annotations)), gains, entries=annotations)
    if config.where is not None:
        columns = columns_of(annotations, gains)
        choice.table = SampleTable(columns, "SELECT * FROM {source}", config.scores)
    return choice


def _from_growth(config: Config) -> _Choice:
    parts = read_growth(str(config.growth)).decision_files
    if not parts:
        raise UserError(f"{config.growth} holds no samples yet; run `python -m infogrowth grow`")
    query = (
        "SELECT row AS sample_position, * REPLACE (coalesce(gain_text, gain_image) AS gain_text), "
        "(gain_image + coalesce(gain_text, gain_image)) / 2 AS gain "
        "FROM {source} WHERE gain_image IS NOT NULL AND "
    )
    if config.among == "kept":
        query += "verdict <> 'dropped'"
    else:  # decided several times: once kept is kept, else the last time counts
        latest = "PARTITION BY id ORDER BY verdict <> 'dropped' DESC, row DESC"
        query += f"true QUALIFY row_number() OVER ({latest}) = 1"
        if config.among == "dropped":
            query = f"SELECT * FROM ({query}) WHERE verdict = 'dropped'"
    table = SampleTable(parts, query, config.scores)
    if table.count == 0:
        raise UserError(f"{config.growth} holds no samples that were {config.among}")
    return _Choice(*table.gains(), table, extra=list(_PROVENANCE))


def _meeting_condition(condition: str, choice: _Choice) -> _Choice:
    """The samples that meet the condition; logs what each clause keeps."""
    assert choice.table is not None
    for scores in choice.table.scores:
        log.info("scores %s: %s", scores.name, scores.summary())
    positions, clauses, used = choice.table.filter(condition)
    width = max(len(clause.text) for clause in clauses)
    log.info("%-*s  %12s %12s", width, "condition", "keeps alone", "leaves")
    for clause in clauses:
        unknown = f"  ({clause.unknown:,} without a value)" if clause.unknown else ""
        counts = f"{clause.alone:>12,} {clause.left:>12,}{unknown}"
        log.info("%-*s  %s", width, clause.text, counts)
    if not len(positions):
        raise UserError(f"no sample meets the condition {condition!r}")
    _, gains = choice.table.gains(positions)
    return replace(choice, positions=positions, gains=gains, extra=[*choice.extra, *used])


def _write_shards(config: Config, folder: Path, choice: _Choice) -> None:
    from infogrowth.data.image_stores import open_images

    about = read_growth(config.growth).settings if config.growth else {}
    where = images_of(config.growth, about, config.images, "--images")
    ids = [sample["image"] for sample in choice.samples()]
    images, records = open_images(where, ids), choice.records()
    quiet = not log.isEnabledFor(logging.INFO)
    written = exports.write_shards(folder, records, len(ids), images.find, config.shard_size, quiet)
    count = f"{written.samples:,}"
    earlier = f" ({written.resumed} of them by an earlier run)" if written.resumed else ""
    log.info("%s: %s samples in %s shards%s", *(folder, count, written.shards, earlier))
    for reason, number in written.skipped.most_common(5):
        log.warning("  %s left out: %s", f"{number:,}", reason)
    if written.unusual:
        log.warning(
            "  %s images are neither JPEG nor PNG nor WebP: common loaders skip them",
            f"{written.unusual:,}",
        )
