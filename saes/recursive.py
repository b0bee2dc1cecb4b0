"""Recursive direct feature attribution: from a latent, through its heads' values, to what was written before.

    v[s,h] = (r[s] - mean) / scale[s] . W_V[h] + b_V[h],    r[s] = sum of components c[s]

(RMSNorm takes off no mean, and heads of a group share ``v``). So with the attention pattern and normalisation scales held
fixed, each source position's DFA is a sum over components of the residual stream there (Kissane et al. 2024,
arXiv:2406.17759, RDFA). ``recursive_dfa`` lists them all; ``trace`` follows the largest, which are often heads or latents
themselves, into *their* values, and so on down.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.cache import ActivationCache
from mechinterp.errors import SAEError
from mechinterp.models.config import ModelConfig
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node
from mechinterp.sites import Site
from saes.base import SparseAutoencoder
from saes.components import (
    Component,
    Standing,
    Stream,
    component_sites,
    fold,
    folded_bias,
    norm_scale,
    standing_at,
    stream_of,
)
from saes.linear import alone, constant, frozen_decoder, frozen_encoder, heads_of, layer_of, numbers, write_scale, written
from saes.places import Place


@dataclass(frozen=True, eq=False)
class RecursiveDFA:
    """A latent's pre-activation at one query position, by what stood in the residual stream at each source position.

    Term ``t`` of ``stream`` contributes ``by_head[t]`` through the values of ``heads``, in units of the latent. ``bias`` is
    what the heads' own biases bring, by source position, and ``constant`` what the latent's bring.
    ``by_head`` and ``bias`` of one source position sum to its DFA.
    """

    place: Place
    latent: int
    query: int
    heads: tuple[int, ...]
    stream: Stream
    by_head: Float[Tensor, "term head_index"]
    bias: Float[Tensor, "pos head_index"]
    constant: Float[Tensor, ""]

    @property
    def values(self) -> Float[Tensor, "term"]:
        return self.by_head.sum(1)

    @property
    def by_source(self) -> Float[Tensor, "pos head_index"]:
        """The DFA of heads and sources."""
        return self.bias.index_add(0, self.stream.pos, self.by_head)

    @property
    def by_component(self) -> dict[Component, float]:
        """What each component contributes from all positions together; ``bias`` is the heads'."""
        summed = self.values.new_zeros(len(self.stream.components)).index_add_(0, self.stream.which, self.values)
        return dict(zip(self.stream.components, summed.tolist(), strict=True)) | {Component("bias"): float(self.bias.sum())}

    @property
    def pre_activation(self) -> float:
        return float(self.values.sum() + self.bias.sum() + self.constant)

    def largest(self, n: int = 10) -> list[tuple[Component, int, float]]:
        """The ``n`` terms of largest magnitude: component, source position, contribution."""
        order = self.values.abs().topk(min(n, len(self.values))).indices.tolist()
        return [(self.stream.component(term), int(self.stream.pos[term]), float(self.values[term])) for term in order]


@dataclass(frozen=True)
class Step:
    """A component at a position, and what it contributes to the root's pre-activation (in units of the root's latent).

    ``children`` are the largest of what made it, if it was followed; ``rest`` is what the others and biases made of it.
    """

    component: Component
    pos: int
    contribution: float
    children: tuple["Step", ...] = ()

    @property
    def node(self) -> Node | None:
        """``f1.57@14``, ``a2.h3@14``, ``m0@3``, ``input@3``, ``f1.error@3``; None for biases."""
        return None if (node := self.component.node) is None else node.at(self.pos)

    @property
    def rest(self) -> float:
        return self.contribution - sum(child.contribution for child in self.children)

    @property
    def path(self) -> list["Step"]:
        """From here down along the largest child."""
        return [self, *max(self.children, key=lambda child: abs(child.contribution)).path] if self.children else [self]

    def __str__(self) -> str:
        """The tree, one line a step, indented by depth."""
        below = [f"  {line}" for child in self.children for line in str(child).splitlines()]
        return "\n".join([f"{self.component}@{self.pos} {self.contribution:+.4g}", *below])


def recursive_sites(config: ModelConfig, layer: int) -> list[Site]:
    """What a pass must record for ``recursive_dfa`` and ``trace`` of a latent at ``layer``."""
    own = [Site(name, at) for at in range(layer + 1) for name in ("resid_pre", "pattern", "z")]
    return list(dict.fromkeys([*component_sites(config, layer), *own]))


def recursive_dfa(
    model: Transformer,
    autoencoder: SparseAutoencoder,
    cache: ActivationCache,
    latent: int,
    query: int,
    *,
    prompt: int = 0,
    place: Place | str | None = None,
    upstream: Iterable[SparseAutoencoder] = (),
) -> RecursiveDFA:
    """Every component at every source position up to ``query``, and what it contributes to the latent's pre-activation.

    ``upstream`` autoencoders take earlier layers' heads apart into latents. Exact with patterns, normalisation scales and
    the latents' activity held fixed. The cache is of a pass that recorded ``recursive_sites``. Cost: the memory of
    ``stream_of`` and one product with it. ``SAEError`` for a latent, a query or an autoencoder that does not fit.
    """
    found = _Prompt.read(model, autoencoder, cache, query, prompt, place, upstream)
    weights, bias = found.latent_reads(found.root, latent, query)
    sums = found.follow(layer_of(found.root), found.heads, weights, query)
    return RecursiveDFA(found.root.places[0], latent, query, found.heads, sums.stream, sums.by_head, sums.bias, bias)


def trace(
    model: Transformer,
    autoencoder: SparseAutoencoder,
    cache: ActivationCache,
    latent: int,
    query: int,
    *,
    depth: int = 3,
    width: int = 1,
    prompt: int = 0,
    place: Place | str | None = None,
    upstream: Iterable[SparseAutoencoder] = (),
) -> Step:
    """The tree of what made a latent: at each step the ``width`` terms of largest magnitude, ``depth`` steps down.

    Heads and latents are followed into their own values at their own position; embeddings, MLPs, errors, biases and
    latents of matching pursuits (which are not linear in ``z``) end a branch. Every contribution is in units of the root's
    latent, whose own is its pre-activation; ``rest`` is what a step's children leave of it. Settings and errors as in
    ``recursive_dfa``. Cost: one product with the stream a step, ``width ** depth`` steps at most.
    """
    if depth < 0 or width < 1:
        raise SAEError(f"depth={depth} and width={width} make no tree. Give depth >= 0 and width >= 1.")
    found = _Prompt.read(model, autoencoder, cache, query, prompt, place, upstream)
    weights, bias = found.latent_reads(found.root, latent, query)
    layer, head = layer_of(found.root), found.root.places[0].head
    sums = found.follow(layer, found.heads, weights, query)
    total = float(sums.by_head.sum() + sums.bias.sum() + bias)
    number = latent + (0 if head is None else head * found.root.d_sae)
    return Step(Component("latent", layer, head, number), query, total, found.largest(sums, depth, width))


@dataclass(frozen=True, eq=False)
class _Sums:
    """A number read of some heads' ``z``, as a sum over the terms of the stream below and the heads' biases.

    A term's part through a head is ``vector . read[head] * weight[pos, head]``; ``weight`` is pattern over scale.
    """

    stream: Stream
    read: Float[Tensor, "d_model head_index"]
    weight: Float[Tensor, "pos head_index"]
    bias: Float[Tensor, "pos head_index"]

    @property
    def by_head(self) -> Float[Tensor, "term head_index"]:
        return (self.stream.vectors @ self.read) * self.weight[self.stream.pos]

    def reader(self, pos: int) -> Float[Tensor, "d_model"]:
        """The direction in which the stream is read at a position."""
        return self.read @ self.weight[pos]


@dataclass(frozen=True, eq=False)
class _Prompt:
    """One prompt's stream below the root, and how to follow a direction at a position of it one layer down."""

    model: Transformer
    cache: ActivationCache
    prompt: int
    root: SparseAutoencoder
    standing: Standing
    stream: Stream

    @classmethod
    def read(cls, model: Transformer, autoencoder, cache, query: int, prompt: int, place, upstream) -> "_Prompt":
        root, upstream = alone(autoencoder, place), tuple(upstream)
        root.check_fits(model.config)
        n_prompts, n_pos, _ = cache["embed"].shape
        if not (0 <= query < n_pos and 0 <= prompt < n_prompts):
            raise SAEError(f"position {query} of prompt {prompt} is asked for; there are {n_prompts} prompts of {n_pos}.")
        n_read = query + 1 if model.config.causal else n_pos
        stream = stream_of(model, cache, layer_of(root), prompt=prompt, positions=range(n_read), upstream=upstream)
        return cls(model, cache, prompt, root, standing_at(upstream, model.config), stream)

    @property
    def heads(self) -> tuple[int, ...]:
        return heads_of(self.root, self.model.config.n_heads)

    def latent_reads(
        self, one: SparseAutoencoder, latent: int, pos: int
    ) -> tuple[Float[Tensor, "head_index d_head"], Float[Tensor, ""]]:
        """What a latent reads of its heads' ``z`` at a position, and its constant: together its pre-activation."""
        at = numbers(one, [latent])
        W, scale = frozen_encoder(one, self.at(one, pos))
        heads = (-1, self.model.config.d_head)
        return (scale * W[:, at[0]]).unflatten(0, heads).to(self.model.dtype), constant(one)[at[0]].to(self.model.dtype)

    def at(self, one: SparseAutoencoder, pos: int) -> Float[Tensor, "1 d_in"]:
        return one.places[0].read(self.cache)[self.prompt, pos].to(one.W_enc.dtype).unsqueeze(0)

    def follow(self, layer: int, heads: tuple[int, ...], weights: Float[Tensor, "head_index d_head"], query: int) -> _Sums:
        """``sum_h z[query,h] . weights[h]``, one layer's heads down."""
        model, chosen = self.model.weights, list(heads)
        norm, config = model.blocks[layer].ln1, self.model.config
        W_V, b_V = map(torch.stack, zip(*(model.port(layer, head, "v") for head in heads), strict=True))
        read = torch.einsum("hmd,hd->mh", W_V, weights)
        own = torch.einsum("hd,hd->h", b_V, weights) + folded_bias(norm, read)
        n_read = query + 1 if config.causal else self.cache["pattern", layer].shape[-1]
        pattern = self.cache["pattern", layer][self.prompt, chosen, query, :n_read].mT
        resid = self.cache["resid_pre", layer][self.prompt, :n_read]
        weight = pattern / norm_scale(norm, resid, config).unsqueeze(1)
        return _Sums(self.stream.before(layer, n_read - 1), fold(norm, read, config), weight, pattern * own)

    def largest(self, sums: _Sums, depth: int, width: int) -> tuple[Step, ...]:
        """The largest terms as steps, each with what is below it."""
        if depth == 0:
            return ()
        values = sums.by_head.sum(1)
        steps = []
        for term in values.abs().topk(min(width, len(values))).indices.tolist():
            component, pos = sums.stream.component(term), int(sums.stream.pos[term])
            below = self.below(component, pos, sums.reader(pos)) if depth > 1 else None
            children = () if below is None else self.largest(below, depth - 1, width)
            steps.append(Step(component, pos, float(values[term]), children))
        return tuple(steps)

    def below(self, component: Component, pos: int, reader: Float[Tensor, "d_model"]) -> _Sums | None:
        """What ``reader`` reads of a component at a position, one layer further down; None where the branch ends."""
        layer, head = component.layer, component.head
        if layer is not None and component.kind in ("head", "latent"):
            reader = reader / write_scale(self.model, self.cache, layer)[self.prompt, pos]
        if component.kind == "head" and layer is not None and head is not None:
            return self.follow(layer, (head,), (self.model.weights.W_O(layer)[head] @ reader).unsqueeze(0), pos)
        if component.kind == "latent" and layer is not None and component.latent is not None:
            one = self.standing[layer, head]
            if one.kind == "matching_pursuit":
                return None
            latent = component.latent % one.d_sae
            scale = frozen_decoder(one, self.at(one, pos))[0].to(reader.dtype)
            size = (scale * (written(self.model, one, [latent]) @ reader)).squeeze()
            weights, _ = self.latent_reads(one, latent, pos)
            return self.follow(layer, heads_of(one, self.model.config.n_heads), size * weights, pos)
        return None
