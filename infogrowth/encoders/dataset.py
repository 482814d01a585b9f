"""What is embedded: pairs as numbered rows, from an LMDB or a download, decoded batch by batch.

The rows of one batch always lie in one shard and never move: features are computed in the same
batches whoever computes them, so they are the same to the bit.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from infogrowth.annotations import as_id
from infogrowth.data.image_stores import ImageStore, open_images
from infogrowth.data.images import decode_image
from infogrowth.data.loading import check_shared_memory
from infogrowth.data.sources import open_source
from infogrowth.data.text import NO_CAPTION, first_caption, image_key
from infogrowth.encoders.models import Preprocess, Tokenize, Tokens
from infogrowth.errors import BadSample
from infogrowth.files import read_json

Entry = tuple[str, str, str | None]  # id, caption, and what is wrong


class Pairs:
    """Pairs to be embedded, row by row; picklable, opened anew in each worker process.

    Args:
        entries: id and caption of each row, and what is wrong with it, if anything is.
        images: where its image is; None for captions without images.
        origin: where it all comes from, for features.json.

    Attributes:
        ids: the samples' names.
        captions: those of the rows; None where they are not at hand without reading every row.
        has_images: False for captions without images.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        images: ImageStore | None,
        origin: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._entries, self._images, self.origin = entries, images, dict(origin)
        self.ids: Sequence[str] = [name for name, *_ in entries]
        self.captions: Sequence[str] | None = [caption for _, caption, _ in entries]
        self.has_images = images is not None

    def read(self, row: int) -> tuple[str, bytes | None]:
        """Caption and encoded image of a row; raises BadSample with a reason when the pair is not
        to be had."""
        name, caption, problem = self._entries[row]
        if problem:
            raise BadSample(problem)
        return caption, None if self._images is None else self._images.find(name)


def pairs_of_lmdb(lmdb: str, annotations: str) -> Pairs:
    """The samples of an annotation JSON, in its order, with images from an LMDB (or a folder).

    An entry with several captions is embedded with the first one that is not blank: a pair is one
    image and one caption. An entry without a usable caption is skipped and recorded.

    Raises:
        UserError: a file that is missing or no list of samples, or an LMDB that cannot be opened.
    """
    entries = list(_entries(annotations, "the annotation file"))
    with open(annotations, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
    origin = {"images": lmdb, "annotations": annotations, "samples": digest}
    return Pairs(entries, open_images(lmdb), origin)


def pairs_by_id(path: str, ids: Sequence[str], captions: Sequence[str]) -> Pairs:
    """Images of some ids, with these captions, from whatever ``embed`` took them from.

    Raises:
        UserError: there is neither an LMDB, nor a download, nor a folder of images.
    """
    entries = [(name, caption, None) for name, caption in zip(ids, captions, strict=True)]
    images = open_images(path, ids)
    return Pairs(entries, images, {"images": path, "samples": list_digest(ids)})


def captions_of_file(path: str, wanted: Sequence[str] | None) -> Pairs:
    """Captions made elsewhere, ``[{"image", "caption"}]``, without images.

    Args:
        wanted: the ids to take, in the order to take them (a file extension more or less makes no
            difference, as for an LMDB); None takes every entry.

    Raises:
        UserError: not such a list.
    """
    found: dict[str, Entry] = {}
    for name, caption, problem in _entries(path, "the file of captions"):
        key = image_key(name)
        if key not in found or found[key][2]:  # of several captions the first usable one counts
            found[key] = (name, caption, problem)
    entries = list(found.values())
    if wanted is not None:
        keys = [(name, image_key(name)) for name in wanted]
        entries = [(name, *found[key][1:]) for name, key in keys if key in found]
    digest = list_digest(f"{name}\t{caption}" for name, caption, _ in entries)
    return Pairs(entries, None, {"captions": path, "samples": digest})


def _entries(path: str, what: str) -> Iterator[Entry]:
    """What a file of captions lists; other commands refuse such a file whole, but one bad line in
    a dataset of millions is no reason not to embed the others."""
    for row, entry in enumerate(read_json(path, what, list)):
        name = as_id(entry.get("image")) if isinstance(entry, dict) else None
        caption = first_caption(entry.get("caption")) if name is not None else None
        if name is None:
            yield f"entry {row}", "", "the entry has no image id"
        else:
            yield name, caption or "", None if caption else NO_CAPTION


class SourcePairs(Pairs):
    """Every sample of a download, in the order of its shards and keys.

    What could not even be listed (a damaged tar, an unfinished shard) is a row with a problem, so
    that it is recorded and counted like a bad sample.

    Raises:
        UserError: no such folder, or no pairs in a known layout.
    """

    def __init__(self, path: str) -> None:
        source = self._source = open_source(path)
        self.captions, self.has_images = None, True
        self.ids = [*source.ids, *(name for name, _ in source.notes)]
        versions = source.versions()
        shards = {container.name for container in source.containers if container.kind != "folder"}
        sizes = (f"{name} {size}" for name, size in versions.items())
        self.origin = {
            "images": path,
            "annotations": None,
            "layout": source.layout,
            "containers": {name: version for name, version in versions.items() if name in shards},
            "samples": list_digest([*self.ids, *sizes]),
        }

    def read(self, row: int) -> tuple[str, bytes | None]:
        if row >= len(self._source):
            raise BadSample(self._source.notes[row - len(self._source)][1])
        sample = self._source.read(row)
        if sample.problem:
            raise BadSample(sample.problem)
        return first_caption(sample.caption) or "", sample.data


def list_digest(lines: Iterable[str]) -> str:
    """sha256 of some names or ids in their order, 32 hex digits."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:32]


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

    pairs: Pairs
    preprocess: Preprocess | None
    tokenize: Tokenize | None

    def __getitem__(self, wanted: tuple[int, Sequence[int]]) -> DecodedBatch:
        shard, rows = wanted
        captions: dict[int, str] = {}
        images, skipped = [], {}
        for row in rows:
            try:
                caption, data = self.pairs.read(row)
                if self.preprocess is not None and data is not None:
                    images.append(self.preprocess(decode_image(data)))
                captions[row] = caption
            except BadSample as error:
                skipped[row] = str(error)
        texts = list(captions.values())
        tokens = self.tokenize(texts) if self.tokenize and texts else None
        check_shared_memory(images)
        one_size = len({image.shape for image in images}) == 1
        together = torch.stack(images) if one_size else [image.numpy() for image in images]
        return DecodedBatch(shard, list(captions), texts, together, tokens, skipped)


def decoded_batches(
    pairs: Pairs,
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
    loader = DataLoader(
        _Decoder(pairs, preprocess, tokenize),
        sampler=batches,  # type: ignore[arg-type]  # not sized
        batch_size=None,  # one item is one batch already, to be left as it is
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pinned,
        prefetch_factor=2 if workers else None,  # what is claimed ahead, others cannot take
    )
    return iter(loader)


def _as_it_is(batch: Any) -> Any:
    return batch
