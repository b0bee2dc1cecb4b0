"""What two codes tell together: the information of a pair of parts, for all ordered pairs at once, and which pairs stand out.

    I(y; c1, c2) - I(y; c1) - I(y; c2)  =  I(c1; c2 | y) - I(c1; c2)      y the label, c1 and c2 the codes of two parts

Positive: together they tell more than each alone (synergy: an exclusive or). Negative: they say the same (redundancy: a copy).

Every information is a sum of ``n log n`` over the cells of a table of counts, and counts are whole numbers, so that it is
looked up. A cell of one example adds ``1 log 1 = 0``; where codes are many most cells are such, and are never filled in.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from circuits.code_statistics import columns_of, false_discovery_rates, information, otsu, permuted_labels
from mechinterp.errors import CircuitError, nearest

_AT_ONCE = 1 << 19  # counts held at a time: more would not stay in the processor's cache
_ROUNDING = 1e-6  # nats; less is rounding: `information` counts in float32

Draws = Float[np.ndarray, "draw pair"]  # the first as observed, the others under the null; each less the null's mean
PairScore = Callable[[np.ndarray, np.ndarray, np.ndarray, int, int], Draws]  # codes, labels, n_before, permutations, seed


@dataclass(frozen=True, eq=False)
class JudgedPairs:
    """Each ordered pair's score, p-value and false discovery rate, and which pairs stand out."""

    values: Float[np.ndarray, "pair"]
    p: Float[np.ndarray, "pair"]
    rates: Float[np.ndarray, "pair"]
    selected: Bool[np.ndarray, "pair"]


def pairs_of(n_before: Int[np.ndarray, "node"]) -> tuple[Int[np.ndarray, "pair"], Int[np.ndarray, "pair"]]:
    """Writers and readers: node ``r`` may read from the first ``n_before[r]`` nodes. Pairs are ordered by reader."""
    readers = np.repeat(np.arange(len(n_before)), n_before)
    return np.arange(len(readers)) - np.repeat(np.cumsum(n_before) - n_before, n_before), readers


def joint_information(
    values: Int[np.ndarray, "example node"], labels: Int[np.ndarray, "draw example"], n_before: Int[np.ndarray, "node"]
) -> Draws:
    """``I(y; (c1, c2))`` of every ordered pair with each row of labels, in nats.

    Labels are 1 and 0, and examples i and i + half have one of each: where the first is positive the second is not, so that
    half of the examples decide a table. ``CircuitError`` for other labels. Memory: 8 bytes times the square of the examples.
    """
    half = labels.shape[1] // 2
    if not (labels[:, :half] + labels[:, half:] == 1).all():
        raise CircuitError("the labels are not pairs of 1 and 0. Give positives, then as many negatives, in one order.")
    f, n = _n_log_n(2 * half), np.arange(2 * half + 1)
    of_split = f + f[np.abs(n[:, None] - n)] - f[:, None]  # [count positives]: what a cell adds
    first = labels[:, :half].T.astype(np.float32)
    found = []
    for mine, others, owner in _by_reader(values, n_before):
        sums = np.zeros((owner[-1] + 1, len(labels)))
        counts = _matmul(others, mine.T)  # [column code]
        column, code = np.nonzero(counts >= 2)
        for some in _blocks(len(column), len(labels)):
            both = others[column[some]] * mine[code[some]]  # [cell example]
            positives = both[:, half:].sum(1, dtype=int)[:, None] + _matmul(both[:, :half] - both[:, half:], first)
            _add(sums, of_split[counts[column[some], code[some], None], positives], owner[column[some]])
        found.append(sums)
    return (np.concatenate(found).T - 2 * f[half] + f[2 * half]) / (2 * half)


def conditional_information(
    values: Int[np.ndarray, "example node"],
    labels: Int[np.ndarray, "example"],
    n_before: Int[np.ndarray, "node"],
    orders: Int[np.ndarray, "draw example"],
) -> Draws:
    """``I(c1; c2 | y)`` of every ordered pair, c2 taken in each of the ``orders``, which keep labels in place; in nats."""
    f, found = _n_log_n(len(labels)), []
    for mine, others, owner in _by_reader(values, n_before):
        sums = np.zeros((owner[-1] + 1, len(orders)))
        for kind in np.unique(labels):
            here = labels == kind
            own, theirs = mine[:, here], others[:, here]
            sums += f[here.sum()] - f[own.sum(1, dtype=int)].sum()
            _add(sums, -f[theirs.sum(1, dtype=int), None], owner)
            for some in _blocks(len(orders), len(others) * len(mine)):
                shuffled = mine[:, orders[some][:, here]]  # [code draw example]
                cells = f[_matmul(theirs, shuffled.reshape(-1, here.sum()).T)]
                _add(sums[:, some], cells.reshape(len(others), len(mine), -1).sum(1), owner)
        found.append(sums)
    return np.concatenate(found).T / len(labels)


def interaction(
    values: Int[np.ndarray, "example node"],
    labels: Int[np.ndarray, "example"],
    n_before: Int[np.ndarray, "node"],
    n_permutations: int,
    seed: int,
) -> Draws:
    """``I(y; (c1, c2)) - I(y; c1) - I(y; c2)``, each adjusted for chance; then the same under permuted labels.

    Labels are permuted within pairs, one permutation for all. To take off the mean of the difference under permuted labels is
    not enough: the many cells of a joint table tell permuted labels apart where they could tell nothing more about the true
    ones, as one of the two codes knows them already. Any such part would seem redundant with any noise of many codes (16
    codes each, 400 examples: -0.3 nats). So each of the three is 0 at its chance level and H(y) where it tells all:

        adjusted I = H(y) (I - chance) / (H(y) - chance)

    as in Vinh et al. 2010 (JMLR 11, adjusted mutual information), with the mean under permutations for chance. Between the
    two ends this is a straight line, which is not quite the truth: noise beside a part that knows half of the label scores
    up to some +0.03 nats (16 codes, 400 examples), and its p-value is small more often than it should be. That is why what
    stands out must pass Otsu's cut as well.
    """
    draws = np.concatenate([labels[None], permuted_labels(labels, n_permutations, seed, paired=True)])
    writers, readers = pairs_of(n_before)
    alone = _adjusted(information(values, draws))
    return _adjusted(joint_information(values, draws, n_before)) - alone[:, writers] - alone[:, readers]


def conditional(
    values: Int[np.ndarray, "example node"],
    labels: Int[np.ndarray, "example"],
    n_before: Int[np.ndarray, "node"],
    n_permutations: int,
    seed: int,
) -> Draws:
    """``I(c1; c2 | y)``, less its mean when one of the two is shuffled among examples of the same label; then those.

    What two parts share that the label does not explain, be it about the task or not: the same word that both have read.
    """
    rng, columns = np.random.default_rng(seed), np.arange(len(labels))
    orders = np.tile(columns, (1 + n_permutations, 1))
    for kind in np.unique(labels):
        here = np.flatnonzero(labels == kind)
        orders[1:, here] = rng.permuted(orders[1:, here], axis=1)
    found = conditional_information(values, labels, n_before, orders)
    return found - found[1:].mean(0)


def known_pair_score(name: str) -> PairScore:
    """The score of this name; ``CircuitError`` names those that there are."""
    if name not in PAIR_SCORES:
        known = ", ".join(PAIR_SCORES)
        raise CircuitError(f"there is no score {name!r} of edges; there are {known}.{nearest(name, PAIR_SCORES)}")
    return PAIR_SCORES[name]


def judge_pairs(
    found: Float[np.ndarray, "place draw pair"], level: float, among: Bool[np.ndarray, "pair"] | None = None
) -> JudgedPairs:
    """The best place by magnitude, against the best place under the same permutations; then what stands out ``among`` some.

    Two hundred permutations cannot give a p-value that survives twelve thousand tests. So every pair's magnitudes are divided
    by their root mean square over draws, and all pairs' draws are one null (Tusher et al. 2001; Storey and Tibshirani 2003):
    ``p`` is the share of it that reaches what is observed. A pair that no draw changes has p = 1. Only those ``among`` which
    we look (None: all) are tested, and may stand out; the others have p = 1 too.
    """
    among = np.ones(found.shape[2], bool) if among is None else among
    found = np.where(np.abs(found) < _ROUNDING, 0, found)
    place = np.abs(found[:, 0]).argmax(0)
    values = found[place, 0, np.arange(found.shape[2])]
    p, rates, selected = np.ones(len(values)), np.ones(len(values)), np.zeros(len(values), bool)
    if among.any():
        p[among] = _pooled(np.abs(found[:, :, among]).max(0))
        rates[among] = false_discovery_rates(p[among])
        selected = among & (rates <= level) & (np.abs(values) > otsu(np.abs(values[among])))
    return JudgedPairs(values, p, rates, selected)


def _pooled(size: Float[np.ndarray, "draw pair"]) -> Float[np.ndarray, "pair"]:
    """P-values of the first draw's magnitudes, against those of all pairs in all the others."""
    varies = size.any(0)
    size = size / np.where(varies, np.sqrt(np.square(size).mean(0)), 1)
    null = np.sort(size[1:, varies], axis=None)
    reached = len(null) - np.searchsorted(null, size[0] * (1 - 1e-9))
    return np.where(varies, (1 + reached) / (1 + len(null)), 1.0)


def _by_reader(
    values: Int[np.ndarray, "example node"], n_before: Int[np.ndarray, "node"]
) -> Iterator[tuple[Int[np.ndarray, "code example"], Int[np.ndarray, "column example"], Int[np.ndarray, "column"]]]:
    """Reader by reader its codes, the columns of all writers before it, and whose these are; as zeros and ones."""
    hot, owner = columns_of(values)
    hot = np.ascontiguousarray(hot.numpy().T.astype(np.int8))
    for reader in np.flatnonzero(n_before):
        n_columns = np.searchsorted(owner, n_before[reader])
        yield hot[owner == reader], hot[:n_columns], owner[:n_columns]


def _blocks(n: int, counts_each: int) -> list[slice]:
    at_once = max(1, _AT_ONCE // counts_each)
    return [slice(first, first + at_once) for first in range(0, n, at_once)]


def _matmul(one: Shaped[np.ndarray, "row inner"], other: Shaped[np.ndarray, "inner column"]) -> Int[np.ndarray, "row column"]:
    """Of whole numbers, by way of floats, which multiply faster; exact below 2^24."""
    return (one.astype(np.float32) @ other.astype(np.float32)).astype(np.int64)


def _add(sums: Float[np.ndarray, "owner draw"], cells: Float[np.ndarray, "cell #draw"], owner: Int[np.ndarray, "cell"]) -> None:
    """Adds to each owner's sum its cells, which stand together."""
    if len(owner):
        starts = np.flatnonzero(np.diff(owner, prepend=-1))
        sums[owner[starts]] += np.add.reduceat(cells, starts, axis=0)


def _adjusted(found: Float[np.ndarray, "draw item"]) -> Float[np.ndarray, "draw item"]:
    """0 at the mean of all draws but the first, H(y) = log 2 at H(y). Where chance alone tells all labels, nothing is known."""
    chance = found[1:].mean(0)
    room = np.log(2) - chance
    return np.log(2) * (found - chance) / np.where(room > _ROUNDING, room, np.inf)


def _n_log_n(n: int) -> Float[np.ndarray, "count"]:
    counts = np.arange(n + 1, dtype=np.float64)
    return counts * np.log(np.maximum(counts, 1))


PAIR_SCORES: dict[str, PairScore] = {"interaction": interaction, "conditional": conditional}
