"""Methods side by side: the same prompts, the same ablation, the same sizes.

Each method scores the search prompts; all are judged on the same other prompts, between the same two ends. Beside them
stand random circuits of each size, every edge of them on a path from the input to the logits. A method that refuses the
task is listed with its reason, and the others go on.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from circuits.agreement import Known, ranking
from circuits.comparison import FAITHFUL, Comparison, Row
from circuits.curves import SIZES, Curve, Cuts
from circuits.discovery import CUT_GREEDILY, discover, known_method, settings_of
from circuits.discovery.walk import digest
from circuits.ends import Ends
from circuits.scores import Scores
from circuits.solving import fitness
from circuits.statistics import random_circuits, ratio_of_means, stability
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError, MechinterpError
from mechinterp.files import read_document, to_document, write_text_atomically
from mechinterp.models.transformer import Transformer
from mechinterp.tasks.base import Task

_POINTS = 12  # sizes tried at a time between two of the grid, on the way to the smallest faithful circuit
_TIMED = "mechinterp timed scores"


def compare(
    model: Transformer,
    task: Task,
    methods: Sequence[str],
    *,
    on: Task | None = None,
    ablation: str = "resample",
    sizes: Sequence[float] = SIZES,
    known: Mapping[str, Known] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    n_random: int = 5,
    seed: int = 0,
    allow_unsolved: bool = False,
    resume: str | os.PathLike | None = None,
    progress: bool = False,
) -> Comparison:
    """Score ``task`` by each of ``methods`` (names of ``ALGORITHMS``) and measure the circuits that come of it.

    ``on``: the prompts to measure on (None: those searched). ``known``: circuits to judge rankings by, by name (edges by
    edges, nodes by nodes). ``settings``: a method's own settings, by its name. ``resume``: a folder that keeps each
    method's scores, and what it had done when it was interrupted. Cost: each search, and about 40 forwards with cut edges
    a method. Errors as in ``discover`` where no method could do anything with the task.
    """
    for method in methods:
        known_method(method)
    fitness(model, task, allow_unsolved=allow_unsolved)
    ends, rows = Ends.of(model, on or task, ablation), []
    with tqdm(methods, desc="compare", unit="method", disable=not progress) as bar:
        for method in bar:
            bar.set_postfix_str(method)
            own = {"ablation": ablation} if "ablation" in settings_of(method) else {}
            own |= (settings or {}).get(method, {})
            try:
                scores, seconds = _search(model, task, method, own, resume)
                rows.append(_judge(method, scores, seconds, ends, sizes, known or {}, seed))
            except MechinterpError as problem:
                rows.append(Row(method, refused=str(problem)))
    return Comparison(
        model=model.config.name,
        task=task.name,
        corruption=task.corruption,
        metric=task.metric_name,
        ablation=ends.replacement.name,
        n_search=len(task),
        n_prompts=len(ends.clean),
        n_edges_in_model=Wiring.of(model.config).n_edges,
        clean=float(ends.clean.mean()),
        empty=float(ends.empty.mean()),
        rows=tuple(rows),
        random=_random_curve(ends, sizes, n_random, seed) if n_random else None,
        seed=seed,
    )


def _search(model: Transformer, task: Task, method: str, own: dict[str, Any], resume) -> tuple[Scores, float]:
    """The scores and the seconds they took: found anew, or read where an earlier run kept both."""
    folder = None if resume is None else Path(resume)
    name = f"{method}-{digest(model, [task.prompts], [method, task.metric_name, own])}"
    if folder and (folder / f"{name}.json").is_file():
        kept = read_document(folder / f"{name}.seconds.json", _TIMED, 1, CircuitError)
        return Scores.load(folder / f"{name}.json"), float(kept["seconds"])
    going_on = {"resume": folder} if folder and "resume" in settings_of(method) else {}
    started = time.perf_counter()
    scores = discover(model, task, method, allow_unsolved=True, **own, **going_on)
    seconds = time.perf_counter() - started
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / f"{name}.seconds.json", to_document(_TIMED, 1, {"seconds": seconds}))
        scores.save(folder / f"{name}.json")
    return scores, seconds


def _judge(method: str, scores: Scores, seconds: float, ends: Ends, sizes, known, seed: int) -> Row:
    cuts = [Cuts.of(scores, ends.model, sizes, signed=signed, greedy=method in CUT_GREEDILY) for signed in (False, True)]
    gained = ends.gained(np.concatenate([cut.masks for cut in cuts]))
    curve, signed_curve = (cut.curve(rows, ends.whole, seed) for cut, rows in zip(cuts, np.split(gained, 2), strict=True))
    n_items, n_edges = _smallest(scores, ends, curve, greedy=method in CUT_GREEDILY)
    stable = None
    if scores.per_prompt is not None:
        rows = scores.per_prompt[:, 1:] if scores.items == "node" else scores.per_prompt
        stable = stability(rows, n_items or max(1, rows.shape[1] // 10), seed=seed)
    judged = {name: one for name, one in known.items() if scores.items == "node" or getattr(one, "rule", True)}
    found = {name: ranking(scores, one) for name, one in judged.items()}
    agreement = {name: (each.auroc, each.average_precision) for name, each in found.items()} or None
    return Row(method, seconds, scores.items, curve, signed_curve, n_edges, stable, agreement)


def _smallest(scores: Scores, ends: Ends, curve: Curve, *, greedy: bool) -> tuple[int | None, int | None]:
    """The smallest circuit found that is faithful to 0.9: its items and its edges.

    Between the first size of the grid that is faithful and the one before, a dozen sizes at a time until two neighbours are
    left. Faithfulness need not rise with size, so a smaller one may exist that this walk steps over.
    """
    reached = [f >= FAITHFUL for f in curve.faithfulness]
    if not any(reached):
        return None, None
    first = reached.index(True)
    low, high = (curve.n_items[first - 1] if first else 0), curve.n_items[first]
    n_edges = curve.n_edges[first]
    while high - low > 1:
        counts = np.unique(np.linspace(low, high, _POINTS + 2).astype(int)[1:-1])
        counts = counts[counts > low]
        masks = scores.masks(counts.tolist(), greedy=greedy)
        faithful = np.flatnonzero(ratio_of_means(ends.gained(masks), ends.whole) >= FAITHFUL)
        if len(faithful):
            at = int(faithful[0])
            high, n_edges = int(counts[at]), int(masks[at].sum())
            low = int(counts[at - 1]) if at else low
        else:
            low = int(counts[-1])
    return high, n_edges


def _random_curve(ends: Ends, sizes: Sequence[float], n: int, seed: int) -> Curve:
    """Random circuits at each size: the mean over ``n``, and in place of the interval the lowest and the highest."""
    wiring = Wiring.of(ends.model.config)
    counts = [max(1, int(share * wiring.n_edges)) for share in sizes]
    masks = np.concatenate([random_circuits(wiring, count, n, seed) for count in counts])
    found = ratio_of_means(ends.gained(masks), ends.whole).reshape(len(counts), n)
    mean, low, high = (tuple(of(found, axis=1).tolist()) for of in (np.mean, np.min, np.max))
    return Curve(tuple(counts), mean, low, high, shares=tuple(map(float, sizes)), n_items=tuple(counts))
