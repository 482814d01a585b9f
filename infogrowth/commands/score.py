"""`infogrowth score`: score pairs by cosine, negCLIP (normalised) and BLIP's matching head."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from infogrowth.commands.embed import images_of
from infogrowth.config import option
from infogrowth.data.feature_stream import FeatureBatch, FeatureStream
from infogrowth.data.features import open_features
from infogrowth.errors import UserError
from infogrowth.files import atomic_write, atomic_write_json, read_json, remove_leftovers
from infogrowth.growth import cleaning
from infogrowth.growth.decisions import Recaption
from infogrowth.rows import row_products, unit_pairs

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

PART_ROWS = 16_384  # rows per parquet file; what an interrupted run has to do again at most
Kind = Literal["cosine", "negclip", "itm"]


@dataclass(frozen=True)
class Config:
    """Options of `score`."""

    features: str = option(help="a features folder, as for `grow`")
    output: str = option(help="the folder of scores to write; an interrupted one is continued")
    by: list[Kind] = option(
        ["cosine", "negclip"],
        help="cosine, negclip (from the features), itm (reads the images with a BLIP)",
    )
    recaptions: str | None = option(None, "score this recaption table too: columns recaption_…")
    growth: str | None = option(None, "a growth folder whose negclip reference to take")
    temperature: float = option(
        cleaning.TEMPERATURE, help="of negclip: 0.01 as CLIP's, 0.07 as BLIP's", min=1e-3, max=10
    )
    reference_rows: int = option(cleaning.REFERENCE_ROWS, "pairs in negclip's reference", min=1)
    images: str | None = option(None, help="for itm: LMDB, folder or shards [those embedded]")
    matcher: str | None = option(None, help="for itm: the BLIP that judges [the encoder]")
    vocabulary: str | None = option(None, help="vocab.txt for a BLIP that has none beside it")
    feature_key: Literal["b32", "l14"] | None = option(None, help="which of DataComp's features")
    batch_size: int = option(64, help="pairs per batch of itm", min=1)
    workers: int | None = option(None, help="processes that decode images for itm, or auto", min=0)
    device: str = option("auto", help="auto, cpu or cuda")


def run(config: Config) -> int:
    """Score all pairs; under the launcher the parts are divided among the ranks."""
    if not config.by:
        raise UserError("--by is empty: give cosine, negclip or itm")
    features = open_features(config.features, ("image", "text"), config.feature_key)
    # torch is slow to import: bad input is refused first.
    from infogrowth import distributed
    from infogrowth.commands.grow_session import RecaptionTable

    recaptions = open_features(config.recaptions, ("text",)) if config.recaptions else None
    with distributed.process_group(config.device) as device:
        scores: dict[str, Score] = {}
        models: dict[str, str | None] = {"negclip": None, "itm": None}
        for name in config.by:
            if name == "itm":
                scores[name], models[name] = _itm(config, features, device)
            elif name == "negclip":
                if config.growth:
                    negclip = cleaning.NegClip.load(cleaning.reference_path(config.growth))
                else:
                    size = config.reference_rows
                    negclip = cleaning.draw_reference(features, config.temperature, size)
                scores[name], models[name] = _of_features(negclip), negclip.digest()
            else:
                scores[name] = _of_features(row_products)
        identity = {
            "features": features.fingerprint(features.rows),
            "rows": features.rows,
            "scores": list(config.by),
            **models,
            "recaptions": recaptions and recaptions.fingerprint(recaptions.rows),
        }
        folder = Path(config.output)
        distributed.on_main(lambda: _prepare(folder, identity))
        table = RecaptionTable(recaptions) if recaptions else {}
        _write_parts(folder, features, lambda batch: _columns(batch, scores, table))
        distributed.barrier()
        if distributed.is_main():
            _print_summary(folder, features.rows)
        distributed.barrier()
    return 0


Score = Callable[[FeatureBatch], np.ndarray]
"""N samples -> (N,) float64, NaN where there is no score."""


def _of_features(score: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Score:
    """A score of unit rows."""

    def scored(batch: FeatureBatch) -> np.ndarray:
        image, text, usable = unit_pairs(batch.image, batch.text)
        values = np.full(len(batch), np.nan)
        values[usable] = score(image[usable], text[usable])
        return values

    return scored


def _itm(config: Config, features: FeatureStream, device: "torch.device") -> tuple[Score, str]:
    """BLIP's probability that a caption belongs to its image, and that BLIP's fingerprint."""
    import torch

    from infogrowth import distributed
    from infogrowth.encoders import dataset
    from infogrowth.encoders.embedding import Timing, computed, threads_for, workers_for
    from infogrowth.encoders.loading import load_matcher

    name = config.matcher or (features.encoder or {}).get("name")
    if name is None:
        raise UserError(f"{config.features} does not record its encoder: give --matcher, a BLIP")
    images = images_of(config.features, features.description, config.images, "--images")
    with distributed.main_first():  # rank 0 downloads, the others find the files
        matcher = load_matcher(str(name), device, config.vocabulary)
    workers = workers_for(device) if config.workers is None else config.workers

    def match(batch: dataset.DecodedBatch) -> np.ndarray:
        if batch.tokens is None or not isinstance(batch.images, torch.Tensor):
            return np.empty(0)
        return matcher.match(batch.images, batch.tokens).numpy()

    def scored(pairs: FeatureBatch) -> np.ndarray:
        ids = pairs.ids
        batches = dataset.decoded_batches(
            dataset.pairs_by_id(images, ids, pairs.captions), matcher.preprocess,
            matcher.tokenize, [(0, range(len(ids)))], config.batch_size, workers,
            pinned=device.type == "cuda",
        )  # fmt: skip
        values = np.full(len(ids), np.nan)
        for batch, found in computed(batches, match, threads_for(device), Timing()):
            values[batch.rows] = found
        return values

    return scored, matcher.fingerprint


def _prepare(folder: Path, identity: dict[str, Any]) -> None:
    """Refuse to mix the scores of different runs in one folder."""
    about = folder / "_scores.json"  # readers of parquet folders pass it over
    if about.is_file():
        before = read_json(about, "the description of the scores")
        changed = [name for name in identity if before.get(name) != identity[name]]
        if changed:
            raise UserError(f"{folder} holds scores of other {changed[0]}: give another --output")
        remove_leftovers(folder)
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--output {folder} is not empty and holds no scores; give another folder")
    else:
        atomic_write_json(about, identity, indent=1)


def _write_parts(
    folder: Path, features: FeatureStream, columns: Callable[[FeatureBatch], dict[str, Any]]
) -> None:
    """Write the parts of this rank that are not there yet."""
    from infogrowth import distributed

    parts = range(-(-features.rows // PART_ROWS))[distributed.rank() :: distributed.world_size()]
    quiet = not (distributed.is_main() and log.isEnabledFor(logging.INFO))
    for part in tqdm(parts, desc="scoring", unit="part", disable=quiet or None):
        path = folder / f"{part:05d}.parquet"
        if not path.is_file():
            start, stop = part * PART_ROWS, min((part + 1) * PART_ROWS, features.rows)
            table = pa.table(columns(next(features.batches(stop - start, start, stop))))
            with atomic_write(path) as file:
                pq.write_table(table, file)


def _columns(
    batch: FeatureBatch, scores: Mapping[str, Score], recaptions: Mapping[str, Recaption]
) -> dict[str, Any]:
    """A column per score, null where an image, a feature or a caption is missing; with recaptions
    another one of the scores of their captions."""
    columns: dict[str, Any] = {"id": pa.array(batch.ids, pa.string())}
    for name, score in scores.items():
        values = score(batch)
        columns[name] = pa.array(values, pa.float64(), mask=np.isnan(values))
    if recaptions:
        rows = np.array([row for row, name in enumerate(batch.ids) if name in recaptions], int)
        own = batch.take(rows)
        assert own.image is not None
        others = [recaptions[name] for name in own.ids]
        text = np.array([other.text_feature for other in others], np.float32)
        captions = [str(other.caption or "") for other in others]
        own = replace(own, captions=captions, text=text.reshape(own.image.shape))
        for name, score in scores.items():
            values = np.full(len(batch), np.nan)
            values[rows] = score(own)
            columns[f"recaption_{name}"] = pa.array(values, pa.float64(), mask=np.isnan(values))
    return columns


def _print_summary(folder: Path, rows: int) -> None:
    tables = [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    print(f"samples  {rows:,}")
    for name in tables[0].column_names[1:]:
        values = np.concatenate([table[name].drop_null().to_numpy() for table in tables])
        middle = f"median {np.median(values):.4f}" if len(values) else "none"
        print(f"{name}  {len(values):,} scored, {middle}")
    print(f"written: {folder}  (select --scores {folder}, grow --scores {folder})")
