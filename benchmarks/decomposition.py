"""Which rules of contextual decomposition say what a head does: against exact mean ablation, total and direct.

    python -m benchmarks.decomposition     # some minutes on one core; writes results/decomposition.md and .json

*Total* is the fall of the metric when a head's z is replaced by its mean (``patching``), *direct* the same where only the
logits see it (``path_patching``, MLPs frozen). Correlations over heads, signs kept, are the mean of three draws of prompts
or of weights: Spearman's, and with an ``r`` Pearson's, which a few large heads decide. A circuit is heads: all MLPs stay,
every other head is mean-ablated, on prompts that the search has not seen; heads are taken by magnitude. ``.9 at``: the
fewest heads that reach a faithfulness of 0.9; ``distance``: the mean of |1 - faithfulness| over all numbers of heads (at
most 1 counted for each).
"""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial

import numpy as np
import torch

from benchmarks.measure import RESULTS
from benchmarks.subjects import random_task, sharpened
from circuits import discover, path_patching, ranking
from circuits.ends import Ends
from circuits.ground_truth import heads_of
from circuits.scores import Scores
from circuits.statistics import ratio_of_means
from circuits.wiring import Wiring
from mechinterp import load
from mechinterp.models.compiled import COMPILED
from mechinterp.models.transformer import Transformer
from mechinterp.tasks import TASKS
from mechinterp.tasks.base import Task

N_PROMPTS, SEEDS, FRESH = 64, (0, 1, 2), 1_000_003
RULES = ("paper", "frozen", "tail", "held", "linear")
METHODS: dict[str, Callable[..., Scores]] = {
    **{f"CD-T, {rules}": partial(discover, method="cdt", rules=rules, allow_unsolved=True) for rules in RULES},
    "EAP": partial(discover, method="eap", allow_unsolved=True),
    "EAP-IG": partial(discover, method="eap-ig", allow_unsolved=True),
    "attribution patching": partial(discover, method="atp", allow_unsolved=True),
    "relevance patching (half rules)": partial(discover, method="relp", allow_unsolved=True),
    "exact patching": partial(discover, method="patching", allow_unsolved=True),
}
Subject = tuple[str, Transformer, Task, Task]


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, model, task, fresh in subjects():
        print(name, flush=True)
        for method, figures in one(model, task, fresh).items():
            rows = found.setdefault(name, {}).setdefault(method, {})
            for figure, value in figures.items():
                rows.setdefault(figure, []).append(value)  # type: ignore[arg-type]
    means = {
        name: {method: {figure: float(np.mean(values)) for figure, values in rows.items()} for method, rows in methods.items()}
        for name, methods in found.items()
    }
    known = known_circuits()
    (RESULTS / "decomposition.json").write_text(json.dumps({"means": means, "draws": found, "auroc": known}, indent=1) + "\n")
    text = _text(means, known)
    (RESULTS / "decomposition.md").write_text(text, encoding="utf-8")
    print(text)


def subjects() -> Iterator[Subject]:
    """The built-in model's tasks, and random models of usual and of sharp attention, with and without biases."""
    model = load("builtin")
    for name, make in TASKS.items():
        for seed in SEEDS:
            yield name, model, make(model, n_prompts=N_PROMPTS, seed=seed), make(model, n_prompts=N_PROMPTS, seed=seed + FRESH)
    for name, sharpness, bias in (("random", 1.0, 0.3), ("random, sharp", 3.0, 0.3), ("random, sharp, no biases", 3.0, 0.0)):
        for seed in SEEDS:
            made = sharpened(sharpness, seed, bias)
            task, fresh = (random_task(n_prompts=32, n_pos=12, seed=seed + at, d_vocab=64) for at in (0, FRESH))
            yield name, made, task, fresh


def one(model: Transformer, task: Task, fresh: Task) -> dict[str, dict[str, float]]:
    wiring, ablation = Wiring.of(model.config), {"ablation": "mean"}
    total = heads_of(wiring, METHODS["exact patching"](model, task, **ablation).values)
    direct = heads_of(wiring, path_patching(model, task, mlps="frozen", **ablation).values)
    ends = Ends.of(model, fresh, "mean")
    figures = {}
    for name, method in METHODS.items():
        scores = heads_of(wiring, method(model, task, **ablation).nodes)
        curve = faithfulness_by_heads(ends, wiring, scores)
        reached = np.flatnonzero(curve >= 0.9)
        figures[name] = {
            "total": spearman(scores, total),
            "direct": spearman(scores, direct),
            "r total": float(np.corrcoef(scores, total)[0, 1]),
            "r direct": float(np.corrcoef(scores, direct)[0, 1]),
            ".9 at": float(reached[0] if len(reached) else len(scores)),
            "distance": float(np.minimum(np.abs(1 - curve), 1).mean()),
        }
    return figures


def faithfulness_by_heads(ends: Ends, wiring: Wiring, scores: np.ndarray) -> np.ndarray:
    """Of the 0, 1, 2, ... heads of largest magnitude alone, all MLPs kept."""
    order = np.argsort(-np.abs(scores), kind="stable")
    is_head = np.array([writer.kind == "head" for writer in wiring.writers])
    writes = np.repeat(~is_head[None], len(order) + 1, axis=0)
    for n, head in enumerate(order):
        writes[n + 1 :, np.flatnonzero(is_head)[head]] = True
    metric = ends.metric(writes[:, wiring.edge_writer])
    return ratio_of_means(metric - metric[0], ends.clean - metric[0])


def known_circuits() -> dict[str, dict[str, float]]:
    """AUROC over heads and MLPs against circuits set by hand, whose truth belongs to resampling."""
    found: dict[str, dict[str, float]] = {}
    for name, make in COMPILED.items():
        planted = make(n_prompts=24)
        for label, method in METHODS.items():
            scores = method(planted.model, planted.task, ablation=planted.ablation)
            found.setdefault(label, {})[name] = ranking(scores, planted.circuit_edges, level="node").auroc
    return found


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(of)) for of in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])


def _text(means: dict, known: dict) -> str:
    about = f"Written by `python -m benchmarks.decomposition` on {datetime.now(UTC):%Y-%m-%d}.\n\n"
    about += (__doc__ or "").partition("one core;")[2].partition("\n\n")[2].strip()
    parts = ["# Contextual decomposition against exact ablation", about]
    heads = ("total", "direct", "r total", "r direct", ".9 at", "distance")
    for name, methods in means.items():
        lines = [f"## {name}", "", f"| method | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
        for method, figures in methods.items():
            cells = [f"{figures[h]:.1f}" if h == ".9 at" else f"{figures[h]:.2f}" for h in heads]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    lines = ["## Circuits set by hand: AUROC over heads and MLPs", "", f"| method | {' | '.join(COMPILED)} |"]
    lines.append("| --- |" + " ---: |" * len(COMPILED))
    lines += [f"| {method} | {' | '.join(f'{area:.3f}' for area in areas.values())} |" for method, areas in known.items()]
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n"


if __name__ == "__main__":
    main()
