"""`infogrowth select`: a smaller dataset by gain, from a grown one."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infogrowth.annotations import Annotation, gains_array, load_annotations
from infogrowth.config import option
from infogrowth.data.exports import ExportChoices, check_outputs, uid_repeats, write_export
from infogrowth.errors import UserError
from infogrowth.growth.sampling import normalized_gains, select_bernoulli, select_top

HELP = "select a subset of a grown dataset by gain: the top N, or at random by gain"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Options of `select`."""

    annotations: str = option(help="a result JSON of `grow`")
    output: list[str] = option(
        help="files to write: .json, .parquet, .npy (DataComp uids), .jsonl (Hugging Face metadata)"
    )
    top: int | None = option(None, help="take this many samples of highest gain")
    bernoulli: bool = option(
        False, help="take each sample with its gain (over the 0.99 quantile) as the chance"
    )
    seed: int = option(0, help="of the random choice")
    legacy_strings: bool = option(False, help="write JSON gains as strings, as the paper's files")
    uid_repeats: int = option(1, help="repeat a .npy uid up to this often, by its gain")
    file_ending: str = option(".jpg", help="for ids without one, in file_name of a .jsonl")


def run(config: Config) -> int:
    """Choose samples and write them in their order, extra keys and all."""
    check_outputs(config.output)
    if (config.top is None) != config.bernoulli:
        raise UserError("give either --top N or --bernoulli (with --seed S)")
    if config.uid_repeats < 1:
        raise UserError(f"uid_repeats must be at least 1, not {config.uid_repeats}")
    annotations = load_annotations(config.annotations)
    if not annotations:
        raise UserError(f"{config.annotations} holds no samples to select from")
    gains = gains_array(annotations)
    rows = (
        select_top(gains, config.top)
        if config.top is not None
        else select_bernoulli(gains, config.seed)
    )
    if len(rows) == 0:
        raise UserError("no sample was drawn; give another --seed, or --top N")
    # With --top all gains may be zero: then no uid is repeated.
    probability = (
        normalized_gains(gains) if (gains.mean(axis=1) > 0).any() else np.zeros(len(gains))
    )
    _write(config, [annotations[row] for row in rows.tolist()], probability[rows])
    log.info(
        "selected %s of %s samples (mean gain %.4f, before %.4f)\nwritten: %s",
        f"{len(rows):,}",
        f"{len(annotations):,}",
        gains[rows].mean(),
        gains.mean(),
        ", ".join(config.output),
    )
    return 0


def _write(config: Config, chosen: list[Annotation], probability: np.ndarray) -> None:
    for path in config.output:
        repeats = None
        if config.uid_repeats > 1 and Path(path).suffix == ".npy":
            repeats = uid_repeats(probability, config.uid_repeats)
        choices = ExportChoices(config.legacy_strings, repeats, config.file_ending)
        write_export(path, chosen, choices)
