"""Models of transformers by the files of their folder: dual encoders (CLIP, SigLIP, …) and
image-to-text models (GIT, ViT-GPT2, BLIP-2, LLaVA, …)."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from infogrowth.data.transforms import pixels
from infogrowth.encoders.models import (
    TOKENIZING,
    Captioner,
    CaptionTokenizer,
    DualEncoder,
    Preprocess,
    Tokenize,
    Tokens,
    fingerprint,
)
from infogrowth.errors import UserError, shorten

# These were trained on captions padded to full length, so a shorter padding changes the feature.
_PADDED_TO_FULL_LENGTH = ("siglip", "siglip2")
_MAX_SIDE = 2048
_QUESTION = "Describe this image in one short sentence."


class HuggingFaceDualEncoder(DualEncoder):
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
        model = _load_model("AutoModel", folder, name)
        for method in ("get_image_features", "get_text_features"):
            if not hasattr(model, method):
                raise UserError(
                    f"{name} is a {type(model).__name__}, which has no {method}; give a dual "
                    "encoder such as CLIP, SigLIP or BLIP"
                )
        processor = _load("AutoImageProcessor", folder, name, "image processor")
        self.preprocess: Preprocess = ProcessorTransform(processor, name)
        tokenizer = _load_tokenizer(folder, name)
        # Tokens per caption: what both the tokenizer and the position table allow.
        text_config = getattr(model.config, "text_config", model.config)
        positions = getattr(text_config, "max_position_embeddings", None) or 512
        length = min(int(tokenizer.model_max_length), int(positions))
        full = model.config.model_type in _PADDED_TO_FULL_LENGTH
        self.tokenize: Tokenize = CaptionTokenizer(
            tokenizer, padding="max_length" if full else True, max_length=length
        )
        settings = {"image_processor": _comparable(processor), "text_length": length}
        self.fingerprint = _fingerprint(model, tokenizer, settings)
        super().__init__(model.float(), device)
        self.dimension = self.encode_texts(["a"]).shape[1]

    def image_features(self, model: Any, images_BCHW: torch.Tensor) -> torch.Tensor:
        return _pooled(model.get_image_features(pixel_values=images_BCHW))

    def text_features(self, model: Any, tokens: Tokens) -> torch.Tensor:
        return _pooled(model.get_text_features(**tokens))


class ProcessorTransform:
    """One RGB image through a Hugging Face image processor, as a CHW tensor; picklable."""

    def __init__(self, processor: Any, name: str) -> None:
        self._processor, self._name = processor, name

    def __call__(self, image: Image.Image) -> torch.Tensor:
        inputs = self._processor(images=image, return_tensors="pt")
        if extra := set(inputs) - {"pixel_values", "pixel_mask"}:
            raise UserError(
                f"{self._name} needs {', '.join(sorted(extra))} beside the pixels, which is not "
                "supported; use its fixed-resolution variant"
            )
        return inputs["pixel_values"][0]


class HuggingFaceCaptioner(Captioner):
    """A model of transformers' image-text-to-text family with the processor beside its weights.

    On CUDA the weights are bfloat16 (what such models are published in), on a CPU float32.

    Args:
        folder: config.json, weights, and processor files.
        name: what the user called it.
        device: where to run it.

    Raises:
        UserError: not an image-to-text model, or one of its files is missing or broken.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        device: torch.device,
        prompt: str,
        beams: int,
        max_tokens: int,
    ) -> None:
        self.name = name
        self.preprocess: Preprocess = ToPixels()
        self._device = device
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = _load_model("AutoModelForImageTextToText", folder, name)
        self._load_processor(folder)
        self._prompt = prompt
        self._options = {
            "do_sample": False,
            "num_beams": beams,
            "max_new_tokens": max_tokens,
        }
        self.fingerprint = _fingerprint(
            model, self._tokenizer, {"prompt": self._prompt, **self._options}
        )
        self._model = model.eval().to(device, self._dtype)

    def describe(self, images: list[torch.Tensor]) -> list[str]:
        with TOKENIZING:
            inputs = self._inputs(images).to(self._device, self._dtype)
        with torch.inference_mode():
            ids = self._model.generate(**inputs, **self._options).cpu()
        prompt = inputs.get("input_ids")
        if prompt is not None and torch.equal(ids[:, : prompt.shape[1]], prompt.cpu()):
            ids = ids[:, prompt.shape[1] :]  # decoder-only models repeat it
        with TOKENIZING:
            texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [" ".join(text.split()).removeprefix(self._prompt).strip() for text in texts]

    def _load_processor(self, folder: Path) -> None:
        """The processor, or where a folder has none (ViT-GPT2), its two halves."""
        try:
            processor = _load("AutoProcessor", folder, self.name, "processor")
        except UserError:
            processor = None
        self._processor: Any = processor if hasattr(processor, "image_processor") else None
        if self._processor is not None:
            self._image_processor = self._processor.image_processor
            self._tokenizer = self._processor.tokenizer
        else:
            what = "AutoImageProcessor", folder, self.name, "image processor"
            self._image_processor = _load(*what)
            self._tokenizer = _load_tokenizer(folder, self.name)
        # New words follow the last token of the question, so padding goes before it.
        self._tokenizer.padding_side = "left"

    def _inputs(self, images: list[torch.Tensor]) -> Any:
        if self._processor is not None and self._processor.chat_template:
            question = {"type": "text", "text": self._prompt or _QUESTION}
            turn = {"role": "user", "content": [{"type": "image"}, question]}
            text = self._processor.apply_chat_template([turn], add_generation_prompt=True)
            given: list[Any] = [[image] for image in images]
        elif self._prompt and self._processor is not None:
            text, given = self._prompt, list(images)
        else:
            return self._image_processor(images=images, return_tensors="pt")
        return self._processor(
            images=given, text=[text] * len(images), padding=True, return_tensors="pt"
        )


class ToPixels:
    """An RGB image as uint8 ``(3, H, W)`` of its own size, at most 2048 on a side; picklable."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        if max(image.size) > _MAX_SIDE:
            image = image.copy()
            image.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.BICUBIC)
        return pixels(image)


def _load(factory: str, folder: Path, name: str, what: str, **options: Any) -> Any:
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
        reason = shorten(str(error).strip().partition("\n")[0] or type(error).__name__)
        raise UserError(f"cannot load the {what} of {name}: {reason}") from error


def _load_model(factory: str, folder: Path, name: str) -> Any:
    """The model; a weight missing from its file would stay random, so that is refused."""
    model, loading = _load(factory, folder, name, "weights", output_loading_info=True)
    if missing := loading["missing_keys"]:
        shown = ", ".join(sorted(missing)[:3])
        raise UserError(
            f"{name} has {len(missing)} weights missing of its architecture ({shown}, …); "
            "its features would be random"
        )
    return model


def _load_tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer of a local folder.

    transformers 5 gives an empty one, without a word, where the vocabulary file is missing; every
    caption would then have the same feature.
    """
    tokenizer = _load("AutoTokenizer", folder, name, "tokenizer")
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise UserError(
            f"cannot load the tokenizer of {name}: its vocabulary (tokenizer.json, vocab.txt, …) "
            "is missing from the folder"
        )
    return tokenizer


def _fingerprint(model: Any, tokenizer: Any, settings: dict[str, Any]) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items())
    described = {"config": _comparable(model.config), "vocabulary": vocabulary, **settings}
    return fingerprint(model.state_dict(), described)


def _comparable(config: Any) -> dict[str, Any]:
    """A config or processor as a dict without what differs between copies of one model."""
    volatile = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
    return {k: v for k, v in config.to_dict().items() if k not in volatile}


def _pooled(output: Any) -> torch.Tensor:
    """The projected feature: transformers 4 returned it bare, 5 returns it in an output object."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output
