"""The gradient of the metric at every reader, from one plain forward and one backward pass.

No reader's input is split off and no head's output is ever part of the graph: autograd stops at q, k and v as they leave
the projection, and the way back through each port's columns of W_Q, W_K, W_V and through the normalisation is a product and
a closed form (``normalization.pull_back``). That is what makes edge attribution cost two to three forwards instead of
twenty, in a tenth of the memory.

``BackwardRules`` put something else in the place of the derivative: patches that leave every value of the forward pass
as it is, and let another gradient through.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.measure import measure
from circuits.wiring import Wiring
from mechinterp.cache import ActivationCache
from mechinterp.errors import TaskError
from mechinterp.metrics import Metric
from mechinterp.models.normalization import pull_back
from mechinterp.models.trace import Patch
from mechinterp.models.transformer import ResidualStart, Transformer
from mechinterp.nodes import PORTS
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site


@dataclass(frozen=True)
class BackwardRules:
    """``patches`` that keep values and change gradients, the sites that they look up, and what no patch can reach.

    ``hold_scale``: whether a normalisation's scale counts as a constant. The patches say so inside the pass; this says it to
    the closed form, which takes the readers' gradients through the last normalisation on their way. ``soft_cap``: what
    stands for ``soft_cap`` of the logits in models that have one; None is the function itself.
    """

    patches: Mapping[Site | str, Patch] = field(default_factory=dict)
    record: tuple[Site, ...] = ()
    hold_scale: bool = False
    soft_cap: Callable[[Tensor, float], Tensor] | None = None


DERIVATIVE = BackwardRules()


@dataclass(frozen=True)
class ReaderGradients:
    """What one backward pass left, averaged over ``variants`` (steps of integrated gradients) when it is read."""

    model: Transformer
    cache: ActivationCache
    by_site: dict[Site, Tensor]
    metric: Float[Tensor, "variant batch"]
    rules: BackwardRules = DERIVATIVE

    def readers(self) -> Iterator[tuple[slice, Float[Tensor, "reader batch pos d_model"]]]:
        """Gradients at the residual stream that each reader takes, a layer's ports at a time, with their columns."""
        wiring = Wiring.of(self.model.config)
        for layer in range(wiring.n_layers):
            if Site("q", layer) in self.by_site:
                yield wiring.port_slice(layer), self._mean(self._ports(layer))
            if Site("mlp_in", layer) in self.by_site:
                mlp = wiring.mlp_reader(layer)
                yield slice(mlp, mlp + 1), self._mean(self.by_site[Site("mlp_in", layer)][None])
        last = Site("resid_post", wiring.n_layers - 1)
        yield slice(len(wiring.readers) - 1, len(wiring.readers)), self._mean(self.by_site[last][None])

    def _ports(self, layer: int) -> Float[Tensor, "reader row pos d_model"]:
        """W_Q[h] dq_h and so on for all ports as one batched product, then back through the layer's normalisation."""
        weights = self.model.weights
        d_ports = torch.cat([self.by_site[Site(port, layer)] for port in PORTS], dim=2).movedim(2, 0)
        W = weights.ports(layer).transpose(1, 2)
        gradient = torch.bmm(d_ports.flatten(1, 2), W).unflatten(1, d_ports.shape[1:3])
        stream = self.cache["resid_pre", layer].detach()
        norm = weights.blocks[layer].ln1
        return pull_back(stream, gradient, norm, self.model.config, hold_scale=self.rules.hold_scale)

    def _mean(self, gradient: Float[Tensor, "reader row pos d_model"]) -> Float[Tensor, "reader batch pos d_model"]:
        variants = self.metric.shape[0]
        return gradient if variants == 1 else gradient.unflatten(1, (variants, -1)).mean(1)


@torch.enable_grad()
def reader_gradients(
    model: Transformer,
    prompts: PromptBatch,
    metric: Metric,
    start: ResidualStart,
    *,
    variants: int = 1,
    record: Iterable[Site | str] = (),
    rules: BackwardRules = DERIVATIVE,
) -> ReaderGradients:
    """One forward from ``start``, one backward to everything that reads after it.

    Prompts never mix, so the *sum* of their metrics gives each prompt its own gradient. ``record`` is kept in the
    result's cache. Parameters take no gradient. What ``rules`` cut off from the metric has gradient 0.
    """
    targets = _targets(model, start.site)
    streams = [Site("resid_pre", site.layer) for site in targets if site.name == "q"]
    leaf = ResidualStart(start.site, start.value.detach().requires_grad_())
    wanted = [*targets, *streams, *record, *rules.record]
    runs, measured = (model, metric) if rules.soft_cap is None else _capped_in_metric(model, metric, rules.soft_cap)
    values, cache = measure(runs, prompts, measured, start=leaf, variants=variants, record=wanted, patch=rules.patches)
    if not values.requires_grad:
        raise TaskError(
            "the metric has no gradient (it counts right answers, say), so edges cannot be attributed by gradients. Use a "
            "metric of the logits' values, or the method 'exact'."
        )
    found = torch.autograd.grad(values.sum(), [cache[site] for site in targets], materialize_grads=bool(rules.patches))
    return ReaderGradients(model, cache, dict(zip(targets, found, strict=True)), values.detach(), rules)


def _capped_in_metric(
    model: Transformer, metric: Metric, soft_cap: Callable[[Tensor, float], Tensor]
) -> tuple[Transformer, Metric]:
    """The same metric of the same model; only that it is the metric that caps the logits, if anything does."""
    cap = model.config.logit_soft_cap
    if cap is None:
        return model, metric
    uncapped = replace(model.weights, config=replace(model.config, logit_soft_cap=None))
    return replace(model, weights=uncapped), lambda logits, prompts: metric(soft_cap(logits, cap), prompts)


def _targets(model: Transformer, entrance: Site) -> list[Site]:
    config = model.config
    sites = [Site(name, layer) for layer in range(config.n_layers) for name in ("q", "k", "v", "mlp_in")]
    sites = [site for site in sites if config.has_mlp or site.name != "mlp_in"]
    sites.append(Site("resid_post", config.n_layers - 1))
    return [site for site in sites if site.order >= entrance.order]
