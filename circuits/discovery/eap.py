"""Edge attribution patching, plain and with integrated gradients: the effect of every edge to first order.

* ``eap`` (Syed, Rager, Conmy 2023, arXiv:2310.10348): ``-<Δ_u, g_v>`` with ``g_v`` the metric's gradient at reader v on
  the clean run. It is the gradient of exact patching's edge mask, all edges from two forwards and one backward.
* ``eap_ig`` (Hanna, Pezzelle, Belinkov 2024, arXiv:2403.17806): the gradient averaged along a path of runs. With
  ``path="inputs"`` the path is the straight line between corrupted and clean embedding; with ``path="activations"`` one
  module's output at a time is moved from corrupted to clean, for the edges out of that module.

Our sign is the toolkit's: the fall of the metric if the edge is cut, positive helps (the published code has the opposite
for a metric and this one for a loss). Where the published EAP-IG code differs from its formula we follow the formula: it
divides by the batch size twice, and its activations variant adds every reader's gradient to every earlier writer.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.ablation import Ablation
from circuits.discovery.gradients import ReaderGradients, reader_gradients
from circuits.discovery.walk import assemble, batches, replacements
from circuits.scores import Scores
from circuits.wiring import Wiring
from circuits.writes import Writes, sites
from mechinterp.errors import CircuitError, nearest
from mechinterp.metrics import Metric
from mechinterp.models.transformer import ResidualStart, Transformer
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site
from mechinterp.tasks.base import Task

_ROWS_AT_ONCE = 4096  # tokens of one forward and backward pass; steps are stacked up to this


def eap(
    model: Transformer,
    task: Task,
    *,
    ablation: str | Ablation = "resample",
    batch_size: int | None = None,
    keep_prompts: bool = False,
    progress: bool = False,
) -> Scores:
    """First-order effect of every edge, in units of the metric. Two forwards and one backward for all of them.

    Blind where softmax or activations saturate, and identically zero for a divergence from the clean run.
    """

    def score(prompts: PromptBatch, replaced: Writes) -> Iterator[Tensor]:
        start = ResidualStart(Site("resid_pre", 0), model.embed(prompts.clean))
        keep = [site for site in sites(model) if "embed" not in site]
        gradients = reader_gradients(model, prompts, task.metric, start, record=keep)
        delta = (replaced - _writes(model, start.value, gradients)).map(torch.detach)
        yield _contract(delta, gradients, slice(0, None))

    return _over_batches(model, task, "eap", score, ablation, batch_size, keep_prompts, progress, {})


def eap_ig(
    model: Transformer,
    task: Task,
    *,
    steps: int = 5,
    path: str = "inputs",
    grid: str = "midpoint",
    ablation: str | Ablation = "resample",
    batch_size: int | None = None,
    keep_prompts: bool = False,
    progress: bool = False,
) -> Scores:
    """Integrated-gradient effect of every edge, in units of the metric.

    ``grid``: where the ``steps`` gradients are taken, ``(k + 1/2)/n`` (default), ``k/n`` or ``(k + 1)/n``; 0 is the
    corrupted run. The published code uses "left" for inputs and "right" for activations. Cost: two forwards and
    ``steps`` forwards and backwards; ``path="activations"`` does that once for every module.
    """
    alphas = _grid(steps, grid)
    if path not in ("inputs", "activations"):
        raise CircuitError(f"the path of integrated gradients is 'inputs' or 'activations', not {path!r}.{nearest(path, ['inputs', 'activations'])}")

    def score(prompts: PromptBatch, replaced: Writes) -> Iterator[Tensor]:
        with torch.no_grad():
            wanted = [*sites(model), *(("resid_mid",) if model.config.has_mlp and not model.config.parallel else ()), "resid_post"]
            _, cache = model.run(prompts.clean, record=wanted, logits_at="last")
            delta = replaced - Writes.of(cache, model.weights)
        for module in _modules(delta, cache, only_input=path == "inputs"):
            for gradients in _along(model, prompts, task.metric, module, alphas):
                share = gradients.metric.shape[0] / len(alphas)
                yield share * _contract(delta, gradients, slice(0, None) if path == "inputs" else module.writers)

    name = "eap-ig" if path == "inputs" else "eap-ig-activations"
    settings = {"steps": steps, "path": path, "grid": grid}
    return _over_batches(model, task, name, score, ablation, batch_size, keep_prompts, progress, settings)


class _Module:
    """A place where the path of integrated gradients runs: the clean stream, its change, and who writes there."""

    def __init__(self, site: Site, stream: Tensor, change: Tensor, writers: slice):
        self.site, self.stream, self.change, self.writers = site, stream, change, writers


def _modules(delta: Writes, cache, *, only_input: bool) -> Iterator[_Module]:
    clean = cache["embed"] + cache["pos_embed"]
    yield _Module(Site("resid_pre", 0), clean, delta.input, slice(0, 1))
    if only_input:
        return
    heads, after = delta.weights.config.n_heads, 1
    for layer, z in enumerate(delta.z):
        site = Site("resid_mid" if Site("resid_mid", layer) in cache else "resid_post", layer)
        change = z.flatten(2) @ delta.weights.blocks[layer].W_O
        yield _Module(site, cache[site], change, slice(after, after + heads))
        after += heads
        if delta.mlp_out:
            site = Site("resid_post", layer)
            yield _Module(site, cache[site], delta.mlp_out[layer], slice(after, after + 1))
            after += 1


def _along(model, prompts: PromptBatch, metric: Metric, module: _Module, alphas: list[float]) -> Iterator[ReaderGradients]:
    """Gradients at the points of the path, stacked as far as a pass should be large."""
    at_once = max(1, _ROWS_AT_ONCE // prompts.clean.numel())
    for first in range(0, len(alphas), at_once):
        some = alphas[first : first + at_once]
        value = torch.cat([module.stream + (1 - alpha) * module.change for alpha in some])
        yield reader_gradients(model, prompts, metric, ResidualStart(module.site, value), variants=len(some))


@torch.no_grad()
def _contract(delta: Writes, gradients: ReaderGradients, writers: slice) -> Float[Tensor, "batch writer reader"]:
    """``-<Δ_u, g_v>`` for all pairs, one batched product a layer; per prompt, summed over positions."""
    wiring = Wiring.of(delta.weights.config)
    n_prompts = delta.input.shape[0]
    grid = delta.input.new_zeros((n_prompts, len(wiring.writers), len(wiring.readers)))
    wrote = delta.first(len(wiring.writers)).flatten(2).transpose(0, 1)
    for readers, gradient in gradients.readers():
        stop = min(int(wiring.writers_before[readers.start]), writers.stop or len(wiring.writers))
        mine = slice(writers.start, stop)
        read = gradient.flatten(2).transpose(0, 1)
        grid[:, mine, readers] = torch.bmm(wrote[:, mine], read.transpose(1, 2)).neg_()
    return grid


def _writes(model: Transformer, embedded: Tensor, gradients: ReaderGradients) -> Writes:
    layers = range(model.config.n_layers)
    mlp_out = tuple(gradients.cache["mlp_out", layer] for layer in layers) if model.config.has_mlp else ()
    return Writes(model.weights, embedded, tuple(gradients.cache["z", layer] for layer in layers), mlp_out)


def _over_batches(model, task: Task, name, score, ablation, batch_size, keep_prompts, progress, settings) -> Scores:
    wiring = Wiring.of(model.config)
    ablation_name, replacement = replacements(model, task, ablation)
    rows: list[np.ndarray] = []
    with tqdm(total=len(task), desc=name, unit="prompt", disable=not progress) as bar:
        for prompts, replaced in batches(model, task, replacement, batch_size):
            grid = sum(score(prompts.to(model.device), replaced))
            rows.append(wiring.vector(grid.cpu().numpy()))
            bar.update(len(prompts))
    return assemble(model, task, name, np.concatenate(rows), keep_prompts, {"ablation": ablation_name, **settings})


def _grid(steps: int, grid: str) -> list[float]:
    offsets = {"midpoint": 0.5, "left": 0.0, "right": 1.0}
    if steps < 1:
        raise CircuitError(f"integrated gradients need at least one step, not {steps}. Five are usual.")
    if grid not in offsets:
        raise CircuitError(f"the grid is one of {', '.join(offsets)}, not {grid!r}.{nearest(grid, offsets)}")
    return [(k + offsets[grid]) / steps for k in range(steps)]
