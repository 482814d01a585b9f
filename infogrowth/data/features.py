"""The door to features: open any supported folder or file as one stream; write our own shards.

Layouts: clip-retrieval / LAION shards (feature_shards.py), DataComp's pairs of parquet and npz,
and single .npz / .pth files of arrays (feature_sources.py).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infogrowth.data.feature_shards import find_shards
from infogrowth.data.feature_sources import find_datacomp, read_arrays
from infogrowth.data.feature_stream import FeatureBatch, FeatureShard, FeatureStream
from infogrowth.data.feature_writer import FeatureWriter
from infogrowth.errors import UserError
from infogrowth.files import read_json

__all__ = ["SPACES", "FeatureBatch", "FeatureStream", "FeatureWriter", "open_features"]

SPACES = ("image", "text")


def open_features(
    path: str | os.PathLike[str],
    spaces: Sequence[str] = SPACES,
    key: str | None = None,
    extra: Sequence[str] = (),
) -> FeatureStream:
    """Open a features folder or file of any supported layout.

    Args:
        path: a clip-retrieval / LAION folder, a DataComp metadata folder, or a .npz / .pth file.
        spaces: the spaces that must be there: ``("image", "text")``, ``("text",)`` for a
            recaption table, ``("image",)`` for growth in the image space alone.
        key: which of DataComp's features, ``"b32"`` or ``"l14"``; needed where both are there.
        extra: metadata columns wanted besides id and caption; absent ones are left out.

    Raises:
        UserError: nothing readable there, an unfinished ``embed``, files whose row counts do not
            agree (named), a missing space or column.
    """
    path = Path(path)
    if path.is_file():
        return FeatureStream(path, "arrays", [read_arrays(path, spaces, extra)], {})
    if not path.is_dir():
        raise UserError(f"the features {path} do not exist; check the path")
    description = _describe(path)
    shards: Sequence[FeatureShard]
    if shards := find_shards(path, spaces, extra):
        _refuse_missing(path, description, len(shards))
        return FeatureStream(path, "clip-retrieval", shards, description)
    if description.get("shards") == 0:  # nothing wanted a caption, or nothing could be embedded
        return FeatureStream(path, "clip-retrieval", [], description)
    if found := find_datacomp(path, spaces, key, extra):
        shards, encoder = found
        return FeatureStream(path, "DataComp", shards, {"encoder": {"name": encoder}})
    raise UserError(
        f"{path} holds no features: expected img_emb/*.npy, text_emb/*.npy and metadata/*.parquet "
        "(python -m infogrowth embed writes them), or DataComp's parquet and npz pairs"
    )


def _describe(path: Path) -> dict[str, Any]:
    file = path / "features.json"
    if not file.is_file():
        return {}
    description = read_json(file, "the features' description")
    if not isinstance(description, dict):
        raise UserError(f"{file} must hold an object; run `python -m infogrowth embed` again")
    if description.get("finished") is False:
        raise UserError(
            f"the features in {path} are not finished (the run that writes them was interrupted "
            "or is still going); run the same command again, then this one"
        )
    return description


def _refuse_missing(path: Path, description: dict[str, Any], found: int) -> None:
    planned = description.get("shards")
    if isinstance(planned, int) and planned != found:
        raise UserError(
            f"{path} has {found} feature shards, but its features.json tells of {planned}; "
            "files are missing, write them again with `python -m infogrowth embed`"
        )
