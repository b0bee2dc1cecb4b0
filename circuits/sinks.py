"""What attention sinks do for a task: its metric and accuracy with the attention of heads that rest on sinks calibrated away.

Yu et al. 2024 (arXiv:2406.15765) calibrate the heads that gain by it, one by one, on held-out prompts, and report up to 7 %
of accuracy gained. Here every head is measured alone and all together, on every prompt, whichever way it goes: heads chosen by
``helped`` must be judged on other prompts than those that chose them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.measure import apply
from circuits.statistics import bootstrap_means, interval
from mechinterp.errors import TaskError
from mechinterp.interventions import Intervention
from mechinterp.metrics import is_preferred
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node, nodes_of
from mechinterp.prompts import PromptBatch
from mechinterp.sinks import Sinks, calibrate, find_sinks, resting
from mechinterp.tasks.base import Task


@dataclass(frozen=True)
class Calibration:
    """Some heads calibrated: the task's mean metric and accuracy, and the mean change of each with its 95 % interval."""

    heads: tuple[Node, ...]
    metric: float
    accuracy: float
    metric_change: tuple[float, float, float]  # mean, low, high
    accuracy_change: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class SinkEffect:
    """Each prompt's metric, and whether its best answer beats every foil (0 or 1).

    ``metric`` and ``right`` have a row for the model as it is, one for all ``heads`` calibrated together, one for each alone.
    """

    heads: tuple[Node, ...]
    metric: Float[np.ndarray, "variant prompt"]
    right: Float[np.ndarray, "variant prompt"]
    keep: float
    model: str
    task: str
    metric_name: str

    @property
    def together(self) -> Calibration:
        return self._calibration(1, self.heads)

    @property
    def alone(self) -> tuple[Calibration, ...]:
        """One head calibrated, those that change the metric most first."""
        rows = [self._calibration(2 + index, (head,)) for index, head in enumerate(self.heads)]
        return tuple(sorted(rows, key=lambda row: -abs(row.metric_change[0])))

    @property
    def helped(self) -> tuple[Node, ...]:
        """The heads whose calibration alone raises the metric, its interval above 0: to be tried together on other prompts."""
        return tuple(row.heads[0] for row in self.alone if row.metric_change[1] > 0)

    def __str__(self) -> str:
        head = f"{self.model} on {self.task}, {self.metric.shape[1]} prompts; attention on sinks times {self.keep:g}"
        lines = [head, f"{'calibrated':<12} {'accuracy':>8}  {'change':>25}  {self.metric_name:>14}  {'change':>25}"]
        lines.append(f"{'none':<12} {self.right[0].mean():>8.3f}  {'':>25}  {self.metric[0].mean():>14.4f}")
        named = [("all of them", self.together), *((str(row.heads[0]), row) for row in self.alone)]
        for name, row in named:
            accuracy, metric = _shown(row.accuracy_change), _shown(row.metric_change)
            lines.append(f"{name:<12} {row.accuracy:>8.3f}  {accuracy:>25}  {row.metric:>14.4f}  {metric:>25}")
        return "\n".join(lines)

    def _calibration(self, variant: int, heads: tuple[Node, ...]) -> Calibration:
        return Calibration(
            heads,
            metric=float(self.metric[variant].mean()),
            accuracy=float(self.right[variant].mean()),
            metric_change=_change(self.metric[variant] - self.metric[0]),
            accuracy_change=_change(self.right[variant] - self.right[0]),
        )


@torch.no_grad()
def sink_effect(
    model: Transformer,
    task: Task,
    heads: Node | str | Iterable[Node | str] | None = None,
    *,
    sinks: Sinks | Bool[Tensor, "layer head_index batch pos"] | None = None,
    keep: float = 0.4,
    batch_size: int = 64,
) -> SinkEffect:
    """The task with the heads' attention on sinks scaled to ``keep``: all together, and each alone.

    ``sinks``: where they are on the task's clean prompts (``find_sinks(model, task, ...)``, or a mask such as its ``later``,
    which spares the first token); None finds them. ``heads``: None takes those that have a sink in at least half of the
    prompts; ``TaskError`` where there are none. Cost: a forward pass a head and batch, and two.
    """
    found = find_sinks(model, task, batch_size=batch_size) if sinks is None else sinks
    mask = found.mask if isinstance(found, Sinks) else found
    chosen = resting(mask) if heads is None else nodes_of(heads)
    if not chosen:
        raise TaskError(
            f"no head of {model.config.name} rests on a sink in half of the prompts of {task.name!r}. Name heads, or find "
            "sinks with a lower threshold: sinks=find_sinks(model, task, threshold=0.2)."
        )
    variants: list[tuple[Node, ...]] = [(), chosen, *((head,) for head in chosen)]
    parts: list[Tensor] = []
    for first in tqdm(range(0, len(task), batch_size), desc="calibration", delay=2, leave=False, disable=None):
        rows = slice(first, first + batch_size)
        prompts, there = task.prompts[rows].to(model.device), mask[:, :, rows]
        edits = [calibrate(some, there, keep=keep) for some in variants]
        parts.append(torch.stack([_measured(model, prompts, task, edit) for edit in edits], 1))
    metric, right = torch.cat(parts, 2).cpu().double().numpy()
    return SinkEffect(chosen, metric, right, keep, model.config.name, task.name, task.metric_name)


def _measured(model: Transformer, prompts: PromptBatch, task: Task, edit: Intervention) -> Float[Tensor, "kind batch"]:
    logits, _ = model.run(prompts.clean, patch=edit, logits_at=prompts.end)
    return torch.stack([apply(metric, logits, prompts) for metric in (task.metric, is_preferred)])


def _change(by_prompt: Float[np.ndarray, "prompt"]) -> tuple[float, float, float]:
    low, high = interval(bootstrap_means(by_prompt))
    return float(by_prompt.mean()), float(low), float(high)


def _shown(change: tuple[float, float, float]) -> str:
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*change)
