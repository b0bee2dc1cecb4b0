"""What discrete codes are measured on: a model, its prompts, and two truths about its heads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from circuits.discovery.nodes import patching
from circuits.scores import Scores
from circuits.statistics import auroc, average_precision, rank_correlation
from mechinterp import load
from mechinterp.models.compiled import COMPILED
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node
from mechinterp.tasks import TASKS
from mechinterp.tasks.base import Task

N_PROMPTS, N_OTHERS, FRESH = 200, 48, 1_000_003
SUBJECTS = (*TASKS, *(f"{name} (by hand)" for name in COMPILED))
TOP = 4  # the truth by patching is one head in so many


@dataclass(frozen=True, eq=False)
class Subject:
    """``task``: the prompts to code; ``others``: those to find the truth on. ``effects``: ``|patching|`` of each head.

    ``known``: the heads of the circuit set by hand, ``edges`` its edges; None for a trained model.
    """

    name: str
    model: Transformer
    task: Task
    others: Task
    heads: tuple[Node, ...]
    effects: Float[np.ndarray, "head"]
    known: Bool[np.ndarray, "head"] | None
    edges: frozenset[str] | None

    @property
    def top(self) -> Bool[np.ndarray, "head"]:
        """The quarter of the heads that patching finds largest."""
        order = np.argsort(-self.effects, kind="stable")
        return np.isin(np.arange(len(order)), order[: len(order) // TOP])


def subject_of(name: str) -> Subject:
    if name in TASKS:
        model = load("builtin")
        task, others = (TASKS[name](model, n_prompts=n, seed=seed) for n, seed in ((N_PROMPTS, 0), (N_OTHERS, FRESH)))
        return _subject(name, model, task, others)
    planted = COMPILED[name.removesuffix(" (by hand)")](n_prompts=N_PROMPTS + N_OTHERS)
    task, others = (
        replace(planted.task, prompts=planted.task.prompts[rows])
        for rows in (slice(N_PROMPTS), slice(N_PROMPTS, N_PROMPTS + N_OTHERS))
    )
    return _subject(name, planted.model, task, others, set(planted.roles.values()), planted.circuit_edges)


def of_heads(scores: Scores) -> Float[np.ndarray, "head"]:
    """A method's scores of heads alone, layer by layer."""
    return np.array([value for node, value in zip(scores.wiring.writers, scores.nodes, strict=True) if node.kind == "head"])


def measures(subject: Subject, values: Float[np.ndarray, "head"], selected: Sequence[Node] | None = None) -> dict[str, Any]:
    """How well these values rank heads, and how well ``selected`` picks them; ties count half."""
    top = subject.top
    found: dict[str, Any] = {"auroc": auroc(values, top), "ap": average_precision(values, top)}
    found["rho"] = rank_correlation(values, subject.effects) or 0.0  # all tied: no order
    if subject.known is not None:
        found |= {"known_auroc": auroc(values, subject.known), "known_ap": average_precision(values, subject.known)}
    if selected is not None:
        picked = np.isin([str(head) for head in subject.heads], [str(head) for head in selected])
        hits = float((picked & top).sum())
        found |= {"any": float(picked.any()), "recall": hits / top.sum()}
        found |= {"precision": hits / picked.sum()} if picked.any() else {}
    return found


@torch.no_grad()
def _subject(
    name: str, model: Transformer, task: Task, others: Task, known: set[str] | None = None, edges: frozenset[str] | None = None
) -> Subject:
    heads = tuple(Node("head", layer, head) for layer in range(model.config.n_layers) for head in range(model.config.n_heads))
    effects = np.abs(of_heads(patching(model, others)))
    mask = None if known is None else np.array([str(head) in known for head in heads])
    return Subject(name, model, task, others, heads, effects, mask, edges)
