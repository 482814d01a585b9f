"""Momentum contrast for both trainings: momentum encoders, feature queues, and the losses on them.

Shapes: B images and N texts of this rank (N = B but for pretraining with several captions an
image), D feature width, L image tokens, W a transformer's width, T text length, G images whose
tokens are at hand, C candidates: the batch's momentum features, then the queue.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from infogrowth import distributed
from infogrowth.blip.config import BlipConfig
from infogrowth.blip.losses import (
    contrastive_loss,
    matching_loss,
    negative_weights,
    sample_negatives,
    similarity_logits,
    unit,
)
from infogrowth.blip.model import BlipDual, seeded
from infogrowth.blip.text import build_text_encoder
from infogrowth.blip.vision import build_vision

# The temperature is kept in this range before each step, as BLIP does.
TEMPERATURE_RANGE = (0.001, 0.5)
INITIAL_TEMPERATURE = 0.07

BothWays = tuple[torch.Tensor, torch.Tensor]  # images to texts (B, C), texts to images (N, C)
Texts = tuple[torch.Tensor, torch.Tensor]  # ids and mask, (B, T) each


@dataclass(frozen=True)
class BatchFeatures:
    """Unit features of one batch, online and momentum, and how they compare with candidates."""

    image_tokens: torch.Tensor  # (B, L, W)
    image: torch.Tensor  # (B, D)
    text: torch.Tensor  # (N, D)
    image_momentum: torch.Tensor
    text_momentum: torch.Tensor
    logits: BothWays
    momentum_logits: BothWays

    def contrastive_loss(
        self, targets: BothWays, alpha: float, hidden_BC: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The contrastive loss (ITA), mean of both ways.

        Args:
            targets: the matching candidates of each row, which sum to one.
            alpha: share of the momentum model in the targets, 0 to 1.
            hidden_BC: candidates that take no part.
        """
        ways = zip(self.logits, self.momentum_logits, targets, strict=True)
        i2t, t2i = (contrastive_loss(*way, alpha, hidden_BC) for way in ways)
        return (i2t + t2i) / 2


class MomentumBlip(BlipDual):
    """A :class:`BlipDual` with momentum encoders, a temperature and queues.

    Args:
        config: sizes and token ids.
        queue_size: how many past momentum features are candidates; any size goes with any global
            batch, 0 for none.
        momentum: how much of a momentum parameter stays at each step. With 0 and no queue the
            momentum features are the online ones: nothing is computed twice, and the candidates
            take a gradient as well (CLIP's loss).
        with_ids: keep the ids of the queued samples.
        seed: random weights and queues are a function of it alone.
        recomputing: ``vit_grad_ckpt`` and ``vit_ckpt_layer`` of the online image transformer.
    """

    pointer_name: ClassVar[str]  # the official name of the queue's pointer
    temp: nn.Parameter
    image_queue: torch.Tensor
    text_queue: torch.Tensor
    idx_queue: torch.Tensor

    def __init__(
        self,
        config: BlipConfig,
        *,
        queue_size: int = 57600,
        momentum: float = 0.995,
        with_ids: bool = False,
        seed: int = 0,
        **recomputing: Any,
    ) -> None:
        super().__init__(config, seed=seed, **recomputing)
        self.momentum = momentum
        self.temp = nn.Parameter(torch.tensor(INITIAL_TEMPERATURE))
        with seeded(seed + 1):
            self.visual_encoder_m = build_vision(config)
            self.vision_proj_m = nn.Linear(config.vision_width, config.embed_dim)
            self.text_encoder_m = build_text_encoder(config)
            self.text_proj_m = nn.Linear(config.text_width, config.embed_dim)
            for name in ("image_queue", "text_queue"):  # random, until passes write over it
                queue_DQ = torch.randn(config.embed_dim, queue_size)
                self.register_buffer(name, F.normalize(queue_DQ, dim=0))
        if with_ids:
            self.register_buffer("idx_queue", torch.full((1, queue_size), -100, dtype=torch.int64))
        self.register_buffer(self.pointer_name, torch.zeros(1, dtype=torch.int64))
        self.copy_to_momentum()

    @property
    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Each online module with the momentum encoder that follows it."""
        names = ("visual_encoder", "vision_proj", "text_encoder", "text_proj")
        return [(self.get_submodule(name), self.get_submodule(f"{name}_m")) for name in names]

    def copy_to_momentum(self) -> None:
        """Make the momentum encoders equal to the online ones; they never take a gradient."""
        for online, momentum in self.momentum_pairs:
            momentum.load_state_dict(online.state_dict())
            momentum.requires_grad_(False)

    @torch.no_grad()
    def update_momentum(self) -> None:
        """``m · momentum + (1 − m) · online`` with m = ``momentum``, in few launches for all;
        statistics of normalization (a conv stem has some) are copied: they are means already."""
        pairs = self.momentum_pairs
        sources, targets = (
            tuple(tensor for pair in pairs for tensor in pair[side].parameters()) for side in (0, 1)
        )
        torch._foreach_mul_(targets, self.momentum)
        torch._foreach_add_(targets, sources, alpha=1.0 - self.momentum)
        for online, momentum in pairs:
            for source, target in zip(online.buffers(), momentum.buffers(), strict=True):
                target.copy_(source)

    def contrast(
        self, images_BCHW: torch.Tensor, ids_NT: torch.Tensor, mask_NT: torch.Tensor
    ) -> BatchFeatures:
        """Features of a training batch: temperature kept in range, momentum moved, queue read.

        The order is BLIP's: online features, then the momentum update, then momentum features.
        """
        with torch.no_grad():
            self.temp.clamp_(*TEMPERATURE_RANGE)
        image_tokens, image = self.encode_image(images_BCHW)
        _, text = self.encode_text(ids_NT, mask_NT)
        self.update_momentum()
        if self.momentum == 0 and not self.image_queue.numel():
            image_momentum, text_momentum = image, text
        else:
            with torch.no_grad():
                tokens_BLW = self.visual_encoder_m(images_BCHW)
                states_NTW = self._text(self.text_encoder_m, ids_NT, mask_NT)
                image_momentum = unit(self.vision_proj_m(tokens_BLW[:, 0]))
                text_momentum = unit(self.text_proj_m(states_NTW[:, 0]))
        # A copy: the queue is written in this step, while autograd still needs what it read.
        images_CD = torch.cat([image_momentum, self.image_queue.T])
        texts_CD = torch.cat([text_momentum, self.text_queue.T])

        def logits(image_BD: torch.Tensor, text_ND: torch.Tensor) -> BothWays:
            return (
                similarity_logits(image_BD, texts_CD, self.temp),
                similarity_logits(text_ND, images_CD, self.temp),
            )

        with torch.no_grad():
            soft = logits(image_momentum, text_momentum)
        both = logits(image, text)
        return BatchFeatures(image_tokens, image, text, image_momentum, text_momentum, both, soft)

    def enqueue(self, features: BatchFeatures, ids_B: torch.Tensor | None) -> None:
        """Write the momentum features of all ranks' batches into the queues, and the samples' ids
        where those are kept; of several texts of an image the first."""
        rows = len(features.image)
        new = {"image_queue": features.image_momentum, "text_queue": features.text_momentum[:rows]}
        if ids_B is not None:
            new["idx_queue"] = ids_B[:, None]
        queues = [self.get_buffer(name) for name in new]
        columns = [distributed.all_gather(rows) for rows in new.values()]
        write_queue(queues, self.get_buffer(self.pointer_name), columns)

    def matching(
        self,
        image_tokens_BLW: torch.Tensor,
        texts: Texts,
        logits: BothWays,
        forbidden_BC: torch.Tensor,
        generator: torch.Generator | None,
        floor: float = 0.0,
        pool: tuple[torch.Tensor, Texts] | None = None,
    ) -> torch.Tensor:
        """Matching loss (ITM): own pairs against each image with a wrong text, each text with a
        wrong image, drawn from C candidates, alike ones likelier (:func:`negative_weights`).

        Args:
            logits: images to the candidates' texts, texts to their images, ``(B, C)`` each.
            forbidden_BC: candidates that are not wrong.
            pool: image tokens and texts of the candidates; default: the batch is the pool.
        """
        wrong = []
        for logits_BC in reversed(logits):  # all images are drawn first
            weights_BC, exists_B = negative_weights(logits_BC, forbidden_BC, floor)
            wrong.append(sample_negatives(weights_BC, generator))
        wrong_image_B, wrong_text_B = wrong
        own_B = torch.arange(len(wrong_image_B), device=wrong_image_B.device)
        pool_texts = texts
        if pool is not None:
            # Own images, then the wrong ones: of a large pool only those are read.
            pool_tokens_CLW, pool_texts = pool
            image_tokens_BLW = torch.cat([image_tokens_BLW, pool_tokens_CLW[wrong_image_B]])
            wrong_image_B = own_B + len(own_B)
        ids_NT, mask_NT = (
            torch.cat([own, own, candidates[wrong_text_B]])
            for own, candidates in zip(texts, pool_texts, strict=True)
        )
        rows_N = torch.cat([own_B, wrong_image_B, own_B])
        return matching_loss(self.itm_logits(image_tokens_BLW, ids_NT, mask_NT, rows_N), exists_B)


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
