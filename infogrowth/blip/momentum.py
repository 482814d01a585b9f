"""Momentum contrast for both trainings: momentum encoders, and the feature queues.

Shapes: B images and N texts of this rank (N = B but for pretraining with several captions an
image), D feature width, C candidates: the batch's momentum features, then the queue.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from infogrowth.blip.config import BlipConfig
from infogrowth.blip.dual import BlipDual, seeded
from infogrowth.blip.losses import (
    drawable,
    negative_weights,
    sample_negatives,
    similarity_logits,
    unit,
)
from infogrowth.blip.text import build_text_encoder
from infogrowth.blip.vision import build_vision

# The temperature is kept in this range before each step, as BLIP does.
TEMPERATURE_RANGE = (0.001, 0.5)
INITIAL_TEMPERATURE = 0.07


@dataclass(frozen=True)
class Features:
    """Unit features ``(B, D)`` of one batch, online and momentum, and what they compare with."""

    image_tokens: torch.Tensor  # (B, L, W)
    image: torch.Tensor
    text: torch.Tensor
    image_momentum: torch.Tensor
    text_momentum: torch.Tensor
    image_candidates: torch.Tensor  # (C, D)
    text_candidates: torch.Tensor  # (C, D)


class MomentumBlip(BlipDual):
    """A :class:`BlipDual` with momentum encoders, a temperature and queues.

    Args:
        queue_size: how many past momentum features are candidates; any size, 0 for none.
        momentum: how much of a momentum parameter stays at each step. With 0 and no queue the
            momentum features are the online ones: nothing is computed twice, and the candidates
            take a gradient as well (CLIP's loss).
        pointer_name: the official name of the queue's pointer, which differs between models.
        with_ids: keep the ids of the queued samples.
    """

    temp: nn.Parameter
    image_queue: torch.Tensor
    text_queue: torch.Tensor

    def __init__(
        self,
        config: BlipConfig,
        *,
        queue_size: int,
        momentum: float,
        pointer_name: str,
        with_ids: bool,
        seed: int,
        learn_padding: bool,
        vit_grad_ckpt: bool,
        vit_ckpt_layer: int,
    ) -> None:
        super().__init__(
            config,
            seed=seed,
            learn_padding=learn_padding,
            vit_grad_ckpt=vit_grad_ckpt,
            vit_ckpt_layer=vit_ckpt_layer,
        )
        self.momentum = momentum
        self.temp = nn.Parameter(torch.tensor(INITIAL_TEMPERATURE))
        with seeded(seed + 1):
            self.visual_encoder_m = build_vision(config)
            self.vision_proj_m = nn.Linear(config.vision_width, config.embed_dim)
            self.text_encoder_m = build_text_encoder(config, learn_padding)
            self.text_proj_m = nn.Linear(config.text_width, config.embed_dim)
            register_queues(self, config.embed_dim, queue_size, pointer_name, with_ids)
        self.copy_to_momentum()

    @property
    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Each online module with the momentum encoder that follows it."""
        return [
            (self.visual_encoder, self.visual_encoder_m),
            (self.vision_proj, self.vision_proj_m),
            (self.text_encoder, self.text_encoder_m),
            (self.text_proj, self.text_proj_m),
        ]

    @torch.no_grad()
    def copy_to_momentum(self) -> None:
        """Make the momentum encoders equal to the online ones; they never take a gradient."""
        for online, momentum in self.momentum_pairs:
            pairs = zip(online.parameters(), momentum.parameters(), strict=True)
            for source, target in pairs:
                target.copy_(source)
                target.requires_grad_(False)
        self._copy_buffers()

    @torch.no_grad()
    def update_momentum(self) -> None:
        """``m · momentum + (1 − m) · online`` with m = ``momentum``, in few launches for all."""
        sources: list[torch.Tensor] = []
        targets: list[torch.Tensor] = []
        for online, momentum in self.momentum_pairs:
            sources.extend(online.parameters())
            targets.extend(momentum.parameters())
        torch._foreach_mul_(targets, self.momentum)
        torch._foreach_add_(targets, sources, alpha=1.0 - self.momentum)
        self._copy_buffers()

    @torch.no_grad()
    def _copy_buffers(self) -> None:
        """Take statistics of normalization (a conv stem has some) as they are: they are means."""
        for online, momentum in self.momentum_pairs:
            for source, target in zip(online.buffers(), momentum.buffers(), strict=True):
                target.copy_(source)

    @torch.no_grad()
    def momentum_features(
        self, images_BCHW: torch.Tensor, ids_BT: torch.Tensor, mask_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit features ``(B, D)`` of images and texts by the momentum encoders; moves nothing."""
        image = self.vision_proj_m(self.visual_encoder_m(images_BCHW)[:, 0])
        text = self.text_proj_m(self._text(self.text_encoder_m, ids_BT, mask_BT)[:, 0])
        return unit(image), unit(text)

    def contrast(
        self, images_BCHW: torch.Tensor, ids_BT: torch.Tensor, mask_BT: torch.Tensor
    ) -> Features:
        """Features of a training batch: temperature kept in range, momentum moved, queue read.

        The order is BLIP's: online features, then the momentum update, then momentum features.
        """
        with torch.no_grad():
            self.temp.clamp_(*TEMPERATURE_RANGE)
        image_tokens, image = self.encode_image(images_BCHW)
        _, text = self.encode_text(ids_BT, mask_BT)
        self.update_momentum()
        if self.momentum == 0 and not self.image_queue.numel():
            image_momentum, text_momentum = image, text
        else:
            image_momentum, text_momentum = self.momentum_features(images_BCHW, ids_BT, mask_BT)
        return Features(
            image_tokens=image_tokens,
            image=image,
            text=text,
            image_momentum=image_momentum,
            text_momentum=text_momentum,
            # A copy: the queue is written in this step, while autograd still needs what it read.
            image_candidates=torch.cat([image_momentum, self.image_queue.T]),
            text_candidates=torch.cat([text_momentum, self.text_queue.T]),
        )

    def both_ways(self, features: Features) -> tuple[torch.Tensor, torch.Tensor]:
        """Online logits ``(B, C)``: image to texts, text to images."""
        return (
            similarity_logits(features.image, features.text_candidates, self.temp),
            similarity_logits(features.text, features.image_candidates, self.temp),
        )

    @torch.no_grad()
    def momentum_both_ways(self, features: Features) -> tuple[torch.Tensor, torch.Tensor]:
        """The same logits ``(B, C)`` by the momentum features."""
        return (
            similarity_logits(features.image_momentum, features.text_candidates, self.temp),
            similarity_logits(features.text_momentum, features.image_candidates, self.temp),
        )

    def hard_negatives(
        self,
        logits_BC: torch.Tensor,
        forbidden_BC: torch.Tensor,
        floor: float,
        generator: torch.Generator | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A wrong partner for each row, alike ones likelier: its column, whether there is one.

        Both ``(B,)``; see :func:`negative_weights` and :func:`drawable`.
        """
        weights_BC = negative_weights(logits_BC, forbidden_BC, floor)
        usable_BC, exists_B = drawable(weights_BC, forbidden_BC)
        return sample_negatives(usable_BC, generator), exists_B


def random_feature_queue(dimension: int, size: int) -> torch.Tensor:
    """``(dimension, size) float32`` random unit columns, which the first passes write over."""
    return F.normalize(torch.randn(dimension, size), dim=0)


@torch.no_grad()
def write_queue(
    queues: list[torch.Tensor], pointer: torch.Tensor, columns: list[torch.Tensor]
) -> None:
    """Write new columns at the pointer, in place, and move the pointer on.

    Any size goes with any batch: writing wraps at the end, and of a batch longer than the queue
    the last columns stay, where a one-by-one writing would have left them. No value is read back
    from the device.

    Args:
        queues: buffers ``(D, size)`` that move together.
        pointer: ``(1,) int64``, where the next column goes.
        columns: for each queue the new rows ``(N, D)``, oldest first.
    """
    size, count = queues[0].shape[1], len(columns[0])
    if not size or not count:
        return
    kept = min(size, count)
    offsets = torch.arange(count - kept, count, device=pointer.device)
    positions = (pointer + offsets) % size
    for queue, rows in zip(queues, columns, strict=True):
        queue.index_copy_(1, positions, rows[count - kept :].T.to(queue.dtype))
    pointer.copy_((pointer + count) % size)


def register_queues(
    module: nn.Module, dimension: int, size: int, pointer_name: str, with_ids: bool
) -> None:
    """Give ``module`` the buffers image_queue, text_queue, perhaps idx_queue, and the pointer."""
    module.register_buffer("image_queue", random_feature_queue(dimension, size))
    module.register_buffer("text_queue", random_feature_queue(dimension, size))
    if with_ids:
        module.register_buffer("idx_queue", torch.full((1, size), -100, dtype=torch.int64))
    module.register_buffer(pointer_name, torch.zeros(1, dtype=torch.int64))
