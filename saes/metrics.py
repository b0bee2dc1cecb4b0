"""How well activations are rebuilt and with how few latents: each group by itself, in one pass that keeps no rows.

    found = reconstruction(autoencoder, activations.windows)   # or a list of [group, row, d_in]
    found.explained_variance, found.l0, found.dead_share

What the model makes of the rebuilt activations is another question, and ``fidelity.py`` asks it: explained variance can
be negative where the model hardly notices (Kissane et al. 2024, layers 7 to 11 of GPT-2 small). Report both.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.errors import SAEError
from saes.base import SparseAutoencoder
from saes.places import Place

# Each window is [group row d_in], with any number of rows. A function is asked for them anew at every pass.
Windows = Iterable[Tensor] | Callable[[], Iterable[Tensor]]
PerGroup = Float[np.ndarray, "group"]

_NUMBERS = 1 << 24  # latents held at once: 64 MiB of float32


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Rows ``x``, their reconstructions ``y`` and latents ``f``, in one number a group. ``m`` is the mean of all rows.

    ``mse``: mean of ``|x - y|^2``, summed over ``d_in``. ``explained_variance``: ``1 - sum |x - y|^2 / sum |x - m|^2``, one
    ratio of totals; 1 is perfect, 0 is as good as ``m``, and it has no lower end. ``explained_variance_legacy``: the mean
    over rows of ``1 - |x - y|^2 / |x - m|^2``, which is still widely printed (SAEBench issue 76 tells why it should not be):
    rows near ``m`` rule it. We centre both by the mean of all rows; by a batch's mean they would change with its size.

    ``cosine``: mean of ``cos(x, y)``, 0 where either is zero. ``l2_ratio``: mean of ``|y| / |x|``. ``relative_bias``:
    ``sum |y|^2 / sum x.y``, below 1 where reconstructions shrink (Rajamanoharan et al. 2024, arXiv:2404.16014).
    ``l0`` and ``l1``: mean number and mean summed size of the latents that are not 0. ``density``: the share of rows on
    which a latent is not 0. Rows that would divide by zero are left out of their mean; NaN where none remain.
    """

    places: tuple[Place, ...]
    n_rows: int
    mse: PerGroup
    explained_variance: PerGroup
    explained_variance_legacy: PerGroup
    cosine: PerGroup
    l2_ratio: PerGroup
    relative_bias: PerGroup
    l0: PerGroup
    l1: PerGroup
    density: Float[np.ndarray, "group d_sae"]

    @property
    def dead_share(self) -> PerGroup:
        """The share of latents that were never active on these ``n_rows``. On more rows some of them may be."""
        return (self.density == 0).mean(-1)

    def denser_than(self, share: float) -> PerGroup:
        """The share of latents active on more than this share of rows (0.01 and 0.1 are usual); such rarely mean one thing."""
        return (self.density > share).mean(-1)


@dataclass(frozen=True, eq=False)
class Cosines:
    """How latents' directions lie: means over the latents of a group.

    ``encoder_decoder``: of a latent's encoder column with its own decoder row; 1 where they are parallel, as at the start of
    training. ``nearest_encoder`` and ``nearest_decoder``: of a latent with the other latent most like it; near 1 where
    latents double one another. NaN for a single latent.
    """

    encoder_decoder: PerGroup
    nearest_encoder: PerGroup
    nearest_decoder: PerGroup


def reconstruction(
    autoencoder: SparseAutoencoder, windows: Windows, *, mean: Float[Tensor, "group d_in"] | None = None
) -> Reconstruction:
    """Reconstruction and sparsity on rows that come a window at a time; how they are divided changes nothing.

    Passes over ``windows`` twice, first for the mean of all rows; with ``mean`` once. Sums are float64. Costs one encoding
    and decoding of every row, and memory for one window and 16 million latents. Raises ``SAEError`` for rows that do not
    fit or are not finite, with their place, and for windows that can be passed over only once.

    >>> autoencoder = SparseAutoencoder.random([Place.parse("z.0")], d_in=4, d_sae=8, kind="topk", k=2)
    >>> reconstruction(autoencoder, [torch.eye(4).unsqueeze(0)]).l0 <= 2
    array([ True])
    """
    mean = mean_activation(autoencoder.places, windows) if mean is None else mean
    totals: dict[str, Tensor] = {}
    for window in _checked(autoencoder.places, windows):
        for name, sums in _window_sums(autoencoder, window, mean).items():
            totals[name] = totals[name] + sums if name in totals else sums
    if not totals:
        raise SAEError("there are no rows to measure on. Give at least one window of [group, row, d_in].")
    t = {name: sums.numpy() for name, sums in totals.items()}
    return Reconstruction(
        places=autoencoder.places,
        n_rows=int(t["rows"][0]),
        mse=t["error"] / t["rows"],
        explained_variance=1 - _over(t["error"], t["variance"]),
        explained_variance_legacy=1 - _over(t["error_by_variance"], t["varying"]),
        cosine=t["cosine"] / t["rows"],
        l2_ratio=_over(t["size_by_size"], t["sized"]),
        relative_bias=_over(t["own_square"], t["inner"]),
        l0=t["l0"] / t["rows"],
        l1=t["l1"] / t["rows"],
        density=t["active"] / t["rows"][:, None],
    )


def mean_activation(places: tuple[Place, ...], windows: Windows) -> Float[Tensor, "group d_in"]:
    """The mean of all rows, in float64, on the CPU. ``SAEError`` if ``windows`` could not be passed over again."""
    if isinstance(windows, Iterator):
        raise SAEError(
            "these windows can be passed over once, and the mean of all rows is needed first. Give a list, a function that "
            "makes them anew (activations.windows, not activations.windows()), or the mean."
        )
    total, n_rows = None, 0
    for window in _checked(places, windows):
        summed = window.double().sum(1).cpu()
        total, n_rows = summed if total is None else total + summed, n_rows + window.shape[1]
    if total is None or not n_rows:
        raise SAEError("there are no rows to take the mean of. Give at least one window of [group, row, d_in].")
    return total / n_rows


def cosines(autoencoder: SparseAutoencoder) -> Cosines:
    """Cosines among the latents' directions.

    Costs ``2 d_sae^2 d_in`` multiplications a group: about 25 s on one core at 24,576 and 768.
    """
    encoder, decoder = (_unit(W) for W in (autoencoder.W_enc.mT, autoencoder.W_dec))
    own = torch.einsum("gid,gid->gi", encoder, decoder).mean(-1).double().cpu().numpy()
    nearest = [np.array([_nearest(rows) for rows in directions]) for directions in (encoder, decoder)]
    return Cosines(own, *nearest)


def _checked(places: tuple[Place, ...], windows: Windows) -> Iterator[Tensor]:
    """The windows, each looked at before it is believed."""
    first = 0
    for window in windows() if callable(windows) else windows:
        if window.dim() != 3 or len(window) != len(places):
            raise SAEError(
                f"a window has shape {list(window.shape)}; with {len(places)} places it is [{len(places)}, row, d_in]."
            )
        finite = window.isfinite().all(-1)
        if not finite.all():
            group, row = (int(at) for at in finite.logical_not().nonzero()[0])
            raise SAEError(
                f"row {first + row} at {str(places[group])!r} is not finite. Drop such rows, or record in float32 or bfloat16 "
                "if the activations are too large for float16."
            )
        first += window.shape[1]
        if window.shape[1]:
            yield window


def _window_sums(autoencoder: SparseAutoencoder, window: Tensor, mean: Tensor) -> dict[str, Float[Tensor, "group *latent"]]:
    """One group and few enough rows at a time, for latents are many times as wide as activations."""
    step = max(1, _NUMBERS // autoencoder.d_sae)
    groups = [autoencoder.group(number) for number in range(autoencoder.n_groups)]
    found = []
    for number, group in enumerate(groups):
        parts = [_sums(group, rows, mean[number]) for rows in window[number : number + 1].split(step, 1)]
        found.append({name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]})
    return {name: torch.cat([of_group[name] for of_group in found]).cpu() for name in found[0]}


def _sums(
    autoencoder: SparseAutoencoder, x: Float[Tensor, "group row d_in"], mean: Float[Tensor, "d_in"]
) -> dict[str, Float[Tensor, "group *latent"]]:
    latents, y = _coded(autoencoder, x := x.to(autoencoder.W_enc.device))
    x, y = x.double(), y.double()
    error, variance = (x - y).square().sum(-1), (x - mean.to(x)).square().sum(-1)
    size, own_size, inner = x.norm(dim=-1), y.norm(dim=-1), (x * y).sum(-1)
    per_row = {
        "rows": torch.ones_like(error),
        "error": error,
        "variance": variance,
        "error_by_variance": _where_divisible(error, variance),
        "varying": variance > 0,
        "cosine": _where_divisible(inner, size * own_size),
        "size_by_size": _where_divisible(own_size, size),
        "sized": size > 0,
        "own_square": own_size.square(),
        "inner": inner,
        "l0": latents.count_nonzero(-1),
        "l1": latents.abs().sum(-1, dtype=torch.float64),
    }
    return {name: values.double().sum(-1) for name, values in per_row.items()} | {"active": latents.count_nonzero(1).double()}


@torch.no_grad()
def _coded(autoencoder: SparseAutoencoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction of one and the same encoding."""
    kept: list[Tensor] = []

    def keep(latents: Tensor) -> Tensor:
        kept.append(latents)
        return latents

    y = autoencoder.reconstruct(x.to(autoencoder.W_enc.dtype), keep)
    return kept[0], y


def _where_divisible(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole, 0)


def _over(part: PerGroup, whole: PerGroup) -> PerGroup:
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole != 0)


def _unit(directions: Float[Tensor, "group d_sae d_in"]) -> Float[Tensor, "group d_sae d_in"]:
    return directions / directions.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(directions.dtype).tiny)


def _nearest(directions: Float[Tensor, "d_sae d_in"]) -> float:
    """The mean over rows of the largest cosine with another row, some rows at a time."""
    if len(directions) < 2:
        return float("nan")
    total, step = 0.0, max(1, _NUMBERS // len(directions))
    for start in range(0, len(directions), step):
        rows = directions[start : start + step]
        with_others = rows @ directions.T
        at = torch.arange(len(rows), device=rows.device)
        with_others[at, at + start] = -torch.inf
        total += float(with_others.max(-1).values.double().sum())
    return total / len(directions)
