"""From a task to codes: the first steps of every method that reads discrete codes, and what it is measured against.

Positives are the clean prompts, negatives the corrupted ones. Some of both train the autoencoders, the others are counted:
codes that were fitted to the very examples that they are counted on say more than they know.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node
from mechinterp.prompts import PromptBatch
from mechinterp.store import ActivationStore
from mechinterp.tasks.base import Task
from saes.base import SparseAutoencoder
from saes.code_rows import Written, read_parts, weights_of
from saes.codes import Codes, CodeSettings, assign_codes, stratified
from saes.places import Place, each_head, each_layer


@dataclass(frozen=True, eq=False)
class Examples:
    """What every part wrote on clean prompts (first) and corrupted ones, at each place; and which rows train."""

    model: Transformer
    task: Task
    places: tuple[str, ...]
    written: Written
    training: Int[Tensor, "some"]
    counted: Int[Tensor, "pair"]

    @property
    def parts(self) -> tuple[Node, ...]:
        """Heads, layer by layer; then MLPs."""
        config = self.model.config
        heads = tuple(Node("head", layer, head) for layer in range(config.n_layers) for head in range(config.n_heads))
        mlps = () if self.written.mlps is None else tuple(Node("mlp", layer) for layer in range(config.n_layers))
        return heads + mlps

    @property
    def rows(self) -> Int[Tensor, "example"]:
        """The rows to count on: positives, then their partners."""
        return torch.cat([self.counted, self.counted + len(self.task)])

    @property
    def labels(self) -> Int[np.ndarray, "example"]:
        return np.repeat([1, 0], len(self.counted))

    @property
    def prompts(self) -> PromptBatch:
        """The pairs that are counted."""
        return self.task.prompts[self.counted]


@dataclass(frozen=True, eq=False)
class Coded:
    """The codes of the counted examples, ``values[place, example, part]``, and where they came from."""

    examples: Examples
    settings: CodeSettings
    values: Int[np.ndarray, "place example part"]
    by_place: tuple[tuple[Codes, ...], ...]

    @property
    def facts(self) -> dict[str, Any]:
        """What must stand beside any result: active latents, silent examples and codes in use; means over parts and places."""
        kinds = [codes for here in self.by_place for codes in here]
        used = [len(np.unique(part)) for here in self.values for part in here.T]
        mean = {"l0": np.concatenate([codes.l0 for codes in kinds]).mean(), "codes_a_part": np.mean(used)}
        mean["silent"] = np.concatenate([codes.silent for codes in kinds]).mean()
        return {name: round(float(value), 4) for name, value in mean.items()}

    @property
    def autoencoders(self) -> dict[str, tuple[SparseAutoencoder, ...]]:
        """Those of each place: of all heads, then of all MLPs."""
        return {
            place: tuple(codes.autoencoder for codes in here)
            for place, here in zip(self.examples.places, self.by_place, strict=True)
        }


def examples_of(
    model: Transformer,
    task: Task,
    positions: str | Sequence[str],
    n_train: int,
    *,
    seed: int = 0,
    mlps: bool = True,
    store: ActivationStore | None = None,
) -> Examples:
    """Run the task's prompts once and keep one row a prompt and part. ``SAEError`` for too few prompts or foreign positions."""
    prompts, n = task.prompts, len(task)
    positive, negative = stratified(n_train, n, n, seed)
    places = (positions,) if isinstance(positions, str) else tuple(positions)
    weights = weights_of(prompts, places, task.tokenizer.bos_id)
    tokens = torch.cat([prompts.clean, prompts.corrupted])
    written = read_parts(model, tokens, weights.repeat(1, 2, 1), mlps=mlps, store=store)
    training = torch.tensor([*positive, *(n + row for row in negative)])
    counted = torch.tensor(sorted(set(range(n)) - {*positive, *negative}))
    return Examples(model, task, places, written, training, counted)


def coded(examples: Examples, settings: CodeSettings, *, progress: bool = False) -> Coded:
    """The codes of the counted examples, by autoencoders of one head each (and of one MLP each) at each place."""
    config, both = examples.model.config, []
    heads, mlps = each_head(config), each_layer(config, "mlp_out") if examples.written.mlps is not None else ()
    for at in range(len(examples.places)):
        kinds: list[tuple[Tensor, tuple[Place, ...]]] = [(examples.written.heads[at], heads)]
        kinds += [] if examples.written.mlps is None else [(examples.written.mlps[at], mlps)]
        both.append(tuple(assign_codes(rows, where, examples.training, settings, progress=progress) for rows, where in kinds))
    values = [np.concatenate([codes.values[examples.rows.numpy()] for codes in here], 1) for here in both]
    return Coded(examples, settings, np.stack(values), tuple(both))
