"""The paper's search: from the output back, to the heads that are most relevant to the heads that were found before.

Hsu et al. 2024/2025 (arXiv:2407.00886), algorithm 1. Targets are first the output, then what the last round kept:

1. *Relevance*: ``R(s, T)`` of every head (or head at a position) upstream of the targets. To the output it is what arrives
   there, in units of the metric; to heads, the sum over targets of how relevant s is to each.
2. *Selection*: the sources of the highest R (optionally divided by the mean of their layer) join the circuit.
3. *Pruning*: members without which the circuit would be better are taken out again, one at a time.
4. Stop when the circuit does as well as the model or nothing is upstream; if ``stepwise``, also when it gains no more.

What a source is to a target depends on no earlier choice, so all pairs are decomposed once (``relevance_table``) and the
rounds only look them up. All MLPs stay, as in the paper: a circuit is its heads, and what is outside carries what the
ablation puts there. What the paper leaves open, its code does differently in each notebook; ours are settings:

=============== ============================================ ========================================================
setting         by default                                   ``PAPER``
=============== ============================================ ========================================================
``rules``       ``"tail"``                                   ``"paper"``
``relevance``   ``"projection"``, which has a sign           ``"ratio"``, eq. 16 (the code: ``"share"`` or projection)
``signed``      ``False``: the largest magnitudes            ``True``: a negative head is never taken from the output
``weighted``    ``True``: a target counts by its own R       ``False``
``per_layer``   ``False``                                    ``True``, appendix B.1 (the code: in some notebooks)
``stepwise``    ``False``: the output stays a target, and    ``True``: targets are what the last round kept; each round
                pruning comes last                           is pruned, and the first that gains nothing ends it
``prune_by``    ``"distance"`` to the model's metric         ``"higher"``: a better metric, even above the model's
``ablation``    ``"resample"``, as everywhere in the toolkit ``"mean"``
=============== ============================================ ========================================================
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
import numpy as np

from circuits.ablation import Ablation, replacement_for
from circuits.discovery.cdt_table import Part, RelevanceTable, check_positions, relevance_table, table_key
from circuits.discovery.heads_alone import HeadsAlone
from circuits.graph import Circuit
from circuits.solving import fitness
from circuits.wiring import Wiring
from mechinterp.decomposition import Rules, rules_name
from mechinterp.errors import CircuitError
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node
from mechinterp.tasks.base import Task

PRUNINGS = ("distance", "higher")
_ROUNDING = 1e-6
PAPER: dict[str, Any] = {
    "rules": "paper",
    "relevance": "ratio",
    "signed": True,
    "weighted": False,
    "per_layer": True,
    "stepwise": True,
    "prune_by": "higher",
    "ablation": "mean",
}


@dataclass(frozen=True)
class Round:
    """One step back. ``targets``: empty for the output. ``scores``: R of every part upstream. ``metric``: after pruning."""

    targets: tuple[Part, ...]
    scores: Mapping[Part, float]
    taken: tuple[Part, ...]
    pruned: tuple[Part, ...]
    metric: float


@dataclass(frozen=True)
class FoundHeads:
    """The heads that a search found, and how it got there.

    ``metric``, ``whole``, ``empty``: the mean metric of these heads alone, of the model, and with every head ablated.
    ``edges``: R(s, t) from each part to those for whose sake it was taken; ``"logits"`` is one of them.
    """

    wiring: Wiring
    parts: tuple[Part, ...]
    rounds: tuple[Round, ...]
    edges: Mapping[tuple[str, str], float]
    metric: float
    whole: float
    empty: float
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def heads(self) -> tuple[Node, ...]:
        return tuple(sorted({part.head for part in self.parts}))

    @property
    def faithfulness(self) -> float:
        """``(m(C) - m(∅)) / (m(M) - m(∅))`` on the prompts searched, means before the ratio; every MLP stays."""
        return (self.metric - self.empty) / (self.whole - self.empty)

    @property
    def graph(self) -> nx.DiGraph:
        """The parts by name, and R as ``weight``: the trace of the search, and no circuit to be run."""
        graph = nx.DiGraph(**self.facts)
        graph.add_nodes_from(map(str, self.parts))
        graph.add_weighted_edges_from((source, target, weight) for (source, target), weight in self.edges.items())
        return graph

    @property
    def circuit(self) -> Circuit:
        """To be run and evaluated: every edge of the model but those that leave a head outside. Positions are given up."""
        kept = np.array([writer.kind != "head" or writer in self.heads for writer in self.wiring.writers])
        return self.wiring.circuit(kept[self.wiring.edge_writer], **self.facts)

    def __str__(self) -> str:
        stopped = " (as many as were allowed)" if len(self.rounds) == self.facts.get("max_rounds") else ""
        lines = [f"{len(self.parts)} parts in {len(self.rounds)} rounds{stopped}, faithfulness {self.faithfulness:.3f}"]
        for n, step in enumerate(self.rounds):
            pruned = f"; pruned {_listed(step.pruned)}" if step.pruned else ""
            into = "the output" if not step.targets else _listed(step.targets) if self.facts.get("stepwise") else "all of these"
            lines.append(f"  {n + 1}. into {into}: {_listed(step.taken)}{pruned}; metric {step.metric:.3f}")
        return "\n".join(lines)


def cdt_search(
    model: Transformer,
    task: Task,
    *,
    rules: str | Rules = "tail",
    relevance: str = "projection",
    percentile: float = 90.0,
    n_per_round: int | None = None,
    positions: Sequence[str] | None = None,
    signed: bool = False,
    weighted: bool = True,
    per_layer: bool = False,
    stepwise: bool = False,
    prune_by: str | None = "distance",
    max_rounds: int = 10,
    tolerance: float = 0.02,
    ablation: str | Ablation = "resample",
    allow_unsolved: bool = False,
    table: RelevanceTable | None = None,
    progress: bool = False,
) -> FoundHeads:
    """The heads of a circuit, from the output back. ``cdt_search(model, task, **PAPER)`` is the published way.

    ``percentile``: parts whose R is at or above it are taken in each round (the paper sweeps 90 to 99); ``n_per_round`` takes
    that many instead. ``positions``: the task's positions at which heads are told apart; None takes heads whole. ``prune_by``:
    None does not prune. ``tolerance``: stop when the metric is as near to the model's as this share of what all heads make
    (model minus none). ``table``: that of an earlier search with the same rules, positions and ablation on the same task,
    which then is not made again. The settings in between are those of the table at the top of this module.

    Cost: ``relevance_table``, and in pruning one forward for each member and removal. Errors as in ``discover``;
    ``CircuitError`` for settings that take nothing, ``TaskError`` for positions that the task does not name.

    >>> from mechinterp.models.compiled import indirect_object
    >>> planted = indirect_object(n_prompts=8)
    >>> found = cdt_search(planted.model, planted.task, n_per_round=1)
    >>> {str(head) for head in found.heads} == set(planted.roles.values())
    True
    """
    _check(percentile, n_per_round, prune_by, max_rounds)
    check_positions(task, positions)
    whole = float(fitness(model, task, allow_unsolved=allow_unsolved).clean.mean())
    replacement = replacement_for(model, task, ablation)
    if table is None:
        table = relevance_table(model, task, rules=rules, positions=positions, ablation=ablation, progress=progress)
    _refuse_foreign(table, table_key(model, task, rules, positions, replacement.name))
    alone = HeadsAlone(model, task, replacement.writes)
    between = table.between(relevance) * (_worth(table, relevance) if weighted else 1.0)
    empty = float(alone.metrics([()])[0])
    kept: tuple[Part, ...] = ()
    rounds: list[Round] = []
    targets: tuple[Part, ...] = ()
    edges: dict[tuple[str, str], float] = {}
    before = empty
    while len(rounds) < max_rounds:
        scores = _scores(table, between, targets, per_layer, with_output=not stepwise)
        taken = _best({part: score for part, score in scores.items() if part not in kept}, percentile, n_per_round, signed)
        if not taken:
            break
        edges |= _edges(table, between, taken, targets, with_output=not stepwise)
        kept, pruned, metric = _pruned(alone, (*kept, *taken), whole, prune_by if stepwise else None)
        rounds.append(Round(targets, scores, taken, pruned, metric))
        gains = metric > before if prune_by == "higher" else abs(metric - whole) < abs(before - whole)
        targets, before = tuple(part for part in (taken if stepwise else kept) if part in kept), metric
        if abs(metric - whole) <= tolerance * abs(whole - empty) or (stepwise and not (gains and targets)):
            break
    if rounds and not stepwise:
        kept, pruned, before = _pruned(alone, kept, whole, prune_by)
        rounds[-1] = replace(rounds[-1], pruned=pruned, metric=before)
    settings = {"rules": rules_name(rules), "relevance": relevance, "percentile": percentile, "n_per_round": n_per_round}
    settings |= {"signed": signed, "weighted": weighted, "per_layer": per_layer, "stepwise": stepwise}
    settings |= {"prune_by": prune_by, "max_rounds": max_rounds}
    facts = {"model": model.config.name, "task": task.name, "method": "cdt-search", "ablation": replacement.name, **settings}
    there = {*map(str, kept), "logits"}
    return FoundHeads(
        Wiring.of(model.config),
        kept,
        tuple(rounds),
        {ends: weight for ends, weight in edges.items() if there.issuperset(ends)},
        before,
        whole,
        empty,
        {name: fact for name, fact in facts.items() if fact is not None},
    )


def _refuse_foreign(table: RelevanceTable, key: str) -> None:
    if table.key != key:
        raise CircuitError(
            "this table was made with another model, task, metric, rules, positions or ablation than this search has. Make it "
            "with `relevance_table` for the same, or leave it out."
        )


def _worth(table: RelevanceTable, relevance: str) -> np.ndarray:
    """What each target counts: its own relevance to the output, with its sign where R has one."""
    return table.output if relevance == "projection" else np.abs(table.output)


def _scores(
    table: RelevanceTable, between: np.ndarray, targets: Sequence[Part], per_layer: bool, with_output: bool
) -> dict[Part, float]:
    """R(s, T) of every part upstream of any target; ``with_output``: the output stays one of them."""
    to_output = with_output or not targets
    last = max((target.head.layer or 0 for target in targets), default=0)
    upstream = [to_output or (part.head.layer or 0) < last for part in table.parts]
    totals = between[:, [table.parts.index(target) for target in targets]].sum(1) + (table.output if to_output else 0.0)
    if per_layer:
        layers = np.array([part.head.layer for part in table.parts])
        mean = np.array([np.abs(totals[layers == layer]).mean() for layer in layers])
        totals = np.divide(totals, mean, out=np.zeros_like(totals), where=mean > 0)
    return {part: float(total) for part, total, is_up in zip(table.parts, totals, upstream, strict=True) if is_up}


def _best(scores: Mapping[Part, float], percentile: float, n: int | None, signed: bool) -> tuple[Part, ...]:
    """The highest, best first; what scores nothing is not taken to fill a number."""
    keys = {part: score if signed else abs(score) for part, score in scores.items()}
    ranked = [part for part in sorted(keys, key=lambda part: -keys[part]) if keys[part] > 0]
    if not ranked or n is not None:
        return tuple(ranked[:n])
    bar = np.percentile(list(keys.values()), percentile)
    return tuple(part for part in ranked if keys[part] >= bar)


def _edges(
    table: RelevanceTable, between: np.ndarray, taken: Sequence[Part], targets: Sequence[Part], with_output: bool
) -> dict[tuple[str, str], float]:
    place = {part: index for index, part in enumerate(table.parts)}
    edges = {(str(s), str(t)): float(between[place[s], place[t]]) for s in taken for t in targets}
    if with_output or not targets:
        edges |= {(str(part), "logits"): float(table.output[place[part]]) for part in taken}
    return {ends: weight for ends, weight in edges.items() if weight}


def _pruned(
    alone: HeadsAlone, joined: tuple[Part, ...], whole: float, prune_by: str | None
) -> tuple[tuple[Part, ...], tuple[Part, ...], float]:
    """Kept, pruned, and the metric: without the member whose loss does the most good, until each loss would do harm."""

    def loss(metric: float) -> float:
        return -metric if prune_by == "higher" else abs(metric - whole)

    slack = 0.0 if prune_by == "higher" else _ROUNDING * abs(whole)  # what makes no difference is not needed

    kept, metric = joined, float(alone.metrics([joined])[0])
    while prune_by is not None and len(kept) > 1:
        without = [tuple(part for part in kept if part != left_out) for left_out in kept]
        metrics = alone.metrics(without).tolist()
        best = min(range(len(kept)), key=lambda index: loss(metrics[index]))
        if loss(metrics[best]) >= loss(metric) + slack:
            break
        kept, metric = without[best], metrics[best]
    return kept, tuple(part for part in joined if part not in kept), metric


def _check(percentile: float, n_per_round: int | None, prune_by: str | None, max_rounds: int) -> None:
    if not 0 <= percentile <= 100:
        raise CircuitError(f"percentile={percentile} is none. Give a number from 0 to 100; the paper sweeps 90 to 99.")
    if (n_per_round is not None and n_per_round < 1) or max_rounds < 1:
        raise CircuitError(f"n_per_round={n_per_round} and max_rounds={max_rounds} take nothing. Give at least 1 (or None).")
    if prune_by is not None and prune_by not in PRUNINGS:
        raise CircuitError(f"prune_by must be {', '.join(map(repr, PRUNINGS))} or None, not {prune_by!r}.")


def _listed(parts: Sequence[Part]) -> str:
    return ", ".join(map(str, parts))
