"""BLIP retrieval fine-tuning: contrastive with same-image targets, matching over all ranks.

Shapes: B pairs of this rank, G pairs of all ranks, L image tokens, T text length, C candidates.
"""

from dataclasses import dataclass

import torch

from infogrowth import distributed
from infogrowth.blip.config import BlipConfig
from infogrowth.blip.losses import (
    contrastive_loss,
    matching_loss,
    same_id_targets,
    similarity_logits,
    soft_targets,
)
from infogrowth.blip.momentum import Features, MomentumBlip, write_queue


@dataclass(frozen=True)
class _Pool:
    """The pairs among which negatives are chosen: this rank's, or all ranks'."""

    image_tokens: torch.Tensor  # (G, L, W) with gradient
    image: torch.Tensor  # (G, D) unit, no gradient
    text: torch.Tensor
    ids: torch.Tensor  # (G, T)
    mask: torch.Tensor
    image_ids: torch.Tensor  # (G,)


class BlipRetrieval(MomentumBlip):
    """BLIP for retrieval on captioned images, where one image has several captions.

    Args:
        config: sizes and token ids.
        queue_size: past features that serve as candidates; any size goes with any global batch.
        momentum: how much of a momentum parameter stays at each step.
        negative_all_rank: take matching negatives from the pairs of all ranks, not only one's own.
            All ranks must then pad their texts to the same length.
        vit_grad_ckpt, vit_ckpt_layer: recompute the image transformer's (last) blocks.
        seed: random weights and queues are a function of it alone.
    """

    idx_queue: torch.Tensor
    ptr_queue: torch.Tensor

    def __init__(
        self,
        config: BlipConfig,
        *,
        queue_size: int = 57600,
        momentum: float = 0.995,
        negative_all_rank: bool = True,
        vit_grad_ckpt: bool = False,
        vit_ckpt_layer: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            config,
            queue_size=queue_size,
            momentum=momentum,
            pointer_name="ptr_queue",
            with_ids=True,
            seed=seed,
            learn_padding=False,
            vit_grad_ckpt=vit_grad_ckpt,
            vit_ckpt_layer=vit_ckpt_layer,
        )
        self.negative_all_rank = negative_all_rank

    def forward(
        self,
        images_BCHW: torch.Tensor,
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor,
        image_ids: torch.Tensor,
        alpha: float,
        generator: torch.Generator | None = None,
    ) -> dict[str, torch.Tensor]:
        """The losses ita and itm of one batch, float32; moves momentum weights, writes queues.

        Args:
            images_BCHW: normalised images.
            ids_BT, mask_BT: from :func:`infogrowth.blip.tokenizer.tokenize`.
            image_ids: ``int64`` >= 0; pairs with the same id match each other.
            alpha: share of the momentum model in the contrastive targets, 0 to 1.
            generator: draws the negatives; None draws from torch's global state.
        """
        features = self.contrast(images_BCHW, ids_BT, mask_BT)
        hard_BC = same_id_targets(image_ids, torch.cat([image_ids, self.idx_queue[0]]))
        losses = [
            contrastive_loss(online, soft_targets(momentum, hard_BC, alpha))
            for online, momentum in zip(
                self.both_ways(features), self.momentum_both_ways(features), strict=True
            )
        ]
        all_ids_G = distributed.all_gather(image_ids)
        write_queue(
            [self.image_queue, self.text_queue, self.idx_queue],
            self.ptr_queue,
            [
                distributed.all_gather(features.image_momentum),
                distributed.all_gather(features.text_momentum),
                all_ids_G[:, None],
            ],
        )
        pool = self._pool(features, ids_BT, mask_BT, image_ids, all_ids_G)
        itm = self._matching(features, pool, ids_BT, mask_BT, image_ids, generator)
        return {"ita": (losses[0] + losses[1]) / 2, "itm": itm}

    def _pool(
        self,
        features: Features,
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor,
        image_ids: torch.Tensor,
        all_ids_G: torch.Tensor,
    ) -> _Pool:
        if not self.negative_all_rank:
            image, text = features.image.detach(), features.text.detach()
            return _Pool(features.image_tokens, image, text, ids_BT, mask_BT, image_ids)
        return _Pool(
            image_tokens=distributed.all_gather_with_grad(features.image_tokens),
            image=distributed.all_gather(features.image),
            text=distributed.all_gather(features.text),
            ids=distributed.all_gather(ids_BT),
            mask=distributed.all_gather(mask_BT),
            image_ids=all_ids_G,
        )

    def _matching(
        self,
        features: Features,
        pool: _Pool,
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor,
        image_ids: torch.Tensor,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """Matching loss against hard negatives of other images in the pool."""
        forbidden_BG = image_ids[:, None] == pool.image_ids[None, :]
        with torch.no_grad():
            # The wrong images of all texts are drawn first, then the wrong texts.
            wrong_image_B, _ = self.hard_negatives(
                similarity_logits(features.text, pool.image, self.temp), forbidden_BG, 0, generator
            )
            wrong_text_B, exists_B = self.hard_negatives(
                similarity_logits(features.image, pool.text, self.temp), forbidden_BG, 0, generator
            )
        rows_B = torch.arange(len(ids_BT), device=ids_BT.device)
        # Own images, then the wrong ones: of a large pool only those are read.
        logits_N2 = self.itm_logits(
            torch.cat([features.image_tokens, pool.image_tokens[wrong_image_B]]),
            torch.cat([ids_BT, ids_BT, pool.ids[wrong_text_B]]),
            torch.cat([mask_BT, mask_BT, pool.mask[wrong_text_B]]),
            torch.cat([rows_B, rows_B + len(rows_B), rows_B]),
        )
        return matching_loss(logits_N2, exists_B)
