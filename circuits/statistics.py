"""The statistics that stand beside a faithfulness: bootstrap intervals, random circuits, ROC and precision."""

import numpy as np
from jaxtyping import Bool, Float

from circuits.wiring import Wiring
from mechinterp.errors import CircuitError


def ratio_of_means(
    part: Float[np.ndarray, "*variants prompt"], whole: Float[np.ndarray, "prompt"]
) -> Float[np.ndarray, "*variants"]:
    """Mean over mean, which a prompt with a tiny denominator cannot blow up as it would a mean of ratios."""
    return np.asarray(part.mean(-1) / whole.mean(-1))


def bootstrap_means(
    values: Float[np.ndarray, "*variants prompt"], *, n_resamples: int = 1000, seed: int = 0
) -> Float[np.ndarray, "*variants resample"]:
    """Means over prompts drawn again with replacement, the same draws for every variant."""
    n = values.shape[-1]
    times_drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples)
    return values @ times_drawn.T / n


def interval(samples: Float[np.ndarray, "*variants resample"], level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """The percentile interval of bootstrap samples: low ends, high ends."""
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=-1)
    return np.asarray(low), np.asarray(high)


def bootstrap_interval(
    part: Float[np.ndarray, "*variants prompt"], whole: Float[np.ndarray, "prompt"], *, seed: int = 0
) -> tuple[Float[np.ndarray, "*variants"], Float[np.ndarray, "*variants"]]:
    """95 % percentile interval of ``ratio_of_means`` when the prompts are drawn again (1,000 times).

    Means nothing where the mean of ``whole`` may be zero: see ``may_be_zero``.
    """
    return interval(bootstrap_means(part, seed=seed) / bootstrap_means(whole, seed=seed))


def may_be_zero(values: Float[np.ndarray, "prompt"], seed: int = 0) -> bool:
    """Whether the 95 % bootstrap interval of the mean contains zero."""
    low, high = interval(bootstrap_means(values, seed=seed))
    return bool(low <= 0 <= high)


def stability(
    per_prompt: Float[np.ndarray, "prompt item"], n: int, *, signed: bool = False, n_resamples: int = 100, seed: int = 0
) -> float:
    """Mean Jaccard index between the ``n`` best items on all prompts and on prompts drawn again with replacement.

    By the mean over prompts, largest magnitudes (values if ``signed``) first. 1: the same circuit whatever the prompts.
    """
    n_prompts = len(per_prompt)
    drawn = np.random.default_rng(seed).multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=n_resamples)
    means = np.concatenate([np.full((1, n_prompts), 1), drawn]).astype(per_prompt.dtype) @ per_prompt
    best = np.argpartition(-(means if signed else np.abs(means)), n - 1, axis=1)[:, :n]
    shared = [len(np.intersect1d(best[0], again, assume_unique=True)) for again in best[1:]]
    return float(np.mean([common / (2 * n - common) for common in shared]))


def random_circuits(wiring: Wiring, n_edges: int, n_circuits: int, seed: int) -> Bool[np.ndarray, "variant edge"]:
    """Random circuits of exactly ``n_edges`` edges, each edge on a path from the input to the logits.

    The null that a found circuit must beat. Grown backwards from the logits, one random edge at a time among those whose
    reader is in; a writer that is new is joined to the input by random edges in turn. Edges drawn evenly from the whole
    model would mostly hang in the air and carry nothing, which makes too easy a null.
    """
    rng = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    while len(found) < n_circuits:
        grown = _grow(wiring, n_edges, rng)
        found += [grown] if grown is not None else []  # one that got stuck an edge short is thrown away
    return np.stack(found)


def _grow(wiring: Wiring, n_edges: int, rng: np.random.Generator) -> Bool[np.ndarray, "edge"] | None:
    kept = np.zeros(wiring.n_edges, dtype=bool)
    is_open = kept.copy()  # edges whose reader leads to the logits: the candidates and those kept
    candidates: list[int] = []
    fed = np.zeros(len(wiring.writers) + 1, dtype=bool)  # parts that the input leads to
    fed[0] = True

    is_in, fed_by = fed.copy(), wiring.reads.T.copy()

    def take_in(part: int) -> None:
        if not is_in[part]:
            is_in[part], edges = True, wiring.edges_into[part]
            candidates.extend(edges[~is_open[edges]].tolist())
            is_open[edges] = True

    take_in(-1)
    remaining = n_edges
    while remaining:
        if remaining == 1 and not any(fed[wiring.edge_writer[edge]] for edge in candidates):
            return None  # every edge left needs a second one that joins its writer to the input
        pick = int(rng.integers(len(candidates)))
        chain = [int(candidates[pick])]
        while not fed[writer := wiring.edge_writer[chain[-1]]] and len(chain) < remaining:
            before = wiring.edges_into[writer]
            from_input = before[wiring.edge_writer[before] == 0]
            chain.append(int(rng.choice(from_input if len(chain) == remaining - 1 else before)))
        if not fed[writer]:
            continue
        candidates[pick] = candidates[-1]
        candidates.pop()
        kept[chain] = True
        remaining -= len(chain)
        if is_open[chain[1:]].any():  # into a key that another head, already in, shares
            candidates[:] = [edge for edge in candidates if not kept[edge]]
        is_open[chain] = True
        for edge in chain:
            fed |= fed_by[wiring.edge_reader[edge]]
            take_in(int(wiring.edge_writer[edge]))
    return kept


def auroc(scores: Float[np.ndarray, "item"], truth: Bool[np.ndarray, "item"]) -> float:
    """Area under the ROC curve of a full ranking, higher scores first; ties count half. 0.5 is chance."""
    positives, negatives = _both(truth)
    order = np.argsort(scores, kind="stable")
    ranks = np.empty(len(scores))
    ranks[order] = np.arange(1, len(scores) + 1)
    _, tied, count = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.bincount(tied, weights=ranks) / count
    return float((mean_rank[tied][truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(scores: Float[np.ndarray, "item"], truth: Bool[np.ndarray, "item"]) -> float:
    """Area under the precision-recall curve as a step function, tied items entering together.

    Chance is the share of positives, which among edges is one to three per cent: a sterner test than the ROC.
    """
    precision, recall = precision_recall_curve(scores, truth)
    return float((np.diff(recall, prepend=0) * precision).sum())


def rank_correlation(one: Float[np.ndarray, "item"], other: Float[np.ndarray, "item"]) -> float | None:
    """Spearman's, ties at their average rank; None where one side has no order."""
    ranks = []
    for values in (one, other):
        _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[which])
    return None if min(map(np.ptp, ranks)) == 0 else round(float(np.corrcoef(*ranks)[0, 1]), 4)


def _both(truth: np.ndarray) -> tuple[int, int]:
    positives = int(truth.sum())
    if not 0 < positives < len(truth):
        raise CircuitError(
            f"{positives} of {len(truth)} items are in the known circuit; a ranking can only be judged if some are and "
            "some are not."
        )
    return positives, len(truth) - positives


def roc_curve(scores: Float[np.ndarray, "item"], truth: Bool[np.ndarray, "item"]) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates as the threshold falls, from (0, 0) to (1, 1); tied items enter together."""
    positives, negatives = _both(truth)
    taken, hits = _taken(scores, truth)
    return np.append(0, (taken - hits) / negatives), np.append(0, hits / positives)


def precision_recall_curve(scores: Float[np.ndarray, "item"], truth: Bool[np.ndarray, "item"]) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall as the threshold falls; tied items enter together."""
    positives, _ = _both(truth)
    taken, hits = _taken(scores, truth)
    return hits / taken, hits / positives


def _taken(scores: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At each threshold from the highest score down: how many items are taken, and how many of them are true."""
    order = np.argsort(-scores, kind="stable")
    taken = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True)) + 1
    return taken, np.cumsum(truth[order])[taken - 1]
