"""Running a task while heads are made to look elsewhere: which positions of each prompt, and what comes out.

An *edit* is heads and the positions that they shall attend to, prompt by prompt; several edits go into one pass. A pass
begins at the first layer and the first position that are edited, which for END is one token or a few, not the whole prompt.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import lcm

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.cache import ActivationCache
from mechinterp.errors import CircuitError, TaskError, UnknownNode, nearest
from mechinterp.interventions import attend_to, combine
from mechinterp.metrics import is_preferred, is_top
from mechinterp.models.attention import Prefix
from mechinterp.models.trace import Patch
from mechinterp.models.transformer import ResidualStart, Transformer
from mechinterp.nodes import Node, nodes_of
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site
from mechinterp.tasks.base import Task

Attention = Sequence[str] | Int[Tensor, "row *key"]


@dataclass(frozen=True)
class Edit:
    """These heads shall attend evenly to the positions ``to`` of each prompt (a position given twice counts twice)."""

    heads: tuple[Node, ...]
    to: Int[Tensor, "row key"]


@dataclass(frozen=True)
class Outcome:
    """One number a prompt: whether the likeliest token is right, whether the answer beats the foils, the metric, the token."""

    is_right: Float[np.ndarray, "prompt"]
    is_preferred: Float[np.ndarray, "prompt"]
    metric: Float[np.ndarray, "prompt"]
    said: Int[np.ndarray, "prompt"]


def positions(task: Task, attention: Attention, at: Int[Tensor, "prompt"]) -> Int[Tensor, "prompt key"]:
    """Where each prompt's heads shall look: named positions, without those whose name follows a minus.

    ``("color1", "color2", "color3", "-answer_color")`` is the two colors that are not asked for, whichever they are. Where
    prompts have different numbers of positions, each row repeats its own until all are equally long. ``TaskError`` for an
    unknown name, a prompt with no position left, and a position after ``at``, which no causal head sees.
    """
    prompts = task.prompts
    if isinstance(attention, Tensor):
        if attention.dim() != 2 or len(attention) != len(prompts):
            shape = tuple(attention.shape)
            raise TaskError(f"attention has shape {shape} and the task {len(prompts)} prompts. Give one row a prompt.")
        wanted = [list(row) for row in attention.tolist()]
    else:
        names = [name.removeprefix("-") for name in attention]
        places = [named(prompts, name).tolist() for name in names]
        plus = [column for name, column in zip(attention, places, strict=True) if not name.startswith("-")]
        minus = [column for name, column in zip(attention, places, strict=True) if name.startswith("-")]
        wanted = [sorted({column[row] for column in plus} - {column[row] for column in minus}) for row in range(len(prompts))]
    for row, (here, last) in enumerate(zip(wanted, at.tolist(), strict=True)):
        if not here or not 0 <= min(here) <= max(here) <= last:
            what = "no position is left" if not here else f"position {max(here)} is not among those up to {last}"
            raise TaskError(
                f"attention {attention if not isinstance(attention, Tensor) else here!r} cannot be given in prompt {row}: "
                f"{what}. Name positions that every prompt has at or before the place that attends."
            )
    width = lcm(*(len(here) for here in wanted))
    return torch.tensor([[place for place in here for _ in range(width // len(here))] for here in wanted])


def one_or_more(attention: Attention | str) -> Attention:
    """A single name of a position is a list of one."""
    return (attention,) if isinstance(attention, str) else attention


def named(prompts: PromptBatch, name: str) -> Int[Tensor, "prompt"]:
    """A named position of each prompt; ``END`` is there even if the task does not name it."""
    known = {"END": prompts.end, **prompts.positions}
    if name not in known:
        raise TaskError(f"this task has no position {name!r}; it has {', '.join(known)}.{nearest(name, known)}")
    return known[name]


def parse_heads(model: Transformer, heads: Node | str | Sequence[Node | str]) -> tuple[Node, ...]:
    """Heads of this model, each once. ``UnknownNode`` for what is none of them."""
    config, found = model.config, []
    for head in nodes_of(heads):
        is_whole = head.kind == "head" and head.port is None and head.pos is None
        if not is_whole or not (head.layer < config.n_layers and head.index < config.n_heads):  # type: ignore[operator]
            there = f"a0.h0 to a{config.n_layers - 1}.h{config.n_heads - 1}"
            raise UnknownNode(f"{str(head)!r} is no head of {config.name}, whose heads are {there}.")
        found.append(head)
    if not found:
        raise CircuitError("no head is named. Name at least one, such as 'a0.h0'.")
    if twice := [str(head) for head in found if found.count(head) > 1]:
        raise CircuitError(f"{twice[0]!r} is named twice. Name each head once, in one group.")
    return tuple(found)


def patches(
    edits: Sequence[Edit], rows: Int[Tensor, "batch"], at: Int[Tensor, "prompt"], share: float
) -> dict[Site | str, Patch]:
    """What ``Transformer.run`` takes to make these edits in the prompts ``rows``."""
    return combine(*(attend_to(edit.heads, at=at[rows], to=edit.to[rows], share=share) for edit in edits))


def first_layer(edits: Sequence[Edit]) -> int:
    return min(head.layer for edit in edits for head in edit.heads)  # type: ignore[type-var, return-value]


def batches(at: Int[Tensor, "prompt"], batch_size: int) -> Iterator[Int[Tensor, "batch"]]:
    """The prompts by their position ``at``, ``batch_size`` at a time: those edited at like positions go together."""
    yield from at.argsort(stable=True).split(batch_size)


@dataclass(frozen=True)
class Run:
    """A batch in one model, from where edits begin: what the unedited pass leaves there, and any pass from there on.

    In a causal model an edit at ``at`` leaves all that comes before as it is. So a pass has the positions from the first
    ``at`` of the batch to the last END, and reads keys and values of those before, made once. ``offset`` is the first.
    """

    model: Transformer
    prompts: PromptBatch
    rows: Int[Tensor, "batch"]
    at: Int[Tensor, "prompt"]
    share: float
    streams: Mapping[int, Float[Tensor, "batch suffix d_model"]]
    prefix: Prefix | None

    @classmethod
    def begin(
        cls, model: Transformer, task: Task, rows: Tensor, at: Int[Tensor, "prompt"], share: float, layers: Sequence[int]
    ) -> "Run":
        """One unedited pass, which leaves the stream at each of ``layers``, where edits may begin."""
        prompts, config = task.prompts[rows].to(model.device), model.config
        offset = int(at[rows].min()) if config.causal else 0
        sites = [Site("resid_pre", layer) for layer in sorted(set(layers))]
        ports = [Site(port, layer) for layer in range(config.n_layers) for port in "kv"] if offset else []
        tokens = prompts.clean[:, : int(prompts.end.max()) + 1]
        _, cache = model.run(tokens, record=sites + ports, logits_at=prompts.end, logits_of=prompts.candidates)
        streams = {layer: cache["resid_pre", layer][:, offset:] for layer in layers}
        return cls(model, prompts, rows, at, share, streams, Prefix.of(cache, config.n_layers, offset) if offset else None)

    @property
    def offset(self) -> int:
        return self.prefix.length if self.prefix else 0

    def start(self, edits: Sequence[Edit]) -> ResidualStart:
        """Where a pass with these edits begins; one with none, at the first layer where any begins."""
        layer = first_layer(edits) if edits else min(self.streams)
        return ResidualStart(Site("resid_pre", layer), self.streams[layer], self.prefix)

    def patch(self, edits: Sequence[Edit]) -> dict[Site | str, Patch]:
        return patches(edits, self.rows, self.at, self.share)

    def logits(
        self, edits: Sequence[Edit], record: Sequence[Site] = ()
    ) -> tuple[Float[Tensor, "batch d_vocab"], ActivationCache]:
        """The logits at END under ``edits``; with none, those of the unedited model."""
        start, patch = self.start(edits), self.patch(edits)
        return self.model.run(None, start=start, record=record, patch=patch, logits_at=self.prompts.end)


def outcome(task: Task, logits: Float[Tensor, "batch d_vocab"], prompts: PromptBatch) -> Outcome:
    """What the logits of these prompts say, prompt by prompt."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    values = (is_top(logits, prompts), is_preferred(logits, prompts), task.metric(logits, prompts), logits.argmax(-1))
    return Outcome(*(value.cpu().numpy() for value in values))


def joined(parts: Sequence[Outcome], at: Int[Tensor, "prompt"]) -> Outcome:
    """The batches' outcomes as one, in the order of the task."""
    back = at.argsort(stable=True).argsort().numpy()
    fields = ("is_right", "is_preferred", "metric", "said")
    return Outcome(*(np.concatenate([getattr(part, field) for part in parts])[back] for field in fields))


def fingerprints(task: Task) -> list[str]:
    """A short name for each prompt's clean tokens, by which two sets of prompts can be told apart."""
    tokens, ends = task.prompts.clean.tolist(), task.prompts.end.tolist()
    texts = (" ".join(map(str, row[: end + 1])) for row, end in zip(tokens, ends, strict=True))
    return [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]
