"""Drawing by gain for people who stream: which shards to read, and which of their samples to take.

A sampler of rows needs random access; a stream of tar files has none. So each epoch visits every
shard with the probability of its best sample, in random order, and takes of its samples each with
the chance that makes its probability whole: p = P(shard) · P(sample | shard). Every sample is drawn
with the very probability that :class:`GainSampler` gives it (spec §2).

    shards = GainShards("selected", seed=0)    # a folder that `select` wrote, or its address
    pipeline = webdataset.DataPipeline(
        shards.visits(epochs=range(100)),      # the shards, by their weights
        webdataset.split_by_node, webdataset.split_by_worker,
        shards.samples,                        # their samples, by theirs
        webdataset.decode("pilrgb"), webdataset.to_tuple("jpg;png;webp", "txt"),
    )
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infogrowth.errors import UserError, refusing
from infogrowth.growth.sampling import REVERSE_FLOOR, normalized_gains
from infogrowth.randomness import generator
from infogrowth.remote import is_remote, list_remote, open_file


class GainShards:
    """Weights of shards and samples, and the two stages of a webdataset pipeline that use them.

    Args:
        location: a folder that `select` wrote, or its copy at an fsspec address.
        mode: as for GainSampler: ``two_phase`` draws by gain in even epochs, by max(1 − gain, 0.1)
            in odd ones; ``gain`` draws by gain in all; ``uniform`` takes everything.
        seed: names the random streams: the same samples in the same order, whoever asks.

    Attributes:
        urls: the shards in order.

    Raises:
        UserError: no shards there, or none of the samples has any gain.
    """

    def __init__(
        self,
        location: str | Path,
        mode: Literal["two_phase", "gain", "uniform"] = "two_phase",
        seed: int = 0,
    ) -> None:
        if mode not in ("two_phase", "gain", "uniform"):
            raise UserError(f"mode must be two_phase, gain or uniform, not {mode!r}")
        self.mode, self.seed = mode, seed
        address = str(location)
        names = list_remote(address) if is_remote(address) else _names(Path(address))
        stems = sorted(name.removesuffix(".tar") for name in names if name.endswith(".tar"))
        if not stems:
            raise UserError(f"there are no .tar shards in {location}")
        self.urls = [f"{address.rstrip('/')}/{stem}.tar" for stem in stems]
        tables = [_read(f"{address.rstrip('/')}/{stem}.parquet") for stem in stems]
        gains = np.concatenate([table["gain"].to_numpy() for table in tables])
        probability = normalized_gains(gains) if mode != "uniform" else np.ones(len(gains))
        ends = np.cumsum([len(table) for table in tables])[:-1]
        parts = np.split(probability, ends)
        self._probability = {
            url: dict(zip(table["key"].to_pylist(), part.tolist(), strict=True))
            for url, table, part in zip(self.urls, tables, parts, strict=True)
        }

    def sample_weights(self, url: str, epoch: int = 0) -> dict[str, float]:
        """The probability of each sample of a shard, by key, in this epoch."""
        drawn = self._probability[url]
        if self.mode == "two_phase" and epoch % 2:
            return {key: max(1 - gain, REVERSE_FLOOR) for key, gain in drawn.items()}
        return drawn

    def shard_weights(self, epoch: int = 0) -> dict[str, float]:
        """The mean probability of each shard's samples: what loaders want that only weigh shards
        (open_clip's ``--train-data-upsampling-factors``)."""
        return {
            url: float(np.mean(list(self.sample_weights(url, epoch).values()))) for url in self.urls
        }

    def expected_samples(self, epoch: int = 0) -> float:
        """How many samples an epoch draws on average, over all ranks and workers."""
        return float(sum(sum(self.sample_weights(url, epoch).values()) for url in self.urls))

    def visits(self, epochs: Iterable[int] = (0,)) -> Callable[[], Iterator[dict[str, Any]]]:
        """A pipeline's first stage: called, it gives the shards to read in these epochs, one epoch
        after the other, as ``{"url", "epoch"}``."""
        return partial(self._visits, epochs)

    def samples(self, visits: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The samples that are taken of the shards visited: a pipeline's stage.

        Raises:
            UserError: a shard that cannot be read.
        """
        from webdataset.tariterators import group_by_keys, tar_file_expander

        for visit in visits:
            url, epoch = visit["url"], visit["epoch"]
            weights = self.sample_weights(url, epoch)
            best = max(weights.values(), default=1.0)
            random = generator(self.seed, "shard samples", self.mode, epoch, url.rsplit("/", 1)[-1])
            taken = dict(zip(weights, random.random(len(weights)), strict=True))
            with open_file(url) as stream:
                for sample in group_by_keys(tar_file_expander([{"url": url, "stream": stream}])):
                    key = sample["__key__"]
                    if taken[key] * best < weights[key]:
                        yield sample

    def _visits(self, epochs: Iterable[int]) -> Iterator[dict[str, Any]]:
        for epoch in epochs:
            random = generator(self.seed, "shards", self.mode, epoch)
            best = [max(self.sample_weights(url, epoch).values(), default=0) for url in self.urls]
            chosen = np.flatnonzero(random.random(len(best)) < np.array(best))
            for number in random.permutation(chosen).tolist():
                yield {"url": self.urls[number], "epoch": epoch}


def _names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UserError(f"the folder of shards {folder} does not exist; check the path")
    return sorted(path.name for path in folder.iterdir())


def _read(path: str) -> pa.Table:
    """Keys and gains of the samples in a shard."""
    with refusing(path, "the shard's table", pa.ArrowException, KeyError):
        with open_file(path) as file:
            table = pq.read_table(file, columns=["key", "gain", "status"])
        return table.filter(pc.equal(table["status"], "success"))
