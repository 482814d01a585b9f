"""BLIP pretraining: contrastive, matching and language modelling losses on one batch (BLIP §3.2).

Shapes: B images of this rank, N texts (a multiple of B: text n belongs to image n mod B), L image
tokens, T text length, W width, C candidates, V words, K classes.
"""

import re
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import nn

from infogrowth.blip.config import BlipConfig
from infogrowth.blip.losses import class_loss, copies_of_row, language_loss, same_id_targets
from infogrowth.blip.model import seeded
from infogrowth.blip.momentum import BatchFeatures, BothWays, MomentumBlip
from infogrowth.blip.text import attention_bias, build_text_decoder, open_with

# Keeps every other pair of the batch possible as a negative, however unlike it is.
NEGATIVE_FLOOR = 1e-4

Objective = Literal["ita", "itm", "lm"]
OBJECTIVES: tuple[Objective, ...] = ("ita", "itm", "lm")
# Parameters that take no gradient where no objective uses them (ranks would wait for one).
_USED_BY = {
    r"(vision_proj|text_proj)\.|temp$": {"ita"},
    r"itm_head\.": {"itm"},
    r"text_encoder\..*\.crossattention\.": {"itm", "lm"},
    r"text_encoder\..*\.attention\.": {"ita", "itm"},
    r"text_decoder\.": {"lm"},  # but for what it shares with the text encoder
}


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
        # In the paper's pretraining [PAD] learns too: resized embeddings forget which row it is.
        self.text_encoder.embeddings.word_embeddings.padding_idx = None
        self.label_smoothing, self.objectives = label_smoothing, frozenset(objectives)
        self.id_aware_targets, self.class_positives = id_aware_targets, class_positives
        with seeded(seed + 2):
            self.text_decoder = build_text_decoder(config, self.text_encoder)
            if class_vectors:
                vectors_KD = torch.randn(class_vectors, config.embed_dim)
                self.class_vectors = nn.Parameter(vectors_KD * config.embed_dim**-0.5)
        unused = [names for names, users in _USED_BY.items() if not users & self.objectives]
        for name, parameter in self.named_parameters():
            if any(re.match(names, name) for names in unused):
                parameter.requires_grad_(False)

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
            ids_NT, mask_NT: from :func:`infogrowth.blip.text.tokenize`; those after the first B
                are more captions of the same images, which only ``ita`` reads.
            alpha: share of the momentum model in the contrastive targets, 0 to 1.
            sample_ids: ``(B,) int64`` >= 0, needed with ``id_aware_targets``.
            class_ids: ``(B,) int64`` >= 0, needed with ``class_positives`` and class vectors.
            generator: draws the negatives; None draws from torch's global state.
        """
        compared = class_ids if self.class_positives else sample_ids
        ids_B = compared if self.id_aware_targets or self.class_positives else None
        if ids_B is None and (self.id_aware_targets or self.class_positives):
            raise ValueError("id_aware_targets needs sample_ids, class_positives needs class_ids")
        rows = len(images_BCHW)
        texts = ids_NT[:rows], mask_NT[:rows]
        losses: dict[str, torch.Tensor] = {}
        if self.objectives == {"lm"}:
            image_tokens_BLW = self.visual_encoder(images_BCHW)
        else:
            features = self.contrast(images_BCHW, ids_NT, mask_NT)
            image_tokens_BLW = features.image_tokens
            copies_BC = None
            if ids_B is not None:
                copies_BC = copies_of_row(ids_B, torch.cat([ids_B, self.idx_queue[0]]))
            if "ita" in self.objectives:
                hidden_BC = None if self.class_positives else copies_BC
                targets = self._targets(features, ids_B)
                losses["ita"] = features.contrastive_loss(targets, alpha, hidden_BC)
                if hasattr(self, "class_vectors") and class_ids is not None:
                    losses["class"] = class_loss(
                        features.image, features.text, self.class_vectors, class_ids
                    )
            self.enqueue(features, ids_B)
            if "itm" in self.objectives:
                i2t_BC, t2i_NC = features.logits
                forbidden_BB = torch.eye(rows, dtype=torch.bool, device=images_BCHW.device)
                if copies_BC is not None:
                    forbidden_BB |= copies_BC[:, :rows]
                losses["itm"] = self.matching(
                    image_tokens_BLW,
                    texts,
                    (i2t_BC[:, :rows], t2i_NC[:rows, :rows]),
                    forbidden_BB,
                    generator,
                    NEGATIVE_FLOOR,
                )
        if "lm" in self.objectives:
            logits_BTV = self.text_decoder(
                input_ids=open_with(texts[0], self.config.bos_token_id),
                attention_mask=attention_bias(texts[1], self.text_proj.weight.dtype, causal=True),
                encoder_hidden_states=image_tokens_BLW,
                use_cache=False,
            ).logits
            losses["lm"] = language_loss(
                logits_BTV, texts[0], self.config.pad_token_id, self.label_smoothing
            )
        return losses

    def _targets(self, features: BatchFeatures, ids_B: torch.Tensor | None) -> BothWays:
        """Which candidates match the rows: their own, which come first, or all of their class."""
        if not self.class_positives or ids_B is None:
            i2t, t2i = (torch.eye(*each.shape, device=each.device) for each in features.logits)
            return i2t, t2i
        text_ids_N = ids_B.repeat(len(features.text) // len(features.image))
        queued = self.idx_queue[0]
        return (
            same_id_targets(ids_B, torch.cat([text_ids_N, queued])),
            same_id_targets(text_ids_N, torch.cat([ids_B, queued])),
        )
