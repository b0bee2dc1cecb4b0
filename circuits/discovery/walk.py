"""What every discovery method shares: the prompts in batches, the ablation over all of them, the scores put together."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from circuits.ablation import Ablation, ablation_named
from circuits.discovery.suffix import CleanRun
from circuits.scores import Scores
from circuits.wiring import Wiring
from circuits.writes import Writes
from mechinterp.errors import TaskError
from mechinterp.models.transformer import Transformer
from mechinterp.tasks.base import Task

_MEMORY = 64 * 2**20  # bytes for the per-writer differences of one batch


def over_batches(
    model: Transformer,
    task: Task,
    method: str,
    score: Callable[[CleanRun], Float[np.ndarray, "prompt item"]],
    ablation: str | Ablation,
    batch_size: int | None,
    keep_prompts: bool,
    settings: Mapping[str, Any],
    items: str = "edge",
) -> Scores:
    """Scores of a method that works on one recorded clean run after another. Averaged over prompts last."""
    name, replacement = replacements(model, task, ablation)
    rows = []
    for prompts, replaced in batches(model, task, replacement, batch_size):
        with torch.no_grad():
            run = CleanRun.record(model, prompts, task.metric, replaced, shares_prefix=name == "resample")
        rows.append(score(run))
    return assemble(model, task, method, np.concatenate(rows), keep_prompts, {"ablation": name, **settings}, items)


def replacements(model: Transformer, task: Task, ablation: str | Ablation) -> tuple[str, Writes]:
    """The ablation's name, and what every writer is replaced by on every prompt of the task."""
    name, ablate = ablation_named(ablation)
    if name == "resample" and torch.equal(task.prompts.clean, task.prompts.corrupted):
        raise TaskError(
            f"every corrupted prompt of {task.name!r} equals its clean one, so cutting an edge changes nothing. "
            "Choose another corruption, or another ablation (mean, zero)."
        )
    return name, ablate(model, task.prompts.to(model.device))


def batches(model: Transformer, task: Task, replacement: Writes, batch_size: int | None):
    """Prompts with their replacements, as many at a time as the memory for all writers' differences allows."""
    if batch_size is None:
        n_writers = len(Wiring.of(model.config).writers)
        a_prompt = n_writers * task.prompts.clean.shape[1] * model.config.d_model * replacement.input.element_size()
        batch_size = max(1, _MEMORY // a_prompt)
    for first in range(0, len(task), batch_size):
        rows = slice(first, first + batch_size)
        yield task.prompts[rows], replacement[rows]


def assemble(
    model: Transformer,
    task: Task,
    method: str,
    per_prompt: Float[np.ndarray, "prompt item"],
    keep_prompts: bool,
    settings: Mapping[str, Any],
    items: Any = "edge",
) -> Scores:
    return Scores(
        Wiring.of(model.config),
        per_prompt.mean(0, dtype=np.float64),
        method=method,
        unit=task.metric_name,
        model=model.config.name,
        task=task.name,
        settings={"corruption": task.corruption, "n_prompts": len(task), **settings},
        per_prompt=per_prompt if keep_prompts else None,
        items=items,
    )


