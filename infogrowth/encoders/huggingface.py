"""Any Hugging Face dual encoder (CLIP, SigLIP, …): a model with get_image/text_features."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from infogrowth.encoders.fingerprint import fingerprint
from infogrowth.encoders.inference import CaptionTokenizer, UnitFeatures, moved
from infogrowth.encoders.protocols import Tokens
from infogrowth.errors import UserError

# These were trained on captions padded to full length, so a shorter padding changes the feature.
_PADDED_TO_FULL_LENGTH = ("siglip", "siglip2")


class HuggingFaceDualEncoder:
    """CLIP, SigLIP and their kin, with the preprocessing files that lie beside the weights.

    Args:
        folder: config.json, weights, tokenizer and image processor files.
        name: what the user called it.
        device: where to run it.

    Raises:
        UserError: no such features, or a file of the four is missing or broken.
    """

    def __init__(self, folder: Path, name: str, device: torch.device) -> None:
        self.name = name
        self._device = device
        model, loading = load_part("AutoModel", folder, name, "weights", output_loading_info=True)
        for method in ("get_image_features", "get_text_features"):
            if not hasattr(model, method):
                raise UserError(
                    f"{name} is a {type(model).__name__}, which has no {method}; give a dual "
                    "encoder such as CLIP, SigLIP or BLIP"
                )
        refuse_missing_weights(loading["missing_keys"], name)
        self.preprocess = ProcessorTransform(
            load_part("AutoImageProcessor", folder, name, "image processor"), name
        )
        tokenizer = load_tokenizer(folder, name)
        length = _max_tokens(model.config, tokenizer)
        full = model.config.model_type in _PADDED_TO_FULL_LENGTH
        self.tokenize = CaptionTokenizer(
            tokenizer, padding="max_length" if full else True, max_length=length
        )
        self.fingerprint = fingerprint(
            model.state_dict(),
            {
                "config": comparable_config(model.config),
                "image_processor": comparable_config(self.preprocess.processor),
                "vocabulary": sorted(tokenizer.get_vocab().items()),
                "text_length": length,
            },
        )
        self._features = UnitFeatures(model.float(), device)
        self.dimension = self.encode_texts(["a"]).shape[1]

    def encode_images(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        pixels = images_BCHW.to(self._features.device, non_blocking=True)
        return self._features(lambda model: _pooled(model.get_image_features(pixel_values=pixels)))

    def encode_tokens(self, tokens: Tokens) -> torch.Tensor:
        on_device = moved(tokens, self._features.device)
        return self._features(lambda model: _pooled(model.get_text_features(**on_device)))

    def encode_texts(self, captions: list[str]) -> torch.Tensor:
        return self.encode_tokens(self.tokenize(captions))


def _max_tokens(config: Any, tokenizer: Any) -> int:
    """Tokens per caption: what both the tokenizer and the position table allow."""
    text_config = getattr(config, "text_config", config)
    positions = getattr(text_config, "max_position_embeddings", None) or 512
    return min(int(tokenizer.model_max_length), int(positions))


class ProcessorTransform:
    """One RGB image through a Hugging Face image processor, as a CHW tensor; picklable."""

    def __init__(self, processor: Any, name: str) -> None:
        self.processor = processor
        self._name = name

    def __call__(self, image: Image.Image) -> torch.Tensor:
        inputs = self.processor(images=image, return_tensors="pt")
        extra = set(inputs) - {"pixel_values", "pixel_mask"}
        if extra:
            raise UserError(
                f"{self._name} needs {', '.join(sorted(extra))} beside the pixels, which is not "
                "supported; use its fixed-resolution variant"
            )
        return inputs["pixel_values"][0]


def load_part(factory: str, folder: Path, name: str, what: str, **options: Any) -> Any:
    """Load one part of a local Hugging Face folder with a transformers Auto class.

    Never runs code from the folder; weights come from safetensors, or from a .bin through
    torch's restricted unpickler.

    Raises:
        UserError: the part is missing or does not load, with the library's own first line.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()  # half a second of bar for every part
    try:
        return getattr(transformers, factory).from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # the library raises a dozen kinds for a missing or broken file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot load the {what} of {name}: {reason}") from error


def load_tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer of a local folder.

    transformers 5 gives an empty one, without a word, where the vocabulary file is missing; every
    caption would then have the same feature.
    """
    tokenizer = load_part("AutoTokenizer", folder, name, "tokenizer")
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise UserError(
            f"cannot load the tokenizer of {name}: its vocabulary (tokenizer.json, vocab.txt, …) "
            "is missing from the folder"
        )
    return tokenizer


def refuse_missing_weights(missing: Any, name: str) -> None:
    """A weight missing from the file would stay random: refuse instead of scoring with noise."""
    if missing:
        shown = ", ".join(sorted(missing)[:3])
        raise UserError(
            f"{name} has {len(missing)} weights missing of its architecture ({shown}, …); "
            "its features would be random"
        )


def comparable_config(config: Any) -> dict[str, Any]:
    """A config or processor as a dict without what differs between copies of one model."""
    volatile = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
    return {k: v for k, v in config.to_dict().items() if k not in volatile}


def _pooled(output: Any) -> torch.Tensor:
    """The projected feature: transformers 4 returned it bare, 5 returns it in an output object."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output
