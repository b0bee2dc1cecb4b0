"""Edge attribution patching, plain and with integrated gradients: the effect of every edge to first order.

* ``eap`` (Syed, Rager, Conmy 2023, arXiv:2310.10348): ``-<Δ_u, g_v>`` with ``g_v`` the metric's gradient at reader v on
  the clean run. It is the gradient of exact patching's edge mask, all edges from two forwards and one backward.
* ``eap_ig`` (Hanna, Pezzelle, Belinkov 2024, arXiv:2403.17806): the gradient averaged along a path of runs. With
  ``path="inputs"`` the path is the straight line between corrupted and clean embedding; with ``path="activations"`` one
  module's output at a time is moved from corrupted to clean, for the edges out of that module.
* ``clean_corrupted`` (the same repository): the mean of the gradients at the two ends of that line.

Our sign is the toolkit's: the fall of the metric if the edge is cut, positive helps (the published code has the opposite
for a metric and this one for a loss). Where the published EAP-IG code differs from its formula we follow the formula: it
divides by the batch size twice, and its activations variant adds every reader's gradient to every earlier writer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.ablation import Ablation
from circuits.discovery.contraction import by_prompt, contract, edges_of, span_shares
from circuits.discovery.gradients import DERIVATIVE, BackwardRules, ReaderGradients, reader_gradients
from circuits.discovery.walk import Walk, WalkSettings
from circuits.scores import Scores
from circuits.wiring import Wiring
from circuits.writes import Writes, heads_sum, sites
from mechinterp.cache import ActivationCache
from mechinterp.errors import CircuitError, nearest
from mechinterp.metrics import Metric
from mechinterp.models.transformer import ResidualStart, Transformer
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site
from mechinterp.tasks.base import Task

_ROWS_AT_ONCE = 4096  # tokens of one forward and backward pass; steps are stacked up to this
_OFFSETS = {"midpoint": 0.5, "left": 0.0, "right": 1.0}
_PATHS = {"inputs": "eap-ig", "activations": "eap-ig-activations"}


def eap(model: Transformer, task: Task, *, ablation: str | Ablation = "resample", **walk: Unpack[WalkSettings]) -> Scores:
    """First-order effect of every edge, in units of the metric. Two forwards and one backward for all of them.

    Blind where softmax or activations saturate, and identically zero for a divergence from the clean run.
    """
    return attributed(model, task, "eap", ablation, {}, walk)


def attributed(
    model: Transformer,
    task: Task,
    method: str,
    ablation: str | Ablation,
    settings: dict[str, Any],
    walk: WalkSettings,
    rules: BackwardRules = DERIVATIVE,
) -> Scores:
    """``-<Δ_u, g_v>`` with the gradient on the clean run, or with what other ``rules`` of the way back put in its place."""
    way = Walk(model, task, method, ablation, settings=settings, splits_positions=True, **walk)
    keep = [site for site in sites(model) if "embed" not in site]

    def score(prompts: PromptBatch, replaced: Writes, bar: tqdm) -> Float[Tensor, "prompt *span edge"]:
        start = ResidualStart(Site("resid_pre", 0), model.embed(prompts.clean))
        gradients = reader_gradients(model, prompts, task.metric, start, record=keep, rules=rules)
        delta = (replaced - Writes.of(gradients.cache, model.weights, start.value)).map(torch.detach)
        bar.update(len(prompts))
        spans = span_shares(prompts) if way.keep_positions else None
        return edges_of(Wiring.of(model.config), contract(by_prompt(delta), gradients, spans=spans))

    return way.scores(lambda _: score)


def eap_ig(
    model: Transformer,
    task: Task,
    *,
    steps: int = 5,
    path: str = "inputs",
    grid: str = "midpoint",
    ablation: str | Ablation = "resample",
    **walk: Unpack[WalkSettings],
) -> Scores:
    """Integrated-gradient effect of every edge, in units of the metric.

    ``grid``: where the ``steps`` gradients are taken, ``(k + 1/2)/n`` (default), ``k/n`` or ``(k + 1)/n``; 0 is the
    corrupted run. The published code uses "left" for inputs and "right" for activations. Cost: two forwards and
    ``steps`` forwards and backwards; ``path="activations"`` does that once for every module.
    """
    alphas = _alphas(steps, grid)
    if path not in _PATHS:
        raise CircuitError(f"the path is 'inputs' or 'activations', not {path!r}.{nearest(path, _PATHS)}")
    settings = {"steps": steps, "path": path, "grid": grid}
    return _averaged(model, task, _PATHS[path], alphas, ablation, settings, walk, only_input=path == "inputs")


def clean_corrupted(
    model: Transformer, task: Task, *, ablation: str | Ablation = "resample", **walk: Unpack[WalkSettings]
) -> Scores:
    """First-order effect of every edge, averaged over the clean and the corrupted run: cheap, and blind in between.

    Two forwards, and one forward and backward from either end.
    """
    return _averaged(model, task, "clean-corrupted", [0.0, 1.0], ablation, {}, walk, only_input=True)


def _averaged(
    model: Transformer,
    task: Task,
    method: str,
    alphas: Sequence[float],
    ablation: str | Ablation,
    settings: dict[str, Any],
    walk: WalkSettings,
    *,
    only_input: bool,
) -> Scores:
    """Differences times the gradient averaged over the points ``alphas`` of the path."""
    way = Walk(model, task, method, ablation, settings=settings, splits_positions=True, **walk)

    def score(prompts: PromptBatch, replaced: Writes, bar: tqdm) -> Float[Tensor, "prompt *span edge"]:
        cache = _clean(model, prompts)
        delta = replaced - Writes.of(cache, model.weights)
        wrote, found = by_prompt(delta), torch.zeros(())
        spans = span_shares(prompts) if way.keep_positions else None
        for module in _modules(delta, cache, only_input=only_input):
            writers = slice(0, None) if only_input else module.writers
            total = torch.zeros(())
            for gradients in _along(model, prompts, task.metric, module, alphas):
                total = total + len(gradients.metric) / len(alphas) * contract(wrote, gradients, writers, spans)
            found = total if only_input else torch.cat([found, total], -2) if found.dim() else total
        bar.update(len(prompts))
        return edges_of(Wiring.of(model.config), found)

    return way.scores(lambda _: score)


@dataclass(frozen=True)
class _Module:
    """A place where the path of integrated gradients runs: the clean stream, its change, and who writes there."""

    site: Site
    stream: Tensor
    change: Tensor
    writers: slice


def _modules(delta: Writes, cache: ActivationCache, *, only_input: bool) -> Iterator[_Module]:
    yield _Module(Site("resid_pre", 0), cache.embedded, delta.input, slice(0, 1))
    if only_input:
        return
    heads, first = delta.weights.config.n_heads, 1
    for layer, z in enumerate(delta.z):
        site = Site("resid_mid" if Site("resid_mid", layer) in cache else "resid_post", layer)
        yield _Module(site, cache[site], heads_sum(delta.weights, layer, z), slice(first, first + heads))
        first += heads
        if delta.mlp_out:
            site = Site("resid_post", layer)
            yield _Module(site, cache[site], delta.mlp_out[layer], slice(first, first + 1))
            first += 1


def _along(model, prompts: PromptBatch, metric: Metric, module: _Module, alphas: Sequence[float]) -> Iterator[ReaderGradients]:
    """Gradients at the points of the path, stacked as far as a pass should be large."""
    at_once = max(1, _ROWS_AT_ONCE // prompts.clean.numel())
    for first in range(0, len(alphas), at_once):
        some = alphas[first : first + at_once]
        value = torch.cat([module.stream + (1 - alpha) * module.change for alpha in some])
        yield reader_gradients(model, prompts, metric, ResidualStart(module.site, value), variants=len(some))


@torch.no_grad()
def _clean(model: Transformer, prompts: PromptBatch) -> ActivationCache:
    """The clean run's writes, and the stream wherever a path can enter it."""
    enters = ["resid_mid"] if model.config.has_mlp and not model.config.parallel else []
    wanted = [*sites(model), *enters, "resid_post"]
    return model.run(prompts.clean, record=wanted, logits_at="last", logits_of=prompts.clean[:, :0])[1]


def _alphas(steps: int, grid: str) -> list[float]:
    if steps < 1:
        raise CircuitError(f"integrated gradients need at least one step, not {steps}. Five are usual.")
    if grid not in _OFFSETS:
        raise CircuitError(f"the grid is one of {', '.join(_OFFSETS)}, not {grid!r}.{nearest(grid, _OFFSETS)}")
    return [(k + _OFFSETS[grid]) / steps for k in range(steps)]
