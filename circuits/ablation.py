"""What stands in for a part that is cut: the values that its edges carry instead.

An ablation takes the model and *all* the prompts, never one batch of them (a mean over the last batch is a known trap),
and gives what every writer is replaced by, prompt by prompt and position by position.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.optimal import optimal
from circuits.writes import Writes
from mechinterp.errors import CircuitError, TaskError, nearest
from mechinterp.models.transformer import Transformer
from mechinterp.prompts import PromptBatch
from mechinterp.tasks.base import Task

Ablation = Callable[[Transformer, PromptBatch], Writes]


def resample(model: Transformer, prompts: PromptBatch) -> Writes:
    """What the writer does on the corrupted prompt (Chan et al. 2022; ACDC's and EAP's choice). One forward."""
    return _in_batches(model, prompts.corrupted)


def mean(model: Transformer, prompts: PromptBatch) -> Writes:
    """The writer's mean over the corrupted prompts of the same template, position by position (Wang et al. 2022).

    Prompts of one template that end at different positions are averaged apart, since their positions mean different
    things. A template of one prompt has itself as its mean: use several prompts a template. One forward.
    """
    layouts = _layouts(prompts)
    return resample(model, prompts).map(lambda x: _group_mean(x, layouts.to(x.device)))


def zero(model: Transformer, prompts: PromptBatch) -> Writes:
    """Nothing at all. Position 0 and the position embedding are included; ``b_O`` stays, it belongs to no writer."""
    return resample(model, prompts[:1]).map(lambda x: x.new_zeros((len(prompts), *x.shape[1:])))


ABLATIONS: dict[str, Ablation] = {"resample": resample, "mean": mean, "zero": zero, "optimal": optimal}


@dataclass(frozen=True)
class Replacement:
    """What every writer is replaced by on every prompt of a task.

    ``keeps_prefix``: where clean and corrupted prompts begin alike, the replacement is what the clean run does.
    """

    name: str
    writes: Writes
    keeps_prefix: bool


def replacement_for(model: Transformer, task: Task, ablation: str | Ablation) -> Replacement:
    """Run an ablation, given by name or as a function of one's own (which reports call ``custom:<its name>``)."""
    if isinstance(ablation, str) and ablation not in ABLATIONS:
        hint = nearest(ablation, ABLATIONS)
        raise CircuitError(f"there is no ablation {ablation!r}; there are {', '.join(ABLATIONS)}.{hint}")
    _refuse_visible_padding(model, task)
    ablate = ABLATIONS[ablation] if isinstance(ablation, str) else ablation
    known = next((name for name, function in ABLATIONS.items() if function is ablate), None)
    if ablate is resample and torch.equal(task.prompts.clean, task.prompts.corrupted):
        raise TaskError(
            f"every corrupted prompt of {task.name!r} equals its clean one, so cutting an edge changes nothing. "
            "Choose another corruption, or another ablation (mean, zero)."
        )
    with torch.no_grad():
        writes = ablate(model, task.prompts.to(model.device))
    return Replacement(known or f"custom:{getattr(ablate, '__name__', 'ablation')}", writes, ablate is resample)


def refuse_lonely_means(task: Task, ablation: str | Ablation) -> None:
    """``TaskError`` where a mean would be taken over a single prompt: it is that prompt's own value, and no mean."""
    if ablation not in ("mean", mean):
        return
    members = _layouts(task.prompts).bincount()
    if alone := int((members == 1).sum()):
        raise TaskError(
            f"{alone} of {len(members)} templates of {task.name!r} have a single prompt (of their length), and a mean over one "
            f"prompt is that prompt. {len(task)} prompts are too few: take several a template, or ablation='resample'."
        )


def _layouts(prompts: PromptBatch) -> Int[Tensor, "batch"]:
    """Which prompts have the same template and the same length: only there does a position mean the same."""
    return torch.stack([prompts.groups, prompts.end], dim=1).unique(dim=0, return_inverse=True)[1]


def _refuse_visible_padding(model: Transformer, task: Task) -> None:
    ends = task.prompts.end
    if not model.config.causal and not bool((ends == ends[0]).all()):
        raise TaskError(
            f"the prompts of {task.name!r} end at positions {int(ends.min())} to {int(ends.max())}, and {model.config.name} is "
            "not causal, so the shorter ones would see their padding. Use prompts of one length and one END."
        )


def _in_batches(model: Transformer, tokens: Int[Tensor, "batch pos"], batch_size: int = 256) -> Writes:
    parts = [Writes.during(model, rows) for rows in tokens.split(batch_size)]
    return Writes(
        model.weights,
        torch.cat([part.input for part in parts]),
        tuple(torch.cat(layer) for layer in zip(*(part.z for part in parts), strict=True)),
        tuple(torch.cat(layer) for layer in zip(*(part.mlp_out for part in parts), strict=True)),
        one_pass=True,
    )


def _group_mean(x: Float[Tensor, "batch *rest"], groups: Int[Tensor, "batch"]) -> Float[Tensor, "batch *rest"]:
    _, index, count = groups.unique(return_inverse=True, return_counts=True)
    sums = x.new_zeros((len(count), *x.shape[1:])).index_add(0, index, x)
    return (sums / count.view(-1, *[1] * (x.dim() - 1)).to(x))[index]
