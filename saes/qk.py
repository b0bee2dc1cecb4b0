"""Why a head attends where it does: an attention score as a sum over pairs of components, one read by each side.

    score[q,k] = (sum_c c[q] W_Q / scale[q] + b_Q) . (sum_c c[k] W_K / scale[k] + b_K) / sqrt(d_head)

Scores are bilinear in the residual streams at query and key, with the LayerNorm's scales held fixed (the QK circuit of
Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"); so each pair of components has its own share, and
where autoencoders take earlier layers apart, each pair of latents.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.cache import ActivationCache
from mechinterp.errors import SAEError
from mechinterp.models.config import ModelConfig
from mechinterp.models.transformer import Transformer
from mechinterp.sites import Site
from saes.base import SparseAutoencoder
from saes.components import Component, Stream, component_sites, fold, folded_bias, norm_scale, stream_of
from saes.linear import Chosen, written
from saes.places import Place


@dataclass(frozen=True, eq=False)
class ScorePairs:
    """A score before softmax, by what the query and what the key read. The last of each side is the head's own bias.

    ``score`` is ``pairs.sum()``. The softmax sees differences between keys alone: a pair that is the same for every key
    (all those with the keys' bias) does nothing to the pattern. Compare with another key's pairs.
    """

    queries: tuple[Component, ...]
    keys: tuple[Component, ...]
    pairs: Float[Tensor, "query_component key_component"]

    @property
    def score(self) -> float:
        return float(self.pairs.sum())

    @property
    def by_query(self) -> dict[Component, float]:
        """What each of the query's components adds to the score, with the whole key."""
        return dict(zip(self.queries, self.pairs.sum(1).tolist(), strict=True))

    @property
    def by_key(self) -> dict[Component, float]:
        return dict(zip(self.keys, self.pairs.sum(0).tolist(), strict=True))

    def largest(self, n: int = 10) -> list[tuple[Component, Component, float]]:
        """The ``n`` pairs of largest magnitude: what the query reads, what the key reads, their part of the score."""
        flat = self.pairs.flatten()
        order = flat.abs().topk(min(n, len(flat))).indices.tolist()
        at = [divmod(pair, len(self.keys)) for pair in order]
        return [(self.queries[query], self.keys[key], float(self.pairs[query, key])) for query, key in at]


def qk_sites(config: ModelConfig, layer: int) -> list[Site]:
    """What a pass must record for ``qk_attribution`` at ``layer``."""
    return component_sites(config, layer)


def qk_attribution(
    model: Transformer,
    cache: ActivationCache,
    layer: int,
    head: int,
    query: int,
    key: int,
    *,
    prompt: int = 0,
    upstream: Iterable[SparseAutoencoder] = (),
) -> ScorePairs:
    """The score that head ``head`` of ``layer`` gives position ``key`` from position ``query``, over pairs of components.

    ``upstream`` autoencoders take earlier layers' heads apart into latents. The cache is of a pass that recorded
    ``qk_sites(config, layer)``. All pairs sum to the site ``attn_scores``. Memory: the components at two positions, times
    d_model. ``SAEError`` for a head or positions that are not there, and for a key that a causal model hides.
    """
    _check(model.config, cache, layer, head, query, key, prompt)
    upstream = tuple(upstream)
    streams = [stream_of(model, cache, layer, prompt=prompt, positions=[at], upstream=upstream) for at in (query, key)]
    read = [
        _project(model, layer, head, port, stream, cache["resid_pre", layer][prompt, at])
        for port, stream, at in zip("qk", streams, (query, key), strict=True)
    ]
    pairs = torch.einsum("qd,kd->qk", *read) * model.config.scale
    names = [tuple(stream.component(term) for term in range(len(stream.which))) for stream in streams]
    own = Component("bias")
    return ScorePairs((*names[0], own), (*names[1], own), pairs)


def latent_pair_scores(
    model: Transformer,
    layer: int,
    head: int,
    queries: SparseAutoencoder,
    keys: SparseAutoencoder | None = None,
    *,
    query_latents: Chosen = None,
    key_latents: Chosen = None,
    places: Sequence[Place | str | None] = (None, None),
) -> Float[Tensor, "query_latent key_latent"]:
    """What each pair of latents, one at the query and one at the key, adds to a head's score, by the weights alone.

    Per unit of both activations, and times both positions' LayerNorm scales (divide by them for a real prompt; where an
    autoencoder normalises, multiply by its inputs' scales). ``keys``: None takes the same autoencoder. ``places`` name a
    group where there are several. ``SAEError`` unless both stand at ``z`` in layers before ``layer``.
    """
    keys = queries if keys is None else keys
    _check_head(model.config, layer, head)
    sides = zip("qk", (queries, keys), (query_latents, key_latents), places, strict=True)
    read = [_directions(model, layer, head, port, *side) for port, *side in sides]
    return torch.einsum("qd,kd->qk", *read) * model.config.scale


def _directions(model: Transformer, layer: int, head: int, port: str, autoencoder, latents, place) -> Tensor:
    directions = written(model, autoencoder, latents, place=place)
    at = autoencoder.places[0 if place is None else autoencoder.index(place)]
    if (at.layer or 0) >= layer:
        raise SAEError(f"head {head} of layer {layer} reads earlier layers; the autoencoder stands at {str(at)!r}.")
    return directions @ fold(model.weights.blocks[layer].ln1, _W(model, layer, head, port))


def _W(model: Transformer, layer: int, head: int, port: str) -> Float[Tensor, "d_model d_head"]:
    return (model.weights.W_Q if port == "q" else model.weights.W_K)(layer)[head]


def _project(
    model: Transformer, layer: int, head: int, port: str, stream: Stream, resid: Float[Tensor, "d_model"]
) -> Float[Tensor, "component d_head"]:
    """What each component becomes in the query or key, and last the bias."""
    norm, W = model.weights.blocks[layer].ln1, _W(model, layer, head, port)
    scale = norm_scale(norm, resid.unsqueeze(0), model.config.norm_eps)
    bias = model.weights.projection_bias(layer)["qk".index(port), head] + folded_bias(norm, W)
    return torch.cat([stream.vectors @ fold(norm, W) / scale, bias.unsqueeze(0)])


def _check(config: ModelConfig, cache: ActivationCache, layer: int, head: int, query: int, key: int, prompt: int) -> None:
    _check_head(config, layer, head)
    n_prompts, n_pos, _ = cache["embed"].shape
    if not (0 <= query < n_pos and 0 <= key < n_pos and 0 <= prompt < n_prompts):
        raise SAEError(
            f"positions {query} and {key} of prompt {prompt} are asked for; there are {n_prompts} prompts of {n_pos}."
        )
    if config.causal and key > query:
        raise SAEError(f"{config.name} is causal: position {query} does not see position {key}. Choose a key at or before it.")


def _check_head(config: ModelConfig, layer: int, head: int) -> None:
    if not (0 <= layer < config.n_layers and 0 <= head < config.n_heads):
        raise SAEError(
            f"head {head} of layer {layer} is not in {config.name}, which has layers 0..{config.n_layers - 1} of heads "
            f"0..{config.n_heads - 1}."
        )
