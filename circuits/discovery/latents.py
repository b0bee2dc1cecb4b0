"""Attribution of an autoencoder's latents, and of what it leaves over: the nodes of sparse feature circuits.

Marks et al. 2024 (arXiv:2403.19647). At every layer that has an autoencoder, the heads' ``z`` is ``latents
W_dec + b_dec + error``, and to first order losing latent i costs

    -(f_i' - f_i) dm/df_i = -(f_i' - f_i) dm/dz . W_dec[i],             losing the error -(error' - error) . dm/dz,

summed over positions; ' is what the ablation puts there. With its error the autoencoder changes nothing about the run, so
one backward pass through the model as it is gives ``dm/dz`` of all layers. That is also what the paper's code takes: there
the gradient passes through autoencoders as through an identity. ``through="latents"`` makes errors leaves instead: the
gradient passes a later autoencoder by way of its latents alone, and what reaches the metric by its error is not counted.

Latents and error of a layer add up to the attribution of its heads. (Not under zero ablation, where ``b_dec`` stays; and
where a model normalises what heads write, to the attribution of what they gather: heads are scored there by their share of
what is written, with the scale of the run that it is from, and a latent moves the scale.)
``exact_latents`` patches chosen ones, to check the ranking where it matters. Signs are ours: positive helps.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.ablation import Ablation, Replacement, replacement_for
from circuits.discovery.backward import INPUT, by_span, check_steps, in_parts
from circuits.discovery.suffix import CleanRun
from circuits.discovery.walk import BatchScore, Walk, WalkSettings
from circuits.latent_layers import LayerLatents, Parts, Z, facts_of, layers_of, nodes_among
from circuits.latent_replacement import replacer, rows_of
from circuits.measure import measure
from circuits.scores import Scores
from circuits.writes import Writes, heads_sum
from mechinterp.cache import ActivationCache
from mechinterp.errors import CircuitError, TaskError
from mechinterp.metrics import Metric
from mechinterp.models.trace import Patch
from mechinterp.models.transformer import ResidualStart, Transformer
from mechinterp.nodes import Node
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site
from mechinterp.tasks.base import Task
from saes.base import SparseAutoencoder
from saes.splice import spliced

THROUGH = ("model", "latents")
_WIDER = 4  # a latent tensor of so many times the residual stream's width counts as another run


def latents(
    model: Transformer,
    task: Task,
    autoencoder: SparseAutoencoder,
    *,
    steps: int | None = None,
    through: str = "model",
    ablation: str | Ablation = "resample",
    **walk: Unpack[WalkSettings],
) -> Scores:
    """First-order effect of every latent and of every layer's error, in units of the metric; positive: losing it hurts.

    Names are ``f5.1234`` and ``f5.error``; those of autoencoders on single heads are numbered ``head * d_sae + latent``.
    ``steps``: instead of the clean run's gradient the mean of as many (five to ten are usual), for each layer apart at
    midpoints of the straight line from its clean to its replaced latents and error, while all layers before it stay clean
    (the paper's integrated gradients, which take left ends). A layer's scores then add up to what patching its whole
    ``z`` does, the better the more steps.

    ``ablation`` is "resample", "mean" or "zero". Cost: three forwards (one more where a model normalises what heads write)
    and one backward; with ``steps``, for each layer as many forwards and backwards through the layers after it; and the
    autoencoder, twice. ``discover(model, task, sparse_features(autoencoder))`` does the same.
    """
    check_steps(steps)
    layers = layers_of(model, autoencoder)
    name, settings = "latents-ig" if steps else "latents", {"steps": steps, "through": through}
    settings |= facts_of(layers, autoencoder)
    way = Walk(model, task, name, ablation, settings=settings, items="latent", splits_positions=True, **walk)
    runs = runs_of(model, layers, steps)

    def score(replacement: Replacement) -> BatchScore:
        attribute = Attribution(model, task.metric, layers, autoencoder, through, steps)
        replace = replacer(model, task, replacement, layers)

        def score_some(prompts: PromptBatch, replaced: Writes) -> Float[Tensor, "prompt *span item"]:
            with torch.no_grad():
                parts = {at.layer: replace(at, prompts, replaced) for at in layers} if steps else {}
            cache, gradients = attribute(prompts, parts)
            falls = []
            for at in layers:
                new = parts[at.layer] if steps else replace(at, prompts, replaced)
                at_position = _falls(at, at.split(cache[at.site]), new, gradients[at.layer])
                falls.append(by_span(at_position, prompts) if way.keep_positions else at_position.sum(1))
            return torch.cat(falls, -1)

        return lambda prompts, replaced, bar: torch.cat([score_some(*some) for some in in_parts(prompts, replaced, runs, bar)])

    return way.scores(score)


def sparse_features(autoencoder: SparseAutoencoder, **settings: Any) -> Callable[..., Scores]:
    """``latents`` of this autoencoder as a method: ``discover(model, task, sparse_features(autoencoder, steps=5))``."""
    return partial(latents, autoencoder=autoencoder, **settings)


@torch.no_grad()
def exact_latents(
    model: Transformer,
    task: Task,
    autoencoder: SparseAutoencoder,
    chosen: Iterable[Node | str],
    *,
    ablation: str | Ablation = "resample",
) -> dict[Node, float]:
    """The measured effect of losing each of the ``chosen`` latents and errors, in units of the metric; positive: it hurts.

    Names are those of ``Scores.strongest``: ``"f5.1234"``, ``"f5.error"``. Cost: for each one pass through the layers after it.
    """
    layers = layers_of(model, autoencoder)
    nodes = nodes_among(layers, list(chosen))
    replacement = replacement_for(model, task, ablation)
    replace, falls = replacer(model, task, replacement, layers), dict.fromkeys(nodes, 0.0)
    for rows in rows_of(task):
        prompts, writes = task.prompts[rows].to(model.device), replacement.writes[rows]
        run = CleanRun.record(model, prompts, task.metric, writes, shares_prefix=replacement.keeps_prefix)
        for at in layers:
            (clean, error), (new, new_error) = at.split(run.cache[at.site]), replace(at, prompts, writes)
            for node in (node for node in nodes if node.layer == at.layer):
                some = [] if node.index is None else [node.index]
                change = (new - clean)[..., some] @ at.rows(some) if some else new_error - error
                written = _write_change(model, at, run.cache[at.site], change.to(model.dtype))[:, run.first :]
                fall = run.falls(run.after_attention(at.layer), at.layer, written[None])
                falls[node] += float(fall.sum()) / len(task)
    return falls


def _write_change(
    model: Transformer, at: LayerLatents, z: Z, change: Float[Tensor, "batch pos d_z"]
) -> Float[Tensor, "batch pos d_model"]:
    """By how much a layer's heads write something else if what they gather changes."""
    change = change.unflatten(-1, z.shape[2:])
    if model.config.has_norms_after:
        change = model.written(at.layer, z + change) - model.written(at.layer, z)
    return heads_sum(model.weights, at.layer, change)


class Attribution:
    """The gradients of the metric at the ``z`` of each layer that has an autoencoder."""

    def __init__(
        self,
        model: Transformer,
        metric: Metric,
        layers: tuple[LayerLatents, ...],
        autoencoder: SparseAutoencoder,
        through: str,
        steps: int | None,
    ):
        if through not in THROUGH:
            raise CircuitError(f"gradients go through one of {', '.join(map(repr, THROUGH))}, not through={through!r}.")
        self.model, self.metric, self.layers, self.steps = model, metric, layers, steps
        here = autoencoder.to(device=model.device)
        splice = spliced(here, with_error=True) if through == "latents" else {}  # it detaches the error
        self.patches: dict[Site | str, Patch] = {at.site: splice[at.site] for at in layers if splice}

    @torch.enable_grad()
    def __call__(self, prompts: PromptBatch, replaced: Mapping[int, Parts]) -> tuple[ActivationCache, dict[int, Z]]:
        """The clean run's ``z`` and the gradients there; with ``steps`` their means on the way to what is ``replaced``."""
        start = ResidualStart(INPUT, self.model.embed(prompts.clean).detach().requires_grad_())
        record = [at.site for at in self.layers] + [Site("resid_pre", at.layer) for at in self.layers if self.steps]
        values, cache = measure(self.model, prompts, self.metric, start=start, patch=self.patches, record=record)
        if not values.requires_grad:
            raise TaskError(
                "the metric has no gradient (it counts right answers, say), so nothing can be attributed by gradients. Use a "
                "metric of the logits' values, or exact_latents for some latents."
            )
        if self.steps:
            clean = ActivationCache({site: value.detach() for site, value in cache.items()}, self.model.weights)
            return clean, {at.layer: self._along(at, prompts, clean, at.join(*replaced[at.layer])) for at in self.layers}
        found = torch.autograd.grad(values.sum(), [cache[at.site] for at in self.layers])
        clean = ActivationCache({at.site: cache[at.site].detach() for at in self.layers}, self.model.weights)
        return clean, {at.layer: gradient for at, gradient in zip(self.layers, found, strict=True)}

    def _along(self, at: LayerLatents, prompts: PromptBatch, cache: ActivationCache, target: Z) -> Z:
        """The mean gradient at the midpoints of the way from clean to replaced: a line in latents and error is one in ``z``."""
        n, z, before = self.steps or 1, cache[at.site], Site("resid_pre", at.layer)
        way = torch.cat([torch.lerp(z, target.to(z), (k + 0.5) / n) for k in range(n)]).requires_grad_()
        later = {of.site for of in self.layers if of.layer > at.layer}
        patch: dict[Site | str, Patch] = {site: splice for site, splice in self.patches.items() if site in later}
        patch[at.site] = lambda *_: way
        start = ResidualStart(before, cache[before].repeat(n, 1, 1))
        values, _ = measure(self.model, prompts, self.metric, start=start, patch=patch, variants=n)
        return torch.autograd.grad(values.sum(), way)[0].unflatten(0, (n, -1)).mean(0)


class Segments:
    """A clean run cut at every ``z``: each layer reads what the layers before handed on as if it were given."""

    @torch.enable_grad()
    def __init__(self, model: Transformer, metric: Metric, layers: tuple[LayerLatents, ...], prompts: PromptBatch):
        self.read: dict[int, Z] = {}
        self.written: dict[int, Z] = {}
        self.embedded = model.embed(prompts.clean).detach().requires_grad_()
        start = ResidualStart(INPUT, self.embedded)
        patch: dict[Site | str, Patch] = {at.site: self._hand_on(at.layer) for at in layers}
        self.metric = measure(model, prompts, metric, start=start, patch=patch)[0].sum()

    def _hand_on(self, layer: int) -> Patch:
        def patch(z: Tensor, _: ActivationCache) -> Tensor:
            self.read[layer], self.written[layer] = z, z.detach().requires_grad_()
            return self.written[layer]

        return patch


def runs_of(model: Transformer, layers: tuple[LayerLatents, ...], steps: int | None) -> int:
    """How many ordinary runs' memory a prompt takes: latents are wide."""
    return max(1 + (steps or 0), max(at.width for at in layers) // (_WIDER * model.config.d_model))


@torch.no_grad()
def _falls(at: LayerLatents, clean: Parts, replaced: Parts, gradient: Z) -> Float[Tensor, "batch pos item"]:
    """``(f - f') dm/df`` of each latent of a layer, then of its error."""
    of_latents = (clean[0] - replaced[0]) * at.pull_back(gradient)
    of_error = ((clean[1] - replaced[1]) * gradient.flatten(2)).sum(-1, keepdim=True)
    return torch.cat([of_latents, of_error], -1)
