"""The result JSON: what `grow` writes, what training reads, what people load from processed_data.

A list of ``{"image": str, "caption": str | [str], "gains": [image, text]}`` (spec §3). The paper's
published files hold the gains as strings; both forms load, numbers are written.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from json.encoder import encode_basestring
from typing import Any

import numpy as np

from infogrowth.errors import UserError
from infogrowth.files import atomic_write, read_json

Annotation = dict[str, Any]
SPACES = ("image", "text")
"""The two feature spaces, in the order of ``gains``."""
# How far below zero float arithmetic may have put a gain. Above 2, the most that a mean cosine
# distance can be, nothing is refused: golden/sampling_annotations.json has gains of 5.
_ROUNDING = 1e-4


def load_annotations(path: str | os.PathLike[str]) -> Sequence[Annotation]:
    """Read a result or annotation JSON, or a result in parquet (an AnnotationTable).

    ``gains`` may be absent (a plain annotation file), or two numbers, or strings of such;
    they come back as two floats. Keys beyond the three are kept as they are.

    Raises:
        UserError: not JSON, or an entry that breaks the contract, named by its position and id.
    """
    if os.fspath(path).endswith(".parquet"):
        from infogrowth.annotation_table import AnnotationTable  # pyarrow is slow to import

        return AnnotationTable(path)
    entries = read_json(path, "the annotation file")
    if not isinstance(entries, list):
        kind = type(entries).__name__
        raise UserError(f"the annotation file {path} must hold a list of samples, not a {kind}")
    return [_checked(entry, position, path) for position, entry in enumerate(entries)]


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


def read_ids(path: str | os.PathLike[str], what: str = "the seed list") -> frozenset[str]:
    """Sample ids from a JSON list of them, or from an annotation file.

    Raises:
        UserError: it is neither, or empty.
    """
    ids = read_json(path, what)
    if isinstance(ids, list) and all(isinstance(entry, dict) for entry in ids):
        ids = [entry.get("image") for entry in ids]
    names = [as_id(name) for name in ids] if isinstance(ids, list) else []
    if not names or None in names:
        raise UserError(f"{what} {path} must be a JSON list of sample ids, or an annotation file")
    return frozenset(name for name in names if name is not None)


def gains_array(annotations: Sequence[Annotation]) -> np.ndarray:
    """The gains of all samples as ``(N, 2)`` float64: image, text.

    Raises:
        UserError: a sample without gains, named by its id.
    """
    if getattr(annotations, "gains", None) is not None:  # an AnnotationTable
        return annotations.gains  # type: ignore[attr-defined]
    for position, entry in enumerate(annotations):
        if "gains" not in entry:
            raise UserError(
                f"sample {position} ({entry['image']!r}) has no gains; "
                "use a file written by `python -m infogrowth grow`"
            )
    return np.array([entry["gains"] for entry in annotations], dtype=np.float64).reshape(-1, 2)


def _checked(entry: Any, position: int, path: str | os.PathLike[str]) -> Annotation:
    where = f"sample {position} of {path}"
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be an object with image and caption, not {entry!r:.60}")
    if (image := as_id(entry.get("image"))) is None:
        raise UserError(f"{where} has no image id: the key 'image' must be a non-empty string")
    if image != entry["image"]:
        entry = {**entry, "image": image}
    where = f"{where} ({entry['image']!r})"
    caption = entry.get("caption")
    captions = caption if isinstance(caption, list) else [caption]
    if not captions or not all(isinstance(text, str) for text in captions):
        raise UserError(f"{where} has no caption: the key 'caption' must be text or a list of text")
    if fault := _unwritable({key: value for key, value in entry.items() if key != "gains"}):
        raise UserError(f"{where} has {fault}; correct it, or take the sample out")
    if "gains" not in entry:
        return entry
    return {**entry, "gains": _checked_gains(entry["gains"], where)}


def _unwritable(value: Any) -> str | None:
    """What in a JSON value could not be written again, at whatever depth; None if nothing."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return f"text that is not Unicode (half of a surrogate pair): {value!r:.60}"
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else f"a number that is not finite: {value}"
    parts: list[Any] = []
    if isinstance(value, dict):
        parts = [*value, *value.values()]
    elif isinstance(value, list):
        parts = value
    try:
        return next(filter(None, map(_unwritable, parts)), None)
    except RecursionError:
        return "values that are nested too deeply"


def _checked_gains(gains: Any, where: str) -> list[float]:
    numbers = [_as_gain(gain) for gain in gains] if isinstance(gains, list) else []
    if len(numbers) != 2 or None in numbers:
        raise UserError(f"{where} has gains {gains!r:.60}, not two numbers [image, text]")
    if not all(math.isfinite(gain) for gain in numbers):
        raise UserError(f"{where} has gains that are not finite: {gains!r:.60}")
    if min(numbers) < -_ROUNDING:
        raise UserError(f"{where} has negative gains, but they are distances: {gains!r:.60}")
    return numbers


def _as_gain(gain: Any) -> Any:
    """A float (infinity for a whole number beyond all floats); None for what is no number."""
    if isinstance(gain, bool) or not isinstance(gain, int | float | str):
        return None
    try:
        return float(gain)
    except ValueError:
        return None
    except OverflowError:
        return math.inf
