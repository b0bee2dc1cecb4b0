"""How faithful a circuit is, with everything that an honest number needs beside it.

Faithfulness is ``(m(C) - m(∅)) / (m(M) - m(∅))``: the share of the model's metric that the circuit keeps when every
other edge is ablated; ``m(∅)`` cuts all edges. It is a ratio of means over prompts with a bootstrap interval, can exceed
1 (parts that hurt were left out) and fall below 0, and is undefined where the ablation does not move the metric.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.ablation import Ablation
from circuits.curves import SIZES, Cuts
from circuits.ends import Ends
from circuits.graph import Circuit
from circuits.report import Report
from circuits.running import measure_circuits
from circuits.scores import Scores
from circuits.solving import fitness
from circuits.statistics import (
    bootstrap_interval,
    may_be_zero,
    random_circuits,
    ratio_of_means,
    stability,
)
from circuits.wiring import Wiring
from circuits.writes import Writes
from mechinterp.errors import TaskError
from mechinterp.metrics import is_preferred, kl_divergence
from mechinterp.models.transformer import Transformer
from mechinterp.prompts import PromptBatch
from mechinterp.tasks.base import Task


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
    allow_unsolved: bool = False,
    progress: bool = False,
) -> Report:
    """Faithfulness of ``circuit`` on ``task``, its interval and spread, and what random circuits of its size reach.

    With ``scores``, also the curves of faithfulness against size (shares of all items, by magnitude and by value), and, if
    they keep every prompt's own scores, how stable a circuit of this size is. Raises ``TaskError`` where the ablation may
    not move the metric at all (the bootstrap interval of the gap contains zero), so that faithfulness is undefined, unless
    ``allow_undefined``, and where the model does not do the task, unless ``allow_unsolved`` (see ``fitness``). Cost: four
    forwards, and one with cut edges for each of ``4 + n_random`` circuits and of the sizes.
    """
    wiring = Wiring.of(model.config)
    kept = wiring.mask(circuit)
    cuts = [] if scores is None else [Cuts.of(scores, model, sizes, signed=signed) for signed in (False, True)]
    fitness(model, task, allow_unsolved=allow_unsolved)
    ends = Ends.of(model, task, ablation)
    if not allow_undefined:
        _refuse_undefined(ends, seed)
    null = random_circuits(wiring, int(kept.sum()), n_random, seed) if n_random else np.zeros((0, wiring.n_edges), bool)
    stacked = np.concatenate([kept[None], ~kept[None], null, *(cut.masks for cut in cuts)])
    with tqdm(total=len(stacked), desc="evaluate", unit="circuit", disable=not progress) as bar:
        gained = ends.gained(stacked, bar)
    faithfulness, (low, high) = ratio_of_means(gained, ends.whole), bootstrap_interval(gained[:1], ends.whole, seed=seed)
    curves = [
        cut.curve(rows, ends.whole, seed)
        for cut, rows in zip(cuts, np.split(gained[2 + len(null) :], max(len(cuts), 1)), strict=False)
    ]
    return Report(
        model=model.config.name,
        task=task.name,
        corruption=task.corruption,
        metric=task.metric_name,
        ablation=ends.replacement.name,
        n_prompts=len(task),
        n_edges=int(kept.sum()),
        n_edges_in_model=wiring.n_edges,
        clean=float(ends.clean.mean()),
        corrupted=float(ends.empty.mean()),
        circuit=float((gained[0] + ends.empty).mean()),
        faithfulness=float(faithfulness[0]),
        interval=(float(low[0]), float(high[0])),
        quartiles=_quartiles(gained[0], ends.whole),
        complement=float(faithfulness[1]),
        random=tuple(faithfulness[2 : 2 + len(null)].tolist()),
        groups=_by_group(task, gained[0], ends.whole),
        curve=curves[0] if curves else None,
        signed_curve=curves[1] if curves else None,
        stability=_stability(scores, circuit, seed),
        items="edge" if scores is None else scores.items,
        seed=seed,
        **_agreement(model, task, np.stack([np.ones_like(kept), kept]), ends.replacement.writes),
    )


def _refuse_undefined(ends: Ends, seed: int) -> None:
    if may_be_zero(ends.whole, seed):
        task = ends.task
        raise TaskError(
            f"on {task.name!r} the whole model scores {ends.clean.mean():.4g} {task.metric_name} and the ablated one "
            f"{ends.empty.mean():.4g}, a gap that {len(task)} prompts cannot tell from zero, so faithfulness is undefined. Use "
            f"another corruption than {task.corruption!r}, another ablation than {ends.replacement.name!r}, or more prompts."
        )


def _stability(scores: Scores | None, circuit: Circuit, seed: int) -> float | None:
    """Of circuits as large as this one, cut out of the scores in the same way."""
    if scores is None or scores.per_prompt is None:
        return None
    if scores.items == "node":
        rows, n = scores.per_prompt[:, 1:], len(circuit.heads) + len(circuit.mlps)
    else:
        rows, n = scores.per_prompt, circuit.n_edges_kept
    return stability(rows, n, signed=bool(circuit.graph.get("signed")), seed=seed) if n else None


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
