"""Cross-attention that reads each image once, however many texts are matched with it.

In the matching step every image meets several texts, and in re-ranking hundreds. Keys and values
depend on the image alone, so they are computed per image and handed out per text: the same
numbers, and at ViT-B/16 nearly half the work of a matched pair less.

Shapes: G images, N texts, L image tokens, T text length, H heads, D channels of a head, W width.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.models.blip.modeling_blip_text import BlipTextModel, BlipTextSelfAttention


class SharedImages(NamedTuple):
    """Images for N texts: text n reads image ``rows_N[n]``, or image n when there are no rows."""

    tokens_GLW: torch.Tensor
    rows_N: torch.Tensor | None


class SharedCrossAttention(BlipTextSelfAttention):
    """transformers' cross-attention, which also takes :class:`SharedImages` for image states."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | SharedImages | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not isinstance(encoder_hidden_states, SharedImages):
            return super().forward(hidden_states, attention_mask, encoder_hidden_states, **options)
        tokens_GLW, rows_N = encoder_hidden_states
        queries = self.query(hidden_states)
        texts, length, width = queries.shape
        keys_GHLD = self._heads(self.key(tokens_GLW))
        values_GHLD = self._heads(self.value(tokens_GLW))
        if rows_N is not None and len(tokens_GLW) == 1:
            # Queries do not see each other, so all texts' can stand in one long row.
            queries = queries.reshape(1, texts * length, width)
        elif rows_N is not None:
            keys_GHLD, values_GHLD = keys_GHLD[rows_N], values_GHLD[rows_N]
        context = F.scaled_dot_product_attention(
            self._heads(queries),
            keys_GHLD,
            values_GHLD,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return context.transpose(1, 2).reshape(texts, length, width), None

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        """``(n, length, W)`` to ``(n, H, length, D)``."""
        split = states.unflatten(-1, (self.num_attention_heads, self.attention_head_size))
        return split.transpose(1, 2)


def share_images(encoder: BlipTextModel) -> None:
    """Give a freshly built text encoder this cross-attention, its weights and names unchanged."""
    for index in range(encoder.config.num_hidden_layers):
        attention = encoder.get_submodule(f"encoder.layer.{index}.crossattention")
        shared = SharedCrossAttention(encoder.config, True, layer_idx=index)
        shared.load_state_dict(attention.get_submodule("self").state_dict())
        attention.add_module("self", shared)
