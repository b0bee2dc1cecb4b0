"""A model's metric on prompts: plain, resumed from a patched residual stream, or for many variants at once."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.cache import ActivationCache
from mechinterp.errors import TaskError
from mechinterp.metrics import READS_CANDIDATES_ONLY, Metric
from mechinterp.models.trace import Patch
from mechinterp.models.transformer import ResidualStart, Transformer
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site


def measure(
    model: Transformer,
    prompts: PromptBatch,
    metric: Metric,
    *,
    tokens: Int[Tensor, "row pos"] | None = None,
    start: ResidualStart | None = None,
    logits_at: Int[Tensor, "row"] | None = None,
    variants: int = 1,
    record: Iterable[Site | str] = (),
    patch: Mapping[Site | str, Patch] | None = None,
) -> tuple[Float[Tensor, "variant batch"], ActivationCache]:
    """The metric of each prompt, once per variant, and what the pass recorded.

    A pass's rows are variant-major: all prompts of variant 0 first. ``logits_at`` is each prompt's END unless the rows
    hold other positions. Where the metric reads its candidates' logits alone, nothing else is unembedded.
    """
    if int(prompts.candidates.max()) >= model.config.d_vocab:
        raise TaskError(
            f"an answer or foil is token {int(prompts.candidates.max())}, and {model.config.name} knows "
            f"{model.config.d_vocab}. Were they made with another model's tokenizer?"
        )
    rows = prompts.to(model.device)
    rows = rows if variants == 1 else rows[torch.arange(len(prompts), device=model.device).repeat(variants)]
    at = rows.end if logits_at is None else logits_at
    only = columns_read(metric, rows)
    logits, cache = model.run(tokens, start=start, record=record, patch=patch, logits_at=at, logits_of=only)
    values = apply(metric, logits, rows if only is None else _renumbered(rows))
    return values.unflatten(0, (variants, len(prompts))), cache


def columns_read(metric: Metric, prompts: PromptBatch) -> Int[Tensor, "batch candidate"] | None:
    """The tokens whose logits a metric looks at; None for all."""
    return prompts.candidates if metric in READS_CANDIDATES_ONLY else None


def metric_of(
    metric: Metric, logits: Float[Tensor, "variant batch token"], prompts: PromptBatch
) -> Float[Tensor, "variant batch"]:
    """The metric of logits that were made elsewhere, of the tokens that ``columns_read`` names."""
    rows = prompts[torch.arange(len(prompts), device=logits.device).repeat(len(logits))]
    values = apply(metric, logits.flatten(0, 1), rows if columns_read(metric, prompts) is None else _renumbered(rows))
    return values.unflatten(0, (len(logits), len(prompts)))


def apply(metric: Metric, logits: Float[Tensor, "row token"], rows: PromptBatch) -> Float[Tensor, "row"]:
    """One number a prompt, or ``TaskError`` for a metric that gives something else."""
    values = metric(logits.to(torch.promote_types(logits.dtype, torch.float32)), rows)
    if not isinstance(values, Tensor) or values.shape != (len(rows),):
        given = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise TaskError(
            f"the metric must give one number a prompt, {len(rows)} here, and gave {given}. Leave averaging to the reports: "
            "drop .mean() or .sum() over prompts."
        )
    return values


def _renumbered(rows: PromptBatch) -> PromptBatch:
    """The same prompts for logits of their candidates alone: candidate i stands in column i."""
    columns = torch.arange(rows.candidates.shape[1], device=rows.candidates.device)
    return replace(rows, candidates=columns.expand_as(rows.candidates).contiguous())
