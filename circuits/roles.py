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
from mechinterp.nodes import Node, nodes_of
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site
from mechinterp.tasks.base import Task

Positions = Int[Tensor, "batch"]
Pairs = list[tuple[str, str]]  # (query, key)
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
    model: Transformer, task: Task, heads: Node | str | Iterable[Node | str], *, n: int = 1, batch_size: int = 64
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
    by_layer, pairs = _by_layer(nodes_of(heads)), _pairs(task.prompts)
    sites = [Site(name, layer) for layer in by_layer for name in ("pattern", "z")]
    nothing = torch.zeros(len(pairs), model.config.n_heads, device=model.device)
    shares, changes = dict.fromkeys(by_layer, nothing), dict.fromkeys(by_layer, nothing)
    for prompts in task.batches(batch_size):
        prompts = prompts.to(model.device)
        _, clean = model.run(prompts.clean, record=sites, logits_at=prompts.end)
        _, corrupted = model.run(prompts.corrupted, record=sites, logits_at=prompts.end)
        for layer in by_layer:
            shares[layer] = shares[layer] + _attention(clean["pattern", layer], prompts, pairs)
            changes[layer] = changes[layer] + _change(clean["z", layer] - corrupted["z", layer], prompts, pairs)
    return {
        head: _most_telling(pairs, shares[layer][:, head.index] / len(task), changes[layer][:, head.index])[:n]
        for layer, its_heads in by_layer.items()
        for head in its_heads
    }


def _most_telling(pairs: Pairs, shares: Float[Tensor, "pair"], changes: Float[Tensor, "pair"]) -> list[Gaze]:
    relative = changes / changes.max().clamp(min=1e-30)
    numbers = zip(pairs, shares.tolist(), relative.tolist(), strict=True)
    gazes = [Gaze(query, key, share, change) for (query, key), share, change in numbers]
    return sorted(gazes, key=lambda gaze: (gaze.key == REST, -gaze.share * gaze.change, -gaze.share))


def _by_layer(heads: Iterable[Node]) -> dict[int, list[Node]]:
    by_layer: dict[int, list[Node]] = defaultdict(list)
    for head in sorted(set(heads)):
        if head.kind != "head" or head.port or head.layer is None:
            raise UnknownNode(f"{str(head)!r} is not a whole head, and only heads have attention. Pass circuit.heads.")
        by_layer[head.layer].append(head)
    return by_layer


def _attention(
    pattern: Float[Tensor, "batch head_index query_pos key_pos"], prompts: PromptBatch, pairs: Pairs
) -> Float[Tensor, "pair head_index"]:
    """The attention from each query to its key, summed over prompts (their positions differ from prompt to prompt)."""
    rows = torch.arange(len(prompts), device=pattern.device)
    looked = [pattern[rows, :, prompts.positions[query], _place(prompts, query, key)] for query, key in pairs]
    return torch.stack(looked).sum(1)


def _change(
    difference: Float[Tensor, "batch pos head_index d_head"], prompts: PromptBatch, pairs: Pairs
) -> Float[Tensor, "pair head_index"]:
    """How long the difference is at each pair's query, summed over prompts."""
    rows, length = torch.arange(len(prompts), device=difference.device), difference.norm(dim=-1)
    return torch.stack([length[rows, prompts.positions[query]] for query, _ in pairs]).sum(1)


def _pairs(prompts: PromptBatch) -> Pairs:
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
