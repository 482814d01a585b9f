"""From gains to training samples: normalised gains, static selection, samplers of rows and shards.

Source: InfoGrowth §"Gain-based sampling" as spec §2 states it. Plain numpy: a sampler is any
iterable of row numbers with a length, so torch's DataLoader takes it as it is.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from infogrowth.config import nearest
from infogrowth.errors import UserError, refusing
from infogrowth.randomness import generator
from infogrowth.remote import as_path

Mode = Literal["two_phase", "proportional", "uniform"]
ShardMode = Literal["two_phase", "gain", "uniform"]
QUANTILE = 0.99
# In the odd epochs of two_phase even the most informative sample keeps this chance.
REVERSE_FLOOR = 0.1
# Uniform numbers drawn at once by `proportional`: bounds memory, does not change the result.
_BLOCK = 4_000_000


def normalized_gains(gains: np.ndarray) -> np.ndarray:
    """Gains as probabilities: the mean of both spaces over its 0.99 quantile, clipped to [0, 1].

    When more than 99 % of the samples have no gain at all the quantile is zero; the limit of the
    same rule then gives 1 to every sample that has some gain and 0 to the others. Raises UserError:
    no samples, a gain that is not finite, or no positive gain at all. Returns ``(N,)`` float64 in
    [0, 1], at least one of them 1.

    Args:
        gains: ``(N, 2)`` image and text gains, or ``(N,)`` their means; any real numbers.
    """
    mean = _mean_gains(gains)
    if not (mean > 0).any():
        raise UserError(f"the total gain of the {len(mean)} samples is zero: sample uniformly")
    quantile = np.quantile(mean, QUANTILE)
    if quantile <= 0:
        return (mean > 0).astype(np.float64)
    return np.clip(mean / quantile, 0.0, 1.0)


def select_bernoulli(gains: np.ndarray, seed: int = 0) -> np.ndarray:
    """Static selection: each sample is taken with its normalised gain as the probability. Returns
    ascending row numbers, int64; the same for the same ``seed`` on every machine."""
    probability = normalized_gains(gains)
    return np.flatnonzero(generator(seed, "select").random(len(probability)) < probability)


def select_top(gains: np.ndarray, count: int) -> np.ndarray:
    """Static selection: the ``count`` samples of highest gain; among equals the earlier row wins.

    Unlike the random selection it orders by the gain before clipping, so that the samples above the
    0.99 quantile still differ. Raises UserError: no samples, a gain that is not finite, or
    ``count`` is not in 1 … N. Returns ascending row numbers, int64.
    """
    mean = _mean_gains(gains)
    if not 1 <= count <= len(mean):
        raise UserError(f"cannot select the top {count} of {len(mean)} samples")
    return np.sort(np.argsort(-mean, kind="stable")[:count])


class GainSampler:
    """The rows of one rank for one epoch, drawn by gain.

    * ``two_phase``: even epochs draw each sample with probability gain, odd epochs with
      max(1 − gain, 0.1); the length differs from epoch to epoch.
    * ``proportional``: always N draws, passes of the even kind one after the other, so samples
      repeat; the last pass is a uniform choice among its draws.
    * ``uniform``: every sample once.

    The sequence is a pure function of (gains, mode, seed, epoch): the same on all ranks, whatever
    was iterated before, and no global random state is read or touched. Rank r takes positions r,
    r + W, … of the sequence, padded by repeating its head so that all ranks are equally long.

    A resume restores the epoch and the position in it; the next iteration then yields what was
    left. ``set_epoch`` with that same epoch keeps the position, with another one starts afresh.
    Loader workers fetch ahead of training, so a training loop gives ``state_dict`` how many samples
    of this rank it has really consumed. Raises UserError: a misspelt mode (with the nearest name),
    zero total gain, or a bad rank.

    Args:
        gains: ``(N, 2)`` or ``(N,)`` raw gains (they are normalised here).
        mode: as above.
        seed: names the random stream.
        rank, world_size: this process and how many there are.
    """

    def __init__(
        self,
        gains: np.ndarray,
        mode: Mode = "two_phase",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} is not one of {world_size} ranks")
        self.mode, self.seed, self.rank, self.world_size = mode, seed, rank, world_size
        self._probability = _probability(gains, mode, get_args(Mode))
        self.epoch = 0
        self._skip = 0  # positions of this rank that the next iteration leaves out (resume)
        self._position = 0  # positions of this rank yielded so far in this epoch
        self._sequence = self._draw(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw epoch ``epoch``; from now on ``len()`` is that epoch's length."""
        if epoch != self.epoch:
            self.epoch, self._skip, self._position = epoch, 0, 0
            self._sequence = self._draw(epoch)

    def epoch_length(self, epoch: int) -> int:
        """How many rows each rank takes in a whole epoch ``epoch``, without going there."""
        sequence = self._sequence if epoch == self.epoch else self._draw(epoch)
        return math.ceil(len(sequence) / self.world_size)

    def __len__(self) -> int:
        """How many rows the next iteration yields on this rank."""
        return self.epoch_length(self.epoch) - self._skip

    def __iter__(self) -> Iterator[int]:
        return (row for row, _, _ in self.positions())

    def positions(self) -> Iterator[tuple[int, int, int]]:
        """Like iteration, but (row, epoch, position in the padded global sequence).

        The position distinguishes two draws of one sample, so augmentation can be a pure function
        of (seed, epoch, position), whatever the number of loader workers.
        """
        self._position, self._skip = self._skip, 0
        padded = np.resize(self._sequence, self.epoch_length(self.epoch) * self.world_size)
        return self._walk(padded[self.rank :: self.world_size], self._position, self.epoch)

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Where the sampler is, as plain values.

        Args:
            consumed: rows of this rank that training has used in this epoch; without it, the rows
                yielded so far (right when nothing fetches ahead).
        """
        position = self._position if consumed is None else consumed
        return {
            "mode": self.mode,
            "seed": self.seed,
            "epoch": self.epoch,
            "consumed": position * self.world_size,
            "samples": len(self._probability),
            "gains": hashlib.blake2b(self._probability.tobytes(), digest_size=8).hexdigest(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where ``state`` was taken, also when the number of ranks has changed. Raises
        UserError: it was taken with other gains, another mode or another seed."""
        now = self.state_dict()
        for key in ("mode", "seed", "samples", "gains"):
            if state[key] != now[key]:
                raise UserError(
                    f"cannot resume: the sampler's {key} changed from {state[key]} to {now[key]} "
                    "since the checkpoint; restore it, or begin another --output_dir"
                )
        self.set_epoch(state["epoch"])
        self._skip = min(state["consumed"] // self.world_size, self.epoch_length(self.epoch))
        self._position = self._skip

    def _walk(self, rows: np.ndarray, start: int, epoch: int) -> Iterator[tuple[int, int, int]]:
        for offset in range(start, len(rows)):
            self._position = offset + 1
            yield int(rows[offset]), epoch, offset * self.world_size + self.rank

    def _draw(self, epoch: int) -> np.ndarray:
        random = generator(self.seed, "sampler", self.mode, epoch)
        if self.mode == "uniform":
            return random.permutation(len(self._probability))
        if self.mode == "proportional":
            return _passes(self._probability, len(self._probability), random)
        chance = _in_phase(self._probability, self.mode, epoch)
        while True:  # a pass that by chance drew nothing; each phase has a sample of 0.1 or more
            chosen = np.flatnonzero(random.random(len(chance)) < chance)
            if len(chosen):
                return random.permutation(chosen)


class GainShards:
    """Drawing by gain for people who stream: which shards to read, and which samples to take.

    A sampler of rows needs random access; a stream of tar files has none. So each epoch visits
    every shard with the probability of its best sample, in random order, and takes of its samples
    each with the chance that makes its probability whole: p = P(shard) · P(sample | shard). Every
    sample is drawn with the very probability that :class:`GainSampler` gives it.

        shards = GainShards("selected", seed=0)    # a folder that `select` wrote, or its address
        pipeline = webdataset.DataPipeline(
            shards.visits(epochs=range(100)),      # the shards, by their weights
            webdataset.split_by_node, webdataset.split_by_worker,
            shards.samples,                        # their samples, by theirs
            webdataset.decode("pilrgb"), webdataset.to_tuple("jpg;png;webp", "txt"),
        )

    Raises UserError: a misspelt mode, no shards there, or none of the samples has any gain.

    Args:
        location: a folder that `select` wrote, or its copy at an fsspec address.
        mode: ``two_phase`` as for GainSampler; ``gain`` draws by gain in all epochs; ``uniform``
            takes everything.
        seed: names the random streams: the same samples in the same order, whoever asks.

    Attributes:
        urls: the shards in order.
    """

    def __init__(self, location: str | Path, mode: ShardMode = "two_phase", seed: int = 0) -> None:
        import pyarrow as pa  # slow to import, and not needed for training from an annotation file
        import pyarrow.parquet as pq

        self.mode, self.seed = mode, seed
        folder = as_path(location)
        stems = sorted(path.stem for path in folder.glob("*.tar"))
        if not stems:
            raise UserError(f"there are no .tar shards in {location}")
        self.urls = [str(folder / f"{stem}.tar") for stem in stems]
        self._keys: dict[str, list[str]] = {}
        gains = []
        for url, stem in zip(self.urls, stems, strict=True):
            path = folder / f"{stem}.parquet"
            with refusing(path, "the shard's table", pa.ArrowException, KeyError):
                with path.open("rb") as file:
                    table = pq.read_table(file, columns=["key", "gain", "status"])
                table = table.filter(pa.compute.equal(table["status"], "success"))
            self._keys[url] = table["key"].to_pylist()
            gains.append(table["gain"].to_numpy())
        probability = _probability(np.concatenate(gains), mode, get_args(ShardMode))
        parts = np.split(probability, np.cumsum([len(part) for part in gains])[:-1])
        self._probability = dict(zip(self.urls, parts, strict=True))

    def sample_weights(self, url: str, epoch: int = 0) -> dict[str, float]:
        """The probability of each sample of a shard, by key, in this epoch."""
        return dict(zip(self._keys[url], self._chances(epoch)[url].tolist(), strict=True))

    def visits(self, epochs: Iterable[int] = (0,)) -> Callable[[], Iterator[dict[str, Any]]]:
        """A pipeline's first stage: called, it gives the shards to read in these epochs, one epoch
        after the other, as ``{"url", "epoch"}``."""
        return partial(self._visits, epochs)

    def samples(self, visits: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The samples that are taken of the shards visited: a pipeline's stage. Raises UserError: a
        shard that cannot be read."""
        from webdataset.tariterators import group_by_keys, tar_file_expander

        for visit in visits:
            url, epoch = visit["url"], visit["epoch"]
            weights = self.sample_weights(url, epoch)
            best = max(weights.values(), default=1.0)
            random = generator(self.seed, "shard samples", self.mode, epoch, url.rsplit("/", 1)[-1])
            taken = dict(zip(weights, random.random(len(weights)), strict=True))
            with as_path(url).open("rb") as stream:
                for sample in group_by_keys(tar_file_expander([{"url": url, "stream": stream}])):
                    key = sample["__key__"]
                    if taken[key] * best < weights[key]:
                        yield sample

    def _visits(self, epochs: Iterable[int]) -> Iterator[dict[str, Any]]:
        for epoch in epochs:
            random = generator(self.seed, "shards", self.mode, epoch)
            best = [chances.max(initial=0) for chances in self._chances(epoch).values()]
            chosen = np.flatnonzero(random.random(len(best)) < best)
            for number in random.permutation(chosen).tolist():
                yield {"url": self.urls[number], "epoch": epoch}

    def _chances(self, epoch: int) -> dict[str, np.ndarray]:
        return {url: _in_phase(p, self.mode, epoch) for url, p in self._probability.items()}


def _probability(gains: np.ndarray, mode: str, modes: tuple[str, ...]) -> np.ndarray:
    """Each sample's chance (N,) in an even epoch; `uniform` needs no gain, so it also samples what
    has none. Refuses a mode that is none of ``modes``."""
    if mode not in modes:
        raise UserError(f"unknown sampler mode {mode!r}{nearest(str(mode), list(modes))}")
    if mode != "uniform":
        return normalized_gains(gains)
    if len(gains) == 0:
        raise UserError("there are no samples to draw from")
    return np.ones(len(gains))


def _in_phase(probability: np.ndarray, mode: str, epoch: int) -> np.ndarray:
    """Each sample's chance (N,) in this epoch."""
    reverse = mode == "two_phase" and epoch % 2
    return np.maximum(1 - probability, REVERSE_FLOOR) if reverse else probability


def _mean_gains(gains: np.ndarray) -> np.ndarray:
    """The mean of both spaces, ``(N,) float64``, once the gains are checked."""
    gains = np.asarray(gains, dtype=np.float64)
    if gains.ndim not in (1, 2) or len(gains) == 0:
        raise UserError(f"gains must be N numbers or N pairs, N at least 1, not {gains.shape}")
    mean = gains.mean(axis=1) if gains.ndim == 2 else gains
    if not np.isfinite(mean).all():
        row = int(np.flatnonzero(~np.isfinite(mean))[0])
        raise UserError(f"the gain of sample {row} is not finite: {gains[row].tolist()}")
    return mean


def _passes(probability: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """``count`` rows: Bernoulli passes one after the other, each in random order.

    Passes run over the rows that can be drawn at all, several at once when those are few. At least
    one per cent of the rows, or all that can be drawn, have probability 1 (normalised gains), so
    the number of passes is bounded.
    """
    support = np.flatnonzero(probability > 0)
    chance = probability[support]
    rows: list[np.ndarray] = []
    missing = count
    while missing > 0:
        wanted = math.ceil(missing / chance.sum())
        at_once = max(1, min(wanted, _BLOCK // len(support)))
        draw, chosen = np.nonzero(random.random((at_once, len(support))) < chance)
        # By pass, and inside a pass in random order: the first `count` is then a choice without
        # replacement among the last pass.
        order = np.lexsort((random.random(len(chosen)), draw))
        rows.append(support[chosen[order]])
        missing -= len(chosen)
    return np.concatenate(rows)[:count]
