"""BLIP to infer with: two encoders into one feature space and the matching head, or an encoder and
a decoder that writes captions.

Shapes: B images or texts, G images for N texts, L image tokens, T text length, W a transformer's
width, D feature width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from infogrowth.blip.config import BlipConfig
from infogrowth.blip.losses import unit, widened
from infogrowth.blip.text import (
    SharedImages,
    attention_bias,
    build_text_decoder,
    build_text_encoder,
    open_with,
)
from infogrowth.blip.vision import build_vision

# The words before every caption in BLIP's captioning data, which are taken off again.
PROMPT = "a picture of "


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initialise parameters from ``seed`` alone and leave the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class BlipDual(nn.Module):
    """Image and text encoders, their projections and the matching head, officially named.

    Args:
        config: sizes and token ids.
        seed: random weights are a function of it alone.
        vit_grad_ckpt, vit_ckpt_layer: see :func:`infogrowth.blip.vision.build_vision`.
    """

    def __init__(
        self,
        config: BlipConfig,
        *,
        seed: int = 0,
        vit_grad_ckpt: bool = False,
        vit_ckpt_layer: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        with seeded(seed):
            self.visual_encoder = build_vision(config, vit_grad_ckpt, vit_ckpt_layer)
            self.text_encoder = build_text_encoder(config)
            self.vision_proj = nn.Linear(config.vision_width, config.embed_dim)
            self.text_proj = nn.Linear(config.text_width, config.embed_dim)
            self.itm_head = nn.Linear(config.text_width, 2)

    def encode_image(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Image tokens ``(B, L, W)`` and unit features ``(B, D) float32``."""
        tokens_BLW = self.visual_encoder(images_BCHW)
        return tokens_BLW, unit(self.vision_proj(tokens_BLW[:, 0]))

    def encode_text(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Text states ``(B, T, W)`` and unit features ``(B, D) float32``; no image is read."""
        states_BTW = self._text(self.text_encoder, ids_BT, mask_BT)
        return states_BTW, unit(self.text_proj(states_BTW[:, 0]))

    def itm_logits(
        self,
        image_tokens_GLW: torch.Tensor,
        ids_NT: torch.Tensor,
        mask_NT: torch.Tensor,
        image_rows_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Matching logits ``(N, 2) float32`` of N image-text pairs; class 1 is "they match".

        Args:
            image_tokens_GLW: tokens of G images from :meth:`encode_image`.
            ids_NT, mask_NT: texts that start with [CLS] as the tokenizer gives them, which
                becomes [ENC] here.
            image_rows_N: which of the images text n is paired with; default: image n, G = N.
                An image that meets several texts is then read once, which is much less work.
        """
        opened_NT = open_with(ids_NT, self.config.enc_token_id)
        images = SharedImages(image_tokens_GLW, image_rows_N)
        states_NTW = self._text(self.text_encoder, opened_NT, mask_NT, images)
        return widened(self.itm_head(states_NTW[:, 0]))

    def compile_encoders(self, **options: object) -> None:
        """``torch.compile`` the transformers in place; state dict names stay as they are."""
        for name, module in self.named_children():
            if name.startswith(("visual_encoder", "text_encoder", "text_decoder")):
                module.compile(**options)

    @staticmethod
    def _text(
        encoder: nn.Module,
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor,
        images: SharedImages | None = None,
    ) -> torch.Tensor:
        mask_B11T = attention_bias(mask_BT, next(encoder.parameters()).dtype)
        # No mask for the image tokens: all are real, and transformers ignores one anyway.
        output = encoder(input_ids=ids_BT, attention_mask=mask_B11T, encoder_hidden_states=images)
        return output.last_hidden_state


class BlipCaptioner(nn.Module):
    """BLIP as a captioner, named as in the official captioning checkpoints.

    A pretraining checkpoint loads too: its decoder is the text encoder but for self-attention.
    """

    def __init__(self, config: BlipConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with seeded(seed):
            self.visual_encoder = build_vision(config)
            self.text_decoder = build_text_decoder(config)

    @torch.inference_mode()
    def caption(
        self,
        images_BCHW: torch.Tensor,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str = PROMPT,
        beams: int = 3,
        max_length: int = 20,
        min_length: int = 5,
    ) -> list[str]:
        """One caption per image by beam search, the same on every call and at any batch size.

        Args:
            images_BCHW: normalised images on the model's device.
            prompt: words that open every caption; they are not part of the result.
            beams: 1 for greedy search.
            max_length, min_length: in tokens, the prompt's included.
        """
        if not len(images_BCHW):
            return []
        words = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        start = torch.tensor([[self.config.bos_token_id, *words]], device=images_BCHW.device)
        training = self.training
        self.eval()
        try:
            ids_BT = self.text_decoder.generate(  # type: ignore[misc]
                input_ids=start.expand(len(images_BCHW), -1),
                encoder_hidden_states=self.visual_encoder(images_BCHW),
                do_sample=False,
                num_beams=beams,
                max_length=max_length,
                min_length=min_length,
                eos_token_id=self.config.sep_token_id,
                pad_token_id=self.config.pad_token_id,
            )
        finally:
            self.train(training)
        # The prompt is removed as tokens: a caption cannot lose words that merely look like it.
        written_BT = ids_BT[:, start.shape[1] :]
        return [t.strip() for t in tokenizer.batch_decode(written_BT, skip_special_tokens=True)]
