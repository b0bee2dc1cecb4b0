"""What every discovery method shares: prompts in batches, finished batches kept on disk, scores put together last."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.ablation import Ablation, Replacement, replacement_for
from circuits.scores import Scores
from circuits.wiring import Wiring
from circuits.writes import Writes
from mechinterp.errors import CircuitError, TaskError
from mechinterp.files import write_beside
from mechinterp.models.transformer import Transformer
from mechinterp.prompts import PromptBatch
from mechinterp.tasks.base import Task

_MEMORY = 64 * 2**20  # bytes for the per-writer differences of one batch

BatchScore = Callable[[PromptBatch, Writes, tqdm], Float[Tensor, "prompt item"]]


@dataclass(frozen=True)
class Walk:
    """One method's way over one task. The settings that all methods take, and how far it has come.

    ``resume`` is a folder: every finished batch is kept there, under a hash of all that decides its scores, and taken
    from there when the same call is made again.
    """

    model: Transformer
    task: Task
    method: str
    ablation: str | Ablation = "resample"
    batch_size: int | None = None
    keep_prompts: bool = False
    resume: str | os.PathLike | None = None
    progress: bool = False
    settings: Mapping[str, Any] | None = None
    items: Literal["edge", "node"] = "edge"

    def scores(self, score: Callable[[Replacement], BatchScore], unit: str = "prompt", units_a_prompt: int = 1) -> Scores:
        """The mean of every prompt's scores. ``score`` is told the replacement and scores one batch after another.

        Raises ``TaskError`` where every item scores exactly zero: the metric then does not depend on what was cut.
        """
        replacement = self._replacement()
        score_batch = score(replacement)
        total, kept = np.zeros(1), []
        with tqdm(total=len(self.task) * units_a_prompt, desc=self.method, unit=unit, disable=not self.progress) as bar:
            for prompts, replaced in self._batches(replacement.writes):
                rows = self._one(prompts, replaced, score_batch, replacement.name, bar, units_a_prompt)
                total = total + rows.sum(0, dtype=np.float64)
                kept += [rows] if self.keep_prompts else []
        self._refuse_nothing(total)
        return Scores(
            Wiring.of(self.model.config),
            total / len(self.task),
            method=self.method,
            unit=self.task.metric_name,
            model=self.model.config.name,
            task=self.task.name,
            settings=self._facts(replacement.name),
            per_prompt=np.concatenate(kept) if kept else None,
            items=self.items,
        )

    def _replacement(self) -> Replacement:
        if self.batch_size is not None and self.batch_size < 1:
            raise CircuitError(f"batch_size={self.batch_size} holds no prompt. Give at least 1, or None to go by memory.")
        return replacement_for(self.model, self.task, self.ablation)

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
        facts = [self.model.weights.fingerprint, self.task.metric_name, str(self.model.dtype), self._facts(ablation)]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        everyone = self.task.prompts if ablation != "resample" else prompts  # a mean depends on all prompts
        for batch in (prompts, everyone):
            for tensor in (batch.clean, batch.corrupted, batch.end, batch.candidates, batch.roles, batch.groups):
                digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def _facts(self, ablation: str) -> dict[str, Any]:
        about = {"corruption": self.task.corruption, "n_prompts": len(self.task), "ablation": ablation}
        return about | dict(self.settings or {})

    def _refuse_nothing(self, total: np.ndarray) -> None:
        if not total.any():
            raise TaskError(
                f"every {self.items} of {self.model.config.name} scores exactly zero on {self.task.name!r} by {self.method}: "
                f"{self.task.metric_name} does not change with what is cut. Choose another metric or corruption; a "
                "divergence from the clean run has no gradient there, so use 'exact' for it."
            )
