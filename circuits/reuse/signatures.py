"""Signatures of heads: what each does on each task, as named numbers, so that "the same head" can be told from "the same role".

    measure_signatures(model, tasks)   every head: where it looks, what it writes, and what it does without a task
    similarity(one, other)      ->  the cosine of two heads' features, of those that both have

``circuits.reuse.matching`` compares the heads of two circuits. What is measured is said where it is measured:
``circuits.reuse.features`` (with a task) and ``mechinterp.head_scores`` (without one). A signature is not a meaning: two heads
that look alike here may differ where nobody looked.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from circuits.reuse.features import head_features
from mechinterp.errors import CircuitError, TaskError, UnknownNode, nearest
from mechinterp.files import array_from_text, array_to_text, read_document, to_document, write_text_atomically
from mechinterp.head_scores import BACK, copying_scores, repetition_scores
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node, nodes_of
from mechinterp.tasks.base import Task

_KIND, _VERSION = "mechinterp head signatures", 1
ALONE = "alone"  # what is measured without a task
KINDS = ("attention", "role", "text", "writes", "logits", "repeated", "weights")
Signature = Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Features:
    """One number a head and feature. Names are a kind, one of ``KINDS``, and what it is: ``"repeated: induction"``."""

    names: tuple[str, ...]
    values: Float[np.ndarray, "head feature"]

    def __post_init__(self):
        if self.values.ndim != 2 or self.values.shape[1] != len(self.names) or not np.isfinite(self.values).all():
            raise CircuitError(f"{len(self.names)} features need so many finite numbers a head, not {self.values.shape}.")
        self.values.setflags(write=False)

    def __getitem__(self, name: str) -> Float[np.ndarray, "head"]:
        if name not in self.names:
            raise CircuitError(f"there is no feature {name!r} here.{nearest(name, self.names)}")
        return self.values[:, self.names.index(name)]

    @property
    def relative(self) -> "Features":
        """In standard deviations from the mean over heads; without features in which all heads are alike."""
        spread = self.values.std(0)
        differs = spread > 1e-6 * np.abs(self.values).max(0, initial=0)
        values = (self.values[:, differs] - self.values[:, differs].mean(0)) / spread[differs]
        return Features(tuple(name for name, kept in zip(self.names, differs, strict=True) if kept), values)

    def of_kinds(self, kinds: Sequence[str]) -> "Features":
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            raise CircuitError(
                f"{unknown[0]!r} is no kind of feature; there are {', '.join(KINDS)}.{nearest(unknown[0], KINDS)}"
            )
        kept = [index for index, name in enumerate(self.names) if name.split(":")[0] in kinds]
        return Features(tuple(self.names[index] for index in kept), self.values[:, kept])


@dataclass(frozen=True, eq=False)
class Signatures:
    """What ``measure_signatures`` found: a table of features a task, and one of those that need none (``ALONE``).

    ``chance`` is what even attention would give the "repeated" features.
    """

    model: str
    heads: tuple[Node, ...]
    tables: Mapping[str, Features]
    chance: float
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(name for name in self.tables if name != ALONE)

    def table(self, task: str | None) -> Features:
        """A task's features of all heads; None: those that need no task."""
        name = ALONE if task is None else task
        if name not in self.tables:
            raise CircuitError(f"{task!r} was not measured; measured: {', '.join(self.tasks)}.{nearest(name, self.tasks)}")
        return self.tables[name]

    def row(self, head: Node | str) -> int:
        """Which row of the tables is this head's."""
        head = Node.parse(head) if isinstance(head, str) else head
        if head not in self.heads:
            names = [str(known) for known in self.heads]
            raise UnknownNode(f"{str(head)!r} is not among the {len(names)} heads measured.{nearest(str(head), names)}")
        return self.heads.index(head)

    def signature(self, head: Node | str, task: str | None = None, *, relative: bool = False) -> dict[str, float]:
        """A head's features by name: those of the task, and those that need none.

        ``relative``: in standard deviations from the mean over all measured heads, so that features compare with each other
        and models with other models.
        """
        tables = [self.table(None)] + ([] if task is None else [self.table(task)])
        row, found = self.row(head), {}
        for table in tables:
            table = table.relative if relative else table
            found |= dict(zip(table.names, table.values[row].tolist(), strict=True))
        return found

    def save(self, path: str | os.PathLike) -> None:
        """JSON, whole or not at all; numbers packed without loss."""
        tables = {name: {"names": table.names, "values": array_to_text(table.values)} for name, table in self.tables.items()}
        facts = {"model": self.model, "heads": [str(head) for head in self.heads], "chance": self.chance}
        write_text_atomically(path, to_document(_KIND, _VERSION, {**facts, "settings": self.settings, "tables": tables}))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Signatures":
        """What ``save`` wrote. ``CircuitError`` names the file and what is wrong with it."""
        found = read_document(path, _KIND, _VERSION, CircuitError)
        try:
            heads = tuple(Node.parse(name) for name in found["heads"])
            tables = {
                name: Features(tuple(table["names"]), array_from_text(table["values"]))
                for name, table in found["tables"].items()
            }
            return cls(found["model"], heads, tables, found["chance"], found["settings"])
        except (KeyError, TypeError, ValueError, AttributeError, UnknownNode) as problem:
            raise CircuitError(f"{os.fspath(path)!r} does not hold usable signatures: {problem}") from problem

    def __str__(self) -> str:
        """A Markdown table: what each head does without a task, then for each task where it looks from END, what it writes."""
        head = ["head", *BACK, "copies", *(f"{task}: {what}" for task in self.tasks for what in ("looks at", "writes"))]
        rows = [[str(node), *self._alone(row), *self._at_tasks(row)] for row, node in enumerate(self.heads)]
        lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]
        about = (
            f"Heads of {self.model}. Shares of attention on random tokens said twice (chance {self.chance:.3f}); copies: -1 "
        )
        about += (
            "to 1, by weights; looks at: the named position with the largest share from END; writes: the token whose logit it "
        )
        about += "moves most there, among those named, in standard deviations over the vocabulary."
        return "\n".join([about, "", *lines])

    def _alone(self, row: int) -> list[str]:
        table = self.table(None)
        return [f"{table[name][row]:.2f}" for name in (*(f"repeated: {name}" for name in BACK), "weights: copying")]

    def _at_tasks(self, row: int) -> list[str]:
        return [
            self._strongest(*what, row) for task in self.tasks for what in ((task, "attention: END -> "), (task, "writes: "))
        ]

    def _strongest(self, task: str, kind: str, row: int) -> str:
        """The largest of these features, by magnitude; nothing where all round to 0."""
        table = self.table(task)
        named = [name for name in table.names if name.startswith(kind) and not name.endswith("elsewhere")]
        values = {name.removeprefix(kind): float(table[name][row]) for name in named}
        name = max(values, key=lambda name: abs(values[name]))
        sign = "+" if kind.startswith("writes") else ""
        return f"{name} {values[name]:{sign}.2f}" if abs(values[name]) >= 0.005 else ""


def measure_signatures(
    model: Transformer,
    tasks: Mapping[str, Task] | Sequence[Task],
    heads: Node | str | Iterable[Node | str] | None = None,
    *,
    n_repeated: int = 32,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> Signatures:
    """The signature of every head (or of ``heads``) on each task, by the task's name or the mapping's.

    ``n_repeated`` prompts of random tokens, drawn by ``seed``, tell induction, duplicate-token and previous-token heads.
    Measure all heads where they are to be compared: ``relative`` and chance levels are taken over the heads that are there.

    Cost: one forward pass over each task's clean prompts and one over the random tokens, patterns kept, and two products of
    ``d_vocab d_model^2``, and what ``copying_scores`` costs. ``TaskError`` for two tasks of one name, ``UnknownNode`` for what
    is no head of the model.

    >>> from mechinterp.models.compiled import indirect_object
    >>> planted = indirect_object()
    >>> mover = measure_signatures(planted.model, [planted.task]).signature(planted.roles["mover"], "indirect-object")
    >>> [round(mover[name], 1) for name in ("attention: END -> IO", "writes: IO", "weights: copying")]
    [0.9, 4.1, 1.0]
    """
    named = _named(tasks)
    everyone = [Node.head(layer, head) for layer in range(model.config.n_layers) for head in range(model.config.n_heads)]
    chosen = tuple(everyone) if heads is None else tuple(sorted(set(nodes_of(heads))))
    if strangers := [str(head) for head in chosen if head not in everyone]:
        raise UnknownNode(
            f"{strangers[0]!r} is not a whole head of {model.config.name}.{nearest(strangers[0], map(str, everyone))}"
        )
    repetition = repetition_scores(model, n_prompts=n_repeated, seed=seed, batch_size=batch_size)
    alone = {f"repeated: {name}": share for name, share in repetition.shares.items()}
    measured = {ALONE: alone | {"weights: copying": copying_scores(model)}}
    for name, task in named.items():
        measured[name] = head_features(model, task, batch_size=batch_size, progress=progress)
    rows = [everyone.index(head) for head in chosen]
    tables = {
        name: Features(tuple(found), np.stack([x.flatten().numpy()[rows] for x in found.values()], 1))
        for name, found in measured.items()
    }
    facts = {"n_prompts": {name: len(task) for name, task in named.items()}, "n_repeated": n_repeated, "seed": seed}
    return Signatures(model.config.name, chosen, tables, repetition.chance, facts)


def similarity(one: Signature, other: Signature, kinds: Sequence[str] = KINDS) -> float:
    """The cosine of two signatures over the features of these ``kinds`` that both have, -1 to 1; 0 where one of them is all 0.

    Names carry the comparison: ``role``, ``text``, ``repeated`` and ``weights`` mean the same in every task and model, while
    ``attention: END -> IO`` is shared by two tasks only if both name an IO. Give relative signatures: raw ones are nearly all
    positive, so that any two heads look alike. ``CircuitError`` where no feature is shared.
    """
    shared = [name for name in one if name in other and name.split(":")[0] in kinds]
    if not shared:
        raise CircuitError("the two signatures share no feature of these kinds. Measure both on tasks, or compare more kinds.")
    a, b = (np.array([signature[name] for name in shared]) for signature in (one, other))
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size > 0 else 0.0


def _named(tasks: Mapping[str, Task] | Sequence[Task]) -> dict[str, Task]:
    pairs = list(tasks.items()) if isinstance(tasks, Mapping) else [(task.name, task) for task in tasks]
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names) or ALONE in names:
        raise TaskError(
            f"the tasks are named {', '.join(names)}: each needs a name of its own, other than {ALONE!r}. Give a mapping."
        )
    return dict(pairs)
