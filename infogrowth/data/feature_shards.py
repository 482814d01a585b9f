"""The files that hold features: which of them are a shard, and in what order shards come.

clip-retrieval / LAION   img_emb/img_emb_{i}.npy, text_emb/text_emb_{i}.npy,
                         metadata/metadata_{i}.parquet; row j is the same sample in all three
DataComp                 {32-hex}.parquet (uid, text, …) and {32-hex}.npz (b32_img, b32_txt, …)
arrays                   one .npz or .pth with ids, captions, image and text, one row per sample

Other people's clip-retrieval folders are called images/, image_emb/, txt_emb/ …, number their files
with or without zeros, or put all of them into one folder: all of that is read.
"""

import hashlib
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from infogrowth.data.captions import texts_of, values_of
from infogrowth.data.feature_files import (
    Part,
    file_tail,
    npz_member,
    open_array,
    open_table,
    read_arrays,
    reading,
    same_rows,
)
from infogrowth.errors import UserError
from infogrowth.remote import AnyPath, opened

_FOLDERS = {
    "image": ("img_emb", "image_emb", "img_embs", "image_embs", "img_embeddings", "images"),
    "text": ("text_emb", "txt_emb", "text_embs", "txt_embs", "text_embeddings", "texts"),
    "metadata": ("metadata", "meta"),
}
_PARTS = {"image": "image features", "text": "text features", "metadata": "metadata"}
_DATACOMP_KEYS = ("b32", "l14")
_DATACOMP_SUFFIX = {"image": "img", "text": "txt"}
_OPENED_AT_ONCE = 16  # each waits for its headers, at an address for some time

Lists = dict[str, list[Any]]
Arrays = dict[str, np.ndarray]


class FeatureShard:
    """One file, or a few files side by side, that hold the same ``rows`` samples.

    Args:
        arrays: the features of each space, ``(rows, dimension)``.
        table: ids, captions and further columns, in this order.
        sign: bytes that change when the shard's content does, found without reading all of it.

    Raises:
        UserError: row counts do not agree; the files are named.
    """

    def __init__(self, arrays: Mapping[str, Part], table: Part, sign: Callable[[], bytes]) -> None:
        self._arrays, self._table, self._sign = arrays, table, sign
        self._loaded: tuple[pa.Table, dict[str, Any]] | None = None
        self.name = next(iter(arrays.values())).name
        self.dimensions = {space: array.shape[1] for space, array in arrays.items()}
        self.rows = same_rows({part.name: part.shape[0] for part in (*arrays.values(), table)})

    def read(self, start: int, stop: int) -> tuple[list[str], list[str], Lists, Arrays]:
        """Ids, captions (``""`` where missing), further columns by name, and features by space,
        float32, of the samples ``start … stop − 1``."""
        if self._loaded is None:
            arrays = {space: array.load() for space, array in self._arrays.items()}
            self._loaded = self._table.load(), arrays
        table, arrays = self._loaded
        ids, captions, *extra = table.slice(start, stop - start).columns
        lists = dict(zip(table.column_names[2:], map(values_of, extra), strict=True))
        features = {space: array[start:stop].astype(np.float32) for space, array in arrays.items()}
        return texts_of(ids), texts_of(captions), lists, features

    def signature(self) -> bytes:
        """16 bytes that identify this content, wherever it is copied to."""
        return hashlib.blake2b(self._sign(), digest_size=16).digest()

    def release(self) -> None:
        """Forget what was loaded; called when the stream has moved on."""
        self._loaded = None


def _opened_shards(opening: Callable[[Any], FeatureShard], of: Iterable[Any]) -> list[FeatureShard]:
    with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
        return list(pool.map(opening, of))


# --- clip-retrieval -------------------------------------------------------------------------------


def find_shards(
    directory: AnyPath, spaces: Sequence[str], extra: Sequence[str]
) -> list[FeatureShard]:
    """The folder's clip-retrieval shards in order of their numbers; empty if it has none.

    Raises:
        UserError: a space or file is missing, or row counts do not agree, each named.
    """
    found = {space: _numbered(directory, _FOLDERS[space], "npy") for space in ("image", "text")}
    if not (found["image"] or found["text"]):
        return []  # DataComp's metadata/ has names without numbers: it is not looked at here
    found["metadata"] = _numbered(directory, _FOLDERS["metadata"], "parquet")
    needed = {part: found[part] for part in (*spaces, "metadata")}
    for part in needed:
        if not needed[part]:
            have = " and ".join(_PARTS[space] for space in ("image", "text") if found[space])
            advice = {
                "text": "; add text_emb/, or grow in the image space alone with --modality image",
                "image": "; add img_emb/ (a folder of captions alone is a --recaptions table)",
            }.get(part, "")
            raise UserError(
                f"{directory} has {have} but no {_PARTS[part]} ({_FOLDERS[part][0]}/){advice}"
            )
    numbers = sorted(set().union(*needed.values()))
    for part in needed:
        if missing := [number for number in numbers if number not in needed[part]]:
            raise UserError(
                f"shard {missing[0]} of {directory} has no {_PARTS[part]} file; "
                "every number needs one file of each kind"
            )
    shards = [{part: needed[part][number] for part in needed} for number in numbers]
    return _opened_shards(partial(_npy_shard, extra=extra), shards)


def _numbered(directory: AnyPath, names: Sequence[str], extension: str) -> dict[int, AnyPath]:
    """Files by number: ``NAME/*{i}.extension``, or ``NAME_{i}.extension`` in the folder itself."""
    for name in names:
        below: list[AnyPath] = list((directory / name).glob(f"*.{extension}"))
        files = sorted(below or directory.glob(f"{name}*.{extension}"), key=str)
        files = [path for path in files if ".tmp-" not in path.name]
        if not files:
            continue
        by_number: dict[int, AnyPath] = {}
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


def _npy_shard(files: dict[str, AnyPath], extra: Sequence[str]) -> FeatureShard:
    spaces = {space: path for space, path in files.items() if space != "metadata"}

    def sign() -> bytes:
        parts = []
        for space, path in spaces.items():
            array = open_array(path)
            parts += [f"{space} {array.shape} {array.dtype}".encode()]
            parts += [array[:1].tobytes() + array[-1:].tobytes()]
        return b"".join([*parts, file_tail(files["metadata"])])

    arrays = {
        space: Part(str(path), open_array(path).shape, partial(open_array, path))
        for space, path in spaces.items()
    }
    return FeatureShard(arrays, open_table(files["metadata"], extra), sign)


# --- DataComp -------------------------------------------------------------------------------------


def find_datacomp(
    directory: AnyPath, spaces: Sequence[str], key: str | None, extra: Sequence[str]
) -> tuple[list[FeatureShard], str] | None:
    """DataComp's shards in order of their names, and which of its encoders they are from.

    Returns None when the folder (or its ``metadata/``) is not DataComp's.

    Raises:
        UserError: a parquet without its npz or the other way, or ``key`` missing or ambiguous.
    """
    for folder in (directory, directory / "metadata"):
        archives = {path.stem: path for path in folder.glob("*.npz")}
        tables = {path.stem: path for path in folder.glob("*.parquet")}
        if archives:
            break
    else:
        return None
    for stem in sorted(archives.keys() ^ tables.keys()):
        missing = "parquet" if stem in archives else "npz"
        raise UserError(f"{folder / stem}.{missing} is missing: DataComp's files come in pairs")
    chosen = _datacomp_key(archives[min(archives)], key)
    members = {space: f"{chosen}_{_DATACOMP_SUFFIX[space]}" for space in spaces}
    opening = lambda s: _datacomp_shard(archives[s], tables[s], members, extra)  # noqa: E731
    return _opened_shards(opening, sorted(tables)), chosen


def _datacomp_key(archive: AnyPath, key: str | None) -> str:
    with reading(archive), zipfile.ZipFile(opened(archive)) as content:
        members = {name.removesuffix(".npy") for name in content.namelist()}
    present = [k for k in _DATACOMP_KEYS if any(m.startswith(f"{k}_") for m in members)]
    if key is None and len(present) == 1:
        return present[0]
    if key is None and present:
        raise UserError(f"{archive.parent} has features of b32 and l14; choose with --feature-key")
    if key not in present:
        have = ", ".join(sorted(members)) or "nothing"
        raise UserError(f"{archive} has no features {key or 'b32_img, b32_txt'}: it holds {have}")
    return key


def _datacomp_shard(
    archive: AnyPath, table: AnyPath, members: dict[str, str], extra: Sequence[str]
) -> FeatureShard:
    arrays = {space: npz_member(archive, member) for space, member in members.items()}
    sign = lambda: repr(members).encode() + file_tail(archive) + file_tail(table)  # noqa: E731
    return FeatureShard(arrays, open_table(table, extra), sign)


def arrays_shard(path: AnyPath, spaces: Sequence[str], extra: Sequence[str]) -> FeatureShard:
    """A single ``.npz`` or ``.pth`` of arrays as a shard, see :func:`read_arrays`."""
    return FeatureShard(*read_arrays(path, spaces, extra), lambda: file_tail(path))
