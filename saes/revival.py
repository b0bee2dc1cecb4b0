"""What becomes of latents that never fire: they explain what the others leave, or start anew on inputs explained badly."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saes.base import seeded
from saes.objectives import Parameters
from saes.places import Place
from saes.settings import TrainSettings

_SMALLER = 0.2  # a new encoder column than the mean of those at work (Bricken et al. 2023; Kissane et al. 2024)


@torch.enable_grad()
def add_auxiliary(
    p: Parameters,
    gradients: Mapping[str, Tensor],
    x: Float[Tensor, "group row d_in"],
    residual: Float[Tensor, "group row d_in"],
    dead: Bool[Tensor, "group d_sae"],
    weight: float,
) -> None:
    """Adds to ``gradients`` those of ``weight * |residual - its reconstruction by dead latents|^2``, mean over rows.

    The ``d_in / 2`` largest dead latents of a row take part (Gao et al. 2024, arXiv:2406.04093, A.2). The
    residual is held, and so is ``b_dec``, which the main loss has placed.
    """
    for group in dead.any(1).nonzero().flatten().tolist():
        which = dead[group].nonzero().flatten()
        columns, rows = p["W_enc"][group][:, which].requires_grad_(), p["W_dec"][group][which].requires_grad_()
        biases = p["b_enc"][group][which].requires_grad_()
        pre = torch.addmm(biases, x[group] - p["b_dec"][group], columns)
        values, chosen = pre.topk(min(len(which), max(1, x.shape[-1] // 2)), sorted=False)
        explained = torch.zeros_like(pre).scatter(1, chosen, values.relu()) @ rows
        missed = weight * (residual[group] - explained).square().sum(-1).mean()
        of_columns, of_rows, of_biases = torch.autograd.grad(missed, [columns, rows, biases])
        gradients["W_enc"][group].index_add_(1, which, of_columns)
        gradients["W_dec"][group].index_add_(0, which, of_rows)
        gradients["b_enc"][group].index_add_(0, which, of_biases)


def resamples_at(step: int, settings: TrainSettings) -> bool:
    """Whether dead latents start anew after this step: ``resamplings`` times, spread over the first half."""
    if settings.revival != "resample" or settings.resamplings == 0:
        return False
    every = max(1, settings.n_steps // (2 * settings.resamplings))
    return (step + 1) % every == 0 and (step + 1) // every <= settings.resamplings


def resample(
    p: Parameters,
    moments: Mapping[str, list[Tensor]],
    x: Float[Tensor, "group row d_in"],
    residual: Float[Tensor, "group row d_in"],
    dead: Bool[Tensor, "group d_sae"],
    places: tuple[Place, ...],
    settings: TrainSettings,
    step: int,
) -> Bool[Tensor, "group d_sae"]:
    """Point dead latents at rows of ``x`` drawn by their squared loss, forget the optimiser's ``moments`` of them; says which.

    As Bricken et al. (2023) do, with the rows of this one batch, where they draw from many. No row is drawn twice: latents
    that start alike have equal gradients and stay alike for good. With more dead latents than rows some stay dead.
    """
    revived = dead & (dead.cumsum(1) <= x.shape[1])
    for group in revived.any(1).nonzero().flatten().tolist():
        which = revived[group].nonzero().flatten()
        generator = torch.Generator().manual_seed(seeded(settings.seed, "resample", step, str(places[group])))
        losses = residual[group].square().sum(-1).square().cpu().double() + 1e-30
        drawn = torch.multinomial(losses, len(which), generator=generator).to(x.device)
        towards = x[group][drawn] - p["b_dec"][group]
        towards = towards / towards.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        alive = p["W_enc"][group][:, ~dead[group]].norm(dim=0)
        size = _SMALLER * (alive.mean() if len(alive) else 1.0)
        p["W_dec"][group][which] = towards
        p["W_enc"][group][:, which] = size * towards.T
        fresh = {"b_enc": 0.0, "b_gate": 0.0, "r_mag": 0.0, "log_threshold": math.log(settings.threshold)}
        for name in fresh.keys() & p.keys():
            p[name][group][which] = fresh[name]
        for name, kept in moments.items():
            for moment in kept if name != "b_dec" else ():
                (moment[group].T if name == "W_enc" else moment[group])[which] = 0.0
    return revived
