"""What each architecture minimises: ``mean over rows of (|x - reconstruction|^2 + penalty)``, group by group.

An objective is a function of the parameters and a batch. Groups share nothing, so the gradient of the sum over groups is
every group's own. Add an architecture by adding a function and its line in ``OBJECTIVES``; autograd does the rest, and
``fast_steps.py`` holds gradients written by hand for those that are trained most.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saes.settings import TrainSettings

Parameters = Mapping[str, Tensor]
Rows = Float[Tensor, "group row d_in"]


@dataclass(frozen=True)
class Loss:
    """A batch's ``error`` (squared, summed over d_in, mean over rows), its weighted ``penalty``, and what was active.

    ``residual`` is ``x - reconstruction``, for those that revive latents.
    """

    error: Float[Tensor, "group"]
    penalty: Float[Tensor, "group"]
    latents: Float[Tensor, "group row d_sae"]
    residual: Float[Tensor, "group row d_in"]

    @property
    def total(self) -> Float[Tensor, "group"]:
        return self.error + self.penalty


Objective = Callable[[Parameters, Rows, TrainSettings, float], Loss]


def relu(p: Parameters, x: Rows, settings: TrainSettings, weight: float) -> Loss:
    """L1 (Bricken et al. 2023; Kissane et al. 2024): ``weight * sum_i f_i``, times the norm of row i if rows are free."""
    latents = pre_activations(p, x).relu()
    sizes = latents if settings.decoder == "unit" else latents * p["W_dec"].norm(dim=-1).unsqueeze(1)
    return _loss(p, x, latents, weight * sizes.sum(-1).mean(-1))


def topk(p: Parameters, x: Rows, settings: TrainSettings, weight: float) -> Loss:
    """The k largest of each row (Gao et al. 2024, arXiv:2406.04093); nothing else is penalised."""
    pre = pre_activations(p, x)
    values, indices = pre.topk(settings.k, sorted=False)
    return _loss(p, x, torch.zeros_like(pre).scatter(-1, indices, values.relu()))


def batchtopk(p: Parameters, x: Rows, settings: TrainSettings, weight: float) -> Loss:
    """The ``k * rows`` largest of a batch (Bussmann et al. 2024, arXiv:2412.06410)."""
    return _loss(p, x, _largest_of_batch(p, x, settings.k))


def matryoshka(p: Parameters, x: Rows, settings: TrainSettings, weight: float) -> Loss:
    """Batch top-k whose first latents must do alone as well (Bussmann et al. 2025, arXiv:2503.17547).

    The error is the mean over ``prefixes`` (d_sae / 16, / 8, / 4, / 2 and all), where the paper sums.
    """
    latents = _largest_of_batch(p, x, settings.k)
    ends = settings.prefixes or tuple(sorted({max(1, settings.d_sae >> shift) for shift in range(5)}))
    reconstruction, errors, start = p["b_dec"].unsqueeze(1), [], 0
    for end in ends:
        reconstruction = reconstruction + torch.bmm(latents[..., start:end], p["W_dec"][:, start:end])
        errors.append((x - reconstruction).square().sum(-1).mean(-1))
        start = end
    error = torch.stack(errors).mean(0)
    return Loss(error, torch.zeros_like(error), latents, x - reconstruction)


def jumprelu(p: Parameters, x: Rows, settings: TrainSettings, weight: float) -> Loss:
    """``weight * sum_i [pre_i > threshold_i]``, with the straight-through slopes of Rajamanoharan et al. 2024 (2407.14435)."""
    pre, threshold = pre_activations(p, x).relu(), p["log_threshold"].exp().unsqueeze(1)
    latents = _Jump.apply(pre, threshold, settings.bandwidth)
    active = _Step.apply(pre, threshold, settings.bandwidth)
    assert latents is not None
    assert active is not None
    return _loss(p, x, latents, weight * active.sum(-1).mean(-1))


def gated(p: Parameters, x: Rows, settings: TrainSettings, weight: float) -> Loss:
    """Gates are penalised, magnitudes are not (Rajamanoharan et al. 2024, arXiv:2404.16014, eq. 8).

    A second reconstruction, from the gates alone through a frozen decoder, keeps them from closing for good. The norms of
    free rows are frozen in the penalty as well: magnitudes can make up for shrinking rows (by ``r_mag``), gates cannot.
    """
    shared = torch.bmm(x - p["b_dec"].unsqueeze(1), p["W_enc"])
    gate = shared + p["b_gate"].unsqueeze(1)
    magnitude = (shared * p["r_mag"].exp().unsqueeze(1) + p["b_enc"].unsqueeze(1)).relu()
    opened = gate.relu()
    sizes = opened if settings.decoder == "unit" else opened * p["W_dec"].detach().norm(dim=-1).unsqueeze(1)
    from_gates = torch.baddbmm(p["b_dec"].detach().unsqueeze(1), opened, p["W_dec"].detach())
    auxiliary = (x - from_gates).square().sum(-1).mean(-1)
    return _loss(p, x, magnitude * (gate > 0), weight * sizes.sum(-1).mean(-1) + auxiliary)


OBJECTIVES: dict[str, Objective] = {
    "relu": relu,
    "topk": topk,
    "batchtopk": batchtopk,
    "jumprelu": jumprelu,
    "gated": gated,
    "matryoshka": matryoshka,
}


def pre_activations(p: Parameters, x: Rows) -> Float[Tensor, "group row d_sae"]:
    return torch.baddbmm(p["b_enc"].unsqueeze(1), x - p["b_dec"].unsqueeze(1), p["W_enc"])


def _loss(p: Parameters, x: Rows, latents: Tensor, penalty: Tensor | None = None) -> Loss:
    residual = x - torch.baddbmm(p["b_dec"].unsqueeze(1), latents, p["W_dec"])
    error = residual.square().sum(-1).mean(-1)
    return Loss(error, torch.zeros_like(error) if penalty is None else penalty, latents, residual)


def _largest_of_batch(p: Parameters, x: Rows, k: int) -> Float[Tensor, "group row d_sae"]:
    latents = pre_activations(p, x).relu()
    flat = latents.flatten(1)
    values, indices = flat.topk(min(k * x.shape[1], flat.shape[1]), sorted=False)
    return torch.zeros_like(flat).scatter(1, indices, values).view_as(latents)


class _Jump(torch.autograd.Function):
    """``pre [pre > threshold]``; the threshold's slope is that of a step smoothed over ``bandwidth`` (their eq. 11)."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx, *gradients):
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.bandwidth / 2) / ctx.bandwidth
        return gradients[0] * (pre > threshold), (-threshold * near * gradients[0]).sum(1, keepdim=True), None


class _Step(torch.autograd.Function):
    """``[pre > threshold]``, with a slope for the threshold alone (their eq. 12)."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, *gradients):
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.bandwidth / 2) / ctx.bandwidth
        return None, (-near * gradients[0]).sum(1, keepdim=True), None
