"""`infogrowth score`: other measures than the cosine of how well captions fit, as a table by id."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from infogrowth.config import option
from infogrowth.data.features import FeatureBatch, FeatureStream, open_features
from infogrowth.errors import UserError
from infogrowth.files import atomic_write, atomic_write_json, read_json, remove_leftovers
from infogrowth.growth.decisions import Recaption
from infogrowth.growth.scores import (
    REFERENCE_ROWS,
    TEMPERATURE,
    NegClip,
    draw_reference,
    reference_path,
)
from infogrowth.neighbors.rows import row_products, unit_rows

if TYPE_CHECKING:
    import torch

HELP = "score pairs by cosine, normalised cosine (negCLIP) and BLIP's matching head (ITM)"
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
    recaptions: str | None = option(
        None, help="score the captions of this recaption table too: columns recaption_…"
    )
    growth: str | None = option(
        None, help="take negclip's reference of this growth folder, grown with --clean-by negclip"
    )
    temperature: float = option(TEMPERATURE, help="of negclip: 0.01 as CLIP's, 0.07 as BLIP's")
    reference_rows: int = option(REFERENCE_ROWS, help="pairs in negclip's reference")
    images: str | None = option(None, help="for itm: LMDB, folder or shards [those embedded]")
    matcher: str | None = option(None, help="for itm: the BLIP that judges [the encoder]")
    vocabulary: str | None = option(None, help="vocab.txt for a BLIP that has none beside it")
    feature_key: Literal["b32", "l14"] | None = option(None, help="which of DataComp's features")
    batch_size: int = option(64, help="pairs per batch of itm")
    workers: int | Literal["auto"] = option("auto", help="processes that decode images for itm")
    device: str = option("auto", help="auto, cpu or cuda")


def run(config: Config) -> int:
    """Score all pairs; under the launcher the parts are divided among the ranks."""
    _check(config)
    features = open_features(config.features, ("image", "text"), config.feature_key)
    if features.rows == 0:
        raise UserError(f"the features {config.features} hold no samples")
    features.dimension  # noqa: B018 - refuses image and text features of different width
    # torch is slow to import: bad input is refused first.
    from infogrowth import distributed
    from infogrowth.commands.grow_session import RecaptionTable

    recaptions = open_features(config.recaptions, ("text",)) if config.recaptions else None
    with distributed.process_group(config.device) as device:
        judge = _Judge(config, features, device) if "itm" in config.by else None
        negclip = _negclip(config, features) if "negclip" in config.by else None
        table = RecaptionTable(recaptions) if recaptions else {}
        scorer = _Scorer(tuple(config.by), negclip, judge, table)
        identity = {
            "features": features.fingerprint(features.rows),
            "rows": features.rows,
            "scores": list(config.by),
            "negclip": negclip and negclip.digest(),
            "itm": judge and judge.fingerprint,
            "recaptions": recaptions and recaptions.fingerprint(recaptions.rows),
        }
        folder = Path(config.output)
        if distributed.is_main():
            _prepare(folder, identity)
        distributed.barrier()
        _write_parts(folder, features, scorer)
        distributed.barrier()
        if distributed.is_main():
            _print_summary(folder, features.rows)
        distributed.barrier()
    return 0


def _check(config: Config) -> None:
    for name in ("batch_size", "reference_rows"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 1, not {getattr(config, name)}")
    if not config.by:
        raise UserError("--by is empty: give cosine, negclip or itm")


def _negclip(config: Config, features: FeatureStream) -> NegClip:
    if config.growth:
        return NegClip.load(reference_path(config.growth))
    return draw_reference(features, config.temperature, config.reference_rows)


def _prepare(folder: Path, identity: dict[str, Any]) -> None:
    """Refuse to mix the scores of different runs in one folder."""
    about = folder / "_scores.json"  # readers of parquet folders pass it over
    if about.is_file():
        before = read_json(about, "the description of the scores")
        changed = [name for name in identity if before.get(name) != identity[name]]
        if changed:
            raise UserError(
                f"{folder} holds scores of other {changed[0]}; give another --output folder"
            )
        remove_leftovers(folder)
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--output {folder} is not empty and holds no scores; give another folder")
    else:
        atomic_write_json(about, identity, indent=1)


def _write_parts(folder: Path, features: FeatureStream, scorer: "_Scorer") -> None:
    """Write the parts of this rank that are not there yet."""
    from infogrowth import distributed

    parts = range(-(-features.rows // PART_ROWS))[distributed.rank() :: distributed.world_size()]
    quiet = not (distributed.is_main() and log.isEnabledFor(logging.INFO))
    with tqdm(desc="scoring", total=len(parts), unit="part", disable=quiet or None) as bar:
        for part in parts:
            path = folder / f"{part:05d}.parquet"
            if not path.is_file():
                start, stop = part * PART_ROWS, min((part + 1) * PART_ROWS, features.rows)
                columns = scorer.columns(next(features.batches(stop - start, start, stop)))
                with atomic_write(path) as file:
                    pq.write_table(pa.table(columns), file)
            bar.update()


def _print_summary(folder: Path, rows: int) -> None:
    tables = [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    print(f"samples  {rows:,}")
    for name in tables[0].column_names[1:]:
        values = np.concatenate([table[name].drop_null().to_numpy() for table in tables])
        middle = f"median {np.median(values):.4f}" if len(values) else "none"
        print(f"{name}  {len(values):,} scored, {middle}")
    print(f"written: {folder}  (select --scores {folder}, grow --scores {folder})")


class _Scorer:
    """The scores of batches of features.

    Args:
        kinds: which.
        negclip, judge: what computes them, where they are wanted.
        recaptions: other captions by id, scored in columns of their own.
    """

    def __init__(
        self,
        kinds: tuple[str, ...],
        negclip: NegClip | None,
        judge: "_Judge | None",
        recaptions: Mapping[str, Recaption],
    ):
        self._judge, self._recaptions = judge, recaptions
        scores = {"cosine": row_products, "negclip": negclip}
        self._scores = {kind: scores.get(kind) for kind in kinds}

    def columns(self, batch: FeatureBatch) -> dict[str, Any]:
        """A column per score, null where an image, a feature or a caption is missing."""
        assert batch.image is not None and batch.text is not None
        columns: dict[str, Any] = {"id": pa.array(batch.ids, pa.string())}
        columns |= self._scored(batch.ids, batch.captions, batch.image, batch.text)
        if not self._recaptions:
            return columns
        rows = np.array([n for n, i in enumerate(batch.ids) if i in self._recaptions], np.int64)
        others = [self._recaptions[batch.ids[row]] for row in rows.tolist()]
        text = np.zeros((len(rows), batch.image.shape[1]), np.float32)
        for number, other in enumerate(others):
            text[number] = other.text_feature
        captions = [str(other.caption or "") for other in others]
        ids = [batch.ids[row] for row in rows.tolist()]
        for name, column in self._scored(ids, captions, batch.image[rows], text).items():
            places = np.full(len(batch), -1, np.int64)
            places[rows] = np.arange(len(rows))
            columns[f"recaption_{name}"] = column.take(pa.array(places, mask=places < 0))
        return columns

    def _scored(
        self, ids: list[str], captions: list[str], image: np.ndarray, text: np.ndarray
    ) -> dict[str, pa.Array]:
        (image, image_faults), (text, text_faults) = unit_rows(image), unit_rows(text)
        usable = (image_faults == 0) & (text_faults == 0)
        columns = {}
        for name, score in self._scores.items():
            values = np.full(len(ids), np.nan)
            if score is not None:
                values[usable] = score(image[usable], text[usable])
            elif self._judge is not None:
                values = self._judge.probabilities(ids, captions)
            columns[name] = pa.array(values, pa.float64(), mask=np.isnan(values))
        return columns


class _Judge:
    """BLIP's matching head over the images of a features folder."""

    def __init__(self, config: Config, features: FeatureStream, device: "torch.device"):
        from infogrowth import distributed
        from infogrowth.encoders.embedding import workers_for
        from infogrowth.encoders.loading import load_matcher

        name = config.matcher or (features.encoder or {}).get("name")
        self._where = config.images or features.description.get("images")
        if name is None:
            raise UserError(f"{config.features} does not tell its encoder: give --matcher, a BLIP")
        if self._where is None:
            raise UserError(f"{config.features} does not tell where its images are: give --images")
        with distributed.main_first():  # rank 0 downloads, the others find the files
            self._matcher = load_matcher(str(name), device, config.vocabulary)
        self._device, self._batch_size = device, config.batch_size
        self._workers = workers_for(device) if config.workers == "auto" else config.workers
        self.fingerprint = self._matcher.fingerprint

    def probabilities(self, ids: list[str], captions: list[str]) -> np.ndarray:
        """(N,) float64, NaN where the image cannot be had."""
        from infogrowth.encoders.dataset import (
            DecodedBatch,
            PairTable,
            decoded_batches,
            pairs_by_id,
        )
        from infogrowth.encoders.embedding import Timing, computed, threads_for

        def match(batch: DecodedBatch) -> np.ndarray:
            if batch.tokens is None or not isinstance(batch.images, torch.Tensor):
                return np.empty(0)
            return self._matcher.match(batch.images, batch.tokens).numpy()

        import torch

        pairs = PairTable(ids, {}, pairs_by_id(str(self._where), ids, captions))
        batches = decoded_batches(
            pairs, self._matcher.preprocess, self._matcher.tokenize, [(0, range(len(ids)))],
            self._batch_size, self._workers, pinned=self._device.type == "cuda",
        )  # fmt: skip
        values = np.full(len(ids), np.nan)
        for batch, scores in computed(batches, match, threads_for(self._device), Timing()):
            values[batch.rows] = scores
        return values
