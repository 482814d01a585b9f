"""BLIP pretraining: contrastive, matching and language modelling losses on one batch (BLIP §3.2).

Shapes: B images of this rank, N texts (a multiple of B: text n belongs to image n mod B), L image
tokens, T text length, W width, C candidates, V words, K classes.
"""

from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import nn

from infogrowth import distributed
from infogrowth.blip.config import BlipConfig
from infogrowth.blip.dual import seeded
from infogrowth.blip.losses import (
    class_loss,
    contrastive_loss,
    copies_of_row,
    identity_targets,
    language_loss,
    matching_loss,
    same_id_targets,
    soft_targets,
)
from infogrowth.blip.momentum import Features, MomentumBlip, write_queue
from infogrowth.blip.text import build_text_decoder, causal_mask, open_with, tie_decoder

# Keeps every other pair of the batch possible as a negative, however unlike it is.
NEGATIVE_FLOOR = 1e-4

Objective = Literal["ita", "itm", "lm"]
OBJECTIVES: tuple[Objective, ...] = ("ita", "itm", "lm")


class BlipPretrain(MomentumBlip):
    """BLIP as pretrained: dual encoder, momentum, queues, and a decoder tied to the text encoder.

    Args:
        config: sizes and token ids.
        queue_size: past features that serve as candidates; any size goes with any global batch.
        momentum: how much of a momentum parameter stays at each step.
        objectives: which losses are computed: ``ita`` (contrastive), ``itm`` (matching), ``lm``
            (language modelling). What serves none of them keeps its weights; without itm and lm
            no text reads an image, which is most of the work.
        label_smoothing: of the language modelling loss.
        id_aware_targets: hide candidates and negatives that are the row's own sample come back
            (a repeat, or a dataset smaller than the queue). Off as in the paper, where such a
            copy counts as a negative; on, a buffer ``idx_queue`` keeps the queued samples' ids.
        class_positives: for data with classes: all candidates of a row's class match it, and no
            pair of its class is a wrong partner for the matching loss.
        class_vectors: of how many classes a vector is learned beside, which images and texts are
            told apart by; 0 for none. It helps small models, and no file but a checkpoint keeps
            them.
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
        objectives: Collection[Objective] = OBJECTIVES,
        label_smoothing: float = 0.1,
        id_aware_targets: bool = False,
        class_positives: bool = False,
        class_vectors: int = 0,
        vit_grad_ckpt: bool = False,
        vit_ckpt_layer: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            config,
            queue_size=queue_size,
            momentum=momentum,
            pointer_name="queue_ptr",
            with_ids=id_aware_targets or class_positives,
            seed=seed,
            learn_padding=True,
            vit_grad_ckpt=vit_grad_ckpt,
            vit_ckpt_layer=vit_ckpt_layer,
        )
        self.label_smoothing = label_smoothing
        self.id_aware_targets, self.class_positives = id_aware_targets, class_positives
        self.objectives = frozenset(objectives)
        with seeded(seed + 2):
            self.text_decoder = build_text_decoder(config)
            if class_vectors:
                vectors_KD = torch.randn(class_vectors, config.embed_dim)
                self.class_vectors = nn.Parameter(vectors_KD * config.embed_dim**-0.5)
        tie_decoder(self.text_encoder, self.text_decoder)
        self._freeze_unused()

    def forward(
        self,
        images_BCHW: torch.Tensor,
        ids_NT: torch.Tensor,
        mask_NT: torch.Tensor,
        alpha: float,
        sample_ids: torch.Tensor | None = None,
        class_ids: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, torch.Tensor]:
        """The losses of one batch by objective, float32; moves momentum weights, writes queues.

        Args:
            images_BCHW: normalised images.
            ids_NT, mask_NT: from :func:`infogrowth.blip.tokenizer.tokenize`; those after the
                first B are more captions of the same images, which only ``ita`` reads.
            alpha: share of the momentum model in the contrastive targets, 0 to 1.
            sample_ids: ``(B,) int64`` >= 0, needed with ``id_aware_targets``.
            class_ids: ``(B,) int64`` >= 0, needed with ``class_positives`` and class vectors.
            generator: draws the negatives; None draws from torch's global state.
        """
        if self.id_aware_targets and sample_ids is None:
            raise ValueError("id_aware_targets needs sample_ids")
        if self.class_positives:
            if class_ids is None:
                raise ValueError("class_positives needs class_ids")
            sample_ids = class_ids
        rows = len(images_BCHW)
        ids_BT, mask_BT = ids_NT[:rows], mask_NT[:rows]
        losses: dict[str, torch.Tensor] = {}
        if self.objectives == {"lm"}:
            image_tokens_BLW = self.visual_encoder(images_BCHW)
        else:
            features = self.contrast(images_BCHW, ids_NT, mask_NT)
            image_tokens_BLW = features.image_tokens
            copies_BC = self._copies(sample_ids)
            logits = self.both_ways(features)
            if "ita" in self.objectives:
                losses["ita"] = self._contrastive(features, logits, alpha, sample_ids, copies_BC)
                if hasattr(self, "class_vectors") and class_ids is not None:
                    losses["class"] = class_loss(
                        features.image, features.text, self.class_vectors, class_ids
                    )
            self._write_queues(features, sample_ids)
            if "itm" in self.objectives:
                losses["itm"] = self._matching(
                    features, logits, ids_BT, mask_BT, copies_BC, generator
                )
        if "lm" in self.objectives:
            losses["lm"] = self._language(image_tokens_BLW, ids_BT, mask_BT)
        return losses

    def _freeze_unused(self) -> None:
        """Take no gradient for what no objective uses (ranks would wait for one)."""
        aims = self.objectives
        unused: list[nn.Module] = []
        if "ita" not in aims:
            unused += [self.vision_proj, self.text_proj]
            self.temp.requires_grad_(False)
        if "itm" not in aims:
            unused.append(self.itm_head)
        layers: list[Any] = list(self.text_encoder.encoder.layer)
        if aims <= {"ita"}:
            unused += [layer.crossattention for layer in layers]
        if aims <= {"lm"}:
            unused += [layer.attention for layer in layers]
        if "lm" not in aims:
            decoder: Any = self.text_decoder
            unused += [layer.attention for layer in decoder.bert.encoder.layer]
            unused.append(decoder.cls.predictions.transform)
            decoder.cls.predictions.bias.requires_grad_(False)
        for module in unused:
            module.requires_grad_(False)

    def _copies(self, sample_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Which candidates are copies of the row's sample ``(B, C)``, or None when not asked."""
        if not (self.id_aware_targets or self.class_positives) or sample_ids is None:
            return None
        return copies_of_row(sample_ids, torch.cat([sample_ids, self.idx_queue[0]]))

    def _contrastive(
        self,
        features: Features,
        logits: tuple[torch.Tensor, torch.Tensor],
        alpha: float,
        sample_ids: torch.Tensor | None,
        copies_BC: torch.Tensor | None,
    ) -> torch.Tensor:
        """Mean of both ways' losses: images to texts ``(B, C)``, texts to images ``(N, C)``."""
        hidden: torch.Tensor | None = None
        targets: list[torch.Tensor] = []
        if self.class_positives and sample_ids is not None:
            repeats = len(features.text) // len(features.image)
            text_ids_N = sample_ids.repeat(repeats)
            queued = self.idx_queue[0]
            targets.append(same_id_targets(sample_ids, torch.cat([text_ids_N, queued])))
            targets.append(same_id_targets(text_ids_N, torch.cat([sample_ids, queued])))
        else:
            hidden = copies_BC
            targets += [identity_targets(len(each), each.shape[1], each.device) for each in logits]
        losses = [
            contrastive_loss(online, soft_targets(momentum, hard, alpha, hidden), hidden)
            for online, momentum, hard in zip(
                logits, self.momentum_both_ways(features), targets, strict=True
            )
        ]
        return (losses[0] + losses[1]) / 2

    def _write_queues(self, features: Features, sample_ids: torch.Tensor | None) -> None:
        rows = len(features.image)
        queues = [self.image_queue, self.text_queue]
        columns = [features.image_momentum, features.text_momentum[:rows]]
        if hasattr(self, "idx_queue") and sample_ids is not None:
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
    ) -> torch.Tensor:
        """Matching loss against the hard negatives of this rank's own batch."""
        rows = len(ids_BT)
        forbidden_BB = torch.eye(rows, dtype=torch.bool, device=ids_BT.device)
        if copies_BC is not None:
            forbidden_BB = forbidden_BB | copies_BC[:, :rows]
        # The wrong images of all texts are drawn first, then the wrong texts: the draws' order.
        wrong_image_B, _ = self.hard_negatives(
            logits[1][:rows, :rows], forbidden_BB, NEGATIVE_FLOOR, generator
        )
        wrong_text_B, exists_B = self.hard_negatives(
            logits[0][:, :rows], forbidden_BB, NEGATIVE_FLOOR, generator
        )
        own_B = torch.arange(rows, device=ids_BT.device)
        logits_N2 = self.itm_logits(
            features.image_tokens,
            torch.cat([ids_BT, ids_BT, ids_BT[wrong_text_B]]),
            torch.cat([mask_BT, mask_BT, mask_BT[wrong_text_B]]),
            torch.cat([own_B, wrong_image_B, own_B]),
        )
        return matching_loss(logits_N2, exists_B)

    def _language(
        self, image_tokens_BLW: torch.Tensor, ids_BT: torch.Tensor, mask_BT: torch.Tensor
    ) -> torch.Tensor:
        """Language modelling loss of the captions, given the images."""
        logits_BTV = self.text_decoder(
            input_ids=open_with(ids_BT, self.config.bos_token_id),
            attention_mask=causal_mask(mask_BT, self.text_proj.weight.dtype),
            encoder_hidden_states=image_tokens_BLW,
            use_cache=False,
        ).logits
        return language_loss(logits_BTV, ids_BT, self.config.pad_token_id, self.label_smoothing)
