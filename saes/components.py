"""What a layer's heads read: the residual stream of one prompt as a list of everything that was written into it.

    r[s] = embed + pos_embed + sum over earlier layers of (heads, or latents + error, + bias) + MLP

Where an autoencoder stands at ``z`` of an earlier layer, its active latents ``f_j W_dec[j] W_O`` and its error take the
heads' place, so the list still sums to the stream exactly. Latents that are not active write nothing and are not listed.
A model without learned positions has no ``pos_embed``. One that normalises what its heads write together adds of each
head, latent and error its share: ``W_O`` with the normalisation's gain, divided by its scale at that position.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.cache import ActivationCache
from mechinterp.errors import SAEError
from mechinterp.models.config import ModelConfig
from mechinterp.models.normalization import scale_of
from mechinterp.models.transformer import Transformer
from mechinterp.models.weights import Norm
from mechinterp.nodes import Node
from mechinterp.sites import Site
from saes.base import SparseAutoencoder
from saes.linear import alone, frozen_decoder, layer_of, output_weights, write_scale, write_scale_sites

Kind = Literal["embed", "pos_embed", "head", "latent", "error", "bias", "mlp"]
Standing = dict[tuple[int, int | None], SparseAutoencoder]  # by layer and head


@dataclass(frozen=True)
class Component:
    """Something that writes to the residual stream.

    ``str``: ``embed``, ``pos_embed``, ``a1.h3``, ``f1.57``, ``m0``; ``f1.error`` and ``f1.h3.error``, what an autoencoder
    misses; ``a1.bias``, the layer's ``b_O`` and its autoencoders' ``b_dec W_O``. Latents of autoencoders on single heads
    are numbered through the layer, ``head * d_sae + latent``, so that each has a node of its own. A ``bias`` without a
    layer is the reader's own.
    """

    kind: Kind
    layer: int | None = None
    head: int | None = None
    latent: int | None = None

    @property
    def node(self) -> Node | None:
        """The part of the model that this is; biases are none. Embeddings share one, and a layer's errors."""
        if self.kind in ("embed", "pos_embed"):
            return Node.input()
        if self.kind == "mlp" and self.layer is not None:
            return Node.mlp(self.layer)
        if self.kind == "error" and self.layer is not None:
            return Node.error(self.layer)
        if self.kind == "latent" and self.layer is not None and self.latent is not None:
            return Node.latent(self.layer, self.latent)
        if self.kind == "head" and self.layer is not None and self.head is not None:
            return Node.head(self.layer, self.head)
        return None

    def __str__(self) -> str:
        if self.kind in ("head", "latent", "mlp"):
            return str(self.node)
        at = "" if self.layer is None else f"{'f' if self.kind == 'error' else 'a'}{self.layer}."
        return f"{at}{'' if self.head is None else f'h{self.head}.'}{self.kind}"


@dataclass(frozen=True, eq=False)
class Stream:
    """A residual stream as terms: term ``t`` is what ``components[which[t]]`` wrote at position ``pos[t]``."""

    components: tuple[Component, ...]
    which: Int[Tensor, "term"]
    pos: Int[Tensor, "term"]
    vectors: Float[Tensor, "term d_model"]

    def component(self, term: int) -> Component:
        return self.components[int(self.which[term])]

    def before(self, layer: int, last: int | None = None) -> "Stream":
        """Only what was written in the layers before ``layer``, and at no position after ``last``."""
        early = torch.tensor([found.layer is None or found.layer < layer for found in self.components])
        keep = early.to(self.which.device)[self.which]
        if last is not None:
            keep = keep & (self.pos <= last)
        return replace(self, which=self.which[keep], pos=self.pos[keep], vectors=self.vectors[keep])


def component_sites(config: ModelConfig, layer: int) -> list[Site]:
    """What a pass must record so that ``stream_of`` can take apart what the heads of ``layer`` read."""
    embedded = [Site("embed"), *[Site("pos_embed")] * config.learned_positions]
    heads = [site for earlier in range(layer) for site in write_scale_sites(config, earlier)]
    mlps = [Site("mlp_out", earlier) for earlier in range(layer) if config.has_mlp]
    return [*embedded, *heads, *mlps, Site("resid_pre", layer)]


def stream_of(
    model: Transformer,
    cache: ActivationCache,
    layer: int,
    *,
    prompt: int = 0,
    positions: Sequence[int] | None = None,
    upstream: Iterable[SparseAutoencoder] = (),
) -> Stream:
    """``resid_pre`` of ``layer`` in one prompt of the batch, at ``positions`` (None: all), as a sum of components.

    Layers with an autoencoder in ``upstream`` are listed by its latents, others by heads; where autoencoders stand on some
    heads alone, the other heads stay heads. Memory: terms × d_model, and terms are about positions × layers × (heads, or
    active latents). Reads ``component_sites`` from the cache; ``SAEError`` for autoencoders that fit no ``z`` of the model.
    """
    standing = standing_at(upstream, model.config)
    at = torch.arange(cache["embed"].shape[1]) if positions is None else torch.as_tensor(positions, dtype=torch.long)
    at = at.to(model.device)
    terms = _Terms(at)
    terms.add(Component("embed"), cache["embed"][prompt, at])
    if model.config.learned_positions:
        terms.add(Component("pos_embed"), cache["pos_embed"][prompt, at])
    for earlier in range(layer):
        z, scale = cache["z", earlier][prompt, at], write_scale(model, cache, earlier)[prompt, at]
        _add_attention(terms, model, z, scale, earlier, standing)
        if model.config.has_mlp:
            terms.add(Component("mlp", earlier), cache["mlp_out", earlier][prompt, at])
    return terms.stream()


def standing_at(autoencoders: Iterable[SparseAutoencoder], config: ModelConfig) -> Standing:
    """Single groups by layer and head (None: all heads). ``SAEError`` where two take the same head apart."""
    found: Standing = {}
    for autoencoder in autoencoders:
        autoencoder.check_fits(config)
        for place in autoencoder.places:
            one = alone(autoencoder, place)
            layer = layer_of(one)
            rivals = [key for key in found if key[0] == layer and (place.head is None or key[1] in (None, place.head))]
            if rivals:
                raise SAEError(f"two autoencoders take {str(place)!r} apart. Give one for each head.")
            found[layer, place.head] = one
    return found


def fold(norm: Norm | None, W: Float[Tensor, "d_model out"], config: ModelConfig) -> Float[Tensor, "d_model out"]:
    """``W`` behind a normalisation as a map of the stream before it, but for the scale: gain, and a LayerNorm's centring."""
    if norm is None:
        return W
    W = W if norm.w is None else norm.w.unsqueeze(1) * W
    return W - W.mean(0) if config.centred else W  # (x - mean x) . w = x . (w - mean w)


def folded_bias(norm: Norm | None, W: Float[Tensor, "d_model out"]) -> Float[Tensor, "out"]:
    """What a normalisation's own bias adds behind ``W``."""
    return W.new_zeros(W.shape[1]) if norm is None or norm.b is None else norm.b @ W


def norm_scale(norm: Norm | None, stream: Float[Tensor, "pos d_model"], config: ModelConfig) -> Float[Tensor, "pos"]:
    """What a normalisation divides by, to be held fixed; 1 without one."""
    return torch.ones_like(stream[:, 0]) if norm is None else scale_of(stream, config).squeeze(-1)


class _Terms:
    """Collects terms at the positions ``at``."""

    def __init__(self, at: Int[Tensor, "pos"]):
        self.at = at
        self.components: list[Component] = []
        self.which, self.pos, self.vectors = [], [], []

    def add(self, component: Component, vectors: Float[Tensor, "pos d_model"]) -> None:
        self.add_some([component], torch.zeros_like(self.at), torch.arange(len(self.at), device=self.at.device), vectors)

    def add_some(self, components: list[Component], which, rows, vectors) -> None:
        self.which.append(which + len(self.components))
        self.pos.append(self.at[rows])
        self.vectors.append(vectors)
        self.components += components

    def stream(self) -> Stream:
        return Stream(tuple(self.components), torch.cat(self.which), torch.cat(self.pos), torch.cat(self.vectors))


def _add_attention(
    terms: _Terms,
    model: Transformer,
    z: Float[Tensor, "pos head_index d_head"],
    divisor: Float[Tensor, "pos 1"],
    layer: int,
    standing: Standing,
):
    """What a layer's heads write, divided by ``divisor``."""
    bias = model.weights.blocks[layer].b_O.expand(len(z), -1)
    if (one := standing.get((layer, None))) is not None:
        bias = bias + _add_latents(terms, model, one, z.flatten(1), divisor)
    else:
        W_O = model.weights.W_O(layer)
        for head in range(model.config.n_heads):
            if (one := standing.get((layer, head))) is not None:
                bias = bias + _add_latents(terms, model, one, z[:, head], divisor)
            else:
                terms.add(Component("head", layer, head), z[:, head] / divisor @ W_O[head])
    terms.add(Component("bias", layer), bias)


def _add_latents(
    terms: _Terms, model: Transformer, one: SparseAutoencoder, x: Float[Tensor, "pos d_in"], divisor: Float[Tensor, "pos 1"]
) -> Float[Tensor, "pos d_model"]:
    """Adds active latents and the error; returns what the decoder's bias writes."""
    layer, head, W_O = layer_of(one), one.places[0].head, output_weights(model, one)
    x = x.to(one.W_enc.dtype)
    latents = one.encode(x.unsqueeze(0))[0]
    scale, shift = frozen_decoder(one, x)
    rows, active = latents.nonzero(as_tuple=True)
    listed, which = active.unique(return_inverse=True)
    sizes = (latents * scale / divisor)[rows, active].to(W_O.dtype)
    first = 0 if head is None else head * one.d_sae
    names = [Component("latent", layer, head, first + latent) for latent in listed.tolist()]
    terms.add_some(names, which, rows, sizes.unsqueeze(1) * (one.W_dec[0][listed].to(W_O.dtype) @ W_O)[which])
    b_dec = scale * one.b_dec[0] + shift
    error = x - scale * (latents @ one.W_dec[0]) - b_dec
    terms.add(Component("error", layer, head), error.to(W_O.dtype) / divisor @ W_O)
    return b_dec.to(W_O.dtype) / divisor @ W_O
