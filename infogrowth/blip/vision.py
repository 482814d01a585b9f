"""The image transformer: timm's ViT as BLIP has it, with optional activation checkpointing."""

from functools import partial

import torch
from fairscale.nn.checkpoint import checkpoint_wrapper
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from infogrowth.blip.config import BlipConfig


class VisionEncoder(VisionTransformer):
    """A ViT whose call gives all tokens, ``(B, 3, H, W) -> (B, L, width)``, [CLS] first."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.forward_features(images)


def build_vision(
    config: BlipConfig,
    gradient_checkpointing: bool = False,
    checkpoint_layers: int = 0,
    drop_path: float | None = None,
) -> VisionEncoder:
    """Build the image transformer under its official parameter names.

    Args:
        gradient_checkpointing: recompute activations in the backward pass (``vit_grad_ckpt``).
        checkpoint_layers: how many of the last blocks recompute (``vit_ckpt_layer``); 0 means all.
        drop_path: stochastic depth of the last block; None takes it from ``config``.
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
        drop_path_rate=config.drop_path if drop_path is None else drop_path,
        num_classes=0,
    )
    if gradient_checkpointing:
        first = len(vision.blocks) - checkpoint_layers if checkpoint_layers else 0
        for block in list(vision.blocks)[max(first, 0) :]:
            # The wrapper replaces the block's forward only, so state dict names stay official.
            checkpoint_wrapper(block)
    return vision
