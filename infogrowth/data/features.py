"""Opening features in the layouts that people have: which files are a shard, and in what order.

clip-retrieval / LAION   img_emb/img_emb_{i}.npy, text_emb/text_emb_{i}.npy,
                         metadata/metadata_{i}.parquet; row j is the same sample in all three
DataComp                 {32-hex}.parquet (uid, text, …) and {32-hex}.npz (b32_img, b32_txt, …)
arrays                   one .npz or .pth with ids, captions, image and text, one row per sample

Other people's clip-retrieval folders are called images/, image_emb/, txt_emb/ …, number their files
with or without zeros, or put all of them into one folder: all of that is read.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import call
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infogrowth.annotations import SPACES
from infogrowth.data.feature_stream import FeatureShard, FeatureStream, Part, reading
from infogrowth.data.text import text_of, unicode_values
from infogrowth.errors import UserError
from infogrowth.files import TEMPORARY_MARK, read_json
from infogrowth.remote import AnyPath, RemoteArray, RemotePath, as_path, npy_header, opened

ID_COLUMNS = ("image_path", "id", "uid", "key", "image", "file_name")
CAPTION_COLUMNS = ("caption", "text", "TEXT", "label")
# Names under which people store each part of a file of arrays; the first is the one to recommend.
_ARRAY_NAMES = {
    "image": ("image", "image_features", "image_feat", "image_feats", "img_emb", "image_emb"),
    "text": ("text", "text_features", "text_feat", "text_feats", "text_emb", "txt_emb"),
    "ids": ("ids", "id", "image_ids", "uids", "keys", "image_paths"),
    "captions": ("captions", "caption", "texts", "labels", "label"),
}
# By what a folder of npy and parquet files holds: names of its subfolder, the first recommended.
_FOLDERS = {
    "image": ("img_emb", "image_emb", "img_embs", "image_embs", "img_embeddings", "images"),
    "text": ("text_emb", "txt_emb", "text_embs", "txt_embs", "text_embeddings", "texts"),
    "metadata": ("metadata", "meta"),
}
_MISSING = {
    "text": "add text_emb/, or grow in the image space alone with --modality image",
    "image": "add img_emb/ (a folder of captions alone is a --recaptions table)",
    "metadata": "add metadata/",
}
_OPENED_AT_ONCE = 16  # each waits for its headers, at an address for some time
Openable = Callable[[], FeatureShard]
_SIGNED_BYTES = 4096  # the last bytes of a parquet or zip hold row counts, statistics, checksums


def open_features(
    path: str | os.PathLike[str],
    spaces: Sequence[str] = SPACES,
    key: str | None = None,
    extra: Sequence[str] = (),
) -> FeatureStream:
    """Open a features folder or file of any supported layout.

    Args:
        path: a clip-retrieval / LAION folder, a DataComp metadata folder, or a .npz / .pth file;
            or the address of one (``s3://…``), which is read in a stream.
        spaces: the spaces that must be there: ``("image", "text")``, ``("text",)`` for a
            recaption table, ``("image",)`` for growth in the image space alone.
        key: which of DataComp's features, ``"b32"`` or ``"l14"``; needed where both are there.
        extra: metadata columns wanted besides id and caption; absent ones are left out.

    Raises:
        UserError: nothing readable there, an unfinished ``embed``, files whose row counts or
            widths do not agree (named), a missing space or column, no samples (where text alone is
            asked for, as of a table of recaptions, there may be none).
    """

    folder = as_path(path)
    description: dict[str, Any] = {}
    if folder.is_file():
        shards: list[Openable] = [partial(arrays_shard, folder, spaces, extra)]
    elif folder.is_dir():
        if (about := folder / "features.json").is_file():
            description = read_json(about, "the features' description", dict)
        if description.get("finished") is False:
            raise UserError(
                f"the features in {path} are not finished (the run that writes them was "
                "interrupted or is still going); run the same command again, then this one"
            )
        shards = find_shards(folder, spaces, extra)
        planned = description.get("shards", len(shards))
        if planned != len(shards):
            raise UserError(
                f"{path} has {len(shards)} feature shards, but its features.json says {planned!r}; "
                "files are missing, write them again with `python -m infogrowth embed`"
            )
        if not shards and "shards" not in description:
            shards, description = find_datacomp(folder, spaces, key, extra)
    else:
        raise UserError(f"the features {path} do not exist; check the path")
    with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
        stream = FeatureStream(folder, list(pool.map(call, shards)), description)
    if stream.rows == 0 and tuple(spaces) != ("text",):
        raise UserError(f"the features {path} hold no samples")
    return stream


def _tail(path: AnyPath) -> bytes:
    """A file's size and last bytes (of parquet and zip files these sum up the content)."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _SIGNED_BYTES))
        return str(size).encode() + file.read()


# --- clip-retrieval -------------------------------------------------------------------------------


def find_shards(directory: AnyPath, spaces: Sequence[str], extra: Sequence[str]) -> list[Openable]:
    """The folder's clip-retrieval shards in order of their numbers; empty if it has none.

    Raises:
        UserError: a space or file is missing, or row counts do not agree, each named.
    """
    found = {space: _numbered(directory, _FOLDERS[space], "npy") for space in ("image", "text")}
    if not any(found.values()):
        return []  # DataComp's metadata/ has names without numbers: it is not looked at here
    found["metadata"] = _numbered(directory, _FOLDERS["metadata"], "parquet")
    needed = {part: found[part] for part in (*spaces, "metadata")}
    numbers = sorted(set().union(*needed.values()))
    for part, files in needed.items():
        if missing := [number for number in numbers if number not in files]:
            what = "metadata" if part == "metadata" else f"{part} features"
            advice = "every number needs one file of each kind" if files else _MISSING[part]
            raise UserError(f"shard {missing[0]} of {directory} has no {what} file; {advice}")
    shards = [{part: needed[part][number] for part in needed} for number in numbers]
    return [partial(_npy_shard, files, extra) for files in shards]


def _numbered(directory: AnyPath, names: Sequence[str], extension: str) -> dict[int, AnyPath]:
    """Files by number: ``NAME/*{i}.extension``, or ``NAME_{i}.extension`` in the folder itself."""
    by_number: dict[int, AnyPath] = {}
    for name in names:
        below: list[AnyPath] = list((directory / name).glob(f"*.{extension}"))
        files = sorted(below or directory.glob(f"{name}*.{extension}"), key=str)
        files = [path for path in files if TEMPORARY_MARK not in path.name]
        for path in files:
            match = re.search(r"(\d+)$", path.stem)
            if match is None and len(files) > 1:
                raise UserError(f"{path} has no shard number at the end of its name")
            number = int(match[1]) if match else 0
            if number in by_number:
                raise UserError(f"{by_number[number]} and {path} both claim shard {number}")
            by_number[number] = path
        if files:
            break
    return by_number


def _npy_shard(files: dict[str, AnyPath], extra: Sequence[str]) -> FeatureShard:
    """``n`` rows of a space in each npy, and the parquet ``metadata`` of the same samples."""
    spaces = {space: path for space, path in files.items() if space != "metadata"}

    def sign() -> bytes:
        parts = []
        for space, path in spaces.items():
            array = _open_array(path)
            parts += [f"{space} {array.shape} {array.dtype}".encode()]
            parts += [array[:1].tobytes() + array[-1:].tobytes()]
        return b"".join([*parts, _tail(files["metadata"])])

    arrays = {
        space: Part(str(path), _open_array(path).shape, partial(_open_array, path))
        for space, path in spaces.items()
    }
    return FeatureShard(arrays, _open_table(files["metadata"], extra), sign)


def _open_array(path: AnyPath) -> Any:
    """The features in a npy file, memory-mapped or (at an address) read by slices."""
    with reading(path):
        if isinstance(path, RemotePath):
            array: Any = RemoteArray(path)
        else:
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except ValueError:  # an array without rows cannot be mapped
                array = np.load(path, allow_pickle=False)
    _check(str(path), array.shape, array.dtype)
    return array


def _check(name: str, shape: tuple[int, ...], dtype: Any) -> None:
    if getattr(dtype, "kind", None) != "f" or len(shape) != 2 or shape[1] == 0:
        raise UserError(
            f"{name} must hold floating-point features of shape (samples, dimension), "
            f"not {dtype} of shape {tuple(shape)}"
        )


def _open_table(path: AnyPath, extra: Sequence[str]) -> Part:
    """A parquet of metadata; its columns, loaded: ids, captions, the extra ones."""
    with reading(path):
        file = pq.ParquetFile(opened(path))
        names, rows = file.schema_arrow.names, int(file.metadata.num_rows)
    wanted = [_column(path, names, ID_COLUMNS), _column(path, names, CAPTION_COLUMNS)]
    wanted += [_column(path, names, [name]) for name in extra if name in names]

    def load() -> pa.Table:
        with reading(path):
            table = pq.ParquetFile(opened(path)).read(list(dict.fromkeys(wanted)))
        return pa.table([table[name] for name in wanted], wanted)

    return Part(str(path), (rows,), load)


def _column(path: AnyPath, names: Sequence[str], wanted: Sequence[str]) -> str:
    name = next((name for name in wanted if name in names), wanted[0])
    if names.count(name) != 1:
        raise UserError(
            f"{path} needs one column {name!r} (or {', '.join(wanted[1:])}); it has "
            f"{', '.join(names) or 'no columns'}"
        )
    return name


# --- DataComp -------------------------------------------------------------------------------------


def find_datacomp(
    directory: AnyPath, spaces: Sequence[str], key: str | None, extra: Sequence[str]
) -> tuple[list[Openable], dict[str, Any]]:
    """DataComp's shards in order of their names, and which of its encoders they are from.

    Raises:
        UserError: neither the folder nor its ``metadata/`` is DataComp's, a parquet without its npz
            or the other way, or ``key`` missing or ambiguous.
    """
    for folder in (directory, directory / "metadata"):
        archives = {path.stem: path for path in folder.glob("*.npz")}
        tables = {path.stem: path for path in folder.glob("*.parquet")}
        if archives:
            break
    else:
        raise UserError(
            f"{directory} holds no features: expected img_emb/*.npy, text_emb/*.npy and "
            "metadata/*.parquet (python -m infogrowth embed writes them), or DataComp's parquet "
            "and npz pairs"
        )
    for stem in sorted(archives.keys() ^ tables.keys()):
        missing = "parquet" if stem in archives else "npz"
        raise UserError(f"{folder / stem}.{missing} is missing: DataComp's files come in pairs")
    archive = archives[min(archives)]
    with reading(archive), np.load(opened(archive), allow_pickle=False) as content:
        names = sorted(content.files)
    present = [k for k in ("b32", "l14") if any(name.startswith(f"{k}_") for name in names)]
    wanted = [k for k in present if key in (None, k)]
    if len(wanted) != 1:
        raise UserError(
            "choose b32_img and b32_txt, or l14_img and l14_txt, with --feature-key: "
            f"{archive} holds {', '.join(names) or 'nothing'}"
        )
    members = {space: f"{wanted[0]}_{'img' if space == 'image' else 'txt'}" for space in spaces}
    pairs = [(archives[stem], tables[stem]) for stem in sorted(tables)]
    shards: list[Openable] = [partial(_npz_shard, *pair, members, extra) for pair in pairs]
    return shards, {"encoder": {"name": f"DataComp {wanted[0]}"}}


def _npz_shard(
    archive: AnyPath, table: AnyPath, members: Mapping[str, str], extra: Sequence[str]
) -> FeatureShard:
    """The features of each space in a member of a npz, and the parquet of the same samples."""
    arrays = {space: _member(archive, member) for space, member in members.items()}
    signed = repr(members).encode()
    return FeatureShard(
        arrays, _open_table(table, extra), lambda: signed + _tail(archive) + _tail(table)
    )


def _member(archive: AnyPath, member: str) -> Part:
    """The features in a member of a npz, their shape from its header alone."""

    def load() -> np.ndarray:
        with reading(archive), np.load(opened(archive), allow_pickle=False) as content:
            return content[member]

    with (
        reading(archive),
        np.load(opened(archive), allow_pickle=False) as content,
        content.zip.open(f"{member}.npy") as file,
    ):
        shape, _, dtype = npy_header(file)
    _check(name := f"{archive}:{member}", shape, dtype)
    return Part(name, shape, load)


# --- a file of arrays ----------------------------------------------------------------------------


def arrays_shard(path: AnyPath, spaces: Sequence[str], extra: Sequence[str]) -> FeatureShard:
    """A single ``.npz`` or ``.pth``/``.pt`` of arrays as a shard, held in memory.

    Raises:
        UserError: another file type, unreadable, a part missing, or lengths that differ.
    """
    readers = {".npz": _read_npz, ".pth": _read_torch, ".pt": _read_torch}
    if path.suffix not in readers:
        raise UserError(f"{path} is not a features folder nor a .npz or .pth file of arrays")
    content = readers[path.suffix](path)
    arrays: dict[str, Part] = {}
    lists: dict[str, list[Any]] = {}
    for part in (*spaces, "ids", "captions"):
        name = next((name for name in _ARRAY_NAMES[part] if name in content), None)
        if name is None:
            names = ", ".join(sorted(content)) or "nothing"
            raise UserError(f"{path} has no {part!r} (one row per sample); it holds {names}")
        value = content[name]
        if part in spaces:
            _check(str(path), getattr(value, "shape", ()), getattr(value, "dtype", type(value)))
            arrays[part] = Part(f"{path}:{part}", value.shape, partial(np.asarray, value))
        else:
            lists[part] = list(map(text_of, _as_list(path, part, value)))
    lists |= {n: unicode_values(_as_list(path, n, content[n])) for n in extra if n in content}
    with reading(path):
        table = pa.table([_column_of(values) for values in lists.values()], list(lists))
    ids = Part(f"{path}:ids", (len(table),), lambda: table)
    return FeatureShard(arrays, ids, lambda: _tail(path))


def _as_list(path: AnyPath, name: str, values: Any) -> list[Any]:
    values = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(values, list | tuple):
        raise UserError(f"{path}: {name!r} must have one row per sample, not be a single value")
    return list(values)


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
            return dict(content)


def _read_torch(path: AnyPath) -> dict[str, Any]:
    import torch

    try:
        content = dict(torch.load(opened(path), map_location="cpu", weights_only=True))
    except Exception as error:  # whatever a damaged or unsafe file makes the restricted loader say
        raise UserError(
            f"{path} cannot be read as a dictionary of tensors and plain lists (weights_only); "
            "save one with torch.save, without other Python objects: ids and captions as lists"
        ) from error
    arrays = {}
    for name, value in content.items():
        if isinstance(value, torch.Tensor):  # of half precision or bfloat16: as float32
            with reading(path, f"has {name!r} as a tensor that is no plain array"):
                value = (value.float() if value.is_floating_point() else value).detach().numpy()
        arrays[str(name)] = value
    return arrays
