"""How faithful a circuit is, with everything that an honest number needs beside it.

Faithfulness is ``(m(C) - m(∅)) / (m(M) - m(∅))``: the share of the model's metric that the circuit keeps when every
other edge is ablated; ``m(∅)`` cuts all edges. It is a ratio of means over prompts with a bootstrap interval, can exceed
1 (parts that hurt were left out) and fall below 0, and is undefined where the ablation does not move the metric.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.ablation import Ablation, replacement_for
from circuits.edges import edge_name
from circuits.graph import Circuit
from circuits.report import Curve, Report
from circuits.running import measure_circuits
from circuits.scores import Scores
from circuits.statistics import (
    auroc,
    average_precision,
    bootstrap_interval,
    may_be_zero,
    precision_recall_curve,
    random_circuits,
    ratio_of_means,
    roc_curve,
)
from circuits.wiring import Wiring
from circuits.writes import Writes
from mechinterp.errors import CircuitError, TaskError
from mechinterp.metrics import is_preferred, kl_divergence
from mechinterp.models.transformer import Transformer
from mechinterp.prompts import PromptBatch
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
    allow_undefined: bool = False,
    progress: bool = False,
) -> Report:
    """Faithfulness of ``circuit`` on ``task``, its interval and spread, and what random circuits of its size reach.

    With ``scores``, also the curve of faithfulness against size (shares of all edges, largest magnitudes first). Raises
    ``TaskError`` where the ablation may not move the metric at all (the bootstrap interval of the gap contains zero), so
    that faithfulness is undefined, unless ``allow_undefined``. Cost: about two forwards for each circuit run; ``6 +
    n_random`` of them and one more a size.
    """
    wiring = Wiring.of(model.config)
    kept = wiring.mask(circuit)
    n_kept = int(kept.sum())
    curve = _nested(wiring, scores, sizes) if scores is not None else np.zeros((0, wiring.n_edges), bool)
    null = random_circuits(wiring, n_kept, n_random, seed) if n_random else curve[:0]
    fixed = np.stack([np.ones_like(kept), np.zeros_like(kept), kept, ~kept])
    replacement = replacement_for(model, task, ablation)
    stacked = np.concatenate([fixed, null, curve])
    with tqdm(total=len(stacked), desc="evaluate", unit="circuit", disable=not progress) as bar:
        (metric,) = measure_circuits(model, task.prompts, stacked, replacement.writes, [task.metric], bar)
    metric = metric.cpu().double().numpy()
    clean, corrupted = metric[0], metric[1]
    if not allow_undefined:
        _refuse_undefined(task, replacement.name, clean, corrupted, seed)
    gained, whole = metric - corrupted, clean - corrupted
    faithfulness, (low, high) = ratio_of_means(gained, whole), bootstrap_interval(gained, whole, seed=seed)
    first_size = len(fixed) + len(null)
    return Report(
        model=model.config.name,
        task=task.name,
        corruption=task.corruption,
        metric=task.metric_name,
        ablation=replacement.name,
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
        **_agreement(model, task, fixed[[0, 2]], replacement.writes),
    )


@dataclass(frozen=True)
class Ranking:
    """How well a ranking finds a known circuit. ``positives``: the share of true items, the chance level of precision."""

    auroc: float
    average_precision: float
    positives: float
    roc: tuple[np.ndarray, np.ndarray]
    precision_recall: tuple[np.ndarray, np.ndarray]


def ranking(scores: Scores, known: Iterable[str] | Circuit) -> Ranking:
    """Areas and points of the ROC and precision-recall curves of a ranking by magnitude against a known circuit.

    ``known``: a circuit, or names such as ``"a0.h1->a1.h3.k"``. The unit is the edge, ties count half, every edge of the
    model is ranked. Scores must never have seen the list. ``CircuitError`` for node scores and for foreign edges.
    """
    _check_scores(scores, scores.wiring)
    names = known if not isinstance(known, Circuit) else [edge_name(*edge) for edge in known.edges_kept]
    truth = np.zeros(len(scores), dtype=bool)
    truth[[scores.wiring.index_of(name) for name in names]] = True
    size = np.abs(scores.values)
    return Ranking(
        auroc=auroc(size, truth),
        average_precision=average_precision(size, truth),
        positives=float(truth.mean()),
        roc=roc_curve(size, truth),
        precision_recall=precision_recall_curve(size, truth),
    )


def _check_scores(scores: Scores, wiring: Wiring) -> None:
    if scores.items != "edge" or scores.wiring != wiring:
        what = f"{scores.items} scores of a model of {scores.wiring.n_layers} layers and {scores.wiring.n_heads} heads"
        raise CircuitError(f"these are {what}. Give edge scores of the model in hand, of {wiring.n_edges:,} edges.")


def _nested(wiring: Wiring, scores: Scores, sizes: Sequence[float]) -> Bool[np.ndarray, "size edge"]:
    """The circuits of the curve: the largest magnitudes, at each share of all edges (at least one edge, no size twice)."""
    _check_scores(scores, wiring)
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


def _refuse_undefined(task: Task, ablation: str, clean: np.ndarray, corrupted: np.ndarray, seed: int) -> None:
    if may_be_zero(clean - corrupted, seed):
        raise TaskError(
            f"on {task.name!r} the whole model scores {clean.mean():.4g} {task.metric_name} and the ablated one "
            f"{corrupted.mean():.4g}, a gap that {len(task)} prompts cannot tell from zero, so faithfulness is undefined. Use "
            f"another corruption than {task.corruption!r}, another ablation than {ablation!r}, or more prompts."
        )


def _quartiles(gained: Float[np.ndarray, "prompt"], whole: Float[np.ndarray, "prompt"]) -> tuple[float, float, float]:
    """Of single prompts' faithfulness: the spread that the ratio of means hides. Prompts without effect are left out."""
    moved = np.abs(whole) > 1e-9
    low, median, high = np.quantile(gained[moved] / whole[moved], [0.25, 0.5, 0.75])
    return float(low), float(median), float(high)


def _by_group(task: Task, gained: np.ndarray, whole: np.ndarray) -> dict[str, float]:
    """Faithfulness of each template, and of each order of names where the task records it (ABBA, BABA)."""
    groups = task.prompts.groups.cpu().numpy()
    members = {name: groups == group for group, name in enumerate(task.group_names)}
    orders = np.array(task.notes.get("orders", ()))
    members |= {str(order): orders == order for order in np.unique(orders) if len(orders) == len(task)}
    return {
        name: float(ratio_of_means(gained[rows], whole[rows]))
        for name, rows in members.items()
        if rows.any() and abs(whole[rows].mean()) > 1e-9
    }


def _agreement(model: Transformer, task: Task, masks: np.ndarray, writes: Writes) -> dict[str, float]:
    """Accuracy of model and circuit, and how far their whole distributions are apart."""

    def kl_from_model(logits: Tensor, prompts: PromptBatch) -> Tensor:
        whole, _ = model.run(prompts.clean, logits_at=prompts.end)
        return kl_divergence(whole.float(), logits.float())

    right, kl = measure_circuits(model, task.prompts, masks, writes, [is_preferred, kl_from_model])
    accuracy_model, accuracy_circuit = right.mean(1).tolist()
    return {"accuracy_model": accuracy_model, "accuracy_circuit": accuracy_circuit, "kl": float(kl[1].mean())}
