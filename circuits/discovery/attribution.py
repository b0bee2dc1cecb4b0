"""Attribution patching of nodes, and AtP*: the two corrections that find what a plain gradient overlooks.

``attribution`` (Nanda 2023, "Attribution Patching"; MIB's NAP) is the first-order effect of replacing what a part writes,
``-<Δ_u, dm/da_u>``: the sum of edge attribution patching over the edges that leave the part. With ``steps`` the gradient
is averaged along the straight line between replaced and clean embedding (NAP-IG). With ``ports=True`` the items are the
q, k and v of every head, as if all edges into the port were cut.

``atp_star`` (Kramár et al. 2024, arXiv:2403.00745) makes two corrections:

* *QK fix* (section 3.1.1): the effect through an attention pattern is recomputed, not linearised (``qk_fix.py``). The paper
  fixes queries and keys as nodes, our ports. We go one step on: of what a writer does, we recompute what it does by adding
  to the queries and keys of later heads itself, and leave to the gradient what it does by way of other parts.
* *GradDrop* (section 3.1.2): two ways of opposite sign can cancel. ``1/(L - 1) Σ_l |score without the gradient through
  layer l's write|`` sees both. (L - 1, because nothing is left of a part when its own layer is dropped.) The paper has one
  magnitude a position; our parts are replaced at all positions at once, so we sum over positions first.
"""

from collections.abc import Callable
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.ablation import Ablation
from circuits.discovery.backward import INPUT, Backward, Gradients, by_span, check_steps, in_parts, written
from circuits.discovery.qk_fix import Rows
from circuits.discovery.walk import Walk, WalkSettings
from circuits.items import Items
from circuits.scores import Scores
from circuits.wiring import Wiring
from circuits.writes import Writes, heads_sum
from mechinterp.errors import CircuitError
from mechinterp.models.attention import Heads
from mechinterp.models.config import ModelConfig
from mechinterp.models.normalization import pull_back
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import PORTS
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site
from mechinterp.tasks.base import Task

_TOKENS_AT_ONCE = 2048  # of all the writers whose changes go through a layer's queries and keys together


def attribution(
    model: Transformer,
    task: Task,
    *,
    ports: bool = False,
    qk_fix: bool = False,
    grad_drop: bool = False,
    steps: int | None = None,
    ablation: str | Ablation = "resample",
    **walk: Unpack[WalkSettings],
) -> Scores:
    """First-order effect of every writer (``ports``: of every q, k and v), in units of the metric; positive: losing it hurts.

    With ``grad_drop`` scores are magnitudes: they rank, but have no sign. ``steps``: None for the gradient of the clean
    run, or how many gradients to average on the way to it (five are usual).

    Cost: two forwards and one backward. ``steps`` as many forwards and backwards more; ``grad_drop`` a backward through
    half the model for each layer; ``qk_fix`` one pass of queries, keys and softmax for each layer and each writer before it.
    """
    _check(model, qk_fix, grad_drop, steps)
    name = "atp-star" if qk_fix and grad_drop else "atp-ig" if steps else "atp"
    settings = {"ports": ports, "qk_fix": qk_fix, "grad_drop": grad_drop, "steps": steps}
    items: Items = "port" if ports else "node"
    way = Walk(model, task, name, ablation, settings=settings, items=items, splits_positions=not grad_drop, **walk)
    wiring = Wiring.of(model.config)
    parts = [reader for reader in wiring.readers if reader.port] if ports else wiring.writers
    sites = dict.fromkeys((*(PORTS if ports else written(model)), *("q", "k", "z") * qk_fix))
    record = ("resid_pre", *PORTS) if ports or qk_fix else ()

    def score_some(prompts: PromptBatch, replaced: Writes) -> Float[Tensor, "prompt *span item"]:
        run = Backward.of(model, prompts, task.metric, replaced.input, sites, steps=steps, grad_drop=grad_drop, record=record)
        delta = replaced - run.writes
        falls = _of_ports(run, delta, qk_fix) if ports else _of_writers(run, delta, qk_fix)
        if grad_drop:
            return _magnitudes(falls, [part.layer for part in parts])
        return by_span(falls[0], prompts) if way.keep_positions else falls[0].sum(1)

    def score(prompts: PromptBatch, replaced: Writes, bar: tqdm) -> Float[Tensor, "prompt *span item"]:
        runs = model.config.n_layers if qk_fix or grad_drop else 1 + (steps or 0)
        return torch.cat([score_some(*some) for some in in_parts(prompts, replaced, runs, bar)])

    return way.scores(lambda _: score)


def atp_star(
    model: Transformer,
    task: Task,
    *,
    ports: bool = False,
    ablation: str | Ablation = "resample",
    **walk: Unpack[WalkSettings],
) -> Scores:
    """AtP*: ``attribution`` with both corrections. Magnitudes without a sign, in units of the metric."""
    return attribution(model, task, ports=ports, qk_fix=True, grad_drop=True, ablation=ablation, **walk)


def _magnitudes(falls: Float[Tensor, "layer batch pos item"], layers: list[int | None]) -> Float[Tensor, "batch item"]:
    """GradDrop's mean over the layers that were dropped, but for each part's own."""
    own = torch.tensor([[of == dropped for of in layers] for dropped in range(len(falls))], device=falls.device)
    return falls.sum(2).abs().masked_fill(own.unsqueeze(1), 0).sum(0) / (len(falls) - 1)


@torch.no_grad()
def _of_writers(run: Backward, delta: Writes, qk_fix: bool) -> Float[Tensor, "run batch pos writer"]:
    gradients = _beside_patterns(run) if qk_fix else run.gradients
    falls = [-(delta.input * gradients[INPUT]).sum(-1, keepdim=True)]
    for layer, z in enumerate(delta.z):
        falls.append(-(z * gradients[Site(run.model.config.write_site, layer)]).sum(-1))
        if delta.mlp_out:
            falls.append(-(delta.mlp_out[layer] * gradients[Site("mlp_out", layer)]).sum(-1, keepdim=True))
    linear = torch.cat(falls, -1)
    return linear + _through_patterns(run, delta) if qk_fix else linear


@torch.no_grad()
def _of_ports(run: Backward, delta: Writes, qk_fix: bool) -> Float[Tensor, "run batch pos port"]:
    """A port is cut by cutting every edge into it: it reads the stream that all writers before it have replaced."""
    falls, change, weights = [], delta.input, run.model.weights
    for layer in range(run.model.config.n_layers):
        clean = [run.cache[port, layer] for port in PORTS]
        changed = run.model.project(layer, run.cache["resid_pre", layer] + change)
        of = [
            -((new - old) * run.gradients[Site(port, layer)]).sum(-1)
            for port, old, new in zip(PORTS, clean, changed, strict=True)
        ]
        if qk_fix:
            rows = _rows(run, layer)
            of[0] = -_each_alone(rows.of_queries, clean[0], changed[0], run.model.config)
            of[1] = -_each_alone(rows.of_keys, clean[1], changed[1], run.model.config)
        falls += of
        change = change + heads_sum(weights, layer, delta.z[layer])
        change = change + delta.mlp_out[layer] if delta.mlp_out else change
    return torch.cat(falls, -1)


def _each_alone(
    effect: Callable[[Tensor], Tensor],
    clean: Float[Tensor, "batch pos port d_head"],
    changed: Float[Tensor, "batch pos port d_head"],
    config: ModelConfig,
) -> Float[Tensor, "run batch pos port"]:
    """The ``effect``, by whichever heads, of changing one query or key of a layer and no other."""
    n = clean.shape[-2]
    if config.qk_norm != "all":
        return effect(changed[None])[:, 0].unflatten(-1, (n, -1)).sum(-1)
    is_own = torch.eye(n, dtype=torch.bool, device=clean.device)[:, None, None, :, None]
    return effect(torch.where(is_own, changed, clean)).sum(-1).movedim(1, -1)  # one norm for all: the others move with it


def _beside_patterns(run: Backward) -> Gradients:
    """The gradients at all writers without their direct way through queries and keys, layer after layer from the last."""
    gradients, weights, config = dict(run.gradients), run.model.weights, run.model.config
    direct = torch.zeros_like(gradients[INPUT])
    for layer in reversed(range(config.n_layers)):
        writes = Site(config.write_site, layer)
        gradients[writes] = gradients[writes] - torch.einsum("rbpm,hdm->rbphd", direct, weights.W_O(layer))
        if config.has_mlp:
            gradients[Site("mlp_out", layer)] = gradients[Site("mlp_out", layer)] - direct
        at_ports = torch.cat([gradients[Site(port, layer)] for port in "qk"], dim=-2)
        at_stream = torch.einsum("rbphd,hmd->rbpm", at_ports, weights.ports(layer)[: -config.n_groups])
        direct = direct + pull_back(run.cache["resid_pre", layer], at_stream, weights.blocks[layer].ln1, config)
    gradients[INPUT] = gradients[INPUT] - direct
    return gradients


def _through_patterns(run: Backward, delta: Writes) -> Float[Tensor, "run batch pos writer"]:
    """What that direct way takes from the metric, softmax and normalisation recomputed, layer by layer, added up."""
    wiring = Wiring.of(run.model.config)
    wrote = delta.first(len(wiring.writers))
    falls = wrote.new_zeros((len(run.gradients[INPUT]), *wrote.shape[:3]))
    for layer in range(wiring.n_layers):
        rows, before = _rows(run, layer), wiring.head_slice(layer).start
        for some in torch.arange(before).split(max(1, _TOKENS_AT_ONCE // delta.input[..., 0].numel())):
            streams = run.cache["resid_pre", layer] + wrote[some]
            q, k, _ = (x.unflatten(0, streams.shape[:2]) for x in run.model.project(layer, streams.flatten(0, 1)))
            falls[:, some] -= (rows.of_queries(q) + rows.of_keys(k)).sum(-1)
    return falls.movedim(1, -1)


def _rows(run: Backward, layer: int) -> Rows:
    q, k, v = (run.cache[port, layer] for port in PORTS)
    heads = Heads.of(run.model.weights, layer, torch.arange(q.shape[1], device=q.device)[None])
    return Rows.of(q, k, v, heads, run.gradients[Site("z", layer)])


def _check(model: Transformer, qk_fix: bool, grad_drop: bool, steps: int | None) -> None:
    check_steps(steps)
    if steps is not None and (qk_fix or grad_drop):
        raise CircuitError(
            f"steps={steps} averages gradients on the way to the clean run, and qk_fix and grad_drop correct the gradient of "
            "the clean run. Choose one or the other."
        )
    if grad_drop and model.config.n_layers < 3:
        raise CircuitError(
            f"grad_drop leaves out one layer after the other, and {model.config.name} has {model.config.n_layers}: what the "
            "first layer does by way of the last would never be counted. It needs three layers; use grad_drop=False."
        )
