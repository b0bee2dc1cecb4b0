"""What every discovery method shares: prompts in batches, finished batches kept on disk, scores put together last."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.ablation import Ablation, Replacement, replacement_for
from circuits.items import Items
from circuits.scores import Scores
from circuits.wiring import Wiring
from circuits.writes import Writes
from mechinterp.errors import CircuitError, TaskError
from mechinterp.files import write_beside
from mechinterp.models.transformer import Transformer
from mechinterp.prompts import PromptBatch
from mechinterp.tasks.base import Task

_MEMORY = 64 * 2**20  # bytes for the per-writer differences of one batch
_KEPT = 256 * 2**20  # bytes of per-prompt scores that are kept without being asked for

BatchScore = Callable[[PromptBatch, Writes, tqdm], Float[Tensor, "prompt *span item"]]


class WalkSettings(TypedDict, total=False):
    """How a method goes over the prompts. None of it changes a score.

    * ``batch_size``: prompts at a time; None (the default) goes by memory.
    * ``keep_prompts``: whether every prompt's own scores are kept, for intervals and stability; None (the default) if they
      fit in 256 MiB.
    * ``keep_positions``: split scores by the task's named positions too (``Scores.by_span``), where a method can.
    * ``resume``: a folder that keeps finished batches, so that the same call goes on where it was interrupted.
    * ``progress``: a bar on stderr.
    """

    batch_size: int | None
    keep_prompts: bool | None
    keep_positions: bool
    resume: str | os.PathLike | None
    progress: bool


@dataclass(frozen=True)
class Walk:
    """One method's way over one task, with the settings of ``WalkSettings`` and the method's own in ``settings``.

    With ``resume`` every finished batch is kept under a hash of all that decides its scores, and taken from there when
    the same call is made again. ``splits_positions``: the method's scores are sums over positions, so that they can be
    given span by span; others refuse ``keep_positions``. ``unit`` is that of the scores, None for the task's metric;
    ``allow_zero`` as in ``scores_of``.
    """

    model: Transformer
    task: Task
    method: str
    ablation: str | Ablation = "resample"
    _: KW_ONLY
    settings: Mapping[str, Any] = field(default_factory=dict)
    items: Items = "edge"
    splits_positions: bool = False
    unit: str | None = None
    allow_zero: bool = False
    batch_size: int | None = None
    keep_prompts: bool | None = None
    keep_positions: bool = False
    resume: str | os.PathLike | None = None
    progress: bool = False

    def scores(self, score: Callable[[Replacement], BatchScore], unit: str = "prompt", units_a_prompt: int = 1) -> Scores:
        """The mean of every prompt's scores. ``score`` is told the replacement and scores one batch after another; the bar
        counts ``units_a_prompt`` of ``unit`` for each prompt.

        A batch's scores are ``[prompt item]``, or ``[prompt span item]`` with ``keep_positions``, whose sum over spans is
        the score. Raises ``TaskError`` where every item scores exactly zero: the metric does not depend on what was cut.
        """
        self._check()
        replacement = replacement_for(self.model, self.task, self.ablation)
        score_batch = score(replacement)
        total, kept, spans = np.zeros(1), [], np.zeros(1)
        with tqdm(total=len(self.task) * units_a_prompt, desc=self.method, unit=unit, disable=not self.progress) as bar:
            for prompts, replaced in self._batches(replacement.writes):
                rows = self._one(prompts, replaced, score_batch, replacement.name, bar, units_a_prompt)
                if self.keep_positions:
                    spans = spans + rows.sum(0, dtype=np.float64)
                    rows = rows.sum(1)
                total = total + rows.sum(0, dtype=np.float64)
                kept += [rows] if self._keeps(rows) else []
        n = len(self.task)
        return scores_of(
            self.model,
            self.task,
            self.method,
            total / n,
            replacement.name,
            settings=self.settings,
            items=self.items,
            unit=self.unit,
            per_prompt=np.concatenate(kept) if kept else None,
            allow_zero=self.allow_zero,
            by_span=dict(zip(self.task.prompts.span_names, spans / n, strict=True)) if self.keep_positions else None,
        )

    def _check(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise CircuitError(f"batch_size={self.batch_size} holds no prompt. Give at least 1, or None to go by memory.")
        if self.keep_positions and not self.splits_positions:
            raise CircuitError(
                f"{self.method!r} does not split its scores by position. Leave "
                "keep_positions out, or use a method of gradients (eap, eap-ig, atp)."
            )

    def _keeps(self, rows: np.ndarray) -> bool:
        if self.keep_prompts is not None:
            return self.keep_prompts
        return len(self.task) * rows.shape[1] * rows.itemsize <= _KEPT

    def _batches(self, writes: Writes):
        """As many prompts at a time as memory allows: edges need every writer's difference at once, nodes a layer's."""
        size = self.batch_size
        if size is None:
            n_writers = len(Wiring.of(self.model.config).writers) if self.items == "edge" else 2 * self.model.config.n_layers
            size = max(1, _MEMORY // (n_writers * writes.input[0].numel() * writes.input.element_size()))
        for first in range(0, len(self.task), size):
            rows = slice(first, first + size)
            yield self.task.prompts[rows].to(self.model.device), writes[rows]

    def _one(self, prompts, replaced, score: BatchScore, ablation: str, bar: tqdm, units: int) -> np.ndarray:
        """The scores of a batch: computed, or read where they were kept."""
        kept = None if self.resume is None else Path(self.resume) / f"{self.method}-{self._key(prompts, ablation)}.npy"
        if kept is not None and kept.is_file():
            bar.update(len(prompts) * units)
            return np.load(kept, allow_pickle=False)
        found = score(prompts, replaced, bar)
        rows = found.detach().to(torch.promote_types(found.dtype, torch.float32)).cpu().numpy()
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with write_beside(kept) as beside:
                np.save(beside, rows)
        return rows

    def _key(self, prompts: PromptBatch, ablation: str) -> str:
        facts = [self.task.metric_name, _facts(self.task, ablation, self.settings), self.keep_positions]
        everyone = self.task.prompts if ablation != "resample" else prompts  # a mean depends on all prompts
        return digest(self.model, [prompts, everyone], facts)


def digest(model: Transformer, batches: Iterable[PromptBatch], facts: Any) -> str:
    """A name for all that decides a result: the weights and their precision, the prompts, and ``facts`` (plain JSON)."""
    about = json.dumps([model.weights.fingerprint, str(model.dtype), facts], sort_keys=True)
    hashed = hashlib.sha256(about.encode())
    for batch in batches:
        tensors = (batch.clean, batch.corrupted, batch.end, batch.candidates, batch.roles, batch.groups)
        for tensor in (*tensors, *batch.positions.values()):
            hashed.update(tensor.cpu().contiguous().numpy().data)
    return hashed.hexdigest()[:16]


def scores_of(
    model: Transformer,
    task: Task,
    method: str,
    values: Float[np.ndarray, "item"],
    ablation: str | None,
    *,
    settings: Mapping[str, Any] | None = None,
    items: Items = "edge",
    unit: str | None = None,
    per_prompt: Float[np.ndarray, "prompt item"] | None = None,
    by_span: Mapping[str, Float[np.ndarray, "item"]] | None = None,
    allow_zero: bool = False,
) -> Scores:
    """A method's numbers with where they came from. ``unit``: None for the task's metric. ``ablation``: None where
    nothing was replaced.

    Raises ``TaskError`` where every item scores exactly zero, unless ``allow_zero`` (only some items were asked for).
    """
    if not values.any() and not allow_zero:
        raise TaskError(
            f"every {items} of {model.config.name} scores exactly zero on {task.name!r} by {method}: {task.metric_name} does "
            "not change with what is cut. Choose another metric or corruption; a divergence from the clean run has no "
            "gradient there, so use 'exact' for it."
        )
    return Scores(
        Wiring.of(model.config),
        values,
        method=method,
        unit=unit or task.metric_name,
        model=model.config.name,
        task=task.name,
        settings=_facts(task, ablation, settings or {}),
        per_prompt=per_prompt,
        by_span=by_span,
        items=items,
    )


def _facts(task: Task, ablation: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    replaced = {} if ablation is None else {"ablation": ablation}
    return {"corruption": task.corruption, "n_prompts": len(task), **replaced, **settings}
