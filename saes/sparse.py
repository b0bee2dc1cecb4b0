"""The few latents that are at work in a batch: found, kept as a sparse matrix, and multiplied with.

Entries are kept row after row (CSR), and turned latent by latent for the gradients of the weights. Groups lie side by side:
row ``group * n_rows + row``, latent ``group * d_sae + latent``.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from saes.objectives import Parameters

Rows = Float[Tensor, "group row d_in"]

HIDDEN_BYTES = 6 << 20  # of a hidden layer at work: twice as much is slower, half as much no faster (measured)
_SHORT = 512  # rows up to which numpy finds the k largest faster than torch does (twice as fast at 256, measured)


@dataclass(frozen=True)
class Active:
    """The latents at work in a batch, row after row: a CSR matrix of ``group * row`` by ``group * latent``."""

    starts: Int[Tensor, "rows_and_1"]
    latents: Int[Tensor, "active"]
    values: Float[Tensor, "active"]
    lowest: Float[Tensor, "group"] | None = None


def per_row(p: Parameters, x: Rows, k: int) -> Active:
    """The k largest of every row, a few rows at a time."""
    n_groups, n_rows, d_sae = *x.shape[:2], p["b_enc"].shape[1]
    values, latents = x.new_empty(n_groups, n_rows, k), torch.empty(n_groups, n_rows, k, dtype=torch.int64, device=x.device)
    for some in row_blocks(x, d_sae):
        values[:, some], latents[:, some] = _largest(encoded(p, x[:, some]), k)
    latents += torch.arange(n_groups, device=x.device).mul_(d_sae).view(-1, 1, 1)
    starts = torch.arange(0, values.numel() + 1, k, device=x.device)
    return Active(starts, latents.flatten(), values.relu_().flatten())


def _largest(pre: Float[Tensor, "group row d_sae"], k: int) -> tuple[Tensor, Tensor]:
    """Values and places of each row's k largest, in any order."""
    d_sae = pre.shape[-1]
    if d_sae <= _SHORT and k < d_sae and pre.device.type == "cpu":
        least = torch.from_numpy(np.partition(pre.numpy(), d_sae - k, -1)[..., d_sae - k])
        chosen = (pre >= least.unsqueeze(-1)).flatten().nonzero().squeeze(-1)
        if len(chosen) == pre.numel() // d_sae * k:  # more, if a row's k-th and next are equal
            shape = (*pre.shape[:-1], k)
            return pre.flatten()[chosen].view(shape), (chosen % d_sae).view(shape)
    values, latents = pre.topk(k, sorted=False)
    return values, latents


def positive(p: Parameters, x: Rows) -> Active:
    """All that ReLU leaves, group after group, a few rows at a time."""
    n_groups, n_rows, d_sae = *x.shape[:2], p["b_enc"].shape[1]
    rows, latents, values = [], [], []
    for group in range(n_groups):
        one, own = x[group : group + 1], {name: p[name][group : group + 1] for name in ("W_enc", "b_enc", "b_dec")}
        for some in row_blocks(one, d_sae):
            pre = encoded(own, one[:, some]).flatten()
            chosen = (pre > 0).nonzero().squeeze(-1)
            values.append(pre[chosen])
            rows.append(chosen // d_sae + (group * n_rows + some.start))
            latents.append(chosen % d_sae + group * d_sae)
    return Active(_starts(torch.cat(rows), n_groups * n_rows), torch.cat(latents), torch.cat(values))


def encoded(p: Parameters, x: Rows) -> Float[Tensor, "group row d_sae"]:
    return torch.baddbmm(p["b_enc"].unsqueeze(1), x - p["b_dec"].unsqueeze(1), p["W_enc"])


def per_batch(p: Parameters, x: Rows, k: int) -> Active:
    """The ``k * row`` largest of the batch, wherever they are."""
    n_groups, n_rows, d_sae = *x.shape[:2], p["b_enc"].shape[1]
    pre = encoded(p, x).relu_()
    chosen = pre.flatten(1).topk(min(k * n_rows, n_rows * d_sae), sorted=False)
    places = chosen.indices.sort(1)
    values = chosen.values.gather(1, places.indices)
    rows = places.values // d_sae + torch.arange(n_groups, device=x.device).mul_(n_rows).unsqueeze(1)
    latents = places.values % d_sae + torch.arange(n_groups, device=x.device).mul_(d_sae).unsqueeze(1)
    lowest = values.masked_fill(values <= 0, torch.inf).amin(1)
    return Active(_starts(rows.flatten(), n_groups * n_rows), latents.flatten(), values.flatten(), lowest)


@dataclass(frozen=True)
class Turned:
    """The same entries latent by latent: the transposed matrix, with whatever values."""

    starts: Int[Tensor, "latents_and_1"]
    rows: Int[Tensor, "active"]
    order: Int[Tensor, "active"]
    latents: Int[Tensor, "active"]
    n_rows: int

    @classmethod
    def of(cls, active: Active, n_latents: int) -> "Turned":
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


def sampled(active: Active, left: Float[Tensor, "row d_in"], right: Float[Tensor, "latent d_in"]) -> Float[Tensor, "active"]:
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


def row_blocks(x: Rows, d_sae: int) -> Iterator[slice]:
    """Rows at a time, so that the hidden layer fits."""
    at_once = max(64, HIDDEN_BYTES // (x.shape[0] * d_sae * x.element_size()))
    return (slice(first, first + at_once) for first in range(0, x.shape[1], at_once))
