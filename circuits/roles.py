"""What heads look at: where a head's attention goes, between the named positions of a task.

A role such as "name mover" is an interpretation. What can be measured is attention, so that is what is said here:
``END -> IO 0.83`` means that from END, averaged over the clean prompts, 83 % of the head's attention rests on IO.
Attention shows what a head reads and not what it does with it; whether that matters is what the scores are for.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import UnknownNode
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site
from mechinterp.tasks.base import Task

Positions = Int[Tensor, "batch"]
REST = "the first token"
# Keys that every query has: how far from it, or None for position 0.
RELATIVE: dict[str, int | None] = {"itself": 0, "the one before": -1, REST: None}


@dataclass(frozen=True)
class Gaze:
    """From ``query``, ``share`` of a head's attention (0 to 1, the mean over prompts) rests on ``key``.

    ``change`` is how much the head's output at ``query`` differs between clean and corrupted prompts, as a fraction of
    where it differs most: where it does not change, the head cannot carry the task.
    """

    query: str
    key: str
    share: float
    change: float

    def __str__(self) -> str:
        return f"{self.query} -> {self.key} {self.share:.2f}"


@torch.no_grad()
def attention_roles(
    model: Transformer, task: Task, heads: Iterable[Node], *, n: int = 1, batch_size: int = 64
) -> dict[Node, list[Gaze]]:
    """For each head its ``n`` most telling gazes between named positions: those with the largest ``share * change``.

    Besides the task's own positions, a head can look at ``itself`` (the query), at ``the one before`` and at ``the
    first token``. The last is listed after all others however large it is: it is where heads rest while they find
    nothing. Where several names stand for one token, the first is used. Two forward passes a batch. ``UnknownNode`` for
    what is no head.

    >>> from mechinterp.models.compiled import induction
    >>> planted = induction()
    >>> for head, gazes in attention_roles(planted.model, planted.task, map(Node.parse, planted.roles.values())).items():
    ...     print(head, *gazes)
    a0.h3 A1 -> the one before 0.98
    a1.h3 A2 -> B 0.94
    """
    by_layer, pairs = _by_layer(heads), _pairs(task.prompts)
    shares: dict[tuple[Node, str, str], float] = defaultdict(float)
    changes: dict[tuple[Node, str], float] = defaultdict(float)
    for prompts in task.batches(batch_size):
        prompts = prompts.to(model.device)
        sites = [Site(name, layer) for layer in by_layer for name in ("pattern", "z")]
        _, clean = model.run(prompts.clean, record=sites, logits_at=prompts.end)
        _, corrupted = model.run(prompts.corrupted, record=sites, logits_at=prompts.end)
        for layer, its_heads in by_layer.items():
            moved = (clean["z", layer] - corrupted["z", layer]).norm(dim=-1)
            for query in dict(pairs):
                total = _at(moved, prompts.positions[query]).sum(0).tolist()
                for head in its_heads:
                    changes[head, query] += total[head.index or 0]
            for query, key in pairs:
                total = (
                    _attention(clean["pattern", layer], prompts.positions[query], _place(prompts, query, key)).sum(0).tolist()
                )
                for head in its_heads:
                    shares[head, query, key] += total[head.index or 0]
    return {head: _most_telling(head, shares, changes, len(task))[:n] for layer in by_layer.values() for head in layer}


def _most_telling(head: Node, shares, changes, n_prompts: int) -> list[Gaze]:
    largest = max(change for (its_head, _), change in changes.items() if its_head == head) or 1.0
    gazes = [
        Gaze(query, key, share / n_prompts, changes[head, query] / largest)
        for (its_head, query, key), share in shares.items()
        if its_head == head
    ]
    return sorted(gazes, key=lambda gaze: (gaze.key == REST, -gaze.share * gaze.change, -gaze.share))


def _by_layer(heads: Iterable[Node]) -> dict[int, list[Node]]:
    by_layer: dict[int, list[Node]] = defaultdict(list)
    for head in sorted(set(heads)):
        if head.kind != "head" or head.port or head.layer is None:
            raise UnknownNode(f"{str(head)!r} is not a whole head, and only heads have attention. Pass circuit.heads.")
        by_layer[head.layer].append(head)
    return by_layer


def _at(values: Float[Tensor, "batch pos head_index"], pos: Positions) -> Float[Tensor, "batch head_index"]:
    """The values at one position, which differs from prompt to prompt."""
    return values[torch.arange(len(pos), device=values.device), pos]


def _attention(
    pattern: Float[Tensor, "batch head_index query_pos key_pos"], query: Positions, key: Positions
) -> Float[Tensor, "batch head_index"]:
    """The attention from one position to another, which differ from prompt to prompt."""
    return pattern[torch.arange(len(query), device=pattern.device), :, query, key]


def _pairs(prompts: PromptBatch) -> list[tuple[str, str]]:
    """Every (query, key), where no two names stand for the same token in every prompt."""
    pairs = []
    for query in _distinct(prompts.positions):
        others = {key: index for key, index in prompts.positions.items() if key != query}
        named = {key: _place(prompts, query, key) for key in RELATIVE} | others
        pairs += [(query, key) for key in _distinct(named)]
    return pairs


def _place(prompts: PromptBatch, query: str, key: str) -> Positions:
    """Where ``key`` is in each prompt, seen from ``query``."""
    if key not in RELATIVE:
        return prompts.positions[key]
    index, shift = prompts.positions[query], RELATIVE[key]
    return torch.zeros_like(index) if shift is None else (index + shift).clamp(min=0)


def _distinct(named: Mapping[str, Positions]) -> list[str]:
    """The names, plain ones before ``IO+1``, without those that stand for the very positions of an earlier one."""
    kept: list[str] = []
    for name in sorted(named, key=lambda name: "+" in name or "-" in name):
        if not any(torch.equal(named[name], named[other]) for other in kept):
            kept.append(name)
    return kept
