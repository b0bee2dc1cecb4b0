"""Documents packed into batches, and shares of the tasks that follow what the model still gets wrong."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.models.builtin.corpus import WRITERS
from mechinterp.models.builtin.document import Document

BOS = 1
N_PLAIN = 12  # further tokens of each document that are predicted as in any language model, at a small weight

# Weight of each kind of prediction in the loss.
KINDS = {
    "plain": 0.05,
    "s2": 0.1,
    "ioi": 1.0,
    "abc": 1.0,
    "years": 1.0,
    "control": 1.0,
    "colors": 1.0,
    "stated": 1.0,
    "where": 1.0,
    "docstring": 1.0,
    "repeat": 1.0,
    "owners": 1.0,
    "assigned": 1.0,
    "reversed": 1.0,
}
# How often each piece is written at first; those of SHRINKING give way as their accuracy grows.
SHARES = {
    "ioi": 5.0,
    "abc": 0.9,
    "years": 0.6,
    "control": 0.5,
    "colors": 2.0,
    "docstring": 2.5,
    "repeat": 1.2,
    "owners": 0.8,
    "assigned": 0.6,
    "reversed": 1.0,
    "filler": 0.3,
}
SHRINKING = ("ioi", "colors", "docstring", "repeat", "owners", "assigned", "reversed")


@dataclass(frozen=True)
class Batch:
    """Tokens, and the predictions that count: prediction ``i`` is made at flat position ``at[i]``."""

    tokens: Int[Tensor, "batch pos"]
    at: Int[Tensor, "prediction"]
    target: Float[Tensor, "prediction d_vocab"]
    kind: Int[Tensor, "prediction"]


@dataclass
class Sampler:
    """Writes documents: half of them of one kind of piece, half of mixed pieces."""

    encode: Callable[[str], list[int]]
    d_vocab: int
    n_ctx: int
    rng: Random
    accuracy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))

    def batch(self, n_documents: int) -> Batch:
        tokens = torch.empty(n_documents, self.n_ctx, dtype=torch.long)
        at, options, kinds = [], [], []
        for row in range(n_documents):
            document = self._document()
            tokens[row] = torch.tensor(document.ids[: self.n_ctx])
            known = {index: (ids, kind) for index, ids, kind in document.targets if index <= self.n_ctx}
            for index in self.rng.sample(range(1, self.n_ctx + 1), N_PLAIN):
                known.setdefault(index, ((document.ids[index],), "plain"))
            for index, (ids, kind) in known.items():
                at.append(row * self.n_ctx + index - 1)
                options.append(ids)
                kinds.append(list(KINDS).index(kind))
        target = torch.zeros(len(at), self.d_vocab)
        rows = torch.tensor([row for row, ids in enumerate(options) for _ in ids])
        target[rows, torch.tensor([i for ids in options for i in ids])] = torch.tensor(
            [1 / len(ids) for ids in options for _ in ids]
        )
        return Batch(tokens, torch.tensor(at), target, torch.tensor(kinds))

    def learn_from(self, kind: Int[Tensor, "prediction"], is_right: Tensor) -> None:
        """Keep a running accuracy of each kind (over about 50 batches)."""
        for index, name in enumerate(KINDS):
            if (kind == index).any():
                latest = float(is_right[kind == index].float().mean())
                self.accuracy[name] += 0.02 * (latest - self.accuracy[name])

    def shares(self) -> list[float]:
        return [SHARES[name] * (1 - 0.7 * self.accuracy[name] if name in SHRINKING else 0.5) for name in WRITERS]

    def _document(self) -> Document:
        document, shares = Document(self.encode, [BOS]), self.shares()
        only = self.rng.choices(list(WRITERS), shares)[0] if self.rng.random() < 0.5 else None
        while len(document.ids) < self.n_ctx + 1:
            if len(document.ids) > 1:
                document.add("\n")
            WRITERS[only or self.rng.choices(list(WRITERS), shares)[0]](document, self.rng)
        return document
