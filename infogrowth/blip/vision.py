"""The image transformer: timm's ViT as BLIP has it, with optional activation checkpointing."""

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from infogrowth.blip.config import BlipConfig


class VisionEncoder(VisionTransformer):
    """A ViT whose call gives all tokens, ``(B, 3, H, W) -> (B, L, width)``, [CLS] first."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.forward_features(images)


class RecomputableBlock(Block):
    """A transformer block that can be told the number format to compute in.

    fairscale's wrapper recomputes a block under autocast's default format, or on a CPU under none
    (its issue 1199), whatever the forward pass had: in bfloat16 training, float16 gradients that
    underflow. So the forward pass hands its own format on, and the recomputation gets the same.
    """

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, autocast_to: torch.dtype | None = None, **options: Any
    ) -> torch.Tensor:
        if autocast_to is None:
            return super().forward(x, **options)
        with torch.autocast(x.device.type, dtype=autocast_to):
            return super().forward(x, **options)


def _with_own_format(
    block: nn.Module, inputs: tuple[torch.Tensor, ...], options: dict[str, Any]
) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """A forward hook: adds the format that autocast has at the moment."""
    device = inputs[0].device.type
    if torch.is_autocast_enabled(device):
        options = {**options, "autocast_to": torch.get_autocast_dtype(device)}
    return inputs, options


def build_vision(
    config: BlipConfig,
    gradient_checkpointing: bool = False,
    checkpoint_layers: int = 0,
) -> VisionEncoder:
    """Build the image transformer under its official parameter names.

    Args:
        gradient_checkpointing: recompute activations in the backward pass (``vit_grad_ckpt``).
        checkpoint_layers: how many of the last blocks recompute (``vit_ckpt_layer``); 0 means all.
    """
    vision = VisionEncoder(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.vision_width,
        depth=config.vision_depth,
        num_heads=config.vision_heads,
        mlp_ratio=config.vision_hidden / config.vision_width,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=config.vision_norm_eps),
        drop_path_rate=config.drop_path,
        num_classes=0,
        block_fn=RecomputableBlock,
    )
    if gradient_checkpointing:
        from fairscale.nn.checkpoint import checkpoint_wrapper  # only who recomputes needs it

        first = len(vision.blocks) - checkpoint_layers if checkpoint_layers else 0
        for block in list(vision.blocks)[max(first, 0) :]:
            # The wrapper replaces the block's forward only, so state dict names stay official.
            checkpoint_wrapper(block)
            block.register_forward_pre_hook(_with_own_format, with_kwargs=True)
    return vision
