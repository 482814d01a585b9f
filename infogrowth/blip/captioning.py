"""Writing captions: BLIP's image encoder and text decoder, by beam search from a prompt."""

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from infogrowth.blip.config import BlipConfig
from infogrowth.blip.dual import seeded
from infogrowth.blip.text import build_text_decoder
from infogrowth.blip.vision import build_vision

# The words before every caption in BLIP's captioning data, which are taken off again.
PROMPT = "a picture of "


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
        """One caption per image, the same on every call and at any batch size.

        Args:
            images_BCHW: normalised images on the model's device.
            prompt: words that open every caption; they are not part of the result.
            beams: 1 for greedy search.
            max_length, min_length: in tokens, the prompt's included.
        """
        if not len(images_BCHW):
            return []
        training = self.training
        self.eval()
        try:
            tokens_BLW = self.visual_encoder(images_BCHW)
            start = self._start(tokenizer, prompt).to(images_BCHW.device)
            ids_BT = self.text_decoder.generate(  # type: ignore[misc]
                input_ids=start.expand(len(images_BCHW), -1),
                encoder_hidden_states=tokens_BLW,
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
        return [
            text.strip()
            for text in tokenizer.batch_decode(
                ids_BT[:, start.shape[1] :], skip_special_tokens=True
            )
        ]

    def _start(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
        """``(1, T)``: [DEC] and the prompt's tokens, without a closing [SEP]."""
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return torch.tensor([[self.config.bos_token_id, *ids]], dtype=torch.int64)
