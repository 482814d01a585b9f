"""Feature files: an array of rows, a table of metadata, or a single file of arrays with ids.

They are written in the clip-retrieval layout, shard by shard, resumable:

    img_emb/img_emb_00.npy  text_emb/text_emb_00.npy  metadata/metadata_00.parquet
    finished/00.json        skipped/00.jsonl          skipped.jsonl

A shard counts as finished once ``finished/{i}.json`` is there, which is written last.
"""

import io
import json
import math
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infogrowth.data.captions import text_of, unicode_values
from infogrowth.errors import UserError, refusing
from infogrowth.files import (
    TEMPORARY_MARK,
    atomic_write,
    atomic_write_array,
    atomic_write_json,
    read_json,
    remove_leftovers,
)
from infogrowth.remote import AnyPath, RemotePath, open_file, opened

ID_COLUMNS = ("image_path", "id", "uid", "key", "image", "file_name")
CAPTION_COLUMNS = ("caption", "text", "TEXT", "label")
# Names under which people store each part of a file of arrays; the first is the one to recommend.
_ARRAY_NAMES = {
    "ids": ("ids", "id", "image_ids", "uids", "keys", "image_paths"),
    "captions": ("captions", "caption", "texts", "labels", "label"),
    "image": ("image", "image_features", "image_feat", "image_feats", "img_emb", "image_emb"),
    "text": ("text", "text_features", "text_feat", "text_feats", "text_emb", "txt_emb"),
}
_HEAD_BYTES = 4096  # at least the header of a npy file
_SIGNED_BYTES = 4096  # the last bytes of a parquet or zip hold row counts, statistics, checksums
_FILES = {
    "img_emb": "img_emb/img_emb_{}.npy",
    "text_emb": "text_emb/text_emb_{}.npy",
    "metadata": "metadata/metadata_{}.parquet",
    "skipped": "skipped/{}.jsonl",
    "finished": "finished/{}.json",
}


class Part(NamedTuple):
    """An array or a table in a file: what errors call it, its shape, and how it is loaded."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Any]


def reading(path: AnyPath, fault: str = "cannot be read") -> AbstractContextManager[None]:
    """What numpy, zipfile or pyarrow say of a damaged file becomes one sentence that names it."""
    return refusing(
        str(path), "the file", ValueError, TypeError, EOFError, RuntimeError,
        zipfile.BadZipFile, zlib.error, pa.ArrowException, fault=fault,
    )  # fmt: skip


def open_array(path: AnyPath) -> Any:
    """A ``(n, D)`` floating array from a npy file, memory-mapped or (at an address) read by slices;
    or a UserError naming it."""
    with reading(path):
        if isinstance(path, RemotePath):
            array: Any = _RemoteArray(path)
        else:
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except ValueError:  # an array without rows cannot be mapped
                array = np.load(path, allow_pickle=False)
    _check(str(path), array.shape, array.dtype)
    return array


class _RemoteArray:
    """A npy file at an address as far as it is needed here: its shape, and rows by slices."""

    def __init__(self, path: RemotePath):
        self._path = path
        head = io.BytesIO(path.read_range(0, _HEAD_BYTES))
        self.shape, fortran_order, self.dtype = _npy_header(head)
        self._start = head.tell()
        if fortran_order and 0 not in self.shape:
            raise UserError(f"{path} is stored column by column; save it in C order")

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        width = self.dtype.itemsize * math.prod(self.shape[1:])
        count = max(0, stop - start)
        first = self._start + start * width
        content = self._path.read_range(first, first + count * width) if count else b""
        if len(content) != count * width:
            raise UserError(f"{self._path} is shorter than its header says; write it again")
        return np.frombuffer(content, self.dtype).reshape(count, *self.shape[1:])


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type of the array in an opened npy file, which then stands at its rows."""
    if np.lib.format.read_magic(file) == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _check(name: str, shape: tuple[int, ...], dtype: Any) -> None:
    """Refuse an array that is not ``(n, D)`` of floats."""
    if getattr(dtype, "kind", None) != "f" or len(shape) != 2:
        raise UserError(
            f"{name} must hold floating-point features of shape (samples, dimension), "
            f"not {dtype} of shape {tuple(shape)}"
        )
    if shape[1] == 0:
        raise UserError(f"{name} has features of dimension 0")


def npz_member(archive: AnyPath, member: str) -> Part:
    """A ``(n, D)`` floating array inside a npz, its shape from its header alone."""

    def load() -> np.ndarray:
        with reading(archive), np.load(opened(archive), allow_pickle=False) as content:
            return content[member]

    with reading(archive), zipfile.ZipFile(opened(archive)) as content:
        if f"{member}.npy" not in content.namelist():
            raise UserError(f"{archive} has no array {member}; see --feature-key")
        with content.open(f"{member}.npy") as file:
            shape, _, dtype = _npy_header(file)
    _check(name := f"{archive}:{member}", shape, dtype)
    return Part(name, shape, load)


def open_table(path: AnyPath, extra: Sequence[str]) -> Part:
    """A parquet of metadata; its columns, loaded: ids, captions, the extra ones."""
    with reading(path):
        file = pq.ParquetFile(opened(path))
        names, rows = file.schema_arrow.names, int(file.metadata.num_rows)
    wanted = [
        _column(path, names, ID_COLUMNS, "sample id"),
        _column(path, names, CAPTION_COLUMNS, "caption"),
        *(_column(path, names, [name], name) for name in extra if name in names),
    ]

    def load() -> pa.Table:
        with reading(path):
            table = pq.ParquetFile(opened(path)).read(list(dict.fromkeys(wanted)))
        return pa.table([table[name] for name in wanted], wanted)

    return Part(str(path), (rows,), load)


def _column(path: AnyPath, names: Sequence[str], wanted: Sequence[str], what: str) -> str:
    name = next((name for name in wanted if name in names), None)
    if name is None:
        raise UserError(
            f"{path} has no column for the {what}: expected {wanted[0]!r} "
            f"(or {', '.join(wanted[1:])}), found {', '.join(names) or 'no columns'}"
        )
    if names.count(name) > 1:
        raise UserError(f"{path} has {names.count(name)} columns named {name!r}; leave one of them")
    return name


def read_arrays(
    path: AnyPath, spaces: Sequence[str], extra: Sequence[str]
) -> tuple[dict[str, Part], Part]:
    """Features by space and the table of a ``.npz`` or ``.pth``/``.pt``, held in memory.

    Raises:
        UserError: another file type, unreadable, a part missing, or lengths that differ.
    """
    readers = {".npz": _read_npz, ".pth": _read_torch, ".pt": _read_torch}
    if path.suffix not in readers:
        raise UserError(f"{path} is not a features folder nor a .npz or .pth file of arrays")
    content = readers[path.suffix](path)
    arrays = {}
    for space in spaces:
        array = _part(path, content, space)
        _check(str(path), getattr(array, "shape", ()), getattr(array, "dtype", type(array)))
        arrays[space] = Part(f"{path}:{space}", array.shape, partial(np.asarray, array))
    lists = {part: _as_list(path, part, _part(path, content, part)) for part in ("ids", "captions")}
    lists = {part: list(map(text_of, values)) for part, values in lists.items()}
    lists |= {n: unicode_values(_as_list(path, n, content[n])) for n in extra if n in content}
    rows = same_rows({f"{path}:{name}": len(values) for name, values in lists.items()})
    table = pa.table([_column_of(values) for values in lists.values()], list(lists))
    return arrays, Part(f"{path}:ids", (rows,), lambda: table)


def _column_of(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):  # of several types: as text
        return pa.array([None if value is None else str(value) for value in values])


def _read_npz(path: AnyPath) -> dict[str, Any]:
    plain = "cannot be read as plain arrays (ids and captions as text arrays, not Python objects)"
    with reading(path, plain):
        content = np.load(opened(path), allow_pickle=False)
        if isinstance(content, np.ndarray):
            raise ValueError("it is a single array (.npy), not several with names")
        with content:
            return {name: content[name] for name in content.files}


def _read_torch(path: AnyPath) -> dict[str, Any]:
    import torch

    try:
        content = torch.load(opened(path), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or unsafe file makes the restricted loader say
        raise UserError(
            f"{path} cannot be read as tensors and plain lists (weights_only); save a dictionary "
            "of these with torch.save, without other Python objects: ids and captions as lists"
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} must hold a dictionary with ids, captions, image and text")
    return {str(name): _as_array(path, name, value) for name, value in content.items()}


def _as_array(path: AnyPath, name: Any, value: Any) -> Any:
    """A tensor as a numpy array (half precision and bfloat16 as float32); the rest as it is."""
    if not hasattr(value, "detach"):
        return value
    with reading(path, f"has {name!r} as a tensor that is no plain array"):
        value = value.detach()
        return (value.float() if value.is_floating_point() else value).numpy()


def _part(path: AnyPath, content: Mapping[str, Any], part: str) -> Any:
    for name in _ARRAY_NAMES[part]:
        if name in content:
            return content[name]
    names = ", ".join(sorted(content)) or "nothing"
    raise UserError(f"{path} has no {part!r} (one row per sample); it holds {names}")


def _as_list(path: AnyPath, name: str, values: Any) -> list[Any]:
    values = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(values, list | tuple):
        raise UserError(f"{path}: {name!r} must have one row per sample, not be a single value")
    return list(values)


def same_rows(counts: Mapping[str, int]) -> int:
    """The one row count of files that belong together; UserError names those that differ."""
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} has {rows}" for name, rows in counts.items())
        raise UserError(f"row counts do not agree: {listed}; the shard is damaged, write it again")
    return next(iter(counts.values()))


def file_tail(path: AnyPath) -> bytes:
    """A file's size and last bytes (of parquet and zip files these sum up the content)."""
    with open_file(str(path)) as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _SIGNED_BYTES))
        return str(size).encode() + file.read()


class FeatureWriter:
    """Writes the shards of one features folder; many ranks may write different shards of it.

    Args:
        directory: FEATURES_DIR; made when missing.
        shards: how many shards are planned: it fixes the zero-padding of a new folder's file
            names; one that grows keeps the padding it has.
    """

    def __init__(self, directory: str | os.PathLike[str], shards: int = 100_000):
        self.directory = Path(directory)
        stems = [path.stem for path in self.directory.glob("finished/*.json")]
        widths = [len(stem) for stem in stems if stem.isdigit()]
        self.width = min(widths, default=len(str(max(shards - 1, 0))))

    def remove_leftovers(self, shards: Iterable[int] | None = None) -> None:
        """Delete temporary files of a killed run; call on one rank, before any rank writes.

        Args:
            shards: only those of these shards, where other jobs write the rest; None: all.
        """
        if shards is None:
            for folder in ("", *_FILES):
                remove_leftovers(self.directory / folder)
            return
        own = {self._path(kind, shard) for shard in shards for kind in _FILES}
        for path in self.directory.glob(f"*/*{TEMPORARY_MARK}*"):
            if path.with_name(path.name.partition(TEMPORARY_MARK)[0]) in own:
                path.unlink(missing_ok=True)

    def finished_shards(self) -> set[int]:
        """Numbers of the shards that are wholly written, all their files in place."""
        names = [path.stem for path in self.directory.glob("finished/*.json")]
        numbers = [int(name) for name in names if name.isdigit()]
        files = {number: self._marker(number)["files"] for number in numbers}
        return {n for n in numbers if all((self.directory / f).is_file() for f in files[n])}

    def write_shard(
        self,
        index: int,
        ids: Sequence[str],
        captions: Sequence[str],
        image: np.ndarray | None,
        text: np.ndarray | None,
        extra: Mapping[str, Sequence[Any]] | None = None,
        skipped: Sequence[Mapping[str, str]] = (),
    ) -> None:
        """Write one shard; rows are brought to unit length and stored as float16.

        Args:
            index: the shard's number.
            ids, captions: ``image_path`` and ``caption`` of the n samples.
            image, text: ``(n, D)`` features, None for a space that the folder does not have.
            extra: more metadata columns, n values each.
            skipped: ``{"id", "reason"}`` of samples that got no features.

        Raises:
            UserError: the disk is full or not writable.
        """
        columns = {"image_path": list(ids), "caption": list(captions)}
        columns.update({name: list(values) for name, values in (extra or {}).items()})
        features = {"img_emb": image, "text_emb": text}
        arrays = {kind: rows for kind, rows in features.items() if rows is not None}
        lengths = {name: len(values) for name, values in columns.items()}
        lengths |= {kind: len(rows) for kind, rows in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"shard {index}: lengths differ: {lengths}")
        for kind, rows in arrays.items():
            atomic_write_array(self._path(kind, index), _half_unit_rows(rows))
        with atomic_write(self._path("metadata", index)) as file:
            names = ("image_path", "caption")
            texts = {name: pa.array(columns[name], pa.string()) for name in names}
            pq.write_table(pa.table({**columns, **texts}), file)
        with atomic_write(self._path("skipped", index), "w") as file:
            file.writelines(_json_line(entry) for entry in skipped)
        paths = [self._path(kind, index) for kind in (*arrays, "metadata")]
        files = sorted(str(path.relative_to(self.directory)) for path in paths)
        marker = {"rows": len(ids), "files": files}
        atomic_write_json(self._path("finished", index), marker)

    def merge_skipped(self) -> dict[str, int]:
        """Join the shards' skipped samples into skipped.jsonl; returns how many per reason."""
        counts: Counter[str] = Counter()
        with atomic_write(self.directory / "skipped.jsonl", "w") as merged:
            for index in sorted(self.finished_shards()):
                for entry in self._skipped(index):
                    counts[entry["reason"]] += 1
                    merged.write(_json_line(entry))
        return dict(counts)

    def samples(self, shards: Iterable[int]) -> tuple[list[tuple[str, str]], list[str]]:
        """(id, caption) of the samples that some shards hold, and the ids of those they skipped."""
        embedded: list[tuple[str, str]] = []
        skipped: list[str] = []
        for index in shards:
            table = pq.read_table(self._path("metadata", index))
            columns = (table[name].to_pylist() for name in ("image_path", "caption"))
            embedded += zip(*columns, strict=True)
            skipped += [entry["id"] for entry in self._skipped(index)]
        return embedded, skipped

    def rows(self) -> int:
        """Samples in the finished shards."""
        return sum(self._marker(index)["rows"] for index in self.finished_shards())

    def _marker(self, index: int) -> dict[str, Any]:
        return read_json(self._path("finished", index), "the finished marker")

    def _skipped(self, index: int) -> list[dict[str, str]]:
        return list(map(json.loads, self._path("skipped", index).read_bytes().splitlines()))

    def _path(self, kind: str, index: int) -> Path:
        return self.directory / _FILES[kind].format(f"{index:0{self.width}d}")


def _json_line(entry: Mapping[str, str]) -> str:
    return json.dumps(dict(entry), ensure_ascii=False) + "\n"


def _half_unit_rows(features: np.ndarray) -> np.ndarray:
    """Rows at unit length as float16; zero rows stay zero, bad rows stay bad for `grow` to see."""
    rows = np.asarray(features, np.float32)
    norms = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1, keepdims=True))
    with np.errstate(invalid="ignore", over="ignore"):
        return (rows / np.where(norms > 0, norms, 1)).astype(np.float16)
