"""How many items two or more circuits would share if chance alone had chosen them.

Two nulls. *Even draws*: each circuit is as large as it is, and its items are drawn evenly from all that it chose among;
for two circuits of ``a`` and ``b`` of ``N`` items the number shared is hypergeometric,
``P(k) = C(a, k) C(N - a, b - k) / C(N, b)``, and each further circuit is one more such draw from what is shared so far.
*Same degrees*: each reader keeps its number of incoming edges and each writer its number of outgoing ones. Circuits with
the same hubs share edges for no other reason, so this null is the sterner one. It is the one to beat: even in a model with
random weights, circuits of two tasks share near half of their edges, which no even draw explains (p below 1e-20) and the
same degrees do (``benchmarks/results/reuse.md``).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int

from circuits.wiring import Wiring
from mechinterp.errors import CircuitError


@dataclass(frozen=True)
class Chance:
    """What a null says of the number of shared items: its mean, its central 95 % interval, P(as many as found, or more).

    ``n_draws``: the random circuits that stand behind it, None where the distribution is exact. Of draws, the observed one
    counts as one of them, so that their ``p_value`` is never below ``1 / (n_draws + 1)``.
    """

    mean: float
    low: float
    high: float
    p_value: float
    n_draws: int | None = None

    @classmethod
    def exact(cls, chances: Float[np.ndarray, "count"], found: int) -> "Chance":
        """From the probability of each number from 0 up."""
        low, high = (float(np.searchsorted(np.cumsum(chances), level)) for level in (0.025, 0.975))
        tail = float(chances[found:].sum()) if found else 1.0  # summed from the small end up, or the smallest are lost
        return cls(float(chances @ np.arange(len(chances))), low, high, min(tail, 1.0))

    @classmethod
    def drawn(cls, counts: Int[np.ndarray, "draw"], found: int) -> "Chance":
        """From the numbers that random circuits share."""
        low, high = np.quantile(counts, [0.025, 0.975])
        reached = int((counts >= found).sum())
        return cls(float(counts.mean()), float(low), float(high), (1 + reached) / (1 + len(counts)), len(counts))


def shared_by_chance(n_items: int, sizes: Sequence[int]) -> Float[np.ndarray, "count"]:
    """The probability of each number of items that evenly drawn sets of these sizes have all in common; exact.

    >>> shared_by_chance(4, [2, 2])  # 1, 4 and 1 of the 6 ways to draw the second pair
    array([0.16666667, 0.66666667, 0.16666667])
    """
    if not sizes or max(sizes) > n_items or min(sizes) < 0:
        raise CircuitError(f"sets of {list(sizes)} cannot be drawn from {n_items} items. Sizes run from 0 to {n_items}.")
    log_factorial = _log_factorials(n_items)
    first, *others = sorted(sizes)
    chances = np.zeros(first + 1)
    chances[first] = 1.0
    for size in others:
        after = np.zeros(first + 1)
        for shared in np.flatnonzero(chances).tolist():
            after[: shared + 1] += chances[shared] * _hypergeometric(n_items, shared, size, log_factorial)
        chances = after
    return chances


def _hypergeometric(n_items: int, a: int, b: int, log_factorial: Float[np.ndarray, "n"]) -> Float[np.ndarray, "count"]:
    """``C(a, k) C(N - a, b - k) / C(N, b)`` for k from 0 to ``a``."""
    chances, k = np.zeros(a + 1), np.arange(max(0, a + b - n_items), min(a, b) + 1)

    def log_choose(n: Int[np.ndarray, "*k"] | int, of: Int[np.ndarray, "*k"] | int) -> Float[np.ndarray, "*k"] | float:
        return log_factorial[n] - log_factorial[of] - log_factorial[n - of]

    chances[k] = np.exp(log_choose(a, k) + log_choose(n_items - a, b - k) - log_choose(n_items, b))
    return chances


@lru_cache(maxsize=8)
def _log_factorials(n: int) -> Float[np.ndarray, "n"]:
    return np.array([math.lgamma(m + 1) for m in range(n + 1)])


def with_same_degrees(
    wiring: Wiring,
    kept: Bool[np.ndarray, "edge"],
    n_draws: int = 200,
    seed: int = 0,
    *,
    judged: Bool[np.ndarray, "edge"] | None = None,
    swaps_per_edge: int = 20,
) -> Bool[np.ndarray, "draw edge"]:
    """Random circuits in which every writer has as many kept edges as in ``kept``, and every reader (each port) as well.

    Each draw starts from the circuit and tries ``swaps_per_edge`` swaps a kept edge, one after the other: of two random
    edges ``u->p`` and ``v->q`` it makes ``u->q`` and ``v->p``, unless the model (or ``judged``, the edges that count) has no
    such edge or the circuit keeps it already. Swaps that are refused leave the circuit as it is, so each is as likely as
    its reverse, and in the long run all circuits of these degrees are equally likely. All can be reached: what is written
    early may be read by all later readers, so of any two that differ one swap makes them more alike. Twenty tries an edge
    are twice what the overlap with the start takes to level off (see the tests). Half a second for 1,000 of GPT-2
    small's edges and 200 draws, which all take their steps together; time grows with the number of kept edges.

    Where a circuit is small and hangs on few hubs, hardly any swap is left to make: the draws are then nearly the circuit
    itself, and a number shared that does not exceed theirs is no evidence either way.
    """
    rng, judged = np.random.default_rng(seed), np.ones_like(kept) if judged is None else judged
    edge_at = np.append(np.full(len(wiring.writers) * len(wiring.readers), wiring.n_edges), 0)
    edge_at[wiring.edge_writer * len(wiring.readers) + wiring.edge_reader] = np.arange(wiring.n_edges)
    free = np.tile(np.append(judged & ~kept, False), n_draws)  # at the end of each draw, what is no edge of this model
    start = np.arange(n_draws) * (wiring.n_edges + 1)
    edges = np.tile(np.flatnonzero(kept & judged), (n_draws, 1))
    n_edges = edges.shape[1]
    for step in range(swaps_per_edge * n_edges if n_edges > 1 else 0):
        if step % _BLOCK == 0:
            picks = rng.integers(n_edges, size=(_BLOCK, 2, n_draws)) + np.arange(n_draws) * n_edges
        _swap(edges.reshape(-1), free, start, picks[step % _BLOCK], wiring, edge_at)
    drawn = np.tile(kept & ~judged, (n_draws, 1))
    drawn[np.arange(n_draws)[:, None], edges] = True
    return drawn


_BLOCK = 512  # steps whose random numbers are drawn at once


def _swap(
    edges: Int[np.ndarray, "place"],
    free: Bool[np.ndarray, "slot"],
    start: Int[np.ndarray, "draw"],
    picks: Int[np.ndarray, "2 draw"],
    wiring: Wiring,
    edge_at: Int[np.ndarray, "cell"],
) -> None:
    """One swap in every draw that can make it, in place: the two picked edges exchange their readers."""
    one, other = edges[picks[0]], edges[picks[1]]
    row = len(wiring.readers)
    crossed = edge_at[wiring.edge_writer[one] * row + wiring.edge_reader[other]]
    back = edge_at[wiring.edge_writer[other] * row + wiring.edge_reader[one]]
    can = np.flatnonzero(free[start + crossed] & free[start + back])
    at = start[can]
    free[at + one[can]] = free[at + other[can]] = True
    free[at + crossed[can]] = free[at + back[can]] = False
    edges[picks[0, can]], edges[picks[1, can]] = crossed[can], back[can]
