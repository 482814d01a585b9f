"""Other people's features: DataComp's metadata folders, and single files of arrays.

DataComp:  {32-hex}.parquet (uid, text, …) + {32-hex}.npz (b32_img, b32_txt, l14_img, l14_txt)
arrays:    a .npz or .pth with ids, captions, image and text, one row per sample
"""

import hashlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infogrowth.data.feature_shards import (
    MetadataColumns,
    checked_features,
    file_tail,
    mended,
    same_rows,
    texts,
)
from infogrowth.data.feature_stream import FeatureBatch, FeatureShard
from infogrowth.errors import UserError

_DATACOMP_KEYS = ("b32", "l14")
_DATACOMP_SUFFIX = {"image": "img", "text": "txt"}
# What zipfile and numpy say of a damaged or encrypted archive.
_UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
# Names under which people store each part of an array file; the first is the one to recommend.
_ARRAY_NAMES = {
    "ids": ("ids", "id", "image_ids", "uids", "keys", "image_paths"),
    "captions": ("captions", "caption", "texts", "labels", "label"),
    "image": ("image", "image_features", "image_feat", "image_feats", "img_emb", "image_emb"),
    "text": ("text", "text_features", "text_feat", "text_feats", "text_emb", "txt_emb"),
}


class DataCompShard(FeatureShard):
    """One parquet of DataComp and the npz of the same stem; the npz is read when it is reached."""

    def __init__(self, metadata: Path, key: str, spaces: Sequence[str], extra: Sequence[str]):
        self.name = str(metadata)
        self._npz = metadata.with_suffix(".npz")
        self._members = {space: f"{key}_{_DATACOMP_SUFFIX[space]}" for space in spaces}
        self._metadata = MetadataColumns(metadata, extra)
        shapes = {space: _npz_shape(self._npz, name) for space, name in self._members.items()}
        counts = {f"{self._npz}:{self._members[s]}": shape[0] for s, shape in shapes.items()}
        self.rows = same_rows({**counts, self.name: self._metadata.rows})
        self.dimensions = {space: shape[1] for space, shape in shapes.items()}
        self._features: dict[str, np.ndarray] = {}

    def batch(self, start: int, stop: int) -> FeatureBatch:
        if not self._features:
            self._features = self._read()
        ids, captions, extra = self._metadata.read(start, stop)
        parts = {s: rows[start:stop].astype(np.float32) for s, rows in self._features.items()}
        return FeatureBatch(ids, captions, parts.get("image"), parts.get("text"), extra)

    def signature(self) -> bytes:
        # A zip's last bytes hold the checksums of its members.
        tails = file_tail(self._npz) + file_tail(Path(self.name))
        return hashlib.blake2b(repr(self._members).encode() + tails, digest_size=16).digest()

    def release(self) -> None:
        self._features = {}
        self._metadata.release()

    def _read(self) -> dict[str, np.ndarray]:
        try:
            with np.load(self._npz, allow_pickle=False) as content:
                return {space: content[name] for space, name in self._members.items()}
        except _UNREADABLE as error:
            raise UserError(f"{self._npz} cannot be read: {error}") from error


class ArraysShard(FeatureShard):
    """A file of arrays, held in memory."""

    def __init__(
        self,
        path: Path,
        ids: list[str],
        captions: list[str],
        features: dict[str, np.ndarray],
        extra: dict[str, list[Any]],
    ):
        self.name = str(path)
        self._ids, self._captions, self._features, self._extra = ids, captions, features, extra
        counts = {f"{path}:{space}": len(rows) for space, rows in features.items()}
        counts.update({f"{path}:ids": len(ids), f"{path}:captions": len(captions)})
        counts.update({f"{path}:{name}": len(column) for name, column in extra.items()})
        self.rows = same_rows(counts)
        self.dimensions = {space: rows.shape[1] for space, rows in features.items()}

    def batch(self, start: int, stop: int) -> FeatureBatch:
        rows = slice(start, stop)
        parts = {space: part[rows].astype(np.float32) for space, part in self._features.items()}
        extra = {name: column[rows] for name, column in self._extra.items()}
        ids, captions = self._ids[rows], self._captions[rows]
        return FeatureBatch(ids, captions, parts.get("image"), parts.get("text"), extra)

    def signature(self) -> bytes:
        return hashlib.blake2b(file_tail(Path(self.name)), digest_size=16).digest()


def find_datacomp(
    directory: Path, spaces: Sequence[str], key: str | None, extra: Sequence[str]
) -> tuple[list[DataCompShard], str] | None:
    """DataComp's shards in order of their names, and what the encoder is called.

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
        lacking = "parquet" if stem in archives else "npz"
        raise UserError(f"{folder / stem}.{lacking} is missing: DataComp's files come in pairs")
    chosen = _datacomp_key(archives[min(archives)], key)
    shards = [DataCompShard(tables[stem], chosen, spaces, extra) for stem in sorted(tables)]
    return shards, f"DataComp {chosen}"


def read_arrays(path: Path, spaces: Sequence[str], extra: Sequence[str]) -> ArraysShard:
    """Read a ``.npz`` or ``.pth``/``.pt`` of arrays with ids.

    Raises:
        UserError: another file type, unreadable, a part missing, or lengths that differ.
    """
    if path.suffix == ".npz":
        content = _read_npz(path)
    elif path.suffix in (".pth", ".pt"):
        content = _read_torch(path)
    else:
        raise UserError(f"{path} is not a features folder nor a .npz or .pth file of arrays")
    features = {space: checked_features(_part(path, content, space), str(path)) for space in spaces}
    ids = texts(_as_list(path, "ids", _part(path, content, "ids")))
    captions = texts(_as_list(path, "captions", _part(path, content, "captions")))
    found = {n: [mended(v) for v in _as_list(path, n, content[n])] for n in extra if n in content}
    return ArraysShard(path, ids, captions, features, found)


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            raise ValueError("it is a single array (.npy), not several with names")
        with content:
            return {name: content[name] for name in content.files}
    except _UNREADABLE as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} cannot be read: {detail}; store plain arrays (ids and captions as text "
            "arrays, not as Python objects)"
        ) from error


def _read_torch(path: Path) -> dict[str, Any]:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or unsafe file makes the restricted loader say
        raise UserError(
            f"{path} cannot be read as tensors and plain lists (weights_only); save a dictionary "
            "of these with torch.save, without other Python objects: ids and captions as lists"
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} must hold a dictionary with ids, captions, image and text")
    return {str(name): _as_array(path, name, value) for name, value in content.items()}


def _as_array(path: Path, name: Any, value: Any) -> Any:
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


def _part(path: Path, content: Mapping[str, Any], part: str) -> Any:
    for name in _ARRAY_NAMES[part]:
        if name in content:
            return content[name]
    names = ", ".join(sorted(content)) or "nothing"
    raise UserError(f"{path} has no {part!r} (one row per sample); it holds {names}")


def _as_list(path: Path, name: str, values: Any) -> list[Any]:
    values = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(values, list | tuple):
        raise UserError(f"{path}: {name!r} must have one row per sample, not be a single value")
    return list(values)


def _datacomp_key(archive: Path, key: str | None) -> str:
    try:
        with zipfile.ZipFile(archive) as content:
            members = {name.removesuffix(".npy") for name in content.namelist()}
    except _UNREADABLE as error:
        raise UserError(f"{archive} cannot be read: {error}") from error
    present = [k for k in _DATACOMP_KEYS if any(m.startswith(f"{k}_") for m in members)]
    if key is None and len(present) == 1:
        return present[0]
    if key is None and present:
        raise UserError(f"{archive.parent} has features of b32 and l14; choose with --feature-key")
    if key not in present:
        have = ", ".join(sorted(members)) or "nothing"
        raise UserError(f"{archive} has no features {key or 'b32_img, b32_txt'}: it holds {have}")
    return key


def _npz_shape(archive: Path, member: str) -> tuple[int, int]:
    """The shape of an array inside a npz, from its header alone."""
    if not archive.is_file():
        raise UserError(f"{archive} is missing: DataComp's files come in pairs")
    try:
        with zipfile.ZipFile(archive) as content, content.open(f"{member}.npy") as file:
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read(file)
    except KeyError as error:
        raise UserError(f"{archive} has no array {member}; see --feature-key") from error
    except _UNREADABLE as error:
        raise UserError(f"{archive} cannot be read: {error}") from error
    if len(shape) != 2 or dtype.kind != "f":
        raise UserError(f"{archive}: {member} must be floats of shape (samples, dimension)")
    return shape
