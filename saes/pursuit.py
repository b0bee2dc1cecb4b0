"""Matching pursuit: latents are chosen one after another, each the best for what the ones before it left over.

There is no encoder to learn. ``x - b_dec`` is the first residual; each step takes the decoder row with the largest inner
product, gives its latent that much and subtracts the row times it (Mallat and Zhang 1993; as an autoencoder, Costa et al.
2025, arXiv:2506.03093).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Pursuit:
    """When to stop: at a residual shorter than ``residual_threshold`` (0: never for that), after ``max_iterations`` steps
    (``None``: ``d_in``), or when a step opens no new latent. The names and defaults are SAELens'."""

    residual_threshold: float = 1e-2
    max_iterations: int | None = None
    stop_on_duplicate_support: bool = True


def pursue(
    x: Float[Tensor, "group row d_in"], W_dec: Float[Tensor, "group d_sae d_in"], until: Pursuit
) -> Float[Tensor, "group row d_sae"]:
    """The latents of centred inputs, equal to SAELens' step by step.

    Costs one product with ``W_dec`` a step, all rows until the last has stopped. Gradients flow through the values of
    latents and not through their choice.
    """
    group = torch.arange(len(x), device=x.device).unsqueeze(1)
    residual, latents = x, x.new_zeros(*x.shape[:2], W_dec.shape[1])
    is_open, is_done = torch.zeros_like(latents, dtype=torch.bool), torch.zeros_like(x[..., 0], dtype=torch.bool)
    for _ in range(x.shape[-1] if until.max_iterations is None else until.max_iterations):
        best = torch.bmm(residual.detach(), W_dec.detach().mT).argmax(-1)
        row = W_dec[group, best]
        size = (residual * row).sum(-1, keepdim=True).relu() * ~is_done.unsqueeze(-1)
        latents = latents.scatter_add(-1, best.unsqueeze(-1), size)
        residual = residual - size * row
        if until.stop_on_duplicate_support:
            was_open, is_open = is_open, latents != 0
            is_done = is_done | (is_open == was_open).all(-1)
        if until.residual_threshold > 0:
            is_done = is_done | (residual.norm(dim=-1) < until.residual_threshold)
        if is_done.all():
            break
    return latents
