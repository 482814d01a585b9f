"""A captioner by retrieval: the nearest caption of a list that is trusted."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional

from infogrowth.encoders.models import DualEncoder, fingerprint
from infogrowth.errors import UserError, refusing
from infogrowth.files import read_json

PREFIX = "nearest:"
_ROWS = 256  # captions encoded at once


class NearestCaptioner:
    """Gives an image the candidate caption whose feature is nearest to its own.

    A candidate with several wordings stands for their mean, and gives its first. What is picked
    as the best of many aligns well even where it is wrong: let growth ask more of it than of a
    caption that came with its image (``--min-recaption-align auto``).

    Args:
        name: ``nearest:FILE``: an annotation JSON (a candidate per entry; ids are not needed), or
            a text file with a candidate per line.
        encoder: the dual encoder of the features that the captions are for.
        min_margin: how much nearer the best candidate must be than the next (cosine); an image
            that is undecided between two gets no caption.

    Raises:
        UserError: the file cannot be read or holds no captions.
    """

    def __init__(self, name: str, encoder: DualEncoder, min_margin: float = 0.0) -> None:
        self.name, self.preprocess = name, encoder.preprocess
        self._encoder, self._min_margin = encoder, min_margin
        candidates = read_candidates(Path(name.removeprefix(PREFIX)))
        self._captions = [wordings[0] for wordings in candidates]
        wordings = [wording for each in candidates for wording in each]
        owner = torch.tensor([row for row, each in enumerate(candidates) for _ in each])
        starts = range(0, len(wordings), _ROWS)
        features_WD = torch.cat([encoder.encode_texts(wordings[s : s + _ROWS]) for s in starts])
        sums_CD = torch.zeros(len(candidates), features_WD.shape[1])
        self._features_CD = functional.normalize(sums_CD.index_add(0, owner, features_WD), dim=-1)
        settings = {
            "encoder": encoder.fingerprint, "captions": candidates, "min_margin": min_margin
        }  # fmt: skip
        self.fingerprint = fingerprint({}, settings)

    def caption(self, images: Sequence[torch.Tensor] | torch.Tensor) -> list[str]:
        stacked = images if isinstance(images, torch.Tensor) else torch.stack(list(images))
        cosines_BC = self._encoder.encode_images(stacked) @ self._features_CD.T
        best_B2, rows_B2 = cosines_BC.topk(min(2, len(self._captions)), dim=1)
        decided = (best_B2[:, 0] - best_B2[:, -1] >= self._min_margin).tolist()
        if len(self._captions) == 1 or self._min_margin <= 0:
            decided = [True] * len(stacked)
        chosen = zip(rows_B2[:, 0].tolist(), decided, strict=True)
        return [self._captions[row] if sure else "" for row, sure in chosen]


def read_candidates(path: Path) -> list[list[str]]:
    """The captions to choose from: for each candidate its wordings, none of them blank.

    Raises:
        UserError: no such file, another format, or no captions in it.
    """
    if path.suffix == ".json":
        entries = read_json(path, "the list of captions")
        found = entries if isinstance(entries, list) else []
        found = [entry.get("caption") if isinstance(entry, dict) else entry for entry in found]
    else:
        with refusing(path, "the list of captions", UnicodeDecodeError, fault="is not UTF-8 text"):
            found = list(path.read_text(encoding="utf-8").split("\n"))
    lists = [entry if isinstance(entry, list) else [entry] for entry in found]
    candidates = [
        wordings
        for texts in lists
        if (wordings := [t.strip() for t in texts if isinstance(t, str) and t.strip()])
    ]
    if not candidates:
        raise UserError(f"the list of captions {path} holds no captions")
    return candidates
