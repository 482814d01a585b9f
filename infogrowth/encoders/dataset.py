"""What is embedded: pairs as numbered rows, from an LMDB or a download, decoded batch by batch.

The rows of one batch always lie in one shard and never move: features are computed in the same
batches whoever computes them, so they are the same to the bit.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from infogrowth.annotations import as_id
from infogrowth.data.captions import NO_CAPTION, first_caption
from infogrowth.data.folders import ImageStore, open_images
from infogrowth.data.images import BadImage, decode_image
from infogrowth.data.lmdb_store import is_lmdb
from infogrowth.data.loading import ErrorsAsItems, check_shared_memory, checked
from infogrowth.data.names import image_key
from infogrowth.data.sources import Source, open_source
from infogrowth.encoders.protocols import Preprocess, Tokenize, Tokens
from infogrowth.encoders.shards import file_digest, list_digest
from infogrowth.errors import UserError
from infogrowth.files import read_json
from infogrowth.remote import is_remote

NO_IMAGE = "the image is missing"


class PairReader(Protocol):
    """Caption and encoded image of a row; picklable, opened anew in each worker process."""

    def read(self, row: int) -> tuple[str, bytes]:
        """Raises BadImage with a reason when the pair is not to be had."""
        ...


@dataclass(frozen=True)
class PairTable:
    """Pairs to be embedded, row by row.

    Attributes:
        ids: the samples' names.
        problems: reason by row number for samples that are skipped without looking at them; what
            follows a colon in a reason is a detail that is recorded, not counted apart.
        pairs: gives the caption and the encoded image of a row.
        origin: where it all comes from, for features.json.
        captions: those of the rows, where they are at hand without reading every row.
    """

    ids: Sequence[str]
    problems: Mapping[int, str]
    pairs: PairReader
    origin: Mapping[str, Any] = field(default_factory=dict)
    captions: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class CaptionTable:
    """Captions without images, row by row; ``problems`` as in a :class:`PairTable`."""

    ids: Sequence[str]
    captions: Sequence[str]
    problems: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class StoredPairs:
    """Captions from a list, images by id from an LMDB or a folder of files."""

    images: ImageStore
    ids: Sequence[str]
    captions: Sequence[str]

    def read(self, row: int) -> tuple[str, bytes]:
        if self.ids[row] not in self.images:
            raise BadImage(NO_IMAGE)
        return self.captions[row], self.images.read(self.ids[row])


@dataclass(frozen=True)
class SourcePairs:
    """Rows of a download: all of them as they lie there, or those of some ids.

    Attributes:
        numbers: the source's number of each row, None where it has no such sample; without it
            rows are the source's own.
        captions: instead of the source's own.
    """

    source: Source
    numbers: Sequence[int | None] | None = None
    captions: Sequence[str] | None = None

    def read(self, row: int) -> tuple[str, bytes]:
        number = row if self.numbers is None else self.numbers[row]
        if number is None:
            raise BadImage(NO_IMAGE)
        sample = self.source.read(number)
        caption = first_caption(sample.caption) if self.captions is None else self.captions[row]
        if sample.data is None or caption is None:
            raise BadImage(sample.problem or NO_IMAGE)
        return caption, sample.data


def pairs_of_lmdb(lmdb: str, annotations: str) -> PairTable:
    """The samples of an annotation JSON, in its order, with images from an LMDB (or a folder).

    An entry with several captions is embedded with the first one that is not blank: a pair is one
    image and one caption. An entry without a usable caption is skipped and recorded.

    Raises:
        UserError: a file that is missing or no list of samples, or an LMDB that cannot be opened.
    """
    entries = read_json(annotations, "the annotation file")
    if not isinstance(entries, list):
        kind = type(entries).__name__
        raise UserError(f"the annotation file {annotations} must hold a list, not a {kind}")
    checked = [_checked(entry, row) for row, entry in enumerate(entries)]
    ids, captions = [name for name, _, _ in checked], [caption for _, caption, _ in checked]
    problems = {row: problem for row, (_, _, problem) in enumerate(checked) if problem}
    origin = {"images": lmdb, "annotations": annotations, "samples": file_digest(annotations)}
    return PairTable(ids, problems, StoredPairs(open_images(lmdb), ids, captions), origin, captions)


def pairs_of_source(path: str) -> PairTable:
    """Every sample of a download, in the order of its shards and keys.

    What could not even be listed (a damaged tar, an unfinished shard) is a row with a problem, so
    that it is recorded and counted like a bad sample.

    Raises:
        UserError: no such folder, or no pairs in a known layout.
    """
    source = open_source(path)
    ids = [*source.ids, *(name for name, _ in source.notes)]
    problems = {len(source) + i: reason for i, (_, reason) in enumerate(source.notes)}
    versions = source.versions()
    shards = {container.name for container in source.containers if container.kind != "folder"}
    origin = {
        "images": path,
        "annotations": None,
        "layout": source.layout,
        "containers": {name: version for name, version in versions.items() if name in shards},
        "samples": list_digest([*ids, *(f"{name} {size}" for name, size in versions.items())]),
    }
    return PairTable(ids, problems, SourcePairs(source), origin)


def pairs_by_id(path: str, ids: Sequence[str], captions: Sequence[str]) -> PairReader:
    """Images of some ids, with these captions, from whatever ``embed`` took them from.

    Raises:
        UserError: there is neither an LMDB, nor a download, nor a folder of images.
    """
    if is_remote(path) or (not is_lmdb(path) and Path(path).is_dir()):
        try:
            source = open_source(path)
        except UserError:  # a plain folder of images, perhaps
            return StoredPairs(open_images(path), ids, captions)
        known = {name: number for number, name in enumerate(source.ids)}
        numbers = [known.get(name) for name in ids]
        if any(number is not None for number in numbers):
            return SourcePairs(source, numbers, captions)
    return StoredPairs(open_images(path), ids, captions)


def table_of_captions(path: str, wanted: Sequence[str] | None) -> CaptionTable:
    """Captions made elsewhere, ``[{"image", "caption"}]``.

    Args:
        wanted: the ids to take, in the order to take them (a file extension more or less makes no
            difference, as for an LMDB); None takes every entry.

    Raises:
        UserError: not such a list.
    """
    entries = read_json(path, "the file of captions")
    if not isinstance(entries, list):
        raise UserError(f"the file of captions {path} must hold a list of image and caption")
    found: dict[str, tuple[str, str, str | None]] = {}
    for row, entry in enumerate(entries):
        name, caption, problem = _checked(entry, row)
        key = image_key(name)
        if key not in found or found[key][2]:  # of several captions the first usable one counts
            found[key] = (name, caption, problem)
    if wanted is None:
        chosen = list(found.values())
    else:
        keys = [(sample, image_key(sample)) for sample in wanted]
        chosen = [(sample, *found[key][1:]) for sample, key in keys if key in found]
    problems = {row: problem for row, (_, _, problem) in enumerate(chosen) if problem}
    return CaptionTable([name for name, _, _ in chosen], [text for _, text, _ in chosen], problems)


@dataclass(frozen=True)
class DecodedBatch:
    """Some rows of one shard: ``rows``, ``captions``, ``images`` and ``tokens`` go together, bad
    samples are apart.

    ``images`` is one ``(B, C, H, W)`` tensor where all have one size, else a list of CHW arrays
    (which travel between processes by value: a tensor would cost an open file each).
    """

    shard: int
    rows: list[int]
    captions: list[str]
    images: torch.Tensor | list[np.ndarray]
    tokens: Tokens | None
    skipped: dict[int, str]

    def pin_memory(self) -> "DecodedBatch":
        """Called by the DataLoader: page-locked memory, which is copied to a GPU in passing."""
        images, tokens = self.images, self.tokens
        if isinstance(images, torch.Tensor):
            images = images.pin_memory()
        if tokens is not None:
            tokens = {name: tensor.pin_memory() for name, tensor in tokens.items()}
        return replace(self, images=images, tokens=tokens)


class DecodedBatches(Dataset):
    """Batches by ``(shard, rows)``, for a DataLoader whose workers decode and tokenize them."""

    def __init__(
        self, pairs: PairTable, preprocess: Preprocess, tokenize: Tokenize | None = None
    ) -> None:
        self._pairs, self._preprocess, self._tokenize = pairs, preprocess, tokenize

    def __getitem__(self, wanted: tuple[int, Sequence[int]]) -> DecodedBatch:
        shard, rows = wanted
        good, captions, images, skipped = [], [], [], {}
        for row in rows:
            if row in self._pairs.problems:
                skipped[row] = self._pairs.problems[row]
                continue
            try:
                caption, data = self._pairs.pairs.read(row)
                image = decode_image(data)
            except BadImage as error:
                skipped[row] = error.reason
                continue
            good.append(row)
            captions.append(caption)
            images.append(self._preprocess(image))
        tokens = self._tokenize(captions) if self._tokenize and captions else None
        check_shared_memory(images)
        if len({image.shape for image in images}) == 1:
            return DecodedBatch(shard, good, captions, torch.stack(images), tokens, skipped)
        arrays = [image.numpy() for image in images]
        return DecodedBatch(shard, good, captions, arrays, tokens, skipped)


def decoded_batches(
    pairs: PairTable,
    preprocess: Preprocess,
    tokenize: Tokenize | None,
    shards: Iterable[tuple[int, Sequence[int]]],
    batch_size: int,
    workers: int,
    pinned: bool = False,
) -> Iterator[DecodedBatch]:
    """All rows of some shards, shard by shard, in batches that do not cross shards.

    Args:
        preprocess, tokenize: as the model asks for; without ``tokenize`` captions stay words.
        shards: numbers and rows; the next one is taken when the decoders have nothing left to do.
        batch_size: rows per batch, bad ones included.
        workers: processes that decode ahead; 0 decodes when asked.
        pinned: page-locked memory, for quicker copies to a GPU.

    Raises:
        UserError: images that can no longer be read, or no shared memory for what workers decode.
    """
    return checked(
        DataLoader(
            ErrorsAsItems(DecodedBatches(pairs, preprocess, tokenize)),
            sampler=rows_of_batches(shards, batch_size),  # type: ignore[arg-type]  # not sized
            batch_size=None,  # one item is one batch already
            num_workers=workers,
            pin_memory=pinned,
            prefetch_factor=2 if workers else None,  # what is claimed ahead, others cannot take
        )
    )


def rows_of_batches(
    shards: Iterable[tuple[int, Sequence[int]]], batch_size: int
) -> Iterator[tuple[int, Sequence[int]]]:
    """Each shard's rows in batches; a shard without rows is one batch without rows."""
    for shard, rows in shards:
        for start in range(0, max(len(rows), 1), batch_size):
            yield shard, rows[start : start + batch_size]


def _checked(entry: Any, row: int) -> tuple[str, str, str | None]:
    """Id, caption and what is wrong with an entry; other commands refuse such a file whole, but
    one bad line in a dataset of millions is no reason not to embed the others."""
    name = as_id(entry.get("image")) if isinstance(entry, dict) else None
    if name is None:
        return f"entry {row}", "", "the entry has no image id"
    caption = first_caption(entry.get("caption"))
    return name, caption or "", None if caption else NO_CAPTION
