"""Gradients written by hand: what ReLU and top-k autoencoders are trained with, several times as fast as autograd on a CPU.

Both are given a few groups at a time, so that the hidden layer stays in the processor's cache. ReLU takes five matrix
products a step while many latents are active. Top-k takes one, and so does ReLU later on: of a row's ``d_sae`` latents only
the few that are active matter after the encoder, so decoding is ``embedding_bag``, the slopes of active latents are sampled
products, and the gradients of the weights are products with sparse matrices of latents by rows.
``tests/saes/test_fast_steps.py`` holds all of them against autograd through ``objectives.py``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from saes.objectives import Parameters
from saes.settings import TrainSettings
from saes.sparse import Active, Turned, encoded, per_batch, per_row, positive, row_blocks, sampled

Rows = Float[Tensor, "group row d_in"]
Gradients = Mapping[str, Tensor]

_FEW = 0.04  # the share of active latents below which sparse products are cheaper than dense ones (measured)


@dataclass(frozen=True)
class Outcome:
    """What a batch did in each group: error and penalty as in ``Loss``, on how many rows each latent ``fired``.

    ``lowest`` is the least latent that batch top-k let through.
    """

    error: Float[Tensor, "group"]
    penalty: Float[Tensor, "group"]
    fired: Float[Tensor, "group d_sae"]
    residual: Float[Tensor, "group row d_in"]
    lowest: Float[Tensor, "group"] | None = None


Step = Callable[[Parameters, Gradients, Rows, TrainSettings, float], Outcome]


def relu_step(p: Parameters, gradients: Gradients, x: Rows, settings: TrainSettings, weight: float) -> Outcome:
    """Overwrites ``gradients`` with those of ``objectives.relu`` with unit rows.

    In the first steps half of all latents are active, and five dense products are the cheapest; later a few in a hundred,
    and all but the encoder is cheaper done at those alone.
    """
    if _share_active(p, x) > _FEW:
        return _dense_step(p, gradients, x, weight)
    return _sparse_step(p, gradients, x, positive(p, x), weight)


def _dense_step(p: Parameters, gradients: Gradients, x: Rows, weight: float) -> Outcome:
    """A few rows at a time: pre-activations, reconstruction, slopes of the latents, and both weights' gradients."""
    n_rows, residual = x.shape[1], torch.empty_like(x)
    fired, penalty = torch.zeros_like(p["b_enc"]), torch.zeros_like(p["b_enc"][:, 0])
    gradients["b_enc"].zero_()
    for number, some in enumerate(row_blocks(x, p["b_enc"].shape[1])):
        inputs, keep = x[:, some] - p["b_dec"].unsqueeze(1), float(number > 0)
        latents = torch.baddbmm(p["b_enc"].unsqueeze(1), inputs, p["W_enc"]).relu_()
        torch.baddbmm(p["b_dec"].unsqueeze(1), latents, p["W_dec"], out=residual[:, some])
        torch.sub(x[:, some], residual[:, some], out=residual[:, some])
        down = residual[:, some] * (-2 / n_rows)
        slopes = torch.bmm(down, p["W_dec"].mT).add_(weight / n_rows)
        torch.ops.aten.threshold_backward.grad_input(slopes, latents, 0, grad_input=slopes)  # ReLU's own, in place
        gradients["W_dec"].baddbmm_(latents.mT, down, beta=keep)
        gradients["W_enc"].baddbmm_(inputs.mT, slopes, beta=keep)
        gradients["b_enc"].add_(slopes.sum(1))
        penalty += latents.sum((1, 2)) * (weight / n_rows)
        fired += latents.sign_().sum(1)
    gradients["b_dec"].copy_(_of_b_dec(p, residual, gradients["b_enc"]))
    return Outcome(residual.square().sum((1, 2)) / n_rows, penalty, fired, residual)


def topk_step(p: Parameters, gradients: Gradients, x: Rows, settings: TrainSettings, weight: float) -> Outcome:
    """Overwrites ``gradients`` with those of ``objectives.topk``."""
    return _sparse_step(p, gradients, x, per_row(p, x, settings.k))


def batchtopk_step(p: Parameters, gradients: Gradients, x: Rows, settings: TrainSettings, weight: float) -> Outcome:
    """Overwrites ``gradients`` with those of ``objectives.batchtopk``."""
    return _sparse_step(p, gradients, x, per_batch(p, x, settings.k))


FAST_STEPS: dict[str, Step] = {"relu": relu_step, "topk": topk_step, "batchtopk": batchtopk_step}


def _sparse_step(p: Parameters, gradients: Gradients, x: Rows, active: Active, weight: float = 0.0) -> Outcome:
    """Decode what is active, and bring the error back along the same entries. ``weight``: of an L1 penalty.

    Costs ``active / (row * d_sae)`` of what dense products cost after the encoder.
    """
    n_rows, decoder, shape = x.shape[1], p["W_dec"].flatten(0, 1), p["b_enc"].shape
    decoded = F.embedding_bag(
        active.latents,
        decoder,
        active.starts,
        per_sample_weights=active.values,
        mode="sum",
        include_last_offset=True,
    )
    residual = (x - p["b_dec"].unsqueeze(1)).sub_(decoded.view_as(x))
    down = residual.flatten(0, 1) * (-2 / n_rows)
    at_work = active.values > 0
    slopes = sampled(active, down, decoder).add_(weight / n_rows).mul_(at_work)
    turned = Turned.of(active, shape.numel())
    turned.times(active.values, down, out=gradients["W_dec"].flatten(0, 1))
    encoder = torch.empty_like(p["W_dec"])
    turned.times(slopes, (x - p["b_dec"].unsqueeze(1)).flatten(0, 1), out=encoder.flatten(0, 1))
    gradients["W_enc"].copy_(encoder.mT)
    gradients["b_enc"].copy_(turned.sums(slopes).view(shape))
    gradients["b_dec"].copy_(_of_b_dec(p, residual, gradients["b_enc"]))
    penalty = turned.sums(active.values).view(shape).sum(1) * (weight / n_rows)
    error = residual.square().sum((1, 2)) / n_rows
    return Outcome(error, penalty, turned.sums(at_work.to(x.dtype)).view(shape), residual, active.lowest)


def _share_active(p: Parameters, x: Rows) -> float:
    """Of all latents, on every sixteenth row."""
    pre = encoded(p, x[:, ::16])
    return float((pre > 0).sum()) / pre.numel()


def _of_b_dec(p: Parameters, residual: Tensor, of_b_enc: Float[Tensor, "group d_sae"]) -> Float[Tensor, "group d_in"]:
    """``b_dec`` is added to what comes out and taken from what goes in."""
    return residual.sum(1) * (-2 / residual.shape[1]) - torch.bmm(p["W_enc"], of_b_enc.unsqueeze(-1)).squeeze(-1)
