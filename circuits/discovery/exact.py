"""Exact edge patching: cut one edge, run everything after it again, see how much the metric falls.

The yardstick that every approximation is held against (MIB's EActP; the direct case of path patching, Wang et al. 2022,
Goldowsky-Dill et al. 2023). For an edge from writer u to reader v the score is ``m(clean) - m(x_v <- x_v + Δ_u)`` with
``Δ_u`` what the ablation changes about u. One edge at a time: both inputs of an OR score 0, both of an AND everything.

Layer by layer:

1. *heads*: each source's changed stream goes through the layer's q, k, v projections once. Heads do not see each other
   before they write, so one pass of attention gives the changed ``z`` of every head for that source and port; each
   head's change then enters the residual stream as a variant of its own, and with it those of the heads that share its key.
   In models where heads share a normalisation every edge has an attention pass of its own: all heads of the layer change.
2. *MLP*: the changed stream goes through the MLP, the change of its output enters as a variant.
3. *logits*: the changed final stream is unembedded; no layer runs.
"""

from collections.abc import Iterable, Iterator
from typing import Unpack

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.ablation import Ablation, Replacement
from circuits.discovery.heads import HeadsOf
from circuits.discovery.suffix import TOKENS_AT_ONCE, CleanRun, at_end
from circuits.discovery.walk import BatchScore, Walk, WalkSettings
from circuits.scores import Scores
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError
from mechinterp.models.transformer import Transformer
from mechinterp.tasks.base import Task


def exact(
    model: Transformer,
    task: Task,
    *,
    edges: Iterable[str] | Bool[np.ndarray, "edge"] | None = None,
    ablation: str | Ablation = "resample",
    **walk: Unpack[WalkSettings],
) -> Scores:
    """The measured effect of every edge, in units of the metric; positive: cutting the edge hurts.

    ``edges``: measure these alone (names, or a mask in wiring order) and leave 0 for the others. Cost: for every edge one
    pass through the layers after its reader, at the positions where the prompts differ.
    """
    wiring = Wiring.of(model.config)
    wanted = np.ones(wiring.n_edges, bool) if edges is None else _mask(wiring, edges)
    chosen = {} if edges is None else {"edges": [wiring.edge_names[edge] for edge in np.flatnonzero(wanted)]}
    way = Walk(model, task, "exact", ablation, settings=chosen, allow_zero=edges is not None, **walk)
    grid = torch.as_tensor(wiring.grid(wanted), device=model.device)

    def score(replacement: Replacement) -> BatchScore:
        return lambda prompts, replaced, bar: _edges(
            CleanRun.record(model, prompts, task.metric, replaced, shares_prefix=replacement.keeps_prefix), wiring, grid, bar
        )

    return way.scores(score, unit="edge", units_a_prompt=int(wanted.sum()))


def _mask(wiring: Wiring, edges: Iterable[str] | Bool[np.ndarray, "edge"]) -> Bool[np.ndarray, "edge"]:
    if isinstance(edges, np.ndarray):
        mask = edges
    else:
        mask = np.zeros(wiring.n_edges, dtype=bool)
        mask[[wiring.index_of(name) for name in edges]] = True
    if mask.dtype != bool or mask.shape != (wiring.n_edges,) or not mask.any():
        raise CircuitError(
            f"edges must name at least one edge, or be a mask of {wiring.n_edges} booleans with at least one true, not "
            f"{mask.dtype} of shape {mask.shape} with {int(mask.sum())} true."
        )
    return mask


@torch.no_grad()
def _edges(run: CleanRun, wiring: Wiring, wanted: Bool[Tensor, "writer reader"], bar: tqdm) -> Float[Tensor, "prompt edge"]:
    """One batch: the fall of the metric for each wanted edge and prompt."""
    grid = run.clean_metric.new_zeros((len(wiring.writers), len(wiring.readers), len(run.prompts)))
    deltas = run.delta.first(len(wiring.writers))
    heads_falls = _joint_falls if run.model.config.has_joint_heads else _separate_falls
    for layer in range(wiring.n_layers):
        ports = wiring.port_slice(layer)
        if wanted[:, ports].any():
            entrance = HeadsOf(run, layer)
            for some in _sources(run, wanted[:, ports]):
                grid[some, ports] = heads_falls(entrance, deltas[some], wanted[some, ports])
                bar.update(int(wanted[some, ports].sum()) * len(run.prompts))
        if wiring.has_mlp:
            reader = wiring.mlp_reader(layer)
            for some in _sources(run, wanted[:, [reader]]):
                grid[some, reader] = _mlp_falls(run, layer, deltas[some])
                bar.update(len(some) * len(run.prompts))
    last = wanted[:, -1].nonzero().flatten()
    if len(last):
        grid[last, -1] = run.falls("resid_post", wiring.n_layers - 1, _ends_of(run, deltas[last]))
    bar.update(len(last) * len(run.prompts))
    return grid[wiring.edge_writer, wiring.edge_reader].T


def _separate_falls(
    heads: HeadsOf, deltas: Float[Tensor, "source batch pos d_model"], wanted: Bool[Tensor, "source port"]
) -> Float[Tensor, "source port batch"]:
    """Each source cut from each port of the layer, q of all heads first; 0 where it is not ``wanted``."""
    run, layer, model, sources = heads.run, heads.layer, heads.run.model, len(deltas)
    clean = [run[port, layer].repeat(sources, 1, 1, 1) for port in "qkv"]
    changed = model.project(layer, (run["resid_pre", layer] + deltas).flatten(0, 1))
    z, first = run["z", layer].repeat(sources, 1, 1, 1), 0
    falls = run.clean_metric.new_zeros((*wanted.shape, len(run.prompts)))
    for i, port in enumerate(changed):
        readers = slice(first, first := first + port.shape[2])
        asked = wanted[:, readers].T
        if not asked.any():
            continue
        mixed = model.mix(layer, *(changed[j] if j == i else clean[j] for j in range(3)), prefix=run.prefix)
        change = _as_units(run, layer, mixed - z, len(asked))
        if asked.all():
            falls[:, readers] = heads.falls(change).transpose(0, 1)
        else:
            unit, source = asked.nonzero().unbind(1)
            falls[source, readers.start + unit] = heads.falls_of(change, asked)
    return falls


def _joint_falls(
    heads: HeadsOf, deltas: Float[Tensor, "source batch pos d_model"], wanted: Bool[Tensor, "source port"]
) -> Float[Tensor, "source port batch"]:
    """The same where the heads of a layer share a normalisation: whatever one port reads, all of them write something else."""
    run, layer, model = heads.run, heads.layer, heads.run.model
    made = model.project(layer, (run["resid_pre", layer] + deltas).flatten(0, 1))
    changed = [port.unflatten(0, (len(deltas), -1)) for port in made]
    falls = run.clean_metric.new_zeros((*wanted.shape, len(run.prompts)))
    for some in wanted.nonzero().split(max(1, TOKENS_AT_ONCE // run.n_tokens)):
        (source, reader), inputs, first = some.unbind(1), [], 0
        for port, new in zip("qkv", changed, strict=True):
            value = run[port, layer].expand(len(some), -1, -1, -1, -1).clone()
            here = (first <= reader) & (reader < first + value.shape[3])
            value[here, :, :, reader[here] - first] = new[source[here], :, :, reader[here] - first]
            inputs.append(value.flatten(0, 1))
            first += value.shape[3]
        written = model.written(layer, model.mix(layer, *inputs, prefix=run.prefix))
        change = written - run[model.config.write_site, layer].repeat(len(some), 1, 1, 1)
        falls[source, reader] = heads.falls(_as_units(run, layer, change, 1))[0]
    return falls


def _as_units(
    run: CleanRun, layer: int, change: Float[Tensor, "row pos head_index d_head"], n: int
) -> Float[Tensor, "variant batch at unit d_unit"]:
    """``n`` units of neighbouring heads, which change together; in the last layer at END alone."""
    change = at_end(run, change) if layer == run.model.config.n_layers - 1 else change
    return change.unflatten(2, (n, -1)).flatten(3).unflatten(0, (-1, len(run.prompts)))


def _mlp_falls(run: CleanRun, layer: int, deltas: Float[Tensor, "source batch pos d_model"]) -> Float[Tensor, "source batch"]:
    model = run.model
    reads = run["resid_pre" if model.config.parallel else "resid_mid", layer] + deltas
    last = layer == model.config.n_layers - 1
    reads = at_end(run, reads.flatten(0, 1)) if last else reads.flatten(0, 1)
    clean = run["mlp_out", layer]
    clean = at_end(run, clean) if last else clean
    change = model.feed_forward(layer, reads).unflatten(0, (len(deltas), -1)) - clean
    return run.falls("resid_post", layer, change)


def _ends_of(run: CleanRun, deltas: Float[Tensor, "source batch pos d_model"]) -> Float[Tensor, "source batch 1 d_model"]:
    return at_end(run, deltas.flatten(0, 1)).unflatten(0, deltas.shape[:2])


def _sources(run: CleanRun, wanted: Bool[Tensor, "writer some_reader"]) -> Iterator[Tensor]:
    """The writers of any wanted edge, as many at a time as a stacked pass should hold."""
    sources = wanted.any(1).nonzero().flatten()
    if len(sources):
        yield from sources.split(max(1, TOKENS_AT_ONCE // run.n_tokens))
