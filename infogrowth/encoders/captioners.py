"""Any Hugging Face image-to-text model as a captioner: GIT, ViT-GPT2, BLIP-2, LLaVA, …"""

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from PIL import Image

from infogrowth.encoders.fingerprint import fingerprint
from infogrowth.encoders.huggingface import (
    comparable_config,
    load_part,
    load_tokenizer,
    refuse_missing_weights,
)
from infogrowth.encoders.inference import halving, pixels
from infogrowth.errors import UserError

_MAX_SIDE = 2048
_QUESTION = "Describe this image in one short sentence."


class HuggingFaceCaptioner:
    """A model of transformers' image-text-to-text family with the processor beside its weights.

    Beam search without sampling, so that the same image always gets the same words. On CUDA the
    weights are bfloat16 (what such models are published in), on a CPU float32.

    Args:
        folder: config.json, weights, and processor files.
        name: what the user called it.
        device: where to run it.
        prompt: what a chat model is asked, or what the others' caption continues; empty asks a
            chat model for a sentence and lets the others begin by themselves.
        beams: hypotheses kept by beam search.
        max_tokens: longest caption.

    Raises:
        UserError: not an image-to-text model, or one of its files is missing or broken.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        device: torch.device,
        prompt: str = "",
        beams: int = 3,
        max_tokens: int = 30,
    ) -> None:
        self.name = name
        self.preprocess = ToPixels()
        self._device = device
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model, loading = load_part(
            "AutoModelForImageTextToText", folder, name, "weights", output_loading_info=True
        )
        refuse_missing_weights(loading["missing_keys"], name)
        self._load_processor(folder)
        self._processing = Lock()
        self._prompt = prompt
        self._options = {"do_sample": False, "num_beams": beams, "max_new_tokens": max_tokens}
        self.fingerprint = fingerprint(
            model.state_dict(),
            {
                "config": comparable_config(model.config),
                "vocabulary": sorted(self._tokenizer.get_vocab().items()),
                "prompt": prompt,
                **self._options,
            },
        )
        self._model = model.eval().to(device, self._dtype)

    def caption(self, images: Sequence[torch.Tensor] | torch.Tensor) -> list[str]:
        return halving(self._caption, images)

    def _caption(self, images: Sequence[torch.Tensor] | torch.Tensor) -> list[str]:
        with self._processing:  # the tokenizers library refuses to be shared between threads
            inputs = self._inputs(list(images)).to(self._device, self._dtype)
        with torch.inference_mode():
            ids = self._model.generate(**inputs, **self._options).cpu()
        prompt = inputs.get("input_ids")
        if prompt is not None and ids.shape[1] >= prompt.shape[1]:
            length = prompt.shape[1]
            if torch.equal(ids[:, :length], prompt.cpu()):  # decoder-only models repeat it
                ids = ids[:, length:]
        with self._processing:
            texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [" ".join(text.split()).removeprefix(self._prompt).strip() for text in texts]

    def _load_processor(self, folder: Path) -> None:
        """The processor, or where a folder has none (ViT-GPT2), its two halves."""
        try:
            processor = load_part("AutoProcessor", folder, self.name, "processor")
        except UserError:
            processor = None
        self._processor: Any = processor if hasattr(processor, "image_processor") else None
        if self._processor is not None:
            self._image_processor = self._processor.image_processor
            self._tokenizer = self._processor.tokenizer
        else:
            self._image_processor = load_part(
                "AutoImageProcessor", folder, self.name, "image processor"
            )
            self._tokenizer = load_tokenizer(folder, self.name)
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
