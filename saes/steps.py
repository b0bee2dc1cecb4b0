"""One training step: gradients a few groups at a time, rows of the decoder kept at norm 1, and Adam over all of it.

Every group has its own gradient norm, its own scale and its own random numbers, so that from the same batches a head's
autoencoder comes out the same alone and among all heads of the model, but for rounding.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saes.base import SparseAutoencoder
from saes.fast_steps import FAST_STEPS, Gradients, Outcome
from saes.objectives import OBJECTIVES, Parameters
from saes.places import Place
from saes.revival import add_auxiliary
from saes.settings import PRECISIONS, TrainSettings
from saes.sparse import HIDDEN_BYTES

Rows = Float[Tensor, "group row d_in"]
_ON_AN_ACCELERATOR = 1 << 30  # bytes of hidden layer at once: caches are of no use to it, and many small products are slow


def start_parameters(
    places: tuple[Place, ...], mean: Float[Tensor, "group d_in"], settings: TrainSettings
) -> dict[str, Tensor]:
    """Random unit rows, the encoder their transpose, ``b_dec`` the mean input (scaled as all inputs are).

    Where every positive latent counts ("relu", "gated"), d_sae of them would add up to ``d_sae / 2 d_in`` times the input;
    the encoder starts that much smaller.
    """
    drawn = SparseAutoencoder.random(places, d_in=mean.shape[1], d_sae=settings.d_sae, seed=settings.seed)
    parameters = {**drawn.tensors, "W_dec": drawn.W_dec.clone(), "b_dec": mean.clone()}
    zeros = torch.zeros_like(drawn.b_enc)
    if settings.architecture in ("relu", "gated"):
        parameters["W_enc"] = parameters["W_enc"] * min(1.0, 2 * mean.shape[1] / settings.d_sae)
    if settings.architecture == "gated":
        parameters |= {"b_gate": zeros.clone(), "r_mag": zeros.clone()}
    if settings.architecture == "jumprelu":
        parameters["log_threshold"] = torch.full_like(zeros, settings.threshold).log()
    return parameters


def fill_gradients(
    p: Parameters, gradients: Gradients, x: Rows, settings: TrainSettings, weight: float, idle: Float[Tensor, "group d_sae"]
) -> Outcome:
    """Overwrites ``gradients`` with those of this batch, clipped group by group. ``idle``: rows since each latent fired."""
    by_hand = x.device.type == "cpu" and settings.precision == "float32" and settings.decoder == "unit"
    step = FAST_STEPS.get(settings.architecture, autograd_step) if by_hand else autograd_step
    at_work = HIDDEN_BYTES if x.device.type == "cpu" else _ON_AN_ACCELERATOR
    groups = max(1, at_work // (x.shape[1] * settings.d_sae * x.element_size()))
    outcomes = []
    for first in range(0, len(x), groups):
        some = slice(first, first + groups)
        own, slopes = ({name: tensor[some] for name, tensor in all_of.items()} for all_of in (p, gradients))
        outcome = step(own, slopes, x[some], settings, weight)
        if settings.revival == "aux":
            add_auxiliary(own, slopes, x[some], outcome.residual, idle[some] >= settings.idle_rows, settings.aux_weight)
        if settings.decoder == "unit":
            _along_the_sphere(own["W_dec"], slopes["W_dec"])
        if settings.clip is not None:
            _clip(slopes, settings.clip)
        outcomes.append(outcome)
    return _joined(outcomes)


def autograd_step(p: Parameters, gradients: Gradients, x: Rows, settings: TrainSettings, weight: float) -> Outcome:
    """Overwrites ``gradients`` by differentiating the objective, in the precision that is asked for."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in p.items()}
    precision = PRECISIONS[settings.precision]
    with torch.enable_grad(), torch.autocast(x.device.type, precision, enabled=precision != torch.float32):
        loss = OBJECTIVES[settings.architecture](leaves, x, settings, weight)
        found = torch.autograd.grad(loss.total.sum(), list(leaves.values()))
    for name, gradient in zip(leaves, found, strict=True):
        gradients[name].copy_(gradient)
    latents = loss.latents.detach()
    lowest = latents.masked_fill(latents <= 0, torch.inf).amin((1, 2))
    parts = (loss.error.detach(), loss.penalty.detach(), (latents > 0).sum(1), loss.residual.detach(), lowest)
    return Outcome(*(part.to(x.dtype) for part in parts))


def renormalize(W_dec: Float[Tensor, "group d_sae d_in"]) -> None:
    """Back to norm 1, in place."""
    for rows in W_dec:
        rows.div_(torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min_(1e-12))


def trained(
    places: tuple[Place, ...],
    p: Parameters,
    settings: TrainSettings,
    scale: Float[Tensor, "group"],
    threshold: Float[Tensor, "group"],
    about: Mapping[str, object],
) -> SparseAutoencoder:
    """The autoencoder of unscaled inputs, with decoder rows of norm 1.

    Scaling inputs by ``s`` scales pre-activations by ``s`` once the biases are divided by it, so only biases (and
    thresholds) change. A row's norm moves over to its encoder column.
    """
    norms = p["W_dec"].norm(dim=-1).clamp_min(1e-12) if settings.decoder == "free" else torch.ones_like(p["b_enc"])
    by_latent, back = {"b_enc", "b_gate", "threshold"}, 1 / scale.unsqueeze(-1)
    own: dict[str, Any] = {name: tensor for name, tensor in p.items() if name != "log_threshold"}
    if settings.architecture == "jumprelu":
        own["threshold"] = p["log_threshold"].exp()
    if settings.architecture in ("batchtopk", "matryoshka"):
        own["threshold"] = threshold.unsqueeze(-1).expand_as(norms)
    own |= {name: own[name] * norms * back for name in by_latent & own.keys()}
    own |= {
        "W_enc": own["W_enc"] * norms.unsqueeze(1),
        "W_dec": own["W_dec"] / norms.unsqueeze(-1),
        "b_dec": own["b_dec"] * back,
    }
    kind = "jumprelu" if "threshold" in own else settings.architecture
    own = {name: tensor.detach().clone() for name, tensor in own.items()}
    facts: dict[str, Any] = {"k": settings.k if kind == "topk" else None, "about": dict(about)}
    return SparseAutoencoder(kind, places, **own, **facts)


def _along_the_sphere(W_dec: Float[Tensor, "group d_sae d_in"], gradient: Float[Tensor, "group d_sae d_in"]) -> None:
    """Take from each row's gradient what would only change its norm."""
    gradient.addcmul_(W_dec, (gradient * W_dec).sum(-1, keepdim=True), value=-1)


def _clip(gradients: Gradients, greatest: float) -> None:
    """Each group's gradient to norm ``greatest`` at most, over all of its parameters."""
    squares = [torch.linalg.vector_norm(slopes.flatten(1), dim=1).square() for slopes in gradients.values()]
    factor = (greatest / (torch.stack(squares).sum(0).sqrt() + 1e-12)).clamp_max(1)
    for slopes in gradients.values():
        slopes.mul_(factor.view(-1, *[1] * (slopes.dim() - 1)))


def _joined(outcomes: list[Outcome]) -> Outcome:
    if len(outcomes) == 1:
        return outcomes[0]
    lowest = [outcome.lowest for outcome in outcomes if outcome.lowest is not None]
    names = ("error", "penalty", "fired", "residual")
    joined = {name: torch.cat([getattr(outcome, name) for outcome in outcomes]) for name in names}
    return Outcome(**joined, lowest=torch.cat(lowest) if lowest else None)
