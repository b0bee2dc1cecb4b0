"""Which heads to edit, and where they should look: a search, on prompts that the report shall not see.

    proposal = propose(model, search, attention={"the giver": ["S2"], "the receiver": ["IO"]})
    print(repair(model, fresh, **proposal.edit))

1. *Alone*: each candidate head is made to attend to each target, and the metric's gain is measured.
2. *Together*: of the best pairs of head and target, the one that gains most on top of those chosen is added, again and
   again, for as long as the gain's 95 % interval over prompts lies above 0 and there are fewer than ``n``.

The best of many is always in part the luckiest, so what the steps say is too good: believe ``repair`` on fresh prompts.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from tqdm.auto import tqdm

from circuits.measure import measure
from circuits.repairs.report import Mean, markdown
from circuits.repairs.runs import (
    Edit,
    Run,
    batches,
    fingerprints,
    first_layer,
    named,
    parse_heads,
    positions,
)
from circuits.scores import Scores
from circuits.statistics import rank_correlation
from mechinterp.errors import CircuitError, TaskError, nearest
from mechinterp.files import read_document, to_document, write_text_atomically
from mechinterp.metrics import METRICS, Metric
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node
from mechinterp.tasks.base import Task

_KIND, _VERSION = "mechinterp repair proposal", 1
Pair = tuple[Node, str]


@dataclass(frozen=True)
class Trial:
    """A head made to look at a target: what the metric gains by it, over the unedited model or over the step before."""

    head: str
    target: str
    gain: Mean


@dataclass(frozen=True)
class Proposal:
    """Heads and targets that a search chose (``steps``, in that order), and what each pair did alone (best first).

    ``targets`` are the names of positions that each target stands for, ``seen`` the fingerprints of the prompts searched.
    """

    facts: Mapping[str, Any]
    targets: Mapping[str, tuple[str, ...]]
    alone: tuple[Trial, ...]
    steps: tuple[Trial, ...]
    seen: tuple[str, ...]

    @property
    def groups(self) -> dict[str, list[str]]:
        """The chosen heads by their target."""
        found: dict[str, list[str]] = {}
        for step in self.steps:
            found.setdefault(step.target, []).append(step.head)
        return found

    @property
    def edit(self) -> dict[str, Any]:
        """What ``repair`` takes. ``CircuitError`` where no head helped."""
        if not self.steps:
            raise CircuitError(
                "no head helps the metric when it looks at any of the targets, so there is nothing to repair with. Offer other "
                "targets, or more candidates."
            )
        kept = {"heads": self.groups, "attention": {target: self.targets[target] for target in self.groups}, "seen": self.seen}
        return {**kept, "at": self.facts["at"], "share": self.facts["share"]}

    def correlation(self, scores: Scores) -> float | None:
        """Spearman's, over the candidates: what a head gains alone with its best target, and how important ``scores`` say
        it is (the magnitude). None where one of the two has no order."""
        best: dict[str, float] = {}
        for trial in self.alone:
            best[trial.head] = max(best.get(trial.head, -np.inf), trial.gain.value)
        if len(best) < 2:
            return None
        nodes = dict(zip(map(str, scores.wiring.writers), np.abs(scores.nodes), strict=True))
        return rank_correlation(np.array(list(best.values())), np.array([nodes[head] for head in best]))

    def save(self, path: str | os.PathLike) -> None:
        """JSON, whole or not at all."""
        write_text_atomically(path, to_document(_KIND, _VERSION, asdict(self)))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Proposal":
        """What ``save`` wrote, equal. ``CircuitError`` names the file and what is wrong with it."""
        document = read_document(path, _KIND, _VERSION, CircuitError)
        try:
            targets = {name: tuple(names) for name, names in document["targets"].items()}
            alone, steps = (tuple(map(_trial, document[name])) for name in ("alone", "steps"))
            return cls(document["facts"], targets, alone, steps, tuple(document["seen"]))
        except (TypeError, KeyError, AttributeError) as problem:
            raise CircuitError(f"{os.fspath(path)!r} does not hold a usable proposal: {problem}") from problem

    def __str__(self) -> str:
        facts = self.facts
        about = f"{facts['task']} on {facts['model']}: {facts['n_candidates']} heads, {len(self.targets)} targets, "
        about += f"{facts['n_prompts']:,} prompts searched; {facts['metric']} {facts['unedited']:.3f} unedited"
        rows = [(str(n), step.head, step.target, str(step.gain)) for n, step in enumerate(self.steps, start=1)]
        steps = markdown(("step", "head", "looks at", "gain"), rows, "rllr") if rows else "No head helps."
        best = markdown(("alone", "looks at", "gain"), [(t.head, t.target, str(t.gain)) for t in self.alone[:5]], "llr")
        return "\n\n".join([about, steps, best])


@torch.no_grad()
def propose(
    model: Transformer,
    task: Task,
    *,
    attention: Mapping[str, Sequence[str]] | Sequence[str],
    scores: Scores | None = None,
    candidates: int | Sequence[Node | str] | None = None,
    n: int = 4,
    breadth: int = 24,
    metric: str | None = None,
    at: str = "END",
    share: float = 1.0,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Proposal:
    """Up to ``n`` heads whose attention, made to rest on one of a few targets, lifts the metric on these prompts.

    ``attention``: targets by name, each a list of position names as in ``repair``; or one such list. ``candidates``: heads by
    name; a number, for the heads of the largest magnitude in ``scores`` (of this task, or of a task that works); None, for
    all. ``breadth``: how many pairs of head and target, best alone, compete in each step. ``metric``: a name of ``METRICS``
    (``"is_top"`` is accuracy, coarse but what counts), or None for the task's own.

    Cost: for every candidate and target, then for ``breadth`` of them a step, a pass from the head's layer on over the
    positions from ``at`` to END alone; and a whole forward for each step.
    """
    if n < 1 or breadth < 1 or batch_size < 1 or not 0 < share <= 1:
        given = f"n={n}, breadth={breadth}, batch_size={batch_size}, share={share}"
        raise CircuitError(f"{given}: give 1 or more of each, and a share above 0 and up to 1.")
    if len(task) < 2:
        raise TaskError("a gain on one prompt has no interval, so any head would seem to help. Search on 8 prompts or more.")
    measured = _metric(task, metric)
    given = attention if isinstance(attention, Mapping) else {" ".join(_listed(attention)): attention}
    targets = {name: _listed(places) for name, places in given.items()}
    if not targets:
        raise CircuitError("there is no target to look at. Give at least one, such as attention={'the giver': ['S2']}.")
    query, heads = named(task.prompts, at), _candidates(model, scores, candidates)
    to = {name: positions(task, places, query) for name, places in targets.items()}
    disable = None if progress is None else not progress
    with tqdm(total=len(heads) * len(to) + n * breadth, desc="propose", unit="edit", delay=2, disable=disable) as bar:
        search = _Search(model, task, measured, query, share, batch_size, to, bar)
        pairs: list[Pair] = [(head, name) for head in heads for name in to]
        unedited, *values = search.values([[], *([pair] for pair in pairs)])
        gains = [value - unedited for value in values]
        order = sorted(range(len(pairs)), key=lambda i: -gains[i].mean())
        steps = _forward(search, [pairs[i] for i in order[:breadth]], unedited, n)
    facts: dict[str, Any] = {"model": model.config.name, "task": task.name, "metric": metric or task.metric_name, "at": at}
    facts |= {"share": share, "n_prompts": len(task), "n_candidates": len(heads), "n": n, "breadth": breadth}
    facts |= {"unedited": float(unedited.mean()), "scores": scores.method if scores else None}
    means = Mean.each(np.stack(gains))
    alone = tuple(Trial(str(pairs[i][0]), pairs[i][1], means[i]) for i in order)
    return Proposal(facts, targets, alone, steps, tuple(sorted(fingerprints(task))))


@dataclass(frozen=True)
class _Search:
    """The metric of every prompt under sets of pairs."""

    model: Transformer
    task: Task
    metric: Metric
    at: torch.Tensor
    share: float
    batch_size: int
    to: Mapping[str, torch.Tensor]
    bar: Any

    def values(self, sets: Sequence[Sequence[Pair]]) -> list[Float[np.ndarray, "prompt"]]:
        """The metric under each set of heads that look at their targets."""
        edits = [[Edit((head,), self.to[name]) for head, name in pairs] for pairs in sets]
        layers = [first_layer(of_set) for of_set in edits if of_set]
        parts: list[list[np.ndarray]] = [[] for _ in sets]
        for rows in batches(self.at, self.batch_size):
            run = Run.begin(self.model, self.task, rows, self.at, self.share, layers)
            for of_set, found in zip(edits, parts, strict=True):
                start, patch = run.start(of_set), run.patch(of_set)
                found.append(measure(run.model, run.prompts, self.metric, start=start, patch=patch)[0][0].cpu().numpy())
                self.bar.update(len(rows) / len(self.task) if of_set else 0)
        back = self.at.argsort(stable=True).argsort().numpy()
        return [np.concatenate(found).astype(np.float64)[back] for found in parts]


def _forward(search: _Search, pairs: Sequence[Pair], unedited: Float[np.ndarray, "prompt"], n: int) -> tuple[Trial, ...]:
    """Greedy: the pair that gains most on top of those chosen, while the gain is above chance. A head looks at one target."""
    chosen: list[Pair] = []
    steps: list[Trial] = []
    value = unedited
    while len(chosen) < n:
        open_to_choice = [pair for pair in pairs if pair[0] not in {head for head, _ in chosen}]
        values = search.values([[*chosen, pair] for pair in open_to_choice])
        if not values:
            break
        best = int(np.argmax([found.mean() for found in values]))
        gain = Mean.of(values[best] - value)
        if gain.low <= 0:
            break
        (head, target), value = open_to_choice[best], values[best]
        chosen.append((head, target))
        steps.append(Trial(str(head), target, gain))
    return tuple(steps)


def _listed(places: str | Sequence[str]) -> tuple[str, ...]:
    return (places,) if isinstance(places, str) else tuple(places)


def _candidates(model: Transformer, scores: Scores | None, candidates: int | Sequence[Node | str] | None) -> tuple[Node, ...]:
    config = model.config
    if isinstance(candidates, int):
        if scores is None or candidates < 1:
            raise CircuitError(f"candidates={candidates} takes the strongest heads of `scores`. Pass scores, and 1 or more.")
        ranked = [node for node in scores.components() if node.kind == "head"]
        return parse_heads(model, ranked[:candidates])
    if candidates is not None:
        return parse_heads(model, candidates)
    return tuple(Node.head(layer, index) for layer in range(config.n_layers) for index in range(config.n_heads))


def _trial(facts: Mapping[str, Any]) -> Trial:
    return Trial(**{**facts, "gain": Mean(**facts["gain"])})


def _metric(task: Task, name: str | None) -> Metric:
    if name is None:
        return task.metric
    if name not in METRICS:
        raise TaskError(f"{name!r} is no metric. There are {', '.join(METRICS)}.{nearest(name, METRICS)}")
    return METRICS[name]
