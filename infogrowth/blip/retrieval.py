"""BLIP retrieval fine-tuning: contrastive with same-image targets, matching over all ranks.

Shapes: B pairs of this rank, G pairs among which negatives are drawn (this rank's, or all ranks'),
L image tokens, T text length, C candidates.
"""

from typing import Any

import torch

from infogrowth import distributed
from infogrowth.blip.config import BlipConfig
from infogrowth.blip.losses import same_id_targets, similarity_logits
from infogrowth.blip.momentum import MomentumBlip


class BlipRetrieval(MomentumBlip):
    """BLIP for retrieval on captioned images, where one image has several captions.

    Args:
        config: sizes and token ids.
        negative_all_rank: take matching negatives from the pairs of all ranks, not only one's own.
            All ranks must then pad their texts to the same length.
        options: as for :class:`MomentumBlip`.
    """

    pointer_name = "ptr_queue"
    ptr_queue: torch.Tensor

    def __init__(
        self, config: BlipConfig, *, negative_all_rank: bool = True, **options: Any
    ) -> None:
        super().__init__(config, with_ids=True, **options)
        self.negative_all_rank = negative_all_rank

    def forward(
        self,
        images_BCHW: torch.Tensor,
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor,
        alpha: float,
        class_ids: torch.Tensor,
        sample_ids: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, torch.Tensor]:
        """The losses ita and itm of one batch, float32; moves momentum weights, writes queues.

        Args:
            class_ids: ``(B,) int64`` >= 0, of which image a pair is: those of one image match each
                other. The others as for :meth:`BlipPretrain.forward`; sample ids are not needed.
        """
        features = self.contrast(images_BCHW, ids_BT, mask_BT)
        targets_BC = same_id_targets(class_ids, torch.cat([class_ids, self.idx_queue[0]]))
        ita = features.contrastive_loss((targets_BC, targets_BC), alpha)
        self.enqueue(features, class_ids)
        pool_tokens_GLW = features.image_tokens
        pool = [features.image.detach(), features.text.detach(), class_ids, ids_BT, mask_BT]
        if self.negative_all_rank:
            pool_tokens_GLW = distributed.all_gather_with_grad(pool_tokens_GLW)
            pool = [distributed.all_gather(each) for each in pool]
        image_GD, text_GD, ids_G, pool_ids_GT, pool_mask_GT = pool
        with torch.no_grad():
            i2t_BG = similarity_logits(features.image, text_GD, self.temp)
            t2i_BG = similarity_logits(features.text, image_GD, self.temp)
        itm = self.matching(
            features.image_tokens,
            (ids_BT, mask_BT),
            (i2t_BG, t2i_BG),
            class_ids[:, None] == ids_G[None, :],
            generator,
            pool=(pool_tokens_GLW, (pool_ids_GT, pool_mask_GT)),
        )
        return {"ita": ita, "itm": itm}
