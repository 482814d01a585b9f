"""One feature file: an array of rows, a table of metadata, or a single file of arrays with ids."""

import io
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infogrowth.annotations import as_id
from infogrowth.errors import UserError, refusing
from infogrowth.remote import AnyPath, RemotePath, opened

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


class Columns(NamedTuple):
    """Ids, captions (``""`` where missing) and wanted further columns of some rows."""

    ids: list[str]
    captions: list[str]
    extra: dict[str, list[Any]]


class Metadata(Protocol):
    """The columns of a shard; read when first needed, forgotten on ``release``."""

    name: str

    @property
    def rows(self) -> int: ...

    def read(self, start: int, stop: int) -> Columns: ...

    def release(self) -> None: ...


class FeatureArray:
    """``(rows, dimension)`` floats in a file, loaded when first needed."""

    def __init__(self, name: str, shape: tuple[int, int], load: Callable[[], np.ndarray]):
        self.name, self.shape = name, shape
        self._load = load
        self._loaded: np.ndarray | None = None

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start … stop − 1`` as float32."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded[start:stop].astype(np.float32)

    def release(self) -> None:
        self._loaded = None


class ParquetColumns:
    """Ids, captions and wanted extra columns of a metadata parquet, read when first needed."""

    def __init__(self, path: AnyPath, extra: Sequence[str]):
        self._path = path
        self.name = str(path)
        with reading(path):
            file = pq.ParquetFile(opened(path))
            names = file.schema_arrow.names
            self.rows = int(file.metadata.num_rows)
        self._id = _column(path, names, ID_COLUMNS, "sample id")
        self._caption = _column(path, names, CAPTION_COLUMNS, "caption")
        self._extra = [_column(path, names, [name], name) for name in extra if name in names]
        self._table: pa.Table | None = None

    def read(self, start: int, stop: int) -> Columns:
        if self._table is None:
            wanted = list(dict.fromkeys([self._id, self._caption, *self._extra]))
            with reading(self._path):
                self._table = pq.ParquetFile(opened(self._path)).read(wanted)
        rows = self._table.slice(start, stop - start)
        return Columns(
            _column_texts(rows[self._id]),
            _column_texts(rows[self._caption]),
            {name: repaired(_values(rows[name])) for name in self._extra},
        )

    def release(self) -> None:
        self._table = None


@dataclass
class ListColumns:
    """Columns in memory."""

    name: str
    columns: Columns

    @property
    def rows(self) -> int:
        return len(self.columns.ids)

    def read(self, start: int, stop: int) -> Columns:
        ids, captions, extra = self.columns
        taken = {name: column[start:stop] for name, column in extra.items()}
        return Columns(ids[start:stop], captions[start:stop], taken)

    def release(self) -> None:
        pass


def read_arrays(
    path: AnyPath, spaces: Sequence[str], extra: Sequence[str]
) -> tuple[dict[str, FeatureArray], ListColumns]:
    """Features by space and metadata of a ``.npz`` or ``.pth``/``.pt``, held in memory.

    Raises:
        UserError: another file type, unreadable, a part missing, or lengths that differ.
    """
    if path.suffix == ".npz":
        content = _read_npz(path)
    elif path.suffix in (".pth", ".pt"):
        content = _read_torch(path)
    else:
        raise UserError(f"{path} is not a features folder nor a .npz or .pth file of arrays")
    arrays = {}
    for space in spaces:
        array = checked_features(_part(path, content, space), str(path))
        arrays[space] = FeatureArray(f"{path}:{space}", array.shape, partial(np.asarray, array))
    ids, captions = (texts(_as_list(path, p, _part(path, content, p))) for p in ("ids", "captions"))
    more = {n: repaired(_as_list(path, n, content[n])) for n in extra if n in content}
    lengths = {"ids": len(ids), "captions": len(captions), **{n: len(more[n]) for n in more}}
    same_rows({f"{path}:{name}": length for name, length in lengths.items()})
    return arrays, ListColumns(f"{path}:ids", Columns(ids, captions, more))


def reading(path: AnyPath, fault: str = "cannot be read") -> AbstractContextManager[None]:
    """What numpy, zipfile or pyarrow say of a damaged file becomes one sentence that names it."""
    return refusing(
        str(path), "the file", ValueError, EOFError, RuntimeError,
        zipfile.BadZipFile, zlib.error, pa.ArrowException, fault=fault,
    )  # fmt: skip


class RemoteRows:
    """A npy file at an address as far as it is needed here: its shape, and rows by slices."""

    def __init__(self, path: RemotePath):
        self._path = path
        head = io.BytesIO(path.read_range(0, _HEAD_BYTES))
        self.shape, fortran_order, self.dtype = npy_header(head)
        self._start = head.tell()
        if fortran_order and self.size:
            raise UserError(f"{path} is stored column by column; save it in C order")

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        width = self.dtype.itemsize * math.prod(self.shape[1:])
        count = max(0, stop - start)
        first = self._start + start * width
        content = self._path.read_range(first, first + count * width) if count else b""
        if len(content) != count * width:
            raise UserError(f"{self._path} is shorter than its header says; write it again")
        return np.frombuffer(content, self.dtype).reshape(count, *self.shape[1:])


def npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type of the array in an opened npy file, which then stands at its rows."""
    first = np.lib.format.read_magic(file) == (1, 0)
    header = np.lib.format.read_array_header_1_0 if first else None
    return (header or np.lib.format.read_array_header_2_0)(file)


def open_array(path: AnyPath) -> Any:
    """A ``(n, D)`` floating array from a npy file, memory-mapped or (at an address) read by slices;
    or a UserError naming it."""
    with reading(path):
        if isinstance(path, RemotePath):
            return checked_features(RemoteRows(path), str(path))
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError:  # an array without rows cannot be mapped
            array = np.load(path, allow_pickle=False)
    return checked_features(array, str(path))


def same_rows(counts: dict[str, int]) -> int:
    """The one row count of files that belong together; UserError names those that differ."""
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} has {rows}" for name, rows in counts.items())
        raise UserError(f"row counts do not agree: {listed}; the shard is damaged, write it again")
    return next(iter(counts.values()))


def file_tail(path: AnyPath) -> bytes:
    """A file's size and last bytes (of parquet and zip files these sum up the content)."""
    if isinstance(path, RemotePath):
        size = path.size()
        return str(size).encode() + path.read_range(max(0, size - _SIGNED_BYTES), size)
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _SIGNED_BYTES))
        return str(size).encode() + file.read()


def texts(values: Sequence[Any]) -> list[str]:
    """Values as text: bytes read as UTF-8, of a list its first that is not blank,
    whole numbers without ``.0``; missing ones (None, NaN) as ``""``.

    What is no Unicode text (half of a surrogate pair, a byte that is not UTF-8) becomes U+FFFD, the
    replacement character: the features are as good as any, so the sample stays.
    """
    return [_text(repaired(value)) for value in values]


def repaired(value: Any) -> Any:
    """Bytes and text as text that every file can hold, see :func:`texts`; the rest as it is."""
    if isinstance(value, list | tuple):
        return [repaired(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if not isinstance(value, str) or value.isascii():
        return value
    return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return next((text for item in value if (text := _text(item)).strip()), "")
    return as_id(value) or ("" if value is None or value != value else str(value))


def _column_texts(column: pa.ChunkedArray) -> list[str]:
    """:func:`texts` of a column, without looking at each value where all are UTF-8 already."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        with suppress(UnicodeDecodeError):
            return pc.fill_null(column, "").to_pylist()
    return texts(_values(column))


def _values(column: pa.ChunkedArray) -> list[Any]:
    """A column as Python values; text that is not UTF-8 as its bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        listed = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        return column.cast(pa.list_(pa.binary()) if listed else pa.binary()).to_pylist()


def checked_features(array: Any, where: str) -> Any:
    """``array`` if it is ``(n, D)`` of floats, or a UserError that names ``where``."""
    is_array = isinstance(array, np.ndarray | RemoteRows)
    if not is_array or array.dtype.kind != "f" or array.ndim != 2:
        shape = getattr(array, "shape", ())
        kind = getattr(array, "dtype", type(array).__name__)
        raise UserError(
            f"{where} must hold floating-point features of shape (samples, dimension), "
            f"not {kind} of shape {tuple(shape)}"
        )
    if array.shape[1] == 0:
        raise UserError(f"{where} has features of dimension 0")
    return array


def _column(path: AnyPath, names: Sequence[str], wanted: Sequence[str], what: str) -> str:
    for name in wanted:
        if name in names:
            if names.count(name) > 1:
                raise UserError(
                    f"{path} has {names.count(name)} columns named {name!r}; leave one of them"
                )
            return name
    raise UserError(
        f"{path} has no column for the {what}: expected {wanted[0]!r} "
        f"(or {', '.join(wanted[1:])}), found {', '.join(names) or 'no columns'}"
    )


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
    value = value.detach()
    try:
        return (value.float() if value.is_floating_point() else value).numpy()
    except (TypeError, RuntimeError) as error:  # sparse, quantized, …
        raise UserError(
            f"{path}: {name!r} is a tensor that is no plain array ({value.layout}); save it dense"
        ) from error


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
