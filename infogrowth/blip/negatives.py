"""Hard negatives: how likely each wrong partner is, and the draw, as pure functions."""

import torch
import torch.nn.functional as F

from infogrowth.blip.losses import full_precision, widened


@torch.no_grad()
def negative_weights(
    logits_BC: torch.Tensor, forbidden_BC: torch.Tensor, floor: float = 0.0
) -> torch.Tensor:
    """Weight of each candidate as a negative: ``softmax(logits) + floor``, forbidden ones 0.

    Pretraining forbids a row's own pair and uses floor 1e-4; retrieval forbids all pairs of the
    same image and uses none.
    """
    with full_precision(logits_BC):
        weights_BC = F.softmax(widened(logits_BC), dim=1) + floor
        return weights_BC.masked_fill(forbidden_BC, 0.0)


@torch.no_grad()
def drawable(
    weights_BC: torch.Tensor, forbidden_BC: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights that can be drawn from in every row, and which rows have a negative at all.

    A row whose allowed weights all underflowed to 0 draws evenly among the allowed; a row with
    nothing allowed gets even weights, so that the draw does not fail, and False in
    ``has_negative (B,)``, so that the loss leaves it out. Nothing is read back from the device.
    """
    allowed_BC = ~forbidden_BC
    has_negative_B = allowed_BC.any(1)
    fallback_BC = torch.where(has_negative_B[:, None], allowed_BC, True).to(weights_BC.dtype)
    usable_B1 = weights_BC.sum(1, keepdim=True) > 0
    return torch.where(usable_B1, weights_BC, fallback_BC), has_negative_B


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
