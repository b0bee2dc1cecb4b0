"""How faithful a circuit is, with everything that an honest number needs beside it.

Faithfulness is ``(m(C) - m(∅)) / (m(M) - m(∅))``: the share of the model's metric that the circuit keeps when every
other edge is ablated; ``m(∅)`` cuts all edges. It is a ratio of means over prompts with a bootstrap interval, can exceed
1 (parts that hurt were left out) and fall below 0, and is undefined where the ablation does not move the metric.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float
from tqdm.auto import tqdm

from circuits.ablation import Ablation
from circuits.discovery.walk import replacements
from circuits.graph import Circuit
from circuits.report import Curve, Report
from circuits.running import measure_circuits
from circuits.scores import Scores
from circuits.statistics import auroc, average_precision, bootstrap_interval, random_circuits, ratio_of_means
from circuits.wiring import Wiring
from mechinterp.errors import TaskError
from mechinterp.metrics import is_preferred, kl_divergence
from mechinterp.models.transformer import Transformer
from mechinterp.tasks.base import Task

SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # MIB's grid, as shares of all edges


def evaluate(
    model: Transformer,
    task: Task,
    circuit: Circuit,
    scores: Scores | None = None,
    *,
    ablation: str | Ablation = "resample",
    sizes: Sequence[float] = SIZES,
    n_random: int = 20,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Faithfulness of ``circuit`` on ``task``, its interval and spread, and what a random circuit of its size reaches.

    With ``scores``, also the curve of faithfulness against size (shares of all edges, largest magnitudes first). Cost:
    about two forwards for each circuit run, ``3 + n_random`` of them and one more a size. Raises ``TaskError`` where
    model and ablated model score the same, so that faithfulness is undefined.
    """
    wiring = Wiring.of(model.config)
    kept = wiring.mask(circuit)
    n_kept = int(kept.sum())
    curve = _nested(wiring, scores, sizes) if scores is not None else np.zeros((0, wiring.n_edges), bool)
    null = random_circuits(wiring, n_kept, n_random, seed) if n_random else curve[:0]
    fixed = np.stack([np.ones_like(kept), np.zeros_like(kept), kept, ~kept])
    ablation_name, replacement = replacements(model, task, ablation)
    stacked = np.concatenate([fixed, null, curve])
    with tqdm(total=len(stacked), desc="evaluate", unit="circuit", disable=not progress) as bar:
        (metric,) = measure_circuits(model, task.prompts, stacked, replacement, [task.metric], bar)
    metric = metric.double().cpu().numpy()
    clean, corrupted = metric[0], metric[1]
    _refuse_undefined(task, clean, corrupted)
    gained, whole = metric - corrupted, clean - corrupted
    faithfulness, (low, high) = ratio_of_means(gained, whole), bootstrap_interval(gained, whole, seed=seed)
    first_size = len(fixed) + len(null)
    return Report(
        model=model.config.name,
        task=task.name,
        corruption=task.corruption,
        metric=task.metric_name,
        ablation=ablation_name,
        n_prompts=len(task),
        n_edges=n_kept,
        n_edges_in_model=wiring.n_edges,
        clean=float(clean.mean()),
        corrupted=float(corrupted.mean()),
        circuit=float(metric[2].mean()),
        faithfulness=float(faithfulness[2]),
        interval=(float(low[2]), float(high[2])),
        quartiles=_quartiles(gained[2], whole),
        complement=float(faithfulness[3]),
        random=tuple(faithfulness[4:first_size].tolist()),
        groups=_by_group(task, gained[2], whole),
        curve=_curve(curve, faithfulness[first_size:], low[first_size:], high[first_size:]),
        seed=seed,
        **_agreement(model, task, fixed[[0, 2]], replacement),
    )


def ranking(scores: Scores, known: Iterable[str] | Circuit) -> dict[str, float]:
    """How well a ranking by magnitude finds a known circuit: AUROC, average precision, and the share of positives.

    ``known``: a circuit, or names such as ``"a0.h1->a1.h3.k"``. The unit is the edge, ties count half, every edge of the
    model is ranked. Scores must never have seen the list.
    """
    names = known if not isinstance(known, Circuit) else [f"{writer}->{reader}" for writer, reader in known.edges_kept]
    truth = np.zeros(len(scores), dtype=bool)
    truth[[scores.wiring.index_of(name) for name in names]] = True
    magnitude = np.abs(scores.values)
    return {
        "auroc": auroc(magnitude, truth),
        "average_precision": average_precision(magnitude, truth),
        "positives": float(truth.mean()),
    }


def _nested(wiring: Wiring, scores: Scores, sizes: Sequence[float]) -> Bool[np.ndarray, "size edge"]:
    """The circuits of the curve: the largest magnitudes, at each share of all edges (at least one edge, no size twice)."""
    order = scores.order()
    counts = sorted({max(1, int(share * wiring.n_edges)) for share in sizes})
    masks = np.zeros((len(counts), wiring.n_edges), dtype=bool)
    for mask, count in zip(masks, counts, strict=True):
        mask[order[:count]] = True
    return masks


def _curve(masks, faithfulness, low, high) -> Curve | None:
    if not len(masks):
        return None
    return Curve(tuple(int(n) for n in masks.sum(1)), tuple(faithfulness.tolist()), tuple(low.tolist()), tuple(high.tolist()))


def _refuse_undefined(task: Task, clean: np.ndarray, corrupted: np.ndarray) -> None:
    gap = abs(float((clean - corrupted).mean()))
    if gap < 1e-6 * max(1e-3, float(np.abs(clean).mean())):
        raise TaskError(
            f"model and ablated model score the same on {task.name!r} ({task.metric_name} {clean.mean():.4g} and "
            f"{corrupted.mean():.4g}), so faithfulness is undefined. Use another corruption, ablation or metric."
        )


def _quartiles(gained: Float[np.ndarray, "prompt"], whole: Float[np.ndarray, "prompt"]) -> tuple[float, float, float]:
    """Of single prompts' faithfulness: the spread that the ratio of means hides. Prompts without effect are left out."""
    moved = np.abs(whole) > 1e-9
    low, median, high = np.quantile(gained[moved] / whole[moved], [0.25, 0.5, 0.75])
    return float(low), float(median), float(high)


def _by_group(task: Task, gained: np.ndarray, whole: np.ndarray) -> dict[str, float]:
    groups = task.prompts.groups.cpu().numpy()
    return {
        task.group_names[group]: float(ratio_of_means(gained[groups == group], whole[groups == group]))
        for group in np.unique(groups)
        if abs(whole[groups == group].mean()) > 1e-9
    }


def _agreement(model: Transformer, task: Task, masks: np.ndarray, replacement) -> dict[str, float]:
    """Accuracy of model and circuit, and how far their whole distributions are apart."""
    right, logits = measure_circuits(model, task.prompts, masks, replacement, [is_preferred, lambda x, _: x])
    return {
        "accuracy_model": float(right[0].mean()),
        "accuracy_circuit": float(right[1].mean()),
        "kl": float(kl_divergence(logits[0], logits[1]).mean()),
    }
