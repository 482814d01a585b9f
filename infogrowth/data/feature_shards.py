"""The clip-retrieval / LAION layout: numbered npy files beside numbered parquet files.

    img_emb/img_emb_{i}.npy  text_emb/text_emb_{i}.npy  metadata/metadata_{i}.parquet

Row j is the same sample in all three. Other people's folders call them images/, image_emb/,
txt_emb/ …, pad the numbers or not, or put all files into one folder: all of that is read.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infogrowth.data.feature_stream import FeatureBatch, FeatureShard
from infogrowth.errors import UserError

ID_COLUMNS = ("image_path", "id", "uid", "key", "image", "file_name")
CAPTION_COLUMNS = ("caption", "text", "TEXT", "label")
_NAMES = {
    "image": ("img_emb", "image_emb", "img_embs", "image_embs", "img_embeddings", "images"),
    "text": ("text_emb", "txt_emb", "text_embs", "txt_embs", "text_embeddings", "texts"),
    "metadata": ("metadata", "meta"),
}
_WHAT = {"image": "image features", "text": "text features", "metadata": "metadata"}
_SIGNED_BYTES = 4096  # a parquet's last bytes hold its row counts and column statistics


class NpyShard(FeatureShard):
    """One number of the layout: npy arrays per space and a parquet, row-aligned."""

    def __init__(self, arrays: dict[str, Path], metadata: Path, extra: Sequence[str]):
        self.name = str(next(iter(arrays.values())))
        self._metadata_path = metadata
        self._arrays = {space: open_array(path) for space, path in arrays.items()}
        self._paths = arrays
        self._metadata = MetadataColumns(metadata, extra)
        counts = {str(path): len(self._arrays[space]) for space, path in arrays.items()}
        self.rows = same_rows({**counts, str(metadata): self._metadata.rows})
        self.dimensions = {space: array.shape[1] for space, array in self._arrays.items()}

    def batch(self, start: int, stop: int) -> FeatureBatch:
        ids, captions, extra = self._metadata.read(start, stop)
        parts = {
            space: array[start:stop].astype(np.float32) for space, array in self._arrays.items()
        }
        return FeatureBatch(ids, captions, parts.get("image"), parts.get("text"), extra)

    def signature(self) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for space, array in self._arrays.items():
            digest.update(f"{space} {array.shape} {array.dtype}".encode())
            digest.update(array[:1].tobytes() + array[-1:].tobytes())
        digest.update(file_tail(self._metadata_path))
        return digest.digest()

    def release(self) -> None:
        self._metadata.release()


class MetadataColumns:
    """Ids, captions and wanted extra columns of a metadata parquet, read when first needed."""

    def __init__(self, path: Path, extra: Sequence[str]):
        self._path = path
        try:
            file = pq.ParquetFile(path)
            names = file.schema_arrow.names
            self.rows: int = file.metadata.num_rows
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path} is not a readable parquet file: {_short(error)}") from error
        self._id = _column(path, names, ID_COLUMNS, "sample id")
        self._caption = _column(path, names, CAPTION_COLUMNS, "caption")
        self._extra = [_column(path, names, [name], name) for name in extra if name in names]
        self._table: pa.Table | None = None

    def read(self, start: int, stop: int) -> tuple[list[str], list[str], dict[str, list[Any]]]:
        """Ids and captions (``""`` where missing) and extra columns of rows start … stop − 1."""
        if self._table is None:
            columns = list(dict.fromkeys([self._id, self._caption, *self._extra]))
            try:
                self._table = pq.ParquetFile(self._path).read(columns)
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{self._path} cannot be read: {_short(error)}") from error
        rows = self._table.slice(start, stop - start)
        return (
            texts(_values(rows[self._id])),
            texts(_values(rows[self._caption])),
            {name: [mended(value) for value in _values(rows[name])] for name in self._extra},
        )

    def release(self) -> None:
        self._table = None


def find_shards(directory: Path, spaces: Sequence[str], extra: Sequence[str]) -> list[NpyShard]:
    """The folder's shards in order of their numbers; empty when it is not this layout.

    Raises:
        UserError: a space or file is missing, or row counts do not agree, each named.
    """
    found = {space: _numbered(directory, _NAMES[space], "npy") for space in ("image", "text")}
    if not (found["image"] or found["text"]):
        return []  # DataComp's metadata/ has names without numbers: it is not looked at here
    found["metadata"] = _numbered(directory, _NAMES["metadata"], "parquet")
    for part in (*spaces, "metadata"):
        if not found[part]:
            raise UserError(_missing_part(directory, part, found))
    needed = {part: found[part] for part in (*spaces, "metadata")}
    numbers = sorted(set().union(*needed.values()))
    for part, files in needed.items():
        lacking = [number for number in numbers if number not in files]
        if lacking:
            raise UserError(
                f"shard {lacking[0]} of {directory} has no {_WHAT[part]} file; "
                "every number needs one file of each kind"
            )
    return [
        NpyShard({space: found[space][i] for space in spaces}, found["metadata"][i], extra)
        for i in numbers
    ]


def open_array(path: Path) -> np.ndarray:
    """A memory-mapped ``(n, D)`` floating array from a npy file, or a UserError naming it."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        array = _empty_array(path)
        if array is None:
            raise UserError(f"{path} is not a readable npy file: {_short(error)}") from error
    return checked_features(array, str(path))


def checked_features(array: Any, where: str) -> np.ndarray:
    """``array`` if it is ``(n, D)`` of floats, or a UserError that names ``where``."""
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim != 2:
        shape = getattr(array, "shape", ())
        kind = getattr(array, "dtype", type(array).__name__)
        raise UserError(
            f"{where} must hold floating-point features of shape (samples, dimension), "
            f"not {kind} of shape {tuple(shape)}"
        )
    if array.shape[1] == 0:
        raise UserError(f"{where} has features of dimension 0")
    return array


def same_rows(counts: dict[str, int]) -> int:
    """The one row count of files that belong together; UserError names those that differ."""
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} has {rows}" for name, rows in counts.items())
        raise UserError(f"row counts do not agree: {told}; the shard is damaged, write it again")
    return next(iter(counts.values()))


def file_tail(path: Path) -> bytes:
    """A file's size and last bytes (of parquet and zip files these sum up the content)."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _SIGNED_BYTES))
        return str(size).encode() + file.read()


def texts(values: Sequence[Any]) -> list[str]:
    """Values as text: bytes read as UTF-8, of a list its first; missing ones (None, NaN) as ``""``.

    What is no Unicode text (half of a surrogate pair, a byte that is not UTF-8) becomes U+FFFD, the
    replacement character: the features are as good as any, so the sample stays.
    """
    return [_text(value) for value in values]


def mended(value: Any) -> Any:
    """Bytes and text as text that every file can hold, see :func:`texts`; the rest as it is."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if not isinstance(value, str) or value.isascii():
        return value
    try:
        value.encode()
        return value
    except UnicodeEncodeError:
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return _text(value[0]) if value else ""
    value = mended(value)
    if isinstance(value, str):
        return value
    return "" if value is None or value != value else str(value)


def _values(column: pa.ChunkedArray) -> list[Any]:
    """A column as Python values; text that is not UTF-8 is mended (U+FFFD), see :func:`texts`."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_decoded(value) for value in column]


def _decoded(value: pa.Scalar) -> Any:
    if isinstance(value, pa.DictionaryScalar):
        value = value.value
    if not value.is_valid:
        return None
    if isinstance(value, pa.ListScalar):
        return [_decoded(item) for item in value.values]
    if isinstance(value, pa.BinaryScalar):  # text is one of these
        return value.as_buffer().to_pybytes().decode("utf-8", "replace")
    return value.as_py()


def _numbered(directory: Path, names: Sequence[str], ending: str) -> dict[int, Path]:
    """Files by number: ``NAME/*{i}.ending``, or ``NAME_{i}.ending`` in the folder itself."""
    for name in names:
        files = sorted((directory / name).glob(f"*.{ending}"))
        files = files or sorted(directory.glob(f"{name}*.{ending}"))
        files = [path for path in files if ".tmp-" not in path.name]
        if not files:
            continue
        by_number: dict[int, Path] = {}
        for path in files:
            match = re.search(r"(\d+)$", path.stem)
            if match is None and len(files) > 1:
                raise UserError(f"{path} has no shard number at the end of its name")
            number = int(match[1]) if match else 0
            if number in by_number:
                raise UserError(f"{by_number[number]} and {path} both claim shard {number}")
            by_number[number] = path
        return by_number
    return {}


def _missing_part(directory: Path, part: str, found: dict[str, dict[int, Path]]) -> str:
    have = " and ".join(_WHAT[space] for space in ("image", "text") if found[space])
    advice = ""
    if part == "text":
        advice = "; add text_emb/, or grow in the image space alone with --modality image"
    if part == "image":
        advice = "; add img_emb/ (a folder of captions alone is a --recaptions table)"
    return f"{directory} has {have} but no {_WHAT[part]} ({_NAMES[part][0]}/){advice}"


def _column(path: Path, names: Sequence[str], wanted: Sequence[str], what: str) -> str:
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


def _empty_array(path: Path) -> np.ndarray | None:
    """An array without rows cannot be mapped: read it; None when it is something else."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if isinstance(array, np.ndarray) and array.size == 0 else None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
