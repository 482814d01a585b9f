"""A result in parquet, read as the result JSON is: what `select` and `grow` write as ``.parquet``.

Columns instead of a Python object per sample: 2.7 million samples are there in a second or two on
every rank, where the JSON takes half a minute and gigabytes.
"""

import os
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infogrowth.errors import UserError, refusing

_IDS = ("image", "id")
_GAINS = ("gain_image", "gain_text")


class AnnotationTable(Sequence[dict[str, Any]]):
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
            wanted = [name for name in (*_IDS, "caption", *_GAINS, "verdict") if name in names]
            table = pq.read_table(path, columns=wanted)
        self._id = next((name for name in _IDS if name in names), "")
        if not self._id or "caption" not in names:
            raise UserError(
                f"the annotation file {path} needs columns image (or id) and caption, "
                f"not {', '.join(names)}"
            )
        if self._id == "id" and "verdict" in names:  # all decisions, as `grow` writes them
            table = table.filter(pc.not_equal(table["verdict"], "dropped"))
        for column in (self._id, "caption"):
            if table[column].null_count:
                row = pc.index(pc.is_null(table[column]), True).as_py()
                raise UserError(f"sample {row} of {path} has no {column}")
        self._table = table.combine_chunks()
        self.gains: np.ndarray | None = self._checked_gains() if "gain_image" in names else None

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        entry = {"image": self._table[self._id][row].as_py()}
        entry["caption"] = self._table["caption"][row].as_py()
        if self.gains is not None:
            entry["gains"] = self.gains[row].tolist()
        return entry

    def __reduce__(self) -> tuple[Any, ...]:
        return AnnotationTable, (self._path,)

    def _checked_gains(self) -> np.ndarray:
        """(N, 2) float64; growth in the image space alone has one gain, both columns hold it."""
        image = self._table["gain_image"].to_numpy().astype(np.float64)
        text = image
        if "gain_text" in self._table.column_names:
            text = self._table["gain_text"].to_numpy().astype(np.float64)
            text = np.where(np.isnan(text), image, text)
        gains = np.stack([image, text], axis=1)
        bad = ~np.isfinite(gains).all(axis=1) | (gains < -1e-4).any(axis=1)
        if bad.any():
            row = int(bad.argmax())
            raise UserError(
                f"sample {row} of {self._path} has gains {gains[row].tolist()}, but they are "
                "distances: finite and not negative"
            )
        return gains
