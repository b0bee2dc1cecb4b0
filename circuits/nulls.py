"""What chance alone would do: binomial tails, permuted prompts, random paths. The arithmetic under ``hypotheses``.

Each p-value here is exact or errs upwards: where the null holds, a test rejects at ``alpha`` no more often than that.
"""

import math

import numpy as np
from jaxtyping import Bool, Float, Int

from circuits.wiring import Wiring
from mechinterp.errors import CircuitError

_TRIES = 1000  # paths drawn until one leaves the circuit


def binomial(n: int, p: float) -> Float[np.ndarray, "count"]:
    """The chance of each count from 0 to ``n``; ``p`` strictly between 0 and 1.

    >>> binomial(2, 0.25)
    array([0.5625, 0.375 , 0.0625])
    """
    log_ways = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1)]
    counts = np.arange(n + 1)
    return np.exp(np.array(log_ways) + counts * math.log(p) + (n - counts) * math.log1p(-p))


def equivalence_p_value(wins: float | int, n: int, epsilon: float) -> float:
    """The chance of a share as far from 1/2 as ``wins / n``, where the true one is as far as ``epsilon`` allows.

    >>> round(equivalence_p_value(9, 10, epsilon=0.0), 4)  # (1 + 10 + 10 + 1) / 1024
    0.0215
    """
    far = np.abs(2 * np.arange(n + 1) - n) >= abs(2 * wins - n)
    return min(1.0, float(binomial(n, 0.5 + epsilon)[far].sum()))


def quantile_p_value(wins: int, n: int, quantile: float, *, more: bool) -> float:
    """The chance of ``wins`` or more (or fewer) of ``n`` comparisons, where each is won with chance ``quantile``."""
    chances = binomial(n, quantile)
    return min(1.0, float((chances[wins:] if more else chances[: wins + 1]).sum()))


def hsic(x: Float[np.ndarray, "prompt"], y: Float[np.ndarray, "prompt"]) -> float:
    """``trace(K H L H) / (n - 1)^2``: Gaussian kernels ``K`` and ``L`` of median width, centred by ``H``."""
    return float((_kernel(x) * _kernel(y)).sum()) / (len(x) - 1) ** 2


def independence_p_value(
    x: Float[np.ndarray, "prompt"], y: Float[np.ndarray, "prompt"], n_permutations: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """HSIC over its largest value, and the share of orders of ``y``, the one observed among them, with as large a one."""
    K, L = _kernel(x), _kernel(y)
    rng, observed = np.random.default_rng(seed), float((K * L).sum())
    orders = (rng.permutation(len(y)) for _ in range(n_permutations))
    reached = sum(float((K * L[np.ix_(order, order)]).sum()) >= observed * (1 - 1e-9) for order in orders)
    largest = math.sqrt(float((K * K).sum()) * float((L * L).sum()))
    return observed / largest if largest else 0.0, (1 + reached) / (1 + n_permutations)


def _kernel(x: Float[np.ndarray, "prompt"]) -> Float[np.ndarray, "prompt prompt"]:
    distance = np.abs(x[:, None] - x)
    pairs = distance[np.triu_indices(len(x), 1)]
    width = np.median(pairs) or pairs.mean() or 1.0  # the median is zero where most scores are tied
    kernel = np.exp(-(distance**2) / (2 * width**2))
    return kernel - kernel.mean(0) - kernel.mean(1, keepdims=True) + kernel.mean()


def inflations(
    wiring: Wiring, kept: Bool[np.ndarray, "edge"], n: int, seed: int
) -> tuple[Bool[np.ndarray, "variant edge"], Int[np.ndarray, "variant"]] | None:
    """``n`` times the circuit with a random path that is not all in it, and an edge that the path brought, drawn evenly.

    None where a thousand random paths stay in the circuit, as in the whole model.
    """
    rng, ways = np.random.default_rng(seed), _ways(wiring, np.ones_like(kept))
    masks, brought = np.repeat(kept[None], n, axis=0), np.zeros(n, dtype=int)
    for index, mask in enumerate(masks):
        paths = (_path(wiring, ways, rng) for _ in range(_TRIES))
        new = next((outside for path in paths if len(outside := path[~kept[path]])), None)
        if new is None:
            return None
        mask[new] = True
        brought[index] = rng.choice(new)
    return masks, brought


def circuits_of_paths(
    wiring: Wiring, among: Bool[np.ndarray, "edge"], n_edges: int, n: int, seed: int
) -> Bool[np.ndarray, "variant edge"]:
    """Unions of random paths that keep to the edges ``among``: of ``n_edges``, and up to a path's length more."""
    rng, ways = np.random.default_rng(seed), _ways(wiring, among)
    masks = np.zeros((n, len(among)), dtype=bool)
    if (most := _reachable(wiring, ways)) < n_edges:
        raise CircuitError(f"only {most:,} of these edges lie on a path from input to logits; {n_edges:,} were asked for.")
    for mask in masks:
        while mask.sum() < n_edges:
            mask[_path(wiring, ways, rng)] = True
    return masks


Ways = list[Int[np.ndarray, "_"]]


def _ways(wiring: Wiring, among: Bool[np.ndarray, "edge"]) -> Ways:
    """The edges out of each writer that lead on to the logits, so that no path runs into a dead end."""
    n_writers = len(wiring.writers)
    leads_on, ways = wiring.reads[-1].copy(), []  # readers of a part that leads to the logits
    for writer in reversed(range(n_writers)):
        out = np.flatnonzero(among & (wiring.edge_writer == writer))
        ways.append(out[leads_on[wiring.edge_reader[out]]])
        if len(ways[-1]):
            leads_on |= wiring.reads[writer]
    return ways[::-1]


def _path(wiring: Wiring, ways: Ways, rng: np.random.Generator) -> Int[np.ndarray, "step"]:
    """From the input, always along one of the edges that lead on, drawn evenly, to the logits.

    From a key or value that heads share it goes on by one of those of them that lead on, drawn evenly too.
    """
    writer, path = 0, []
    while writer < len(ways):
        path.append(ways[writer][rng.integers(len(ways[writer]))])
        onward = _onward(wiring, ways, np.array(path[-1:]))
        writer = int(onward[0] if len(onward) == 1 else rng.choice(onward))
    return np.array(path)


def _onward(wiring: Wiring, ways: Ways, edges: Int[np.ndarray, "some_edge"]) -> Int[np.ndarray, "part"]:
    """The parts that read any of these edges and lead on; the logits are the last part."""
    parts = np.flatnonzero(wiring.reads[:, wiring.edge_reader[edges]].any(1))
    return np.array([part for part in parts if part == len(ways) or len(ways[part])], dtype=int)


def _reachable(wiring: Wiring, ways: Ways) -> int:
    reached = {0}
    for writer, out in enumerate(ways):
        reached |= set(_onward(wiring, ways, out).tolist()) if writer in reached else set()
    return sum(len(out) for writer, out in enumerate(ways) if writer in reached)
