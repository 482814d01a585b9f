"""`infogrowth grow`: grow a clean, diverse dataset out of features: clean, gain, grow."""

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from os.path import realpath
from pathlib import Path
from typing import Literal

import numpy as np

from infogrowth.annotations import gains_array, read_ids
from infogrowth.config import option
from infogrowth.data.exports import check_outputs, uid_repeats, write_export
from infogrowth.data.feature_stream import FeatureStream
from infogrowth.data.features import open_features
from infogrowth.errors import UserError
from infogrowth.files import remove_leftovers
from infogrowth.growth.decisions import Reason
from infogrowth.growth.ledger import GrowthFolder
from infogrowth.growth.sampling import normalized_gains
from infogrowth.growth.thresholds import DEFAULT_MIN_ALIGN, PAPERS_RULE, StreamEstimate, Thresholds

log = logging.getLogger(__name__)

_REASONS_TO_KEEP = {Reason.ALIGNED, Reason.RECAPTIONED, Reason.LABEL_AGREES}


@dataclass(frozen=True)
class Config:
    """Options of `grow`; the command and a YAML file take the same names."""

    features: str = option(help="samples to process: a features folder, or a .npz/.pth of arrays")
    growth: str = option(help="the growth folder: made, or continued")
    output: list[str] = option(
        help="files to write: .json (result), .parquet (all decisions), .npy (DataComp uids), "
        ".jsonl (Hugging Face metadata)"
    )
    seed_features: str | None = option(None, "a clean start, never filtered", excludes="seed_ids")
    seed_ids: str | None = option(None, "JSON list of ids of --features: the clean start")
    recaptions: str | None = option(None, help="a table of other captions (infogrowth recaption)")
    min_align: float | str | None = option(
        None,
        help="lowest cosine of image and caption to keep; auto: what best separates the seeds from "
        "swapped ones; auto:0.98: what leaves the stream 98 % pure [0.4, or that of the folder]",
    )
    min_recaption_align: float | str | None = option(
        None,
        help="what a new caption must reach; auto: the 0.75 quantile of the seeds' own "
        "[min_align, or that of the folder]",
    )
    clean_by: str = option(
        "cosine",
        help="what says how well a caption fits: cosine (the paper), negclip (normalised by a "
        "fixed reference drawn from the features), or a column of --scores such as itm",
    )
    scores: list[str] = option([], help="parquet files with id and the column of --clean-by")
    k: int = option(4, help="a gain is the mean distance to this many nearest kept samples", min=1)
    index: Literal["auto", "exact", "approximate"] = option("auto", help="neighbor search")
    modality: Literal["pair", "image"] = option(
        "pair", help="pair: image and caption; image: images with class labels as captions"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", help="where to search")
    batch_size: int = option(32768, "samples looked up together; does not change the result", min=1)
    memory_mb: int = option(256, help="scratch memory of a search, MB", min=1)
    feature_key: Literal["b32", "l14"] | None = option(None, help="which of DataComp's features")
    commit_rows: int = option(65536, help="samples per commit, at most; also every 60 s", min=1)
    legacy_strings: bool = option(False, help="write JSON gains as strings, as the paper's files")
    uid_repeats: int = option(1, help="repeat a .npy uid up to this often, by its gain", min=1)
    file_ending: str = option(".jpg", help="for ids without one, in file_name of a .jsonl")


def run(config: Config) -> int:
    """Grow, then write the outputs and print a summary; everything decided is in the folder."""
    _check(config)
    started = time.monotonic()
    spaces = ("image", "text") if config.modality == "pair" else ("image",)
    features = _opened(config.features, spaces, config)
    features.skipped  # noqa: B018 - a broken record is refused before anything is decided
    if config.seed_features:
        seeds, seed_ids = _opened(config.seed_features, spaces, config, like=features), None
    elif config.seed_ids:
        seeds, seed_ids = features, read_ids(config.seed_ids)
    else:
        seeds, seed_ids = None, None
    recaptions = None
    if config.recaptions:
        recaptions = _opened(config.recaptions, ("text",), config, like=features)

    # torch is slow to import: bad input is refused first.
    from infogrowth.commands.grow_session import GrowSession
    from infogrowth.distributed import barrier, is_main, process_group

    with process_group(config.device) as device, ExitStack() as stack:
        session = GrowSession(config, device, features, recaptions, stack)
        session.seed(seeds, seed_ids)
        session.grow()
        if is_main():
            folder = session.folder()
            _write_outputs(config, folder)
            if log.isEnabledFor(logging.INFO):
                print(_summary(config, folder, session.processed, time.monotonic() - started))
        barrier()
    return 0


def _check(config: Config) -> None:
    """Refuse options that cannot go together, before any work."""
    check_outputs(config.output)
    for path in config.output:
        if Path(realpath(path)).is_relative_to(realpath(config.growth)):
            raise UserError(f"--output {path} lies in the growth folder: write it elsewhere")
    align, recaption_align = config.min_align, config.min_recaption_align
    Thresholds.requested(DEFAULT_MIN_ALIGN if align is None else align, recaption_align)
    is_auto = isinstance(align, str) or isinstance(recaption_align, str)
    of_captions = is_auto or config.recaptions or config.clean_by != "cosine"
    if config.modality == "image" and of_captions:
        raise UserError("--modality image has no captions: no --recaptions, --clean-by or auto")
    if config.clean_by not in ("cosine", "negclip") and (is_auto or not config.scores):
        raise UserError(f"--clean-by {config.clean_by} needs --scores, and numbers as thresholds")


def _opened(
    path: str, spaces: tuple[str, ...], config: Config, like: FeatureStream | None = None
) -> FeatureStream:
    """Features that can be grown; seeds and recaptions must be of the same encoder as those they
    go with. A recaption table may be empty: nothing needed a caption."""
    extra = ("label",) if config.modality == "image" else ()
    stream = open_features(path, spaces, config.feature_key, extra)
    if like is None or stream.rows == 0:
        return stream
    if stream.dimension != like.dimension:
        raise UserError(
            f"{path} has features of dimension {stream.dimension}, and {like.path} of "
            f"{like.dimension}; they must come from the same encoder"
        )
    ours, theirs = like.encoder, stream.encoder
    if bool(ours) != bool(theirs):
        log.info("note: it is not known whether %s has the encoder of the features", path)
    elif ours and theirs:  # known by the fingerprint of the weights; without one, by the name
        weights = [encoder.get("fingerprint") or encoder.get("name") for encoder in (ours, theirs)]
        if weights[0] != weights[1]:
            raise UserError(
                f"{path} was embedded with encoder {theirs.get('name')}, and {like.path} with "
                f"{ours.get('name')}; embed both with the same one"
            )
    return stream


def _write_outputs(config: Config, folder: GrowthFolder) -> None:
    def repeats() -> np.ndarray:
        gains = normalized_gains(gains_array(folder.annotations()))
        return uid_repeats(gains, config.uid_repeats)

    for path in config.output:
        remove_leftovers(Path(path).parent, Path(path).name)  # of a run killed while writing it
        write_export(
            path,
            folder.iter_annotations(),
            folder.decision_parts,
            config.legacy_strings,
            repeats if config.uid_repeats > 1 else None,
            config.file_ending,
        )


def _summary(config: Config, folder: GrowthFolder, processed: int, seconds: float) -> str:
    """The table at the end: what became of all samples so far, and what this run did."""
    totals, reasons = folder.totals, dict(folder.totals["reasons"])
    sources = folder.sources
    retries = [number for number, source in enumerate(sources) if source.kind == "retry"]
    again = int(np.isin(folder.decisions(["source"])["source"], retries).sum()) if retries else 0
    skipped = sum(sum(source.skipped.values()) for source in sources)
    lines: list[tuple[str, str]] = [
        ("pairs processed", f"{totals['pairs']:,}"),
        ("kept", f"{totals['kept']:,}"),
        ("  of these seeds", f"{reasons.pop(Reason.SEED, 0):,}"),
        ("recaptioned", f"{totals['recaptioned']:,}"),
        ("dropped (some twice)" if again else "dropped", f"{totals['dropped']:,}"),
    ]
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        if reason not in _REASONS_TO_KEEP:
            lines.append((f"  {reason}", f"{count:,}"))
    if skipped:
        lines.append(("skipped before (no features)", f"{skipped:,}"))
    if again:  # a sample that was processed again is counted twice above
        lines.append(("samples still out", f"{totals['pairs'] - again - totals['dataset']:,}"))
    speed = f"{processed:,} pairs in {seconds:.1f} s ({processed / seconds:,.0f} pairs/s)"
    lines += [
        ("in the dataset", f"{totals['dataset']:,}"),
        *_threshold_lines(Thresholds.of_settings(folder.settings), folder.estimate()),
        ("this run", speed if processed else "nothing new: every sample was already decided"),
    ]
    width = max(len(name) for name, _ in lines)
    table = "\n".join(f"{name:<{width}}  {value}" for name, value in lines)
    return f"{table}\ngrowth folder: {config.growth}\nwritten: {', '.join(config.output)}"


def _threshold_lines(
    thresholds: Thresholds, estimate: StreamEstimate | None
) -> list[tuple[str, str]]:
    """The thresholds, and what is estimated about the stream so far: nothing without seeds."""
    align, rule = thresholds.min_align, thresholds.min_align_rule.partition(": ")[0]
    lines = [("min_align", f"{align:.4f} ({rule})")]
    rule = thresholds.min_recaption_align_rule.partition(": ")[0]
    if rule != PAPERS_RULE:
        lines.append(("min_recaption_align", f"{thresholds.min_recaption_align:.4f} ({rule})"))
    if estimate is None:
        return lines
    low, high = (f"{100 * share:.1f}" for share in estimate.noise_interval)
    purity, lost = float(estimate.purity(align)), float(estimate.right_lost(align))
    aim, aimed = thresholds.purity, ""
    if aim is not None:
        aimed = f" (aim: {100 * (1 - aim):.3g} %)"
        if purity < aim - 0.01:
            log.warning(
                "what was added is noisier than what min_align was chosen on: about %.1f %% pure, "
                "not %.1f %%; begin another --growth folder to choose it again",
                *(100 * purity, 100 * aim),
            )
    return [
        *lines,
        ("wrong captions (estimate)", f"{100 * estimate.noise:.1f} % of the stream ({low}–{high})"),
        ("  left above min_align", f"{100 * (1 - purity):.1f} %{aimed}"),
        ("  right ones below it", f"{100 * lost:.1f} %"),
    ]
