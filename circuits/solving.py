"""Whether a task can be analysed on a model at all: asked once, before anything long is computed.

A circuit for something that the model does not do, or under a metric that says nothing, is an hour lost and sometimes a
finding that is none. What is refused here says what to change instead.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.measure import measure
from mechinterp.errors import TaskError
from mechinterp.metrics import Metric, is_preferred
from mechinterp.models.transformer import Transformer
from mechinterp.prompts import PromptBatch
from mechinterp.tasks.base import Task

SOLVED = 0.5  # at most this share of right answers, and the model is said not to do the task
_ROWS = 64


@dataclass(frozen=True)
class Fitness:
    """Each prompt's metric on clean and on corrupted tokens, and whether its best answer beats every foil (0 or 1)."""

    clean: Float[np.ndarray, "prompt"]
    corrupted: Float[np.ndarray, "prompt"]
    right: Float[np.ndarray, "prompt"]

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())


def fitness(model: Transformer, task: Task, *, allow_unsolved: bool = False) -> Fitness:
    """Measure what decides whether a search makes sense, and refuse it with ``TaskError`` where it does not.

    Refused: a metric that is not one number a prompt, or not finite, or the same for all prompts, clean and corrupted;
    and a task that the model does not do, that is, the best answer beats every foil in at most half of the clean prompts.
    ``allow_unsolved`` overrides this last refusal, for those who ask why a model fails. Cost: two forwards.
    """
    rows = [_measured(model, prompts, task.metric).cpu() for prompts in task.batches(_ROWS)]
    found = Fitness(*torch.cat(rows, dim=1).double().numpy())
    _refuse_metric(task, found)
    if found.accuracy <= SOLVED and not allow_unsolved:
        raise TaskError(
            f"{model.config.name} does not do {task.name!r}: its best answer beats every foil in {found.accuracy:.0%} of "
            f"{len(task)} clean prompts, so its circuit would mean little. Use a model that does the task or other prompts; to "
            "search all the same, say allow_unsolved=True (--allow-unsolved)."
        )
    return found


@torch.no_grad()
def _measured(model: Transformer, prompts: PromptBatch, metric: Metric) -> Float[Tensor, "kind batch"]:
    """The metric on clean and on corrupted tokens, and whether the clean run prefers an answer: two passes."""
    right: list[Tensor] = []

    def and_is_right(logits, rows):
        right.append(is_preferred(logits, rows))
        return metric(logits, rows)

    prompts = prompts.to(model.device)
    clean = measure(model, prompts, and_is_right, tokens=prompts.clean)[0][0]
    corrupted = measure(model, prompts, metric, tokens=prompts.corrupted)[0][0]
    return torch.stack([clean, corrupted, right[0].to(clean)])


def _refuse_metric(task: Task, found: Fitness) -> None:
    both = np.stack([found.clean, found.corrupted])
    if n_bad := int((~np.isfinite(both)).sum()):
        raise TaskError(
            f"{task.metric_name} is not finite on {n_bad} of {both.size} clean and corrupted prompts of {task.name!r}. Look "
            "for a division by zero or a logarithm in the metric, or load the model in float32."
        )
    if np.ptp(both) == 0:
        raise TaskError(
            f"{task.metric_name} is {both.flat[0]:.4g} on every prompt of {task.name!r}, clean or corrupted, so nothing that "
            "is cut can change it. Use a metric of the answers' logits, such as logit_diff."
        )
