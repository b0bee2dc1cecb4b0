"""Whether two circuits share roles: for each head of one the head of the other whose signature is most like it.

Two circuits can share a role without sharing a head, and a head without sharing its role, so both are told: which head is the
match, and, where both tasks are of one model, how like itself a head is on the other task. What two circuits drawn at random
would have in common stands beside it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from circuits.reuse.signatures import Features, Signatures
from mechinterp.errors import CircuitError
from mechinterp.nodes import Node, nodes_of

IN_ANY_TASK = ("role", "text", "writes")
OF_A_MODEL = ("repeated", "weights")


@dataclass(frozen=True)
class Match:
    """``head`` on the one task and ``like``, the head of the other circuit that is most like it there; ``similarity`` -1 to 1.

    ``own_rank``: which place ``head`` itself takes on the other task, among all heads measured, in likeness to what it is here;
    1 where no head is more like it. None between models.
    """

    head: Node
    like: Node
    similarity: float
    own_rank: int | None

    @property
    def same(self) -> bool:
        return self.own_rank is not None and self.head == self.like


@dataclass(frozen=True)
class SameRoles:
    """What ``same_role`` found; ``features`` were compared. ``chance``: the mean similarity, were the second circuit drawn at
    random from all heads measured; ``p`` how often it then is at least as large. ``chance_same``: of how many heads the match
    would be the same head, if the second circuit's heads changed places at random (None between models)."""

    tasks: tuple[str, str]
    matches: tuple[Match, ...]
    features: tuple[str, ...]
    chance: float
    p: float
    chance_same: float | None
    n_heads: int

    @property
    def similarity(self) -> float:
        return sum(match.similarity for match in self.matches) / len(self.matches)

    @property
    def n_same(self) -> int:
        return sum(match.same for match in self.matches)

    def __str__(self) -> str:
        rows = [(str(m.head), str(m.like), f"{m.similarity:.2f}", str(m.own_rank or "")) for m in self.matches]
        head = (f"on {self.tasks[0]}", f"most like, on {self.tasks[1]}", "similarity", f"itself there (of {self.n_heads})")
        table = [f"| {' | '.join(cells)} |" for cells in (head, ("---", "---", "---:", "---:"), *rows)]
        about = (
            f"Mean similarity {self.similarity:.2f}, by chance {self.chance:.2f} (p {self.p:.3g}), over {len(self.features)} "
        )
        same = "" if self.chance_same is None else f"; the same head {self.n_same} times, by chance {self.chance_same:.1f}"
        return "\n".join([f"{about}features{same}.", "", *table])


def same_role(
    signatures: Signatures,
    task_a: str,
    task_b: str,
    heads_a: Node | str | Iterable[Node | str],
    heads_b: Node | str | Iterable[Node | str],
    *,
    other: Signatures | None = None,
    kinds: Sequence[str] | None = None,
    n_permutations: int = 1000,
    seed: int = 0,
) -> SameRoles:
    """For each of ``heads_a``, a circuit on ``task_a``, the most alike of ``heads_b``, a circuit on ``task_b`` (of ``other``,
    where that is measured on another model): by the cosine of relative signatures, over the features that both tables have.

    ``kinds`` of features; None: those that mean the same in any task, and between two models also those that need no task,
    which would tell a head of the same model by itself. Signatures should be of all heads: they are relative to the mean over
    those measured, and chance draws from them.

    Raises ``CircuitError`` where a circuit is empty, nothing is drawn or no feature is shared, ``UnknownNode`` for heads not
    measured.
    """
    one_model, there = other is None, signatures if other is None else other
    kinds = (*IN_ANY_TASK, *(() if one_model else OF_A_MODEL)) if kinds is None else kinds
    rows_a, rows_b = [signatures.row(head) for head in nodes_of(heads_a)], [there.row(head) for head in nodes_of(heads_b)]
    if n_permutations < 1:
        raise CircuitError(f"n_permutations={n_permutations} draws no circuit to compare with. Give 1 or more.")
    if not (rows_a and rows_b):
        raise CircuitError("a circuit without heads has no roles to share. Name at least one head of each.")
    names, alike = _likeness(_table(signatures, task_a, kinds), _table(there, task_b, kinds))
    ranks = [_own_rank(alike[row], there, signatures.heads[row]) if one_model else None for row in rows_a]
    best = alike[np.ix_(rows_a, rows_b)]
    matches = [
        Match(signatures.heads[row], there.heads[rows_b[likest]], float(alike[row, rows_b[likest]]), rank)
        for row, likest, rank in zip(rows_a, best.argmax(1), ranks, strict=True)
    ]
    null = _drawn(alike[rows_a], len(rows_b), n_permutations, seed)
    in_both = len({signatures.heads[row] for row in rows_a} & {there.heads[row] for row in rows_b})
    return SameRoles(
        tasks=(task_a, task_b),
        matches=tuple(matches),
        features=names,
        chance=float(null.mean()),
        p=float((1 + (null >= best.max(1).mean() - 1e-12).sum()) / (1 + len(null))),
        chance_same=in_both / len(rows_b) if one_model else None,
        n_heads=len(there.heads),
    )


def _table(signatures: Signatures, task: str, kinds: Sequence[str]) -> Features:
    """All features of a task and of none, of these kinds, relative to the mean over heads."""
    alone, with_task = signatures.table(None), signatures.table(task)
    both = Features(alone.names + with_task.names, np.concatenate([alone.values, with_task.values], 1))
    return both.of_kinds(kinds).relative


def _likeness(one: Features, other: Features) -> tuple[tuple[str, ...], Float[np.ndarray, "head other_head"]]:
    """The shared features, and the cosine of every head of one table with every head of the other."""
    shared = tuple(name for name in one.names if name in other.names)
    if not shared:
        raise CircuitError("the two tasks share no feature of these kinds in which heads differ. Compare more kinds.")
    a, b = (np.stack([table[name] for name in shared], 1) for table in (one, other))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True).clip(min=1e-30) for x in (a, b))
    return shared, a @ b.T


def _own_rank(alike: Float[np.ndarray, "other_head"], there: Signatures, head: Node) -> int | None:
    return 1 + int((alike > alike[there.row(head)] + 1e-12).sum()) if head in there.heads else None


def _drawn(
    alike: Float[np.ndarray, "head other_head"], n: int, n_permutations: int, seed: int
) -> Float[np.ndarray, "permutation"]:
    """The mean over heads of the best of ``n`` heads drawn at random, time after time."""
    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.permutation(alike.shape[1])[:n] for _ in range(n_permutations)])
    return alike[:, drawn].max(2).mean(0)
