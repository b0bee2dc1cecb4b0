"""The statistics that stand beside a faithfulness: bootstrap intervals, random circuits, ROC and precision."""

import numpy as np
from jaxtyping import Bool, Float, Int

from circuits.wiring import Wiring
from mechinterp.errors import CircuitError


def resamples(n_prompts: int, n_resamples: int, seed: int) -> Int[np.ndarray, "resample prompt"]:
    """Bootstrap rows: each a draw of all prompts with replacement."""
    return np.random.default_rng(seed).integers(n_prompts, size=(n_resamples, n_prompts))


def ratio_of_means(
    part: Float[np.ndarray, "*variants prompt"], whole: Float[np.ndarray, "prompt"]
) -> Float[np.ndarray, "*variants"]:
    """Mean over mean, which a prompt with a tiny denominator cannot blow up as it would a mean of ratios."""
    return np.asarray(part.mean(-1) / whole.mean(-1))


def bootstrap_interval(
    part: Float[np.ndarray, "*variants prompt"],
    whole: Float[np.ndarray, "prompt"],
    *,
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[Float[np.ndarray, "*variants"], Float[np.ndarray, "*variants"]]:
    """Percentile interval of ``ratio_of_means`` when the prompts are drawn again."""
    draws = resamples(len(whole), n_resamples, seed)
    ratios = part[..., draws].mean(-1) / whole[draws].mean(-1)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2], axis=-1)
    return np.asarray(low), np.asarray(high)


def random_circuits(wiring: Wiring, n_edges: int, n_circuits: int, seed: int) -> Bool[np.ndarray, "variant edge"]:
    """Random circuits of exactly ``n_edges`` edges, all connected to the logits: the null that a found circuit must beat.

    Grown backwards from the logits: each step adds one edge, chosen evenly among those whose reader is already in.
    Edges drawn evenly from the whole model would mostly hang in the air, which makes too easy a null.
    """
    rng = np.random.default_rng(seed)
    return np.stack([_grow(wiring, n_edges, rng) for _ in range(n_circuits)])


def _grow(wiring: Wiring, n_edges: int, rng: np.random.Generator) -> Bool[np.ndarray, "edge"]:
    into = {node: np.empty(0, int) for node in wiring.writers}
    readers = np.split(np.arange(wiring.n_edges), np.cumsum(wiring.writers_before)[:-1])
    for reader, edges in zip(wiring.readers, readers, strict=True):
        owner = reader.with_port(None)
        if owner in into:
            into[owner] = np.concatenate([into[owner], edges])
    kept = np.zeros(wiring.n_edges, dtype=bool)
    open_edges, reached = list(readers[-1]), set()
    for _ in range(n_edges):
        pick = int(rng.integers(len(open_edges)))
        open_edges[pick], open_edges[-1] = open_edges[-1], open_edges[pick]
        edge = open_edges.pop()
        kept[edge] = True
        writer = wiring.writers[wiring.edge_writer[edge]]
        if writer not in reached:
            reached.add(writer)
            open_edges.extend(into[writer])
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
    positives, _ = _both(truth)
    thresholds = np.unique(scores)[::-1]
    order = np.argsort(-scores, kind="stable")
    taken = np.searchsorted(-scores[order], -thresholds, side="right")
    hits = np.cumsum(truth[order])[taken - 1]
    return float((np.diff(hits, prepend=0) * hits / taken).sum() / positives)


def _both(truth: np.ndarray) -> tuple[int, int]:
    positives = int(truth.sum())
    if not 0 < positives < len(truth):
        raise CircuitError(
            f"{positives} of {len(truth)} items are in the known circuit; a ranking can only be judged if some are and "
            "some are not."
        )
    return positives, len(truth) - positives
