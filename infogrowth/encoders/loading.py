"""From what the user names (a path, a hub name, "tiny") to an encoder, a matcher or a captioner.

One captioner needs no model of its own: the nearest caption of a list that is trusted.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from infogrowth.encoders.huggingface import HuggingFaceCaptioner, HuggingFaceDualEncoder
from infogrowth.encoders.models import Captioner, DualEncoder, fingerprint
from infogrowth.errors import UserError, refusing
from infogrowth.files import read_json

if TYPE_CHECKING:  # timm and transformers take seconds to import
    from infogrowth.encoders.blip import BlipMatcher

_NEAREST = "nearest:"
_ROWS = 256  # captions encoded at once
BUNDLED = {"tiny": Path(__file__).parents[1] / "assets" / "tiny_blip"}
CHECKPOINT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# Everything but the weights first: a repository often holds the same weights in three formats.
_SMALL_FILES = ["*.json", "*.txt", "*.model"]
_WEIGHT_FILES = (["*.safetensors"], ["pytorch_model*.bin"])


def load_encoder(
    name: str, device: str | torch.device = "cpu", vocabulary: str | None = None
) -> DualEncoder:
    """The dual encoder called ``name``, in evaluation mode on ``device``.

    Args:
        name: ``"tiny"`` (bundled), a BLIP folder or training output of ours, a checkpoint file
            (official .pth, .safetensors), a Hugging Face folder, or a hub name such as
            ``Salesforce/blip-itm-base-coco`` or ``openai/clip-vit-base-patch32``.
        vocabulary: vocab.txt for a BLIP checkpoint without one.

    Raises:
        UserError: nothing of that name, no network, or a model that is no dual encoder.
    """
    path = find_model(name, "encoder")
    if _is_blip(path):
        from infogrowth.encoders.blip import BlipEncoder

        return BlipEncoder(path, name, torch.device(device), vocabulary)
    return HuggingFaceDualEncoder(path, name, torch.device(device))


def load_matcher(
    name: str, device: str | torch.device = "cpu", vocabulary: str | None = None
) -> "BlipMatcher":
    """The BLIP called ``name`` as a judge of pairs; names as for :func:`load_encoder`.

    Raises:
        UserError: nothing of that name, or a model that is no BLIP.
    """
    from infogrowth.encoders.blip import BlipMatcher

    path = find_model(name, "matcher")
    if not _is_blip(path):
        raise UserError(f"{name} is no BLIP, and only a BLIP has a matching head; give --matcher")
    return BlipMatcher(path, name, torch.device(device), vocabulary)


def load_captioner(
    name: str,
    device: str | torch.device = "cpu",
    vocabulary: str | None = None,
    encoder: DualEncoder | None = None,
    min_margin: float = 0.0,
    prompt: str = "",
    beams: int = 3,
    max_tokens: int = 30,
) -> Captioner:
    """The captioner called ``name``: a BLIP with a text decoder, a Hugging Face image-to-text
    model (names as for :func:`load_encoder`), or ``nearest:FILE``, which picks from a list.

    Args:
        encoder, min_margin: by which, and how clearly, ``nearest:FILE`` picks.
        prompt: what a chat model is asked (empty: for a sentence), or the words that another
            model's caption continues and that are removed from it. BLIP's official captioning
            weights were tuned with "a picture of ", pretrained ones without.
        beams: hypotheses kept by beam search; there is no sampling.
        max_tokens: longest caption (for BLIP the prompt included).
    """
    if name.startswith(_NEAREST):
        assert encoder is not None
        return NearestCaptioner(name, encoder, min_margin)
    path, device = find_model(name, "captioner"), torch.device(device)
    if _is_blip(path):
        from infogrowth.encoders.blip import BlipDescriber

        return BlipDescriber(path, name, device, vocabulary, prompt, beams, max_tokens)
    return HuggingFaceCaptioner(path, name, device, prompt, beams, max_tokens)


def find_model(name: str, what: str) -> Path:
    """The checkpoint file or model folder that ``name`` stands for; downloads a hub name.

    Raises:
        UserError: nothing there, in one sentence that says where it was looked for.
    """
    path = BUNDLED.get(name, Path(name).expanduser())
    # A training output directory keeps its exported model in `model/`.
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    is_checkpoint = path.suffix in CHECKPOINT_SUFFIXES
    if path.is_file() and is_checkpoint:
        return path
    if path.exists() or is_checkpoint or not _HUB_NAME.fullmatch(name):
        state = "has no config.json" if path.is_dir() else "is no checkpoint file"
        raise UserError(
            f"{what} {name} {state if path.exists() else 'does not exist'}; give 'tiny', a BLIP or "
            "Hugging Face folder, a training output with model/ in it, a checkpoint file "
            f"({', '.join(CHECKPOINT_SUFFIXES)}), or a hub name"
        )
    return _download(name, what)


def _is_blip(path: Path) -> bool:
    """Checkpoint files are BLIP's; a folder says so in its config.json.

    Our own config.json has `image_size` and `text_depth` at the top; Hugging Face's has
    `model_type`, which is "blip" for the one whose weights our classes load.
    """
    if path.is_file():
        return True
    config = read_json(path / "config.json", "the model's config", dict)
    return config.get("model_type", "blip") == "blip"


def _download(name: str, what: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        for weights in _WEIGHT_FILES:
            folder = Path(snapshot_download(name, allow_patterns=[*_SMALL_FILES, *weights]))
            if any(any(folder.glob(pattern)) for pattern in weights):
                return folder
    except Exception as error:  # the hub client raises many kinds; all mean that it is not there
        raise UserError(
            f"{what} {name} is no local path and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}); check the name and the network, or give a local folder"
        ) from error
    raise UserError(f"{what} {name} holds no weights that can be loaded safely")


class NearestCaptioner(Captioner):
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
        candidates = read_candidates(Path(name.removeprefix(_NEAREST)))
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

    def describe(self, images: list[torch.Tensor]) -> list[str]:
        cosines_BC = self._encoder.encode_images(torch.stack(images)) @ self._features_CD.T
        best_B2, rows_B2 = cosines_BC.topk(min(2, len(self._captions)), dim=1)
        decided = (best_B2[:, 0] - best_B2[:, -1] >= self._min_margin).tolist()
        if len(self._captions) == 1 or self._min_margin <= 0:
            decided = [True] * len(images)
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
