"""Gradients written by hand: what ReLU and top-k autoencoders are trained with, several times as fast as autograd on a CPU.

Both are given a few groups at a time, so that the hidden layer stays in the processor's cache. ReLU takes five matrix
products a step. Top-k takes one: of a row's ``d_sae`` latents only ``k`` matter after the encoder, so decoding is
``embedding_bag``, the slopes of active latents are sampled products, and the gradients of the weights are products with
sparse matrices of latents by rows. ``tests/saes/test_fast_steps.py`` holds both against autograd through ``objectives.py``.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from saes.objectives import Parameters
from saes.settings import TrainSettings

Rows = Float[Tensor, "group row d_in"]
Gradients = Mapping[str, Tensor]

HIDDEN_BYTES = 6 << 20  # of a hidden layer at work: twice as much is slower, half as much no faster (measured)


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
    """Overwrites ``gradients`` with those of ``objectives.relu`` with unit rows, a few rows at a time."""
    n_rows, residual = x.shape[1], torch.empty_like(x)
    fired, penalty = torch.zeros_like(p["b_enc"]), torch.zeros_like(p["b_enc"][:, 0])
    for name in ("W_enc", "W_dec", "b_enc"):
        gradients[name].zero_()
    for some in _row_blocks(x, p["b_enc"].shape[1]):
        inputs = x[:, some] - p["b_dec"].unsqueeze(1)
        latents = torch.baddbmm(p["b_enc"].unsqueeze(1), inputs, p["W_enc"]).relu_()
        torch.baddbmm(p["b_dec"].unsqueeze(1), latents, p["W_dec"], out=residual[:, some])
        torch.sub(x[:, some], residual[:, some], out=residual[:, some])
        down = residual[:, some] * (-2 / n_rows)
        slopes = torch.bmm(down, p["W_dec"].mT).add_(weight / n_rows).mul_(latents > 0)
        gradients["W_dec"].baddbmm_(latents.mT, down)
        gradients["W_enc"].baddbmm_(inputs.mT, slopes)
        gradients["b_enc"].add_(slopes.sum(1))
        penalty += latents.sum((1, 2)) * (weight / n_rows)
        fired += (latents > 0).sum(1)
    gradients["b_dec"].copy_(_of_b_dec(p, residual, gradients["b_enc"]))
    return Outcome(residual.square().sum((1, 2)) / n_rows, penalty, fired, residual)


def topk_step(p: Parameters, gradients: Gradients, x: Rows, settings: TrainSettings, weight: float) -> Outcome:
    """Overwrites ``gradients`` with those of ``objectives.topk``."""
    return _sparse_step(p, gradients, x, _per_row(p, x, settings.k))


def batchtopk_step(p: Parameters, gradients: Gradients, x: Rows, settings: TrainSettings, weight: float) -> Outcome:
    """Overwrites ``gradients`` with those of ``objectives.batchtopk``."""
    return _sparse_step(p, gradients, x, _per_batch(p, x, settings.k))


FAST_STEPS: dict[str, Step] = {"relu": relu_step, "topk": topk_step, "batchtopk": batchtopk_step}


@dataclass(frozen=True)
class Active:
    """The latents at work in a batch, row after row: a CSR matrix of ``group * row`` by ``group * latent``."""

    starts: Int[Tensor, "rows_and_1"]
    latents: Int[Tensor, "active"]
    values: Float[Tensor, "active"]
    lowest: Float[Tensor, "group"] | None = None


def _per_row(p: Parameters, x: Rows, k: int) -> Active:
    """The k largest of every row, a few rows at a time."""
    n_groups, n_rows, d_sae = *x.shape[:2], p["b_enc"].shape[1]
    values, latents = x.new_empty(n_groups, n_rows, k), torch.empty(n_groups, n_rows, k, dtype=torch.int64, device=x.device)
    for some in _row_blocks(x, d_sae):
        inputs = x[:, some] - p["b_dec"].unsqueeze(1)
        pre = torch.baddbmm(p["b_enc"].unsqueeze(1), inputs, p["W_enc"])
        values[:, some], latents[:, some] = pre.topk(k, sorted=False)
    latents += torch.arange(n_groups, device=x.device).mul_(d_sae).view(-1, 1, 1)
    starts = torch.arange(0, values.numel() + 1, k, device=x.device)
    return Active(starts, latents.flatten(), values.relu_().flatten())


def _per_batch(p: Parameters, x: Rows, k: int) -> Active:
    """The ``k * row`` largest of the batch, wherever they are."""
    n_groups, n_rows, d_sae = *x.shape[:2], p["b_enc"].shape[1]
    pre = torch.baddbmm(p["b_enc"].unsqueeze(1), x - p["b_dec"].unsqueeze(1), p["W_enc"]).relu_()
    chosen = pre.flatten(1).topk(min(k * n_rows, n_rows * d_sae), sorted=False)
    places = chosen.indices.sort(1)
    values = chosen.values.gather(1, places.indices)
    rows = places.values // d_sae + torch.arange(n_groups, device=x.device).mul_(n_rows).unsqueeze(1)
    latents = places.values % d_sae + torch.arange(n_groups, device=x.device).mul_(d_sae).unsqueeze(1)
    lowest = values.masked_fill(values <= 0, torch.inf).amin(1)
    return Active(_starts(rows.flatten(), n_groups * n_rows), latents.flatten(), values.flatten(), lowest)


def _sparse_step(p: Parameters, gradients: Gradients, x: Rows, active: Active) -> Outcome:
    """Decode what is active, and bring the error back along the same entries. Costs ``active / (row * d_sae)`` of it all."""
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
    slopes = _sampled(active, down, decoder) * at_work
    turned = _Turned.of(active, shape.numel())
    turned.times(active.values, down, out=gradients["W_dec"].flatten(0, 1))
    encoder = torch.empty_like(p["W_dec"])
    turned.times(slopes, (x - p["b_dec"].unsqueeze(1)).flatten(0, 1), out=encoder.flatten(0, 1))
    gradients["W_enc"].copy_(encoder.mT)
    gradients["b_enc"].copy_(turned.sums(slopes).view(shape))
    gradients["b_dec"].copy_(_of_b_dec(p, residual, gradients["b_enc"]))
    error = residual.square().sum((1, 2)) / n_rows
    return Outcome(error, torch.zeros_like(error), turned.sums(at_work.to(x.dtype)).view(shape), residual, active.lowest)


@dataclass(frozen=True)
class _Turned:
    """The same entries latent by latent: the transposed matrix, with whatever values."""

    starts: Int[Tensor, "latents_and_1"]
    rows: Int[Tensor, "active"]
    order: Int[Tensor, "active"]
    latents: Int[Tensor, "active"]
    n_rows: int

    @classmethod
    def of(cls, active: Active, n_latents: int) -> "_Turned":
        n_rows = len(active.starts) - 1
        latents, order = active.latents.sort()
        rows = torch.arange(n_rows, device=latents.device).repeat_interleave(active.starts.diff())
        return cls(_starts(latents, n_latents), rows[order], order, latents, n_rows)

    def times(self, values: Float[Tensor, "active"], dense: Float[Tensor, "row d_in"], out: Tensor) -> None:
        """``out = matrix(values)^T dense``."""
        size = (len(self.starts) - 1, self.n_rows)
        torch.addmm(out, _csr(self.starts, self.rows, values[self.order], size), dense, beta=0, out=out)

    def sums(self, values: Float[Tensor, "active"]) -> Float[Tensor, "latent"]:
        return torch.zeros(len(self.starts) - 1, dtype=values.dtype, device=values.device).index_add_(
            0, self.latents, values[self.order]
        )


def _sampled(active: Active, left: Float[Tensor, "row d_in"], right: Float[Tensor, "latent d_in"]) -> Float[Tensor, "active"]:
    """``left right^T`` at the active entries, and nowhere else."""
    pattern = _csr(active.starts, active.latents, torch.zeros_like(active.values), (len(left), len(right)))
    return torch.sparse.sampled_addmm(pattern, left, right.mT, beta=0.0).values()


def _csr(starts: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that CSR is in beta, once a process
        return torch.sparse_csr_tensor(starts, columns, values, size, check_invariants=False)


def _starts(sorted_ids: Int[Tensor, "active"], n: int) -> Int[Tensor, "n_and_1"]:
    """Where each of ``n`` ids begins in a sorted list."""
    return F.pad(torch.bincount(sorted_ids, minlength=n).cumsum(0), (1, 0))


def _of_b_dec(p: Parameters, residual: Tensor, of_b_enc: Float[Tensor, "group d_sae"]) -> Float[Tensor, "group d_in"]:
    """``b_dec`` is added to what comes out and taken from what goes in."""
    return residual.sum(1) * (-2 / residual.shape[1]) - torch.bmm(p["W_enc"], of_b_enc.unsqueeze(-1)).squeeze(-1)


def _row_blocks(x: Rows, d_sae: int) -> Iterator[slice]:
    """Rows at a time, so that the hidden layer fits."""
    at_once = max(64, HIDDEN_BYTES // (x.shape[0] * d_sae * x.element_size()))
    return (slice(first, first + at_once) for first in range(0, x.shape[1], at_once))
