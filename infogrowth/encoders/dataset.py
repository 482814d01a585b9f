"""What is embedded: pairs as numbered rows, from an LMDB or a download, decoded batch by batch.

The rows of one batch always lie in one shard and never move: features are computed in the same
batches whoever computes them, so they are the same to the bit.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from infogrowth.annotations import as_id
from infogrowth.data.captions import NO_CAPTION, first_caption
from infogrowth.data.image_stores import ImageStore, is_lmdb, open_images
from infogrowth.data.images import BadImage, decode_image
from infogrowth.data.loading import ErrorsAsItems, check_shared_memory, checked
from infogrowth.data.names import image_key
from infogrowth.data.sources import Source, open_source
from infogrowth.encoders.models import Preprocess, Tokenize, Tokens
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
        pairs: gives the caption and the encoded image of a row; None for captions without images.
        origin: where it all comes from, for features.json.
        captions: those of the rows, where they are at hand without reading every row.
    """

    ids: Sequence[str]
    problems: Mapping[int, str]
    pairs: PairReader | None
    origin: Mapping[str, Any] = field(default_factory=dict)
    captions: Sequence[str] | None = None

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
    """Rows of a download.

    Attributes:
        numbers: the source's number of each row, None where it has no such sample.
        captions: instead of the source's own.
    """

    source: Source
    numbers: Sequence[int | None]
    captions: Sequence[str] | None = None

    def read(self, row: int) -> tuple[str, bytes]:
        if (number := self.numbers[row]) is None:
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
    ids, captions, problems = _columns(_entries(annotations, "the annotation file"))
    with open(annotations, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
    origin = {"images": lmdb, "annotations": annotations, "samples": digest}
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
    return PairTable(ids, problems, SourcePairs(source, range(len(source))), origin)


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


def captions_of_file(path: str, wanted: Sequence[str] | None) -> PairTable:
    """Captions made elsewhere, ``[{"image", "caption"}]``, without images.

    Args:
        wanted: the ids to take, in the order to take them (a file extension more or less makes no
            difference, as for an LMDB); None takes every entry.

    Raises:
        UserError: not such a list.
    """
    found: dict[str, tuple[str, str, str | None]] = {}
    for name, caption, problem in _entries(path, "the file of captions"):
        key = image_key(name)
        if key not in found or found[key][2]:  # of several captions the first usable one counts
            found[key] = (name, caption, problem)
    chosen = list(found.values())
    if wanted is not None:
        keys = [(name, image_key(name)) for name in wanted]
        chosen = [(name, *found[key][1:]) for name, key in keys if key in found]
    ids, captions, problems = _columns(chosen)
    digest = list_digest(f"{name}\t{text}" for name, text in zip(ids, captions, strict=True))
    return PairTable(ids, problems, None, {"captions": path, "samples": digest}, captions)


def list_digest(lines: Iterable[str]) -> str:
    """sha256 of some names or ids in their order, 32 hex digits."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:32]


def _entries(path: str, what: str) -> Iterator[tuple[str, str, str | None]]:
    """Id, caption and what is wrong of every entry; other commands refuse such a file whole, but
    one bad line in a dataset of millions is no reason not to embed the others."""
    entries = read_json(path, what)
    if not isinstance(entries, list):
        raise UserError(f"{what} {path} must hold a list, not a {type(entries).__name__}")
    for row, entry in enumerate(entries):
        name = as_id(entry.get("image")) if isinstance(entry, dict) else None
        caption = first_caption(entry.get("caption")) if name is not None else None
        if name is None:
            yield f"entry {row}", "", "the entry has no image id"
        else:
            yield name, caption or "", None if caption else NO_CAPTION


def _columns(
    entries: Iterable[tuple[str, str, str | None]],
) -> tuple[list[str], list[str], dict[int, str]]:
    """Ids, captions, and problems by row."""
    rows = list(entries)
    problems = {row: problem for row, (_, _, problem) in enumerate(rows) if problem}
    return [name for name, _, _ in rows], [caption for _, caption, _ in rows], problems


class DecodedBatch(NamedTuple):
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


@dataclass(frozen=True)
class _Decoder(Dataset):
    """Batches by ``(shard, rows)``, for a DataLoader whose workers decode and tokenize them."""

    table: PairTable
    preprocess: Preprocess | None
    tokenize: Tokenize | None

    def __getitem__(self, wanted: tuple[int, Sequence[int]]) -> DecodedBatch:
        shard, rows = wanted
        captions: dict[int, str] = {}
        images, skipped = [], {}
        for row in rows:
            try:
                caption, image = self._pair(row)
            except BadImage as error:
                skipped[row] = error.reason
                continue
            captions[row] = caption
            images += image
        texts = list(captions.values())
        tokens = self.tokenize(texts) if self.tokenize and texts else None
        check_shared_memory(images)
        one_size = len({image.shape for image in images}) == 1
        together = torch.stack(images) if one_size else [image.numpy() for image in images]
        return DecodedBatch(shard, list(captions), texts, together, tokens, skipped)

    def _pair(self, row: int) -> tuple[str, list[torch.Tensor]]:
        """The caption and the image, where there are images."""
        if row in self.table.problems:
            raise BadImage(self.table.problems[row])
        if self.table.pairs is None or self.preprocess is None:
            return self.table.captions[row], []  # type: ignore[index]  # there without images
        caption, data = self.table.pairs.read(row)
        return caption, [self.preprocess(decode_image(data))]


def decoded_batches(
    table: PairTable,
    preprocess: Preprocess | None,
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
            A shard without rows is one batch without rows.
        batch_size: rows per batch, bad ones included.
        workers: processes that decode ahead; 0 decodes when asked.
        pinned: page-locked memory, for quicker copies to a GPU.

    Raises:
        UserError: images that can no longer be read, or no shared memory for what workers decode.
    """
    batches = (
        (shard, rows[start : start + batch_size])
        for shard, rows in shards
        for start in range(0, max(len(rows), 1), batch_size)
    )
    return checked(
        DataLoader(
            ErrorsAsItems(_Decoder(table, preprocess, tokenize)),
            sampler=batches,  # type: ignore[arg-type]  # not sized
            batch_size=None,  # one item is one batch already, to be left as it is
            collate_fn=_as_it_is,
            num_workers=workers,
            pin_memory=pinned,
            prefetch_factor=2 if workers else None,  # what is claimed ahead, others cannot take
        )
    )


def _as_it_is(batch: Any) -> Any:
    return batch
