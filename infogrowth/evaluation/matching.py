"""The matching head for one image against many texts, without doing anything twice.

Same numbers as ``BlipDual.itm_score`` on every (image, text) pair. The image's keys and values are
projected once, not once per text (577 tokens against a caption's dozen: most of the work); all
texts' queries attend to them as one long sequence; texts are cut to the longest of their pass;
after the last self-attention only the first token goes on.

Shapes: N texts, T text length, L image tokens, W width, H heads.
"""

from typing import Any

import torch
import torch.nn.functional as F

from infogrowth.blip.dual import BlipDual

# Text tokens per pass: enough to fill the device, few enough for its cache or memory.
TOKENS_AT_ONCE = {"cpu": 2_048, "cuda": 16_384}


class ImageMatcher:
    """Scores texts against one image.

    Args:
        model: in ``eval()`` mode.
        tokens_LW: the image's tokens from ``model.encode_image``.
    """

    def __init__(self, model: BlipDual, tokens_LW: torch.Tensor) -> None:
        if model.training:
            raise ValueError("matching scores need eval mode: dropout would change them")
        self.model = model
        self.encoder: Any = model.text_encoder  # transformers' modules, untyped
        self.layers: list[Any] = list(self.encoder.encoder.layer)
        self.heads = model.config.text_heads
        image_1LW = tokens_LW[None]
        self.memory = [
            (
                self._split(layer.crossattention.self.key(image_1LW)),
                self._split(layer.crossattention.self.value(image_1LW)),
            )
            for layer in self.layers
        ]

    def scores(self, ids_NT: torch.Tensor, mask_NT: torch.Tensor) -> torch.Tensor:
        """Matching logits ``(N,) float32``; ids as the tokenizer gives them, [CLS] first."""
        lengths_N = mask_NT.sum(dim=1)
        order_N = torch.argsort(lengths_N, stable=True)
        scores_N = torch.empty(len(ids_NT), dtype=torch.float32, device=ids_NT.device)
        for rows in passes(lengths_N[order_N].tolist(), TOKENS_AT_ONCE[ids_NT.device.type]):
            chosen = order_N[rows]
            longest = int(lengths_N[chosen[-1]])
            scores_N[chosen] = self._pass(ids_NT[chosen, :longest], mask_NT[chosen, :longest])
        return scores_N

    def _pass(self, ids_NT: torch.Tensor, mask_NT: torch.Tensor) -> torch.Tensor:
        ids_NT = ids_NT.clone()
        ids_NT[:, 0] = self.model.config.enc_token_id
        states_NTW = self.encoder.embeddings(input_ids=ids_NT)
        mask = None if bool(mask_NT.all()) else mask_NT.bool()[:, None, None, :]
        for layer, memory in zip(self.layers, self.memory, strict=True):
            states_NTW = self._read_text(layer.attention, states_NTW, mask)
            if layer is self.layers[-1]:
                states_NTW = states_NTW[:, :1]  # the head looks at the first token only
            states_NTW = self._read_image(layer.crossattention, states_NTW, memory)
            states_NTW = layer.feed_forward_chunk(states_NTW)
        return self.model.itm_head(states_NTW[:, 0])[:, 1].float()

    def _read_text(
        self, block: Any, states_NTW: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        attention = block.self
        query, key, value = (
            self._split(projection(states_NTW))
            for projection in (attention.query, attention.key, attention.value)
        )
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return block.output(read.transpose(1, 2).flatten(2), states_NTW)

    def _read_image(
        self,
        block: Any,
        states_NTW: torch.Tensor,
        memory: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        # All texts as one sequence: they share the image, and do not see each other here.
        query = self._split(block.self.query(states_NTW).flatten(0, 1)[None])
        read = F.scaled_dot_product_attention(query, *memory)
        return block.output(read.transpose(1, 2).reshape(states_NTW.shape), states_NTW)

    def _split(self, states_NTW: torch.Tensor) -> torch.Tensor:
        """``(N, T, W)`` to ``(N, H, T, W / H)``."""
        return states_NTW.unflatten(2, (self.heads, -1)).transpose(1, 2)


def passes(lengths: list[int], budget: int) -> list[slice]:
    """Cut ascending lengths into runs of at most ``budget`` padded tokens (at least one text)."""
    cuts, start = [], 0
    for stop, length in enumerate(lengths):
        if stop > start and (stop + 1 - start) * length > budget:
            cuts.append(slice(start, stop))
            start = stop
    return [*cuts, slice(start, len(lengths))] if lengths else []
