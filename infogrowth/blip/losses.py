"""BLIP's losses and hard negatives as pure functions; what was gathered from ranks is an argument.

Shapes: B rows of this rank, C candidates (the batch, then the queue), D feature width, T text
length, V words. The arithmetic is float32 (float64 for float64 input) under any autocast.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

# Fixed: a learned one follows the texts, which are separated at once, and grows too sharp for the
# images, which then learn next to nothing (loss 7.07 against 6.68 after 100 steps of a trial).
CLASS_TEMPERATURE = 0.1

Function = TypeVar("Function", bound=Callable[..., Any])


def in_full_precision(function: Function) -> Function:
    """``function`` computed without autocast; tensors of 16 bits that it is given are float32."""

    @wraps(function)
    def computed(*inputs: Any, **options: Any) -> Any:
        wide: Any = [widened(each) if torch.is_tensor(each) else each for each in inputs]
        with torch.autocast(inputs[0].device.type, enabled=False):
            return function(*wide, **options)

    return computed  # type: ignore[return-value]


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in float32 if it has 16 bits, else as it is."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


@in_full_precision
def unit(features: torch.Tensor) -> torch.Tensor:
    """Rows at length one, in float32 or wider."""
    return F.normalize(features, dim=-1)


@in_full_precision
def similarity_logits(
    features_BD: torch.Tensor, candidates_CD: torch.Tensor, temperature: torch.Tensor | float
) -> torch.Tensor:
    """Cosine over temperature, ``(B, C)``; both sides are unit rows."""
    return features_BD @ candidates_CD.T / temperature


def same_id_targets(ids_B: torch.Tensor, candidate_ids_C: torch.Tensor) -> torch.Tensor:
    """``(B, C)``: candidates of the row's own image share the match equally (BLIP retrieval)."""
    same_BC = (ids_B[:, None] == candidate_ids_C[None, :]).float()
    return same_BC / same_BC.sum(1, keepdim=True)


def copies_of_row(ids_B: torch.Tensor, candidate_ids_C: torch.Tensor) -> torch.Tensor:
    """``(B, C) bool``: candidates that are the row's own sample again, not counting itself."""
    copies_BC = ids_B[:, None] == candidate_ids_C[None, :]
    itself_BC = torch.eye(*copies_BC.shape, dtype=torch.bool, device=copies_BC.device)
    return copies_BC & ~itself_BC


@in_full_precision
def contrastive_loss(
    logits_BC: torch.Tensor,
    momentum_logits_BC: torch.Tensor,
    hard_BC: torch.Tensor,
    alpha: float,
    hidden_BC: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy against ``alpha · softmax(momentum logits) + (1 − alpha) · hard`` (BLIP §3.2).

    The mean over rows; the targets take no gradient, and hidden candidates no part.
    """
    momentum_logits_BC = momentum_logits_BC.detach()
    if hidden_BC is not None:
        momentum_logits_BC = momentum_logits_BC.masked_fill(hidden_BC, float("-inf"))
        logits_BC = logits_BC.masked_fill(hidden_BC, float("-inf"))
    targets_BC = alpha * F.softmax(momentum_logits_BC, dim=1) + (1 - alpha) * hard_BC
    log_p_BC = F.log_softmax(logits_BC, dim=1)
    if hidden_BC is not None:
        log_p_BC = log_p_BC.masked_fill(hidden_BC, 0.0)  # their target is 0: 0 · −inf is nan
    return -(log_p_BC * targets_BC).sum(1).mean()


def class_loss(
    image_BD: torch.Tensor,
    text_ND: torch.Tensor,
    vectors_KD: torch.Tensor,
    class_ids_B: torch.Tensor,
    temperature: float = CLASS_TEMPERATURE,
) -> torch.Tensor:
    """Cross-entropy of the class by cosine to learned vectors, mean of images' and texts'.

    Args:
        image_BD, text_ND: unit rows; text n belongs to image n mod B.
        vectors_KD: one per class, of any length.
    """
    vectors_KD = unit(vectors_KD)
    losses = [
        F.cross_entropy(
            similarity_logits(features, vectors_KD, temperature),
            class_ids_B.repeat(len(features) // len(class_ids_B)),
        )
        for features in (image_BD, text_ND)
    ]
    return (losses[0] + losses[1]) / 2


@in_full_precision
def matching_loss(logits_N2: torch.Tensor, has_negative_B: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of match (class 1) against no match, mean over the pairs that exist.

    Args:
        logits_N2: ``(3B, 2)``: B own pairs, B with a wrong image, B with a wrong text.
        has_negative_B: rows for which the batch has a wrong partner at all. A batch of one, or of
            one image only, has none: its loss is that of the own pairs.
    """
    labels_N = torch.zeros(len(logits_N2), dtype=torch.int64, device=logits_N2.device)
    labels_N[: len(has_negative_B)] = 1
    each_N = F.cross_entropy(logits_N2, labels_N, reduction="none")
    exists_N = torch.cat([torch.ones_like(has_negative_B), has_negative_B, has_negative_B])
    return (each_N * exists_N).sum() / exists_N.sum()


@in_full_precision
def language_loss(
    logits_BTV: torch.Tensor, ids_BT: torch.Tensor, pad_token_id: int, smoothing: float
) -> torch.Tensor:
    """Next-word cross-entropy with label smoothing, mean over the words that are not padding."""
    return F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1),
        ids_BT[:, 1:].flatten(),
        ignore_index=pad_token_id,
        label_smoothing=smoothing,
    )


@torch.no_grad()
@in_full_precision
def negative_weights(
    logits_BC: torch.Tensor, forbidden_BC: torch.Tensor, floor: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight of each candidate as a negative ``(B, C)``, and which rows have one at all ``(B,)``.

    The weight is ``softmax(logits) + floor``, 0 for forbidden ones. Pretraining forbids a row's own
    pair and uses floor 1e-4; retrieval forbids all pairs of the same image and uses none. If all
    allowed weights of a row underflowed to 0 they are even; so are those of a row with nothing
    allowed, so that the draw does not fail. Nothing is read back from the device.
    """
    allowed_BC = ~forbidden_BC
    has_negative_B = allowed_BC.any(1)
    weights_BC = (F.softmax(logits_BC, dim=1) + floor).masked_fill(forbidden_BC, 0.0)
    even_BC = torch.where(has_negative_B[:, None], allowed_BC, True).to(weights_BC.dtype)
    usable_B1 = weights_BC.sum(1, keepdim=True) > 0
    return torch.where(usable_B1, weights_BC, even_BC), has_negative_B


@torch.no_grad()
def sample_negatives(
    weights_BC: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """One column per row ``(B,)``, drawn in proportion to its weight.

    The largest of weight / exponential noise is such a draw, and what ``torch.multinomial`` takes
    as well; but that first reads from the device whether the weights are any.
    """
    device = weights_BC.device if generator is None else generator.device
    noise_BC = torch.empty(weights_BC.shape, dtype=weights_BC.dtype, device=device)
    noise_BC.exponential_(generator=generator)
    return (weights_BC / noise_BC.to(weights_BC.device)).argmax(1)
