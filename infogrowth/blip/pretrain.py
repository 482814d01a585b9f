"""BLIP pretraining: contrastive, matching and language modelling losses on one batch (BLIP §3.2).

Shapes: B images of this rank, N texts (a multiple of B: text n belongs to image n mod B), L image
tokens, T text length, W width, C candidates, V words, K classes.
"""

import re
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import nn

from infogrowth import distributed
from infogrowth.blip.config import BlipConfig
from infogrowth.blip.dual import seeded
from infogrowth.blip.losses import (
    class_loss,
    copies_of_row,
    identity_targets,
    language_loss,
    same_id_targets,
)
from infogrowth.blip.momentum import BothWays, Features, MomentumBlip, Texts, write_queue
from infogrowth.blip.text import build_text_decoder, causal_mask, open_with

# Keeps every other pair of the batch possible as a negative, however unlike it is.
NEGATIVE_FLOOR = 1e-4

Objective = Literal["ita", "itm", "lm"]
OBJECTIVES: tuple[Objective, ...] = ("ita", "itm", "lm")


class BlipPretrain(MomentumBlip):
    """BLIP as pretrained: dual encoder, momentum, queues, and a decoder tied to the text encoder.

    Args:
        config: sizes and token ids.
        objectives: which losses are computed: ``ita`` (contrastive), ``itm`` (matching), ``lm``
            (language modelling). What serves none of them keeps its weights; without itm and lm
            no text reads an image, which is most of the work.
        label_smoothing: of the language modelling loss.
        id_aware_targets: hide candidates and negatives that are the row's own sample come back
            (a repeat, or a dataset smaller than the queue). Off as in the paper, where such a
            copy counts as a negative; on, a buffer ``idx_queue`` keeps the queued samples' ids.
        class_positives: for data with classes: all candidates of a row's class match it, and no
            pair of its class is a wrong partner for the matching loss.
        class_vectors: of how many classes a vector is learned, by which images and texts are
            classified; 0 for none. It helps small models, and no file but a checkpoint keeps them.
        options: as for :class:`MomentumBlip`.
    """

    learn_padding = True
    pointer_name = "queue_ptr"
    queue_ptr: torch.Tensor

    def __init__(
        self,
        config: BlipConfig,
        *,
        objectives: Collection[Objective] = OBJECTIVES,
        label_smoothing: float = 0.1,
        id_aware_targets: bool = False,
        class_positives: bool = False,
        class_vectors: int = 0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        with_ids = id_aware_targets or class_positives
        super().__init__(config, with_ids=with_ids, seed=seed, **options)
        self.label_smoothing = label_smoothing
        self.id_aware_targets, self.class_positives = id_aware_targets, class_positives
        self.objectives = frozenset(objectives)
        with seeded(seed + 2):
            self.text_decoder = build_text_decoder(config, self.text_encoder)
            if class_vectors:
                vectors_KD = torch.randn(class_vectors, config.embed_dim)
                self.class_vectors = nn.Parameter(vectors_KD * config.embed_dim**-0.5)
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
            logits = self.logits(features.image, features.text, features)
            if "ita" in self.objectives:
                targets = self._targets(features, logits, sample_ids)
                hidden_BC = None if self.class_positives else copies_BC
                losses["ita"] = self.contrastive(features, logits, targets, alpha, hidden_BC)
                if hasattr(self, "class_vectors") and class_ids is not None:
                    losses["class"] = class_loss(
                        features.image, features.text, self.class_vectors, class_ids
                    )
            self._write_queues(features, sample_ids)
            if "itm" in self.objectives:
                losses["itm"] = self._matching_in_batch(
                    features, logits, (ids_BT, mask_BT), copies_BC, generator
                )
        if "lm" in self.objectives:
            losses["lm"] = self._language(image_tokens_BLW, ids_BT, mask_BT)
        return losses

    def _freeze_unused(self) -> None:
        """Take no gradient for what no objective uses (ranks would wait for one)."""
        used_by = {
            r"(vision_proj|text_proj)\.|temp$": {"ita"},
            r"itm_head\.": {"itm"},
            r"text_encoder\..*\.crossattention\.": {"itm", "lm"},
            r"text_encoder\..*\.attention\.": {"ita", "itm"},
            r"text_decoder\.": {"lm"},  # but for what it shares with the text encoder
        }
        unused = [names for names, users in used_by.items() if not users & self.objectives]
        for name, parameter in self.named_parameters():
            if any(re.match(names, name) for names in unused):
                parameter.requires_grad_(False)

    def _copies(self, sample_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Which candidates are copies of the row's sample ``(B, C)``, or None when not asked."""
        if not (self.id_aware_targets or self.class_positives) or sample_ids is None:
            return None
        return copies_of_row(sample_ids, torch.cat([sample_ids, self.idx_queue[0]]))

    def _targets(
        self, features: Features, logits: BothWays, sample_ids: torch.Tensor | None
    ) -> BothWays:
        """Which candidates match the rows: their own, or all of their class."""
        if not self.class_positives or sample_ids is None:
            i2t, t2i = (identity_targets(len(each), each.shape[1], each.device) for each in logits)
            return i2t, t2i
        text_ids_N = sample_ids.repeat(len(features.text) // len(features.image))
        queued = self.idx_queue[0]
        return (
            same_id_targets(sample_ids, torch.cat([text_ids_N, queued])),
            same_id_targets(text_ids_N, torch.cat([sample_ids, queued])),
        )

    def _write_queues(self, features: Features, sample_ids: torch.Tensor | None) -> None:
        rows = len(features.image)
        queues = [self.image_queue, self.text_queue]
        columns = [features.image_momentum, features.text_momentum[:rows]]
        if hasattr(self, "idx_queue") and sample_ids is not None:
            queues.append(self.idx_queue)
            columns.append(sample_ids[:, None])
        write_queue(queues, self.queue_ptr, [distributed.all_gather(rows) for rows in columns])

    def _matching_in_batch(
        self,
        features: Features,
        logits: BothWays,
        texts: Texts,
        copies_BC: torch.Tensor | None,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """Matching loss against the hard negatives of this rank's own batch."""
        own_B = torch.arange(len(texts[0]), device=texts[0].device)
        rows = len(own_B)
        forbidden_BB = torch.eye(rows, dtype=torch.bool, device=own_B.device)
        if copies_BC is not None:
            forbidden_BB = forbidden_BB | copies_BC[:, :rows]
        i2t_BC, t2i_NC = logits
        wrong_image_B, wrong_text_B, exists_B = self.hard_negatives(
            t2i_NC[:rows, :rows], i2t_BC[:, :rows], forbidden_BB, NEGATIVE_FLOOR, generator
        )
        wrong_texts = (texts[0][wrong_text_B], texts[1][wrong_text_B])
        tokens_BLW = features.image_tokens
        return self.matching(tokens_BLW, own_B, wrong_image_B, texts, wrong_texts, exists_B)

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
