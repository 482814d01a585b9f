"""The image transformer: timm's ViT as BLIP has it, with optional activation checkpointing."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torchvision.ops import Conv2dNormActivation

from infogrowth.blip.config import BlipConfig

# Channels of the convolutional stem: its first convolution, then one residual stage each.
STEM_CHANNELS = (32, 64, 128, 256)

# A convolution without bias, and BatchNorm.
_convolution = partial(Conv2dNormActivation, activation_layer=None)


class RecomputedBlock(Block):
    """A transformer block that is recomputed in the number format of its forward pass.

    fairscale's wrapper recomputes a block under autocast's default format, or on a CPU under none
    (its issue 1199), whatever the forward pass had: in bfloat16 training, float16 gradients that
    underflow. Its forward pass takes no gradients, the recomputation does.
    """

    autocast_to: torch.dtype | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        device = x.device.type
        if not torch.is_grad_enabled():
            enabled = torch.is_autocast_enabled(device)
            self.autocast_to = torch.get_autocast_dtype(device) if enabled else None
            return super().forward(x)
        with torch.autocast(device, self.autocast_to, enabled=self.autocast_to is not None):
            return super().forward(x)


class ConvStem(PatchEmbed):
    """A small residual network instead of the patch projection: ``(B, 3, H, W) -> (B, L, width)``.

    For models too small to learn from patches what a corner or a stripe is. Where several ranks
    train, each normalises by its own batch, and checkpoints keep the statistics of rank 0.
    """

    def __init__(self, *, embed_dim: int, **options: Any) -> None:
        super().__init__(embed_dim=embed_dim, **options)
        first, *stages = STEM_CHANNELS
        widths = zip([first, *stages], stages, strict=False)
        self.proj = nn.Sequential(  # type: ignore[assignment]
            _convolution(3, first, 3, stride=2),
            nn.ReLU(),
            *(ResidualStage(width, wider) for width, wider in widths),
            nn.Conv2d(stages[-1], embed_dim, 1),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # Channels last is the order that CPUs and GPUs convolve quickest in.
        return super().forward(images.contiguous(memory_format=torch.channels_last))


class ResidualStage(nn.Module):
    """Two 3×3 convolutions beside a 1×1 one, ``(B, C, H, W) -> (B, D, H/2, W/2)``."""

    def __init__(self, width: int, wider: int) -> None:
        super().__init__()
        self.conv1 = _convolution(width, wider, 3, stride=2)
        self.conv2 = _convolution(wider, wider, 3)
        self.shortcut = _convolution(width, wider, 1, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


def build_vision(
    config: BlipConfig, vit_grad_ckpt: bool = False, vit_ckpt_layer: int = 0
) -> VisionTransformer:
    """A ViT under its official names, whose call gives all tokens, [CLS] first:
    ``(B, 3, H, W) -> (B, L, width)``.

    Args:
        vit_grad_ckpt: recompute activations in the backward pass.
        vit_ckpt_layer: how many of the last blocks recompute; 0 means all.
    """
    vision = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.vision_width,
        depth=config.vision_depth,
        num_heads=config.vision_heads,
        mlp_ratio=config.vision_hidden / config.vision_width,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=config.vision_norm_eps),
        drop_path_rate=config.drop_path,
        embed_layer=ConvStem if config.vision_stem == "conv" else PatchEmbed,
        num_classes=0,
        global_pool="",
    )
    if vit_grad_ckpt:
        from fairscale.nn.checkpoint import checkpoint_wrapper  # only who recomputes needs it

        for block in vision.blocks[-vit_ckpt_layer:]:
            block.__class__ = RecomputedBlock
            # The wrapper replaces the block's forward only, so state dict names stay official.
            checkpoint_wrapper(block)
    return vision
