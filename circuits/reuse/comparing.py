"""What the circuits of several tasks share in one model, and what each does for the others.

As Merullo et al. 2024 (arXiv:2310.08744) asked of indirect object identification and colored objects: score every task in
the same way; cut all scores at the same sizes; count what is shared, beside what chance would share; correlate the
rankings; and run each task's circuit on the others' prompts, since overlap is not faithfulness.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from tqdm.auto import tqdm

from circuits import selection
from circuits.discovery import discover, known_method, settings_of
from circuits.ends import Ends
from circuits.graph import Circuit
from circuits.reuse.chosen import Chosen, Level
from circuits.reuse.overlaps import N_DRAWS, SIZES, Overlap, check_shares, cut_counts, overlap_sweep, rank_correlations
from circuits.reuse.report import RANDOM, Parts, Reuse, Transfer
from circuits.scores import Scores
from circuits.statistics import bootstrap_interval, may_be_zero, random_circuits, ratio_of_means
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError
from mechinterp.models.transformer import Transformer
from mechinterp.tasks.base import Task

Tasks = Mapping[str, Task] | Sequence[Task]


def compare_tasks(
    model: Transformer,
    tasks: Tasks,
    method: str = "eap-ig",
    *,
    on: Tasks | None = None,
    again: Tasks | None = None,
    scores: Mapping[str, Scores] | None = None,
    sizes: Sequence[float] = SIZES,
    ablation: str = "resample",
    settings: Mapping[str, Any] | None = None,
    n_draws: int = N_DRAWS,
    n_random: int = 5,
    seed: int = 0,
    allow_unsolved: bool = False,
    resume: str | os.PathLike | None = None,
    progress: bool = False,
) -> Reuse:
    """Score each task by ``method`` and compare: overlap, chance, rank correlation, and faithfulness across tasks.

    ``tasks``: two or more, by name or each under its own. ``on``: the same tasks' prompts to measure faithfulness on (None:
    those searched). ``again``: the same tasks on other prompts, scored too, for what a task shares with itself. ``scores``:
    what ``score_tasks`` found earlier (None: found now). ``sizes``: shares of all items that circuits keep. ``settings``,
    ``ablation``: of the method, and the latter of the measurement. ``n_draws``: see ``overlap``; ``n_random``: random
    circuits on each task at each size. Cost: a search for each task; then ``sizes`` times ``tasks + n_random`` circuits on
    each task. ``CircuitError`` for fewer than two tasks and for methods that score neither edges nor nodes.
    """
    named, known = by_name(tasks), {"ablation": ablation, "allow_unsolved": allow_unsolved, "settings": settings}
    known |= {"resume": resume, "progress": progress}
    check_shares(sizes)
    if min(n_draws, n_random) < 0:
        raise CircuitError(f"n_draws={n_draws} and n_random={n_random}: give 0 or more random circuits.")
    if len(named) < 2:
        raise CircuitError(f"it takes two tasks to share anything; there are {len(named)}: {', '.join(named) or 'none'}.")
    measured_on = named if on is None else _same_tasks("on", by_name(on), named)
    repeated = {} if again is None else _same_tasks("again", by_name(again), named)
    found = dict(scores) if scores is not None else score_tasks(model, named, method, **known)
    _same_tasks("scores", found, named)
    ceilings = _ceilings(found, score_tasks(model, repeated, method, **known), sizes, n_draws, seed) if repeated else ()
    levels = levels_of(found)
    sweeps = [overlap_sweep(found, level=level, sizes=sizes, n_draws=n_draws, seed=seed) for level in levels]
    ends = {name: Ends.of(model, task, ablation) for name, task in measured_on.items()}
    return Reuse(
        method=method,
        overlaps=tuple(one for sweep in sweeps for one in sweep),
        ranks=tuple(rank for level in levels for rank in rank_correlations(found, level=level)),
        transfers=_transfers(found, ends, sizes, n_random, seed, progress),
        parts=_parts(found, sizes),
        ceilings=ceilings,
        seed=seed,
        items=next(iter(found.values())).items,
        **_facts(model, named, ends),
    )


def score_tasks(
    model: Transformer,
    tasks: Tasks,
    method: str = "eap-ig",
    *,
    ablation: str = "resample",
    settings: Mapping[str, Any] | None = None,
    allow_unsolved: bool = False,
    resume: str | os.PathLike | None = None,
    progress: bool = False,
) -> dict[str, Scores]:
    """Every task's scores by one method, in the same way. ``resume``: a folder that keeps what was finished.

    Errors as in ``discover``, and ``CircuitError`` where the method scores neither edges nor nodes.
    """
    known_method(method)
    own = {"ablation": ablation, "resume": resume, "progress": progress}
    own = {name: value for name, value in own.items() if name in settings_of(method)} | dict(settings or {})
    found = {}
    for name, task in by_name(tasks).items():
        found[name] = discover(model, task, method, allow_unsolved=allow_unsolved, **own)
        levels_of(found)  # refuse the first rather than the last
    return found


def circuits_at(scores: Mapping[str, Scores], share: float) -> dict[str, Circuit]:
    """Each task's circuit of this share of the items, with its scores as weights where edges were scored."""
    circuits = {}
    for name, mask in _masks(scores, share).items():
        one = scores[name]
        facts = {"model": one.model, "task": name, "method": one.method, "unit": one.unit, "cut": float(share)}
        circuits[name] = one.wiring.circuit(mask, one.values if one.items == "edge" else None, **facts)
    return circuits


def levels_of(scores: Mapping[str, Scores]) -> tuple[Level, ...]:
    """How these scores can be compared: edge scores as edges and nodes; node scores as nodes and, beside MLPs, as heads."""
    items = {one.items for one in scores.values()}
    if len(items) != 1 or not items <= {"edge", "node"}:
        method = next(iter(scores.values())).method if scores else "none"
        raise CircuitError(
            f"the scores by {method!r} count {' and '.join(sorted(items))}s. Tasks are compared by edges or by nodes: use one "
            "method that scores these, such as 'eap-ig' or 'patching'."
        )
    if items == {"edge"}:
        return ("edge", "node")
    return ("node", "head") if next(iter(scores.values())).wiring.has_mlp else ("head",)


def by_name(tasks: Tasks) -> dict[str, Task]:
    """Tasks by their names; ``CircuitError`` where two have the same."""
    if isinstance(tasks, Mapping):
        return dict(tasks)
    named = {task.name: task for task in tasks}
    if len(named) < len(tasks):
        names = [task.name for task in tasks]
        twice = next(name for name in names if names.count(name) > 1)
        raise CircuitError(f"two of the tasks are called {twice!r}. Give them as a dictionary, under different names.")
    return named


def _facts(model: Transformer, tasks: Mapping[str, Task], ends: Mapping[str, Ends]) -> dict[str, Any]:
    """What was compared, on which prompts, between which ends."""
    wiring = Wiring.of(model.config)
    return {
        "model": model.config.name,
        "n_layers": wiring.n_layers,
        "n_heads": wiring.n_heads,
        "has_mlp": wiring.has_mlp,
        "tasks": tuple(tasks),
        "n_search": tuple(len(task) for task in tasks.values()),
        "n_prompts": tuple(len(end.clean) for end in ends.values()),
        "corruptions": tuple(task.corruption for task in tasks.values()),
        "metrics": tuple(task.metric_name for task in tasks.values()),
        "ablation": next(iter(ends.values())).replacement.name,
        "clean": tuple(float(end.clean.mean()) for end in ends.values()),
        "empty": tuple(float(end.empty.mean()) for end in ends.values()),
    }


def _same_tasks(what: str, given: Mapping[str, Any], tasks: Mapping[str, Task]) -> Mapping[str, Any]:
    if list(given) != list(tasks):
        raise CircuitError(f"{what} is of {', '.join(given) or 'nothing'}; give the tasks {', '.join(tasks)}, in this order.")
    return given


def _ceilings(scores: Mapping[str, Scores], again: Mapping[str, Scores], sizes, n_draws: int, seed: int) -> tuple[Overlap, ...]:
    pairs = [{name: one, f"{name} again": again[name]} for name, one in scores.items()]
    level = levels_of(scores)[0]
    return tuple(found for pair in pairs for found in overlap_sweep(pair, level=level, sizes=sizes, n_draws=n_draws, seed=seed))


def _parts(scores: Mapping[str, Scores], sizes: Sequence[float]) -> tuple[Parts, ...]:
    """For the picture: heads and MLPs at each cut, whatever was scored."""
    found = []
    for n, share in cut_counts(scores, "node", sizes).items():
        for name, one in scores.items():
            kept = Chosen.of(one, "node", n).kept
            found.append(Parts(name, share, tuple(str(one.wiring.writers[item]) for item in np.flatnonzero(kept))))
    return tuple(found)


def _masks(scores: Mapping[str, Scores], share: float) -> dict[str, Bool[np.ndarray, "edge"]]:
    """The edges that each circuit keeps: its own, or those among its nodes and whatever was not judged."""
    level = "edge" if levels_of(scores)[0] == "edge" else "node"
    (n,) = cut_counts(scores, level, [share])
    chosen = {name: Chosen.of(one, level, n) for name, one in scores.items()}
    if level == "edge":
        return {name: one.kept for name, one in chosen.items()}
    return {name: selection.among(one.wiring, one.kept | ~one.judged) for name, one in chosen.items()}


def _transfers(
    scores: Mapping[str, Scores], ends: Mapping[str, Ends], sizes: Sequence[float], n_random: int, seed: int, progress: bool
) -> tuple[Transfer, ...]:
    """Each circuit on each task. All cuts of one task are run together, as they share its two ends."""
    level = "edge" if levels_of(scores)[0] == "edge" else "node"
    shares = list(cut_counts(scores, level, sizes).values())
    masks = [_masks(scores, share) for share in shares]
    found: list[Transfer] = []
    with tqdm(ends.items(), desc="faithfulness across tasks", unit="task", disable=not progress) as bar:
        for task, end in bar:
            for share, kept in zip(shares, masks, strict=True):
                found += _on_one_task(task, end, share, kept, n_random, seed)
    return tuple(sorted(found, key=lambda one: shares.index(one.cut)))


def _on_one_task(
    task: str, end: Ends, share: float, kept: Mapping[str, Bool[np.ndarray, "edge"]], n_random: int, seed: int
) -> list[Transfer]:
    sizes = {name: int(mask.sum()) for name, mask in kept.items()}
    if may_be_zero(end.whole, seed):
        null = {RANDOM: sizes[task]} if n_random else {}
        return [Transfer(name, task, share, size, None) for name, size in (sizes | null).items()]
    gained = end.gained(np.stack(list(kept.values())))
    (low, high), values = bootstrap_interval(gained, end.whole, seed=seed), ratio_of_means(gained, end.whole)
    rows = zip(sizes.items(), values.tolist(), low.tolist(), high.tolist(), strict=True)
    found = [Transfer(name, task, share, size, value, a, b) for (name, size), value, a, b in rows]
    if n_random:
        null = random_circuits(Wiring.of(end.model.config), sizes[task], n_random, seed)
        reached = ratio_of_means(end.gained(null), end.whole)
        found.append(Transfer(RANDOM, task, share, sizes[task], *(float(of(reached)) for of in (np.mean, np.min, np.max))))
    return found
