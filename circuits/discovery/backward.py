"""One clean run and the gradient of the metric wherever it is asked for: plain, along a path, or with layers dropped.

Attribution of whole parts (writers, ports, neurons) needs nothing else; edges, whose readers share a residual stream, have
``gradients.py``. Every gradient has a leading axis ``run``: one for the clean run (or the mean along a path), or one for
each layer that GradDrop leaves out.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery.contraction import span_shares
from circuits.measure import measure
from circuits.writes import Writes
from mechinterp.cache import ActivationCache
from mechinterp.errors import CircuitError, TaskError
from mechinterp.metrics import Metric
from mechinterp.models.transformer import ResidualStart, Transformer
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site, resolve

Gradients = Mapping[Site, Float[Tensor, "run batch pos *axes"]]
INPUT = Site("resid_pre", 0)  # where the input writes
_TOKENS_AT_ONCE = 2048  # of one pass, and of all its runs together


@dataclass(frozen=True)
class Backward:
    """The clean run of a batch (``cache``, and what its parts wrote), and the metric's ``gradients``."""

    model: Transformer
    cache: ActivationCache
    writes: Writes
    gradients: Gradients

    @classmethod
    @torch.enable_grad()
    def of(
        cls,
        model: Transformer,
        prompts: PromptBatch,
        metric: Metric,
        replaced_input: Float[Tensor, "batch pos d_model"],
        sites: Iterable[str],
        *,
        steps: int | None = None,
        grad_drop: bool = False,
        record: Iterable[str] = (),
    ) -> "Backward":
        """Gradients at ``INPUT`` and at ``sites`` of every layer. ``record`` is kept in the cache besides.

        ``steps``: their mean at as many midpoints between replaced and clean input. Those runs are stacked behind the
        clean one, so that one pass gives both.
        """
        embedded, targets = model.embed(prompts.clean), [INPUT, *resolve(model.config, sites)]
        n = steps or 0
        away = [0.0, *((k + 0.5) / n for k in range(n))]
        stacked = torch.cat([embedded + share * (replaced_input - embedded) for share in away])
        start = ResidualStart(INPUT, stacked.detach().requires_grad_())
        keep = [*targets, *written(model), *record, *(("resid_pre", "resid_post") if grad_drop else ())]
        values, cache = measure(model, prompts, metric, start=start, variants=len(away), record=keep)
        if not values.requires_grad:
            raise TaskError(
                "the metric has no gradient (it counts right answers, say), so nothing can be attributed by gradients. Use a "
                "metric of the logits' values, or the method 'patching'."
            )
        if grad_drop:
            gradients = _dropped(model, values, cache, targets)
        else:
            found = torch.autograd.grad(values.sum(), [cache[site] for site in targets])
            gradients = {site: _mean(at, len(away)) for site, at in zip(targets, found, strict=True)}
        clean = {site: value[: len(prompts)].detach() for site, value in cache.items()}
        recorded = ActivationCache(clean, model.weights)
        return cls(model, recorded, Writes.of(recorded, model.weights, embedded), gradients)


def written(model: Transformer) -> tuple[str, ...]:
    """The sites where the parts of a layer write."""
    return (model.config.write_site, *["mlp_out"] * model.config.has_mlp)


def in_parts(prompts: PromptBatch, replaced: Writes, runs: int, bar: tqdm) -> Iterator[tuple[PromptBatch, Writes]]:
    """A batch in as few parts as keep ``runs`` gradients of each in memory, counted on ``bar`` as they are done."""
    at_once = max(1, _TOKENS_AT_ONCE // (runs * prompts.clean.shape[1]))
    for first in range(0, len(prompts), at_once):
        rows = slice(first, first + at_once)
        yield prompts[rows], replaced[rows]
        bar.update(len(prompts.end[rows]))


def by_span(falls: Float[Tensor, "prompt pos item"], prompts: PromptBatch) -> Float[Tensor, "prompt span item"]:
    """Summed over the positions of each of the task's spans."""
    return torch.einsum("bps,bpi->bsi", span_shares(prompts).to(falls), falls)


def check_steps(steps: int | None) -> None:
    if steps is not None and steps < 1:
        raise CircuitError(f"integrated gradients need at least one step, not {steps}. Five are usual; None for none.")


def _mean(gradient: Float[Tensor, "row pos *axes"], variants: int) -> Float[Tensor, "1 batch pos *axes"]:
    """The mean along the path, or what there is without one."""
    runs = gradient.unflatten(0, (variants, -1))
    return runs if variants == 1 else runs[1:].mean(0, keepdim=True)


def _dropped(model: Transformer, values: Tensor, cache: ActivationCache, targets: list[Site]) -> Gradients:
    """GradDrop: for every layer, the gradients that do not pass through what it writes.

    Behind the layer they are the plain ones and inside it there are none. Before it they are what the gradient of the
    stream *behind* the layer gives if it is handed to the stream *before* it: one backward through those layers alone.
    """
    layers = range(model.config.n_layers)
    behind = [Site("resid_post", layer) for layer in layers]
    found = torch.autograd.grad(values.sum(), [cache[site] for site in (*targets, *behind)], retain_graph=True)
    plain = dict(zip((*targets, *behind), found, strict=True))
    runs: dict[Site, list[Tensor]] = {site: [] for site in targets}
    for layer in layers:
        before = [site for site in targets if site == INPUT or (site.layer or 0) < layer]
        through = torch.autograd.grad(
            cache["resid_pre", layer],
            [cache[site] for site in before],
            grad_outputs=plain[Site("resid_post", layer)],
            retain_graph=layer < layers[-1],
        )
        kept = dict(zip(before, through, strict=True))
        for site, of_runs in runs.items():
            of_runs.append(kept[site] if site in kept else plain[site] * (site.layer != layer))
    return {site: torch.stack(of_runs) for site, of_runs in runs.items()}
