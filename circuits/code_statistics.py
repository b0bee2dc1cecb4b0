"""How much codes say about a label: mutual information, what chance alone would give, and which parts are beyond chance.

    I(h) = sum over y, c of p(y, c) log[ p(y, c) / (p(y) p(c)) ]      nats; y the label, c the code of part h

A part of many codes tells labels apart by chance alone, the more the fewer examples there are. So labels are permuted, the
same permutation for all parts: within pairs where examples are paired. What is left of I after the mean of its permuted
values is the part's information; how often they reach it, its p-value.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import CircuitError

_AT_ONCE = 1 << 25  # counts held at a time

# How often each code occurs in each class, draw by draw; and the size of each class.
Tables = tuple[Float[Tensor, "draw class column"], Float[Tensor, "class"]]


def check_test(n_permutations: int, level: float) -> None:
    """``CircuitError`` for no permutations and for a ``level`` that is no rate of false discoveries."""
    if n_permutations < 1:
        raise CircuitError(f"n_permutations={n_permutations} says nothing of chance. Give at least 1; 200 to 1000 are usual.")
    if not 0 < level < 1:
        raise CircuitError(f"level={level} is no rate of false discoveries. Give a number between 0 and 1; 0.05 is usual.")


def permuted_labels(
    labels: Int[np.ndarray, "example"], n: int, seed: int, *, paired: bool = False
) -> Int[np.ndarray, "draw example"]:
    """``n`` permutations of the labels. ``paired``: example i and i + half are a pair, and may only change places."""
    rng = np.random.default_rng(seed)
    if not paired:
        return rng.permuted(np.broadcast_to(labels, (n, len(labels))), axis=1)
    if len(labels) % 2:
        raise CircuitError(f"{len(labels)} examples cannot be pairs. Give as many positives as negatives, in one order.")
    first, second = np.split(labels, 2)
    swap = rng.integers(0, 2, (n, len(first))).astype(bool)
    return np.concatenate([np.where(swap, second, first), np.where(swap, first, second)], axis=1)


def information(
    values: Int[np.ndarray, "example part"], labels: Int[np.ndarray, "draw example"]
) -> Float[np.ndarray, "draw part"]:
    """The mutual information of each part's code with each row of labels, in nats."""
    return _by_part(values, labels, _information)


def unique_to_positives(
    values: Int[np.ndarray, "example part"], labels: Int[np.ndarray, "draw example"]
) -> Float[np.ndarray, "draw part"]:
    """How many codes of each part occur in examples of label 1 and in none of label 0: the paper's count."""
    return _by_part(values, labels, _unique)


def share_changed(values: Int[np.ndarray, "example part"]) -> Float[np.ndarray, "part"]:
    """The share of pairs (example i and i + half) whose two codes differ."""
    first, second = np.split(values, 2)
    return (first != second).mean(0)


def beyond_chance(
    observed: Float[np.ndarray, "part"], null: Float[np.ndarray, "draw part"]
) -> tuple[Float[np.ndarray, "part"], Float[np.ndarray, "part"]]:
    """What is observed, less the mean of the null; and p-values, ``(1 + draws that reach it) / (1 + draws)``."""
    reached = (null >= observed - 1e-9 * np.abs(observed)).sum(0)
    return observed - null.mean(0), (1 + reached) / (1 + len(null))


def false_discovery_rates(p: Float[np.ndarray, "test"]) -> Float[np.ndarray, "test"]:
    """Benjamini and Hochberg 1995: the least rate of false discoveries at which each test is still one."""
    order = np.argsort(p)
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    rates = np.empty(len(p))
    rates[order] = np.minimum.accumulate(scaled[::-1])[::-1].clip(max=1)
    return rates


def otsu(values: Float[np.ndarray, "item"]) -> float:
    """The cut that leaves the least variance on its two sides (Otsu 1979): no answer key, nothing to choose.

    Midway between two neighbouring values; the value itself, where all are equal.
    """
    ranked = np.unique(values)
    if len(ranked) < 2:
        return float(ranked[0])
    everything = np.sort(values)
    cuts = (ranked[1:] + ranked[:-1]) / 2
    sizes = np.searchsorted(everything, cuts)
    sums = np.concatenate([[0.0], np.cumsum(everything)])[sizes]
    below, above = sums / sizes, (everything.sum() - sums) / (len(everything) - sizes)
    between = sizes * (len(everything) - sizes) * (above - below) ** 2
    return float(cuts[np.argmax(between)])


def columns_of(values: Int[np.ndarray, "example part"]) -> tuple[Float[Tensor, "example column"], Int[np.ndarray, "column"]]:
    """Codes as zeros and ones, a column for each code of each part, and the part of each column."""
    numbers, sizes = [], []
    for part in values.T:
        found, number = np.unique(part, return_inverse=True)
        numbers.append(number + sum(sizes))
        sizes.append(len(found))
    hot = torch.zeros(len(values), sum(sizes))
    hot.scatter_(1, torch.as_tensor(np.stack(numbers, 1)), 1.0)
    return hot, np.repeat(np.arange(len(sizes)), sizes)


def _by_part(
    values: Int[np.ndarray, "example part"], labels: Int[np.ndarray, "draw example"], measure: Callable[[Tables], Tensor]
) -> Float[np.ndarray, "draw part"]:
    hot, owner = columns_of(values)
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    sums = [np.add.reduceat(measure(tables).double().numpy(), starts, axis=1) for tables in _tables(hot, labels)]
    return np.concatenate(sums)


def _tables(hot: Float[Tensor, "example column"], labels: Int[np.ndarray, "draw example"]) -> Iterator[Tables]:
    """Some draws at a time. Permutations have the same classes, each as large."""
    classes, sizes = np.unique(labels[0], return_counts=True)
    if len(classes) < 2:
        raise CircuitError(f"all {labels.shape[1]} examples have the label {classes[0]}, so no code can tell labels apart.")
    at_once = max(1, _AT_ONCE // (hot.shape[1] * len(classes)))
    for first in range(0, len(labels), at_once):
        some = labels[first : first + at_once]
        yield torch.stack([torch.as_tensor(some == one).float() @ hot for one in classes], 1), torch.as_tensor(sizes).float()


def _information(tables: Tables) -> Float[Tensor, "draw column"]:
    """A column's share of the sum; those of a part add up to its information."""
    counts, sizes = tables
    expected = sizes.unsqueeze(1) * counts.sum(1, keepdim=True) / sizes.sum()
    return (torch.special.xlogy(counts, counts / expected) / sizes.sum()).sum(1)


def _unique(tables: Tables) -> Float[Tensor, "draw column"]:
    counts, _ = tables
    return ((counts[:, 1] > 0) & (counts[:, 0] == 0)).float()
