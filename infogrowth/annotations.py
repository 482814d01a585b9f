"""Results: what `grow` writes, what training reads, what people load from processed_data.

In JSON a list of ``{"image": str, "caption": str | [str], "gains": [image, text]}`` (spec §3). The
paper's published files hold the gains as strings; both forms load, numbers are written. In parquet
the same in columns, for large sets: 2.7 million samples are there in a second or two on every rank,
where the JSON takes half a minute and gigabytes.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from json.encoder import encode_basestring
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infogrowth.errors import UserError, refusing, shorten
from infogrowth.files import atomic_write, read_json

Annotation = dict[str, Any]
SPACES = ("image", "text")
"""The two feature spaces, in the order of ``gains``."""
# How far below zero float arithmetic may have put a gain. Above 2, the most that a mean cosine
# distance can be, nothing is refused: golden/sampling_annotations.json has gains of 5.
_ROUNDING = 1e-4
_IDS = ("image", "id")  # columns of a table, the first that is there


def load_annotations(path: str | os.PathLike[str]) -> Sequence[Annotation]:
    """Read a result or annotation JSON, or a result in parquet (an AnnotationTable).

    ``gains`` may be absent (a plain annotation file), or two numbers, or strings of such;
    they come back as two floats. Keys beyond the three are kept as they are.

    Raises:
        UserError: not JSON, or an entry that breaks the contract, named by its position and id.
    """
    if os.fspath(path).endswith(".parquet"):
        return AnnotationTable(path)
    entries = read_json(path, "the annotation file", list)
    return [_checked(entry, f"sample {row} of {path}") for row, entry in enumerate(entries)]


def save_annotations(
    path: str | os.PathLike[str],
    annotations: Iterable[Annotation],
    legacy_strings: bool = False,
) -> None:
    """Write a result JSON whole or not at all; the entries are taken as they come.

    Args:
        legacy_strings: write the gains as strings, as the paper's published files do.
    """
    with atomic_write(path, "w") as file:
        file.write("[")
        separator = ""
        for entry in annotations:
            file.write(separator + _entry_text(entry, legacy_strings))
            separator = ", "
        file.write("]\n")


def _entry_text(entry: Annotation, legacy_strings: bool) -> str:
    """The bytes of json.dumps, at a third of its time for the entries that `grow` writes."""
    if "gains" in entry and legacy_strings:
        entry = {**entry, "gains": [str(gain) for gain in entry["gains"]]}
    elif list(entry) == ["image", "caption", "gains"]:
        name, caption, gains = entry.values()
        if type(name) is type(caption) is str and list(map(type, gains)) == [float, float]:
            image, text = gains
            if math.isfinite(image + text):
                name, caption = encode_basestring(name), encode_basestring(caption)
                return f'{{"image": {name}, "caption": {caption}, "gains": [{image!r}, {text!r}]}}'
    return json.dumps(entry, ensure_ascii=False, allow_nan=False)


def as_id(value: Any) -> str | None:
    """An id in its text form: ``802`` and ``802.0`` are ``"802"``; None for what is no id."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:
        return None
    return str(value) or None


def read_ids(path: str | os.PathLike[str]) -> frozenset[str]:
    """Sample ids from a JSON list of them, or from an annotation file.

    Raises:
        UserError: it is neither, or empty.
    """
    entries = read_json(path, "the seed list", list)
    ids = [as_id(entry.get("image") if isinstance(entry, dict) else entry) for entry in entries]
    names = frozenset(name for name in ids if name is not None)
    if not ids or None in ids:
        raise UserError(
            f"the seed list {path} must be a JSON list of sample ids, or an annotation file"
        )
    return names


def gains_array(annotations: Sequence[Annotation]) -> np.ndarray:
    """The gains of all samples as ``(N, 2)`` float64: image, text.

    Raises:
        UserError: a sample without gains, named by its id.
    """
    if isinstance(annotations, AnnotationTable) and annotations.gains is not None:
        return annotations.gains
    for position, entry in enumerate(annotations):
        if "gains" not in entry:
            raise UserError(
                f"sample {position} ({entry['image']!r}) has no gains; "
                "use a file written by `python -m infogrowth grow`"
            )
    return np.array([entry["gains"] for entry in annotations], dtype=np.float64).reshape(-1, 2)


def _checked(entry: Any, where: str) -> Annotation:
    """An entry with its id as text and its gains as floats."""
    entry = {**entry} if isinstance(entry, dict) else {}
    if (name := as_id(entry.get("image"))) is None:
        raise UserError(f"{where} has no image id: an object with text under 'image' is needed")
    entry["image"] = name
    where = f"{where} ({name!r})"
    caption = entry.get("caption")
    captions = caption if isinstance(caption, list) else [caption]
    if not captions or not all(isinstance(text, str) for text in captions):
        raise UserError(f"{where} has no caption: the key 'caption' must be text or a list of text")
    if "gains" in entry:
        entry["gains"] = _numbers(gains := entry["gains"])
        if not entry["gains"]:
            raise UserError(
                f"{where} has gains {gains!r:.60}, but they must be two numbers [image, text], "
                "finite and not negative"
            )
    try:  # what could not be written again: half of a surrogate pair, NaN, values nested too deeply
        json.dumps(entry, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} has what JSON cannot hold ({shorten(error)}); correct it, or take it out"
        ) from error
    return entry


def _numbers(gains: Any) -> list[float]:
    """Gains as floats; none if they are no gains."""
    listed = gains if isinstance(gains, list) else []
    try:  # as text, since a whole number may lie beyond all floats: it is infinite then
        numbers = [gain if type(gain) is float else float(str(gain)) for gain in listed]
    except ValueError:
        return []
    fine = len(numbers) == 2 and all(-_ROUNDING <= gain < math.inf for gain in numbers)
    return numbers if fine else []


class AnnotationTable(Sequence[Annotation]):
    """The samples of a parquet file, in its order; of decisions those that were kept.

    Entries are made when asked for: ``{"image", "caption"}`` and, if the file has them,
    ``"gains"``. Pickled by its path, so that worker processes read it themselves.

    Args:
        path: a parquet file with columns ``image`` (or ``id``) and ``caption``.

    Raises:
        UserError: no such file or columns, a sample without id or caption, or bad gains.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = str(path)
        with refusing(path, "the annotation file", pa.ArrowException):
            names = pq.read_schema(path).names
            known = (*_IDS, "caption", "gain_image", "gain_text", "verdict")
            table = pq.read_table(path, columns=[name for name in known if name in names])
        self._id = next((name for name in _IDS if name in names), "")
        if not self._id or "caption" not in names:
            raise UserError(
                f"the annotation file {path} needs columns image (or id) and caption, "
                f"not {', '.join(names)}"
            )
        if self._id == "id" and "verdict" in names:  # all decisions, as `grow` writes them
            table = table.filter(pc.not_equal(table["verdict"], "dropped"))
        self._table = table.combine_chunks()
        self.gains: np.ndarray | None = None
        invalid = np.zeros(len(table), bool)
        for column in (self._id, "caption"):
            invalid |= pc.is_null(table[column]).to_numpy()
        if "gain_image" in names:
            # Growth in the image space alone has one gain: both columns hold it.
            columns = "gain_image", "gain_text" if "gain_text" in names else "gain_image"
            with refusing(path, "the annotation file", pa.ArrowException):
                image, text = (table[name].cast(pa.float64()).to_numpy() for name in columns)
            self.gains = np.stack([image, np.where(np.isnan(text), image, text)], axis=1)
            invalid |= ~(np.isfinite(self.gains) & (self.gains >= -_ROUNDING)).all(axis=1)
        for row in np.flatnonzero(invalid).tolist():
            _checked(self[row], f"sample {row} of {path}")  # says what is wrong with it

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Annotation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Annotation]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        entry: dict[str, Any] = {"image": as_id(self._table[self._id][row].as_py())}
        entry["caption"] = self._table["caption"][row].as_py()
        if self.gains is not None:
            entry["gains"] = self.gains[row].tolist()
        return entry

    def __reduce__(self) -> tuple[Any, ...]:
        return AnnotationTable, (self._path,)
