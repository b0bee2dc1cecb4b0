"""Path patching: what a sender does to the metric through chosen receivers, and through nobody else.

Wang et al. 2022 (arXiv:2211.00593, sec. 3.1, app. B); Goldowsky-Dill et al. 2023 (arXiv:2304.05969); as released by
Merullo et al. 2024 (arXiv:2310.08744, ``circuit_reuse``). Two runs on the clean prompts for each sender:

1. *sent*: the sender writes its replacement, every other head what it writes in the clean run. MLPs are recomputed (the
   papers' choice: the edge and all its paths through MLPs) or frozen like heads (the edge alone). What then reaches the
   receivers is recorded.
2. *received*: the receivers read what was recorded, the rest is recomputed. The score is the fall of the metric.

With attention frozen nothing moves between positions. So run 1 is a few MLPs at the positions where receivers listen,
which for the logits is END alone; one position names both ends, as a sender elsewhere would not be heard; and run 2
computes nothing before the first layer and the first position that receive.

Where we differ from the release: senders above the earliest of several receivers still reach the later ones; receivers
may be senders, too; a position is each prompt's own and never ``-1``; each prompt has its own score. Where we do not: a
receiver reads what was recorded *instead of* its input, so an earlier receiver has no say in what a later one receives.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Unpack

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from circuits.ablation import Ablation, Replacement
from circuits.discovery.path_runs import path_falls
from circuits.discovery.suffix import CleanRun
from circuits.discovery.walk import BatchScore, Walk, WalkSettings
from circuits.scores import Scores
from circuits.wiring import Wiring
from circuits.writes import Writes
from mechinterp.errors import CircuitError, TaskError, nearest
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node
from mechinterp.prompts import PromptBatch
from mechinterp.tasks.base import Task

Nodes = Node | str | Iterable[Node | str]
MLPs = Literal["recomputed", "frozen"]
Place = Callable[[Float[Tensor, "group sender prompt"]], Float[Tensor, "prompt item"]]

LOGITS = Node.logits()


def path_patching(
    model: Transformer,
    task: Task,
    *,
    receivers: Nodes = "logits",
    senders: Nodes | None = None,
    mlps: MLPs = "recomputed",
    positions: str | Sequence[str] | None = None,
    ablation: str | Ablation = "resample",
    **walk: Unpack[WalkSettings],
) -> Scores:
    """How much the metric falls when each sender's replacement reaches the receivers, all of them together.

    Node scores, one a writer; **0 for writers that are not senders**. ``receivers``: ``"logits"``, ports (``"a9.h6.q"``),
    MLPs (``"m4"``), or whole heads (``"a9.h6"``: their three ports; a key or value that heads share is their group's,
    ``"a9.g1.k"``). ``senders``: every writer that comes before the last
    receiver, input and MLPs included; ``"heads"`` for heads alone, as Wang et al. do it; or writers by name. ``positions``:
    names of the task's positions (``"S2"``), or ``"END"``; None is all, except that the logits only read END.

    With ``mlps="frozen"`` and one receiver this is ``exact``'s score of each edge into it. Merullo et al. divide by the
    effect of corrupting the whole prompt: ``scores.values / (clean - corrupted)``, where these are the metric's means,
    ``measure(model, task.prompts, task.metric, tokens=task.prompts.clean)[0].mean()`` and the same for corrupted tokens.
    (Their number is (patched - clean) / (corrupted - clean), which is the same; their files hold -100 times it.)

    Cost: for each sender the MLPs up to the last receiver, at the positions that receive, and a suffix from the first
    receiver on, beginning at the first of these positions. GPT-2 small's logits and 144 heads take about as long as three
    forwards of TransformerLens, one of which goes into the clean and the corrupted run (``benchmarks/paths.py``).

    >>> from mechinterp.models.compiled import indirect_object
    >>> planted = indirect_object(n_prompts=8)
    >>> to_logits = path_patching(planted.model, planted.task, senders="heads")
    >>> movers = {planted.roles["mover"], planted.roles["late_mover"]}
    >>> {name for name, fall in to_logits.strongest(2)} == movers
    True
    >>> to_queries = path_patching(planted.model, planted.task, receivers=[f"{mover}.q" for mover in movers], positions="END")
    >>> to_queries.strongest(1)[0][0] == planted.roles["inhibit_name"]
    True
    """
    readers = parse_receivers(model, receivers)
    if LOGITS in readers and len(readers) > 1:
        raise CircuitError(
            "the logits read last: with their input as recorded, no other receiver can matter. Patch paths into the logits "
            "in a call of their own."
        )
    plan = _plan(model, task, senders, (readers,), mlps, positions)
    way = Walk(model, task, "path-patching", ablation, items="node", settings=plan.settings, **walk)
    wiring = Wiring.of(model.config)

    def place(falls: Float[Tensor, "group sender prompt"]) -> Float[Tensor, "prompt writer"]:
        scores = falls.new_zeros(falls.shape[2], len(wiring.writers))
        scores[:, [wiring.writers.index(sender) for sender in plan.senders]] = falls[0].T
        return scores

    return way.scores(_scorer(model, task, plan, place), unit="path", units_a_prompt=len(plan.senders))


def path_links(
    model: Transformer,
    task: Task,
    *,
    receivers: Nodes,
    senders: Nodes | None = None,
    mlps: MLPs = "recomputed",
    positions: str | Sequence[str] | None = None,
    ablation: str | Ablation = "resample",
    **walk: Unpack[WalkSettings],
) -> Scores:
    """How much the metric falls when each sender reaches each receiver by itself: edge scores, 0 for edges not asked for.

    Run 1 is shared by all receivers, and the logits may be among them. With ``mlps="frozen"`` an edge scores what ``exact``
    says; recomputed, its score holds all paths from the writer to the reader through MLPs. Settings as in
    ``path_patching``.
    """
    readers = parse_receivers(model, receivers)
    plan = _plan(model, task, senders, tuple((reader,) for reader in readers), mlps, positions)
    way = Walk(model, task, "path-links", ablation, settings=plan.settings, **walk)
    wiring = Wiring.of(model.config)

    def place(falls: Float[Tensor, "group sender prompt"]) -> Float[Tensor, "prompt edge"]:
        grid = falls.new_zeros(falls.shape[2], len(wiring.writers), len(wiring.readers))
        for row, sender in enumerate(plan.senders):
            grid[:, wiring.writers.index(sender), [wiring.readers.index(reader) for reader in readers]] = falls[:, row].T
        return grid[:, wiring.edge_writer, wiring.edge_reader]

    return way.scores(_scorer(model, task, plan, place), unit="path", units_a_prompt=len(plan.senders) * len(readers))


def parse_receivers(model: Transformer, receivers: Nodes) -> tuple[Node, ...]:
    """Readers in order of computation, whole heads as their ports. ``UnknownNode`` for what this model lacks.

    Where heads share keys, a head's are those of its group: what is received there is received by the others of the group, too.
    """
    wiring, found = Wiring.of(model.config), set()
    for node in _nodes(receivers):
        if node.kind == "head" and node.port is None:
            wiring.index(node, LOGITS)
            found |= {wiring.readers[reader] for reader in np.flatnonzero(wiring.reads[wiring.writers.index(node)])}
        else:
            wiring.index("input", node)
            found.add(node)
    if not found:
        raise CircuitError("path patching needs a receiver: 'logits', a port such as 'a9.h6.q', a head, or an MLP.")
    return tuple(sorted(found))


@dataclass(frozen=True)
class _Plan:
    """Who sends and who receives, in order of computation; the logits are a group of their own. ``at``: None is everywhere."""

    senders: tuple[Node, ...]
    groups: tuple[tuple[Node, ...], ...]
    at: tuple[str, ...] | None
    settings: Mapping[str, Any]


def _plan(model: Transformer, task: Task, senders: Nodes | None, groups, mlps: MLPs, positions) -> _Plan:
    if mlps not in ("recomputed", "frozen"):
        raise CircuitError(f"the MLPs between are 'recomputed' or 'frozen', not {mlps!r}.")
    readers = [reader for group in groups for reader in group]
    names = check_positions(task, positions, readers)
    found, able = parse_senders(model, senders, readers), open_to(model, readers)
    everybody = {able: "all", tuple(node for node in able if node.kind == "head"): "heads"}
    settings = {
        "receivers": list(map(str, readers)),
        "senders": everybody.get(found) or list(map(str, found)),
        "mlps": mlps,
        "positions": None if names is None else list(names),
    }
    return _Plan(found, groups, ("END",) if set(readers) == {LOGITS} else names, settings)


def _scorer(model: Transformer, task: Task, plan: _Plan, place: Place) -> Callable[[Replacement], BatchScore]:
    """What ``Walk.scores`` asks for. ``place`` puts the falls where their items stand."""
    frozen = plan.settings["mlps"] == "frozen"

    def score(replacement: Replacement) -> BatchScore:
        def score_batch(prompts: PromptBatch, replaced: Writes, bar: tqdm) -> Float[Tensor, "prompt item"]:
            shares_prefix = replacement.keeps_prefix and plan.at is None
            run = CleanRun.record(model, prompts, task.metric, replaced, shares_prefix=shares_prefix)
            run, at = _listening(run, plan.at)
            return place(path_falls(run, plan.senders, plan.groups, at, frozen_mlps=frozen, bar=bar))

        return score_batch

    return score


def _listening(run: CleanRun, names: Sequence[str] | None) -> tuple[CleanRun, Int[Tensor, "batch at"]]:
    """The positions that receive, and the run without what stands before them all: no patch can change it."""
    if names is None:
        n_pos = run.prompts.clean.shape[1] - run.first
        return run, torch.arange(n_pos, device=run.ends.device).expand(len(run.prompts), -1)
    at = torch.stack([_position(run.prompts, name) for name in names], dim=1)
    first = int(at.min()) if run.model.config.causal else 0
    return replace(run, first=first, delta=run.delta.map(lambda x: x[:, first:])), at - first


def parse_senders(model: Transformer, senders: Nodes | None, readers: Sequence[Node]) -> tuple[Node, ...]:
    """Writers in order of computation. ``CircuitError`` for one that writes after all readers have read."""
    able, wiring = open_to(model, readers), Wiring.of(model.config)
    if senders is None:
        return able
    given = {node for node in able if node.kind == "head"} if senders == "heads" else set(_nodes(senders))
    for stranger in given.difference(wiring.writers):
        wiring.index(stranger, LOGITS)
    if not given:
        raise CircuitError(f"nobody is to send to {listed(readers)}. Name writers computed earlier, or let all send: None.")
    if late := sorted(given.difference(able)):
        raise CircuitError(f"{listed(late)} cannot send to {listed(readers)}: nothing is read after them. Leave them out.")
    return tuple(sorted(given))


def open_to(model: Transformer, readers: Sequence[Node]) -> tuple[Node, ...]:
    """Every writer that comes before some reader."""
    wiring = Wiring.of(model.config)
    return wiring.writers[: max((int(wiring.writers_before[wiring.readers.index(reader)]) for reader in readers), default=0)]


def check_positions(task: Task, positions: str | Sequence[str] | None, readers: Sequence[Node]) -> tuple[str, ...] | None:
    """The names, as a tuple. ``TaskError`` for one that the prompts lack, ``CircuitError`` where logits hear nothing."""
    if positions is None:
        return None
    names = (positions,) if isinstance(positions, str) else tuple(positions)
    known = list(dict.fromkeys([*task.prompts.positions, "END"]))
    if wrong := [name for name in names if name not in known]:
        raise TaskError(f"{task.name!r} has no position {wrong[0]!r}, but {', '.join(known)}.{nearest(wrong[0], known)}")
    if not names:
        raise TaskError("positions=[] is nowhere. Name at least one position, or give None for all.")
    if LOGITS in readers and "END" not in names:
        raise CircuitError(f"the logits read END alone: nothing reaches them at {', '.join(names)}. Leave positions out.")
    return names


def _position(prompts: PromptBatch, name: str) -> Int[Tensor, "batch"]:
    return prompts.end if name == "END" else prompts.positions[name]


def _nodes(given: Nodes) -> list[Node]:
    nodes = [given] if isinstance(given, (Node, str)) else given
    return [node if isinstance(node, Node) else Node.parse(node) for node in nodes]


def listed(nodes: Sequence[Node]) -> str:
    names = list(map(str, nodes))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
