"""Relevance patching: attribution patching whose way back follows layer-wise relevance propagation.

RelP (Jafari, Eberle, Khakzar, Nanda 2025, arXiv:2508.21258) keeps ``-<Δ_u, g_v>`` and replaces the gradient
``g_v``. Each rule holds one factor of a product constant, so that the way back is linear where the model bends:

* *LayerNorm*: ``(x - mean) / σ.detach()``. The derivative also moves σ, which takes ``x`` itself out of every gradient. So
  for RMSNorm, wherever a model has one: before its parts, after them, and over queries and keys.
* *activation*: ``x * (act(x) / x).detach()``, the slope of the chord from 0 in the place of the tangent's. So for the soft
  cap of logits. (That of attention scores is part of the attention, and has its derivative.)
* *half*: a gated product ``p/2 + (p/2).detach()``. Both factors carry relevance, and half each counts it once.
* *attention* (off, as in the paper): ``pattern.detach()``. Every edge into a query or a key is then exactly 0.

``act(x) / x`` lies between 0 and 1 for every activation of the engine, so only 0/0 needs a word: there we take the limit,
1/2 for GELU and SiLU, and for ReLU the 0 that its derivative is given there. (The published code adds 1e-6 to ``x``.)
With *all* rules, no biases and zero ablation relevance is conserved: what flows into a head or an MLP flows out of it,
and what leaves the input is the logit difference.

Rules belong to the call. In the published code the activation rule is chosen when the model is built, and asking for it
later, as its README does, leaves it off without a word.
"""

from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.ablation import Ablation
from circuits.discovery.eap import attributed
from circuits.discovery.gradients import BackwardRules
from circuits.discovery.walk import WalkSettings
from circuits.scores import Scores
from mechinterp.cache import ActivationCache
from mechinterp.decomposition.rules import SLOPE_AT_ZERO
from mechinterp.models.attention import soft_cap
from mechinterp.models.rotary import rotate
from mechinterp.models.trace import Patch
from mechinterp.models.transformer import ACTIVATIONS, Transformer
from mechinterp.models.weights import Weights
from mechinterp.sites import Site, all_sites
from mechinterp.tasks.base import Task

_SCALES = ("ln1_scale", "ln1_post_scale", "ln2_scale", "ln2_post_scale", "ln_final_scale")


def relp(
    model: Transformer,
    task: Task,
    *,
    ln_rule: bool = True,
    activation_rule: bool = True,
    half_rule: bool = True,
    attention_rule: bool = False,
    ablation: str | Ablation = "resample",
    **walk: Unpack[WalkSettings],
) -> Scores:
    """Effect of every edge by relevance propagated back, in units of the metric. With no rule at all it is ``eap``.

    ``Scores.nodes``, a writer's edges summed, is RelP of that node. A rule for something that the model lacks changes
    nothing. Cost: two forwards and one backward, as for ``eap``.
    """
    chosen = {"ln_rule": ln_rule, "activation_rule": activation_rule, "half_rule": half_rule, "attention_rule": attention_rule}
    return attributed(model, task, "relp", ablation, chosen, walk, relevance_rules(model.weights, **chosen))


def relevance_rules(
    weights: Weights, *, ln_rule: bool, activation_rule: bool, half_rule: bool, attention_rule: bool
) -> BackwardRules:
    """The chosen rules as patches, none of which changes a value of the forward pass."""
    config, mlp = weights.config, activation_rule or half_rule
    held = (*(_SCALES if ln_rule else ()), *(("pattern",) if attention_rule else ()))
    there, reads = all_sites(config), (*(("mlp_pre", "mlp_pre_linear") if mlp else ()),)
    patches: dict[Site | str, Patch] = {site: _hold for site in there if site.name in held}
    for site in there:
        if mlp and site.name == "mlp_post":
            patches[site] = mlp_rule(config.activation, site.layer, activation_rule=activation_rule, half_rule=half_rule)
        if ln_rule and config.qk_norm != "none" and site.name in ("rot_q", "rot_k"):
            patches[site] = _query_key_rule(weights, site)
    return BackwardRules(
        patches,
        tuple(site for site in there if site.name in reads),
        hold_scale=ln_rule,
        soft_cap=chord_of_cap if activation_rule else None,
    )


def mlp_rule(activation: str, layer: int | None, *, activation_rule: bool = True, half_rule: bool = True) -> Patch:
    """The patch of ``mlp_post``: ``act(pre)``, or ``act(pre) * pre_linear`` where the pass recorded such a factor."""

    def patch(post: Tensor, cache: ActivationCache) -> Tensor:
        gated = Site("mlp_pre_linear", layer) in cache
        if activation_rule:
            through = chord(activation, cache[Site("mlp_pre", layer)])
            through = through * cache[Site("mlp_pre_linear", layer)] if gated else through
            post = post.detach() + (through - through.detach())  # adds an exact 0: the value stays, to the last bit
        return half(post) if half_rule and gated else post

    return patch


def chord(activation: str, pre: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_mlp"]:
    """``act(pre)``, to rounding, as ``pre`` times a constant."""
    with torch.no_grad():
        slope = torch.where(pre == 0, SLOPE_AT_ZERO[activation], ACTIVATIONS[activation](pre) / pre)
    return pre * slope


def chord_of_cap(logits: Float[Tensor, "*axes"], cap: float) -> Float[Tensor, "*axes"]:
    """The soft cap of logits, to rounding, as the logits times a constant."""
    with torch.no_grad():
        slope = torch.where(logits == 0, 1.0, soft_cap(logits, cap) / logits)
    return logits * slope


def half(product: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_mlp"]:
    """The product itself, with half of its gradient."""
    return product / 2 + (product / 2).detach()


def _query_key_rule(weights: Weights, site: Site) -> Patch:
    """The patch of ``rot_q`` or ``rot_k``: normalised by a scale that is held, then turned."""
    config, layer, port = weights.config, site.layer or 0, site.name[-1]
    block = weights.blocks[layer]
    norm, axes = (block.q_norm if port == "q" else block.k_norm), (-1,) if config.qk_norm == "head" else (-2, -1)

    def patch(turned: Tensor, cache: ActivationCache) -> Tensor:
        raw = cache[Site(port, layer)]
        scaled = raw / (raw.square().mean(axes, keepdim=True) + config.norm_eps).sqrt().detach()
        if norm is not None and norm.w is not None:
            scaled = scaled * norm.w.view(-1, raw.shape[-1])
        rotary, positions = config.rotary_of(layer), torch.arange(raw.shape[1], device=raw.device)[None]
        through = scaled if rotary is None else rotate(scaled, positions, rotary)
        return turned.detach() + (through - through.detach())

    return patch


def _hold(value: Tensor, cache: ActivationCache) -> Tensor:
    return value.detach()
