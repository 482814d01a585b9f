"""A BLIP for ``transformers``: a folder that its classes open, with all that they read."""

import tempfile
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from infogrowth.blip.config import BlipConfig, to_huggingface
from infogrowth.blip.names import to_huggingface_name
from infogrowth.blip.tokenizer import save_vocabulary
from infogrowth.blip.weights_files import config_of, safetensors_bytes
from infogrowth.data.transforms import MEAN, STD
from infogrowth.errors import UserError
from infogrowth.files import atomic_write, atomic_write_json

_RETRIEVAL_PARTS = ("visual_encoder.", "text_encoder.", "vision_proj.", "text_proj.", "itm_head.")
_GENERATION_PARTS = ("visual_encoder.", "text_decoder.")


def save_huggingface(
    model: nn.Module,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    task: str | None,
) -> None:
    """Write the folder for the class that serves ``task``; see :func:`save_weights`.

    Raises:
        UserError: the model lacks parts that the task needs.
    """
    parts = {name.split(".")[0] for name in model.state_dict()}
    task = task or ("retrieval" if "text_encoder" in parts else "captioning")
    prefixes = _RETRIEVAL_PARTS if task == "retrieval" else _GENERATION_PARTS
    if not {prefix.rstrip(".") for prefix in prefixes} <= parts:
        raise UserError(f"this model lacks parts that a BLIP for {task} has; it is not written")
    state = {k: v for k, v in model.state_dict().items() if k.startswith(prefixes)}
    once = {v.data_ptr(): k for k, v in reversed(state.items())}
    renamed = {to_huggingface_name(name): state[name] for name in once.values()}
    # transformers ties the output layer itself and wants it under these names only.
    with atomic_write(directory / "model.safetensors") as file:
        file.write(safetensors_bytes(renamed))
    if tokenizer is not None:
        _save_tokenizer(tokenizer, directory)
    config = config_of(model)
    atomic_write_json(directory / "preprocessor_config.json", _preprocessor(config), indent=2)
    architecture = {
        "retrieval": "BlipForImageTextRetrieval",
        "captioning": "BlipForConditionalGeneration",
    }[task]
    values = {**to_huggingface(config), "architectures": [architecture]}
    atomic_write_json(directory / "config.json", values, indent=2)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    save_vocabulary(tokenizer, directory)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        for source in sorted(Path(scratch).iterdir()):
            if source.name != "vocab.txt":
                with atomic_write(directory / source.name) as file:
                    file.write(source.read_bytes())


def _preprocessor(config: BlipConfig) -> dict[str, object]:
    """How ``transformers`` should prepare images for this model."""
    side = config.image_size
    return {
        "image_processor_type": "BlipImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [*MEAN],
        "image_std": [*STD],
        "do_convert_rgb": True,
    }
