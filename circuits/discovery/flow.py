"""Information-flow routes: which writers make up the residual stream that each reader takes.

IFR (Ferrando and Voita 2024, arXiv:2403.00824; the measure is that of ALTI, Ferrando et al. 2022, arXiv:2203.04212)
needs neither corruption nor metric. At reader v, writer u is as near to the stream as taking it away would shorten the
stream, ``max(|x_v| - |x_v - a_u|, ε)`` in the L1 norm, and its score is its share of all the nearness there. The paper's
graph joins tokens; ours joins writers and readers, as MIB's does. ``Scores.greedy`` walks its routes back from the logits.

A score says *how large* something is, not how much it matters. Each reader's shares sum to 1, so that ranking edges into
different readers compares unlike things. The q, k and v of a layer's heads read one stream and share their values. And
the L1 norm knows the basis: rotate the residual stream, and the shares change though the model does not.

Where published code leaves something out, we do this:

* *Parts sum to the whole.* ``input`` is token and position embedding. An attention bias ``b_O`` belongs to no head, here
  as everywhere in this toolkit, but it is in the stream: each layer's is a part with a share of its own that no edge
  carries. Where there are such biases, a reader's *edges* sum to less than 1.
* *Positions.* Heads and MLPs are averaged over the positions that END can see, and never over padding. The logits are
  those at END, the only ones that a task asks for.
* *0/0.* Where taking any part away would lengthen the stream, ε gives all of them the same share.
"""

from collections.abc import Iterator, Mapping
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery.contraction import edges_of, span_shares
from circuits.discovery.walk import Walk, WalkSettings
from circuits.scores import Scores
from circuits.wiring import Wiring
from circuits.writes import Writes, sites
from mechinterp.cache import ActivationCache
from mechinterp.models.config import ModelConfig
from mechinterp.models.transformer import Transformer
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site
from mechinterp.tasks.base import Task

_EPSILON = 1e-6


def information_flow(model: Transformer, task: Task, **walk: Unpack[WalkSettings]) -> Scores:
    """The share that each writer has in the stream that each reader takes; never negative, and blind to the task.

    Only the clean prompts are run. (``settings["ablation"]`` is "zero": a writer is compared with its absence.) Cost: one
    forward, and for every writer one subtraction from each later stream.
    """
    way = Walk(model, task, "information-flow", "zero", splits_positions=True, unit="share of the reader", **walk)

    def score(prompts: PromptBatch, _: Writes, bar: tqdm) -> Float[Tensor, "prompt *span edge"]:
        shares = _shares(model, prompts)
        bar.update(len(prompts))
        return edges_of(Wiring.of(model.config), shares if way.keep_positions else shares.sum(1))

    return way.scores(lambda _: score)


@torch.no_grad()
def _shares(model: Transformer, prompts: PromptBatch) -> Float[Tensor, "batch span writer reader"]:
    """The mean share over each reader's positions, split by the spans that they belong to."""
    wiring, streams = Wiring.of(model.config), _streams(model.config)
    wanted = [*sites(model), *streams]
    _, cache = model.run(prompts.clean, record=wanted, logits_at="last", logits_of=prompts.clean[:, :0])
    nearness = _nearness(model, cache, streams)
    all_seen, only_end = _position_weights(model.config, prompts, nearness[0].dtype)
    spans = span_shares(prompts).to(all_seen)
    grid = all_seen.new_zeros((len(prompts), spans.shape[-1], len(wiring.writers), len(wiring.readers)))
    for (site, readers), near in zip(streams.items(), nearness, strict=True):
        share = (near / near.sum(0))[: wiring.writers_before[readers.start]]  # the biases come last: no edge has theirs
        at = only_end if site == list(streams)[-1] else all_seen
        grid[:, :, : len(share), readers] = torch.einsum("wbp,bp,bps->bsw", share, at, spans).unsqueeze(-1)
    return grid


def _streams(config: ModelConfig) -> dict[Site, slice]:
    """The places where the residual stream is read, in order, and the readers that take it there."""
    wiring, streams = Wiring.of(config), {}
    for layer in range(config.n_layers):
        ports, shares_stream = wiring.port_slice(layer), config.has_mlp and config.parallel
        streams[Site("resid_pre", layer)] = slice(ports.start, ports.stop + shares_stream)
        if config.has_mlp and not config.parallel:
            streams[Site("resid_mid", layer)] = slice(ports.stop, ports.stop + 1)
    return streams | {Site("resid_post", config.n_layers - 1): slice(len(wiring.readers) - 1, len(wiring.readers))}


def _nearness(
    model: Transformer, cache: ActivationCache, streams: Mapping[Site, slice]
) -> list[Float[Tensor, "part batch pos"]]:
    """For every stream, by how much each part shortens it, at least ε: writers in wiring order, then attention biases."""
    wiring, found = Wiring.of(model.config), [[] for _ in streams]
    biases = [[] for _ in streams]
    for first, parts, bias in _written(Writes.of(cache, model.weights)):
        for index, (site, readers) in enumerate(streams.items()):
            if first < wiring.writers_before[readers.start]:
                found[index].append(_shortening(cache[site], parts))
                biases[index] += [] if bias is None else [_shortening(cache[site], bias.expand_as(parts[:1]))]
    return [torch.cat([*of_writers, *rest]) for of_writers, rest in zip(found, biases, strict=True)]


def _written(writes: Writes) -> Iterator[tuple[int, Float[Tensor, "part batch pos d_model"], Tensor | None]]:
    """What is added to the stream, module by module: the first writer's index, its parts, and a bias beside them."""
    yield 0, writes.input[None], None
    first = 1
    for layer, block in enumerate(writes.weights.blocks):
        yield first, writes.heads(layer), block.b_O if bool(block.b_O.any()) else None
        first += writes.weights.config.n_heads
        if writes.mlp_out:
            yield first, writes.mlp_out[layer][None], None
            first += 1


def _shortening(
    stream: Float[Tensor, "batch pos d_model"], parts: Float[Tensor, "part batch pos d_model"]
) -> Float[Tensor, "part batch pos"]:
    exact = torch.promote_types(stream.dtype, torch.float32)  # a difference of two sums: half precision would drown it
    whole, without = (torch.linalg.vector_norm(x, 1, -1, dtype=exact) for x in (stream, stream - parts))
    return (whole - without).clamp_(min=_EPSILON)


def _position_weights(
    config: ModelConfig, prompts: PromptBatch, dtype: torch.dtype
) -> tuple[Float[Tensor, "batch pos"], Float[Tensor, "batch pos"]]:
    """Weights that average over the positions that END can see, and over END alone."""
    position, end = torch.arange(prompts.clean.shape[1], device=prompts.clean.device), prompts.end.unsqueeze(1)
    seen = ((position <= end) if config.causal else torch.ones_like(prompts.clean)).to(dtype)
    return seen / seen.sum(1, keepdim=True), (position == end).to(dtype)
