"""BLIP pretraining: contrastive, matching and language modelling losses on one batch (BLIP §3.2).

Shapes: B pairs of this rank, L image tokens, T text length, W width, C candidates, V words.
"""

from dataclasses import dataclass

import torch

from infogrowth import distributed
from infogrowth.blip.config import BlipConfig
from infogrowth.blip.dual import seeded
from infogrowth.blip.losses import (
    contrastive_loss,
    copies_of_row,
    identity_targets,
    language_loss,
    matching_loss,
    soft_targets,
)
from infogrowth.blip.momentum import Features, MomentumBlip
from infogrowth.blip.negatives import Chooser, drawable, negative_weights, sample_negatives
from infogrowth.blip.queue import write_queue
from infogrowth.blip.text import build_text_decoder, open_with, tie_decoder

# Keeps every other pair of the batch possible as a negative, however unlike it is.
NEGATIVE_FLOOR = 1e-4


@dataclass(frozen=True)
class StepDetails:
    """What one training step saw on the way, without gradient; for tests and diagnosis."""

    image_feature: torch.Tensor  # (B, D) unit, online
    text_feature: torch.Tensor
    image_momentum: torch.Tensor  # (B, D) unit
    text_momentum: torch.Tensor
    image_tokens: torch.Tensor  # (B, L, W)
    weights_image_for_text: torch.Tensor  # (B, candidates) each text's weights over images
    weights_text_for_image: torch.Tensor
    negative_image: torch.Tensor  # (B,) the image chosen for each text
    negative_text: torch.Tensor
    itm_logits: torch.Tensor  # (3B, 2) own pairs, wrong image, wrong text
    lm_logits: torch.Tensor | None = None  # (B, T, V)


@dataclass(frozen=True)
class PretrainLosses:
    """The three losses of a step as float32 scalars, and on request its details."""

    ita: torch.Tensor
    itm: torch.Tensor
    lm: torch.Tensor
    details: StepDetails | None = None

    @property
    def total(self) -> torch.Tensor:
        """Their sum, which is what is minimised."""
        return self.ita + self.itm + self.lm


class BlipPretrain(MomentumBlip):
    """BLIP as pretrained: dual encoder, momentum, queues, and a decoder tied to the text encoder.

    Args:
        config: the shape.
        queue_size: past features that serve as candidates; any size goes with any global batch.
        momentum: how much of a momentum parameter stays at each step.
        label_smoothing: of the language modelling loss.
        id_aware_targets: hide candidates and negatives that are the row's own sample come back
            (a repeat, or a dataset smaller than the queue). Off as in the paper, where such a
            copy counts as a negative; on, a buffer ``idx_queue`` keeps the queued samples' ids.
        vit_grad_ckpt, vit_ckpt_layer: recompute the image transformer's (last) blocks.
        seed: random weights and queues are a function of it alone.
    """

    queue_ptr: torch.Tensor
    idx_queue: torch.Tensor

    def __init__(
        self,
        config: BlipConfig,
        *,
        queue_size: int = 57600,
        momentum: float = 0.995,
        label_smoothing: float = 0.1,
        id_aware_targets: bool = False,
        vit_grad_ckpt: bool = False,
        vit_ckpt_layer: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            config,
            queue_size=queue_size,
            momentum=momentum,
            pointer_name="queue_ptr",
            with_ids=id_aware_targets,
            seed=seed,
            learn_padding=True,
            vit_grad_ckpt=vit_grad_ckpt,
            vit_ckpt_layer=vit_ckpt_layer,
        )
        self.label_smoothing = label_smoothing
        self.id_aware_targets = id_aware_targets
        self.choose_negatives: Chooser = sample_negatives
        with seeded(seed + 2):
            self.text_decoder = build_text_decoder(config)
        tie_decoder(self.text_encoder, self.text_decoder)

    def forward(
        self,
        images_BCHW: torch.Tensor,
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor,
        alpha: float,
        sample_ids: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        details: bool = False,
    ) -> PretrainLosses:
        """The losses of one batch; moves the momentum weights and writes the queues.

        Args:
            images_BCHW: normalised images.
            ids_BT, mask_BT: from :func:`infogrowth.blip.tokenizer.tokenize`.
            alpha: share of the momentum model in the contrastive targets, 0 to 1.
            sample_ids: ``int64`` >= 0, needed with ``id_aware_targets``.
            generator: draws the negatives; None draws from torch's global state.
            details: also return the step's intermediate values.
        """
        if self.id_aware_targets and sample_ids is None:
            raise ValueError("id_aware_targets needs sample_ids")
        features = self.contrast(images_BCHW, ids_BT, mask_BT)
        copies_BC = self._copies(sample_ids)
        logits = self.both_ways(features)
        ita = self._contrastive(features, logits, alpha, copies_BC)
        self._write_queues(features, sample_ids)
        itm, seen = self._matching(features, logits, ids_BT, mask_BT, copies_BC, generator)
        lm_logits_BTV = self._decode(features.image_tokens, ids_BT, mask_BT)
        lm = language_loss(lm_logits_BTV, ids_BT, self.config.pad_token_id, self.label_smoothing)
        kept = None
        if details:
            kept = step_details(features, lm_logits=lm_logits_BTV.detach(), **seen)
        return PretrainLosses(ita, itm, lm, kept)

    def _copies(self, sample_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Which candidates are copies of the row's sample ``(B, C)``, or None when not asked."""
        if not self.id_aware_targets or sample_ids is None:
            return None
        return copies_of_row(sample_ids, torch.cat([sample_ids, self.idx_queue[0]]))

    def _contrastive(
        self,
        features: Features,
        logits: tuple[torch.Tensor, torch.Tensor],
        alpha: float,
        copies_BC: torch.Tensor | None,
    ) -> torch.Tensor:
        rows, candidates = logits[0].shape
        hard_BC = identity_targets(rows, candidates, logits[0].device)
        losses = [
            contrastive_loss(mine, soft_targets(slow, hard_BC, alpha, copies_BC), copies_BC)
            for mine, slow in zip(logits, self.momentum_both_ways(features), strict=True)
        ]
        return (losses[0] + losses[1]) / 2

    def _write_queues(self, features: Features, sample_ids: torch.Tensor | None) -> None:
        queues = [self.image_queue, self.text_queue]
        columns = [features.image_momentum, features.text_momentum]
        if self.id_aware_targets and sample_ids is not None:
            queues.append(self.idx_queue)
            columns.append(sample_ids[:, None])
        write_queue(queues, self.queue_ptr, [distributed.all_gather(rows) for rows in columns])

    def _matching(
        self,
        features: Features,
        logits: tuple[torch.Tensor, torch.Tensor],
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor,
        copies_BC: torch.Tensor | None,
        generator: torch.Generator | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Matching loss against the hard negatives of this rank's own batch."""
        rows = len(ids_BT)
        forbidden_BB = torch.eye(rows, dtype=torch.bool, device=ids_BT.device)
        if copies_BC is not None:
            forbidden_BB = forbidden_BB | copies_BC[:, :rows]
        seen: dict[str, torch.Tensor] = {}
        # The wrong images of all texts are drawn first, then the wrong texts: the draws' order.
        for name, wanted, logits_BC in (
            ("image_for_text", "negative_image", logits[1]),
            ("text_for_image", "negative_text", logits[0]),
        ):
            weights_BB = negative_weights(logits_BC[:, :rows], forbidden_BB, NEGATIVE_FLOOR)
            seen[f"weights_{name}"] = weights_BB
            usable_BB, has_negative_B = drawable(weights_BB, forbidden_BB)
            seen[wanted] = self.choose_negatives(usable_BB, generator)
        wrong_image_B, wrong_text_B = seen["negative_image"], seen["negative_text"]
        own_B = torch.arange(rows, device=ids_BT.device)
        logits_N2 = self.itm_logits(
            features.image_tokens,
            torch.cat([ids_BT, ids_BT, ids_BT[wrong_text_B]]),
            torch.cat([mask_BT, mask_BT, mask_BT[wrong_text_B]]),
            torch.cat([own_B, wrong_image_B, own_B]),
        )
        seen["itm_logits"] = logits_N2.detach()
        return matching_loss(logits_N2, has_negative_B), seen

    def _decode(
        self, image_tokens_BLW: torch.Tensor, ids_BT: torch.Tensor, mask_BT: torch.Tensor
    ) -> torch.Tensor:
        """Next-word logits ``(B, T, V)`` of the captions, given the images."""
        return self.text_decoder(
            input_ids=open_with(ids_BT, self.config.bos_token_id),
            attention_mask=mask_BT,
            encoder_hidden_states=image_tokens_BLW,
            use_cache=False,
        ).logits


def step_details(features: Features, **seen: torch.Tensor) -> StepDetails:
    """Collect a step's intermediate values, without gradient."""
    return StepDetails(
        image_feature=features.image.detach(),
        text_feature=features.text.detach(),
        image_momentum=features.image_momentum,
        text_momentum=features.text_momentum,
        image_tokens=features.image_tokens.detach(),
        **seen,
    )
