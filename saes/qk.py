"""Why a head attends where it does: an attention score as a sum over pairs of components, one read by each side.

    score[q,k] = (sum_c c[q] W_Q / scale[q] + b_Q) . (sum_c c[k] W_K / scale[k] + b_K) / sqrt(d_head)

Scores are bilinear in the residual streams at query and key, with the normalisations' scales held fixed (the QK circuit of
Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"); so each pair of components has its own share, and
where autoencoders take earlier layers apart, each pair of latents. Rotary positions turn each side's parts by the angle of
its position, and a normalisation of queries and keys is a gain and one more scale: both leave a score bilinear. What is
done to the score afterwards (a soft cap, ALiBi's distances) is kept apart.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.cache import ActivationCache
from mechinterp.errors import SAEError
from mechinterp.models.attention import alibi_slopes, soft_cap
from mechinterp.models.config import ModelConfig
from mechinterp.models.rotary import rotate
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
    (all those with the keys' bias, where positions do not turn it) does nothing to the pattern. Compare with another key's
    pairs. ``attn_score`` is what the softmax is given: the score, soft-capped where the model does so (``cap``), and what
    it adds for the ``distance`` (ALiBi).
    """

    queries: tuple[Component, ...]
    keys: tuple[Component, ...]
    pairs: Float[Tensor, "query_component key_component"]
    cap: float | None = None
    distance: float = 0.0

    @property
    def attn_score(self) -> float:
        """The site ``attn_scores``."""
        score = self.pairs.sum()
        return float(score if self.cap is None else soft_cap(score, self.cap)) + self.distance

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
    sites = component_sites(config, layer)
    return sites if config.qk_norm == "none" else [*sites, Site("q", layer), Site("k", layer)]


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
    ``qk_sites(config, layer)``. All pairs sum to the score before a soft cap; ``attn_score`` is the site ``attn_scores``.
    Memory: the components at two positions, times d_model. ``SAEError`` for a head or positions that are not there, and for
    a key that the query does not see.
    """
    config, upstream = model.config, tuple(upstream)
    _check(config, cache, layer, head, query, key, prompt)
    sides = [_Side(model, layer, head, port) for port in "qk"]
    streams = [stream_of(model, cache, layer, prompt=prompt, positions=[at], upstream=upstream) for at in (query, key)]
    read = [
        side.turned(side.project(stream, cache, prompt, at), at)
        for side, stream, at in zip(sides, streams, (query, key), strict=True)
    ]
    pairs = torch.einsum("qd,kd->qk", *read) * config.scale
    names = [tuple(stream.component(term) for term in range(len(stream.which))) for stream in streams]
    own, distance = Component("bias"), float(alibi_slopes(config.n_heads)[head]) * (key - query) if config.alibi else 0.0
    return ScorePairs((*names[0], own), (*names[1], own), pairs, config.attention_soft_cap, distance)


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
    back: int | None = None,
) -> Float[Tensor, "query_latent key_latent"]:
    """What each pair of latents, one at the query and one at the key, adds to a head's score, by the weights alone.

    Per unit of both activations, and times the scales of all normalisations in between, at both positions: the one that
    the head reads through, that of queries or keys, and the one after the autoencoder's attention (divide by those that the
    model has for a real prompt; where an autoencoder normalises, multiply by its inputs' scales). ``keys``: None takes the
    same autoencoder. ``places`` name a group where there are several. ``back``: how many positions before the query the key
    stands; under rotary positions a score depends on that and must be told, elsewhere it does not. ``SAEError`` unless
    both stand at ``z`` in layers before ``layer``.
    """
    keys = queries if keys is None else keys
    _check_head(model.config, layer, head)
    if back is None and model.config.rotary_of(layer) is not None:
        raise SAEError(
            f"{model.config.name} turns queries and keys by their positions, so a pair of latents has no one score. Say how "
            "many positions before the query the key stands: back=1."
        )
    sides = zip("qk", (queries, keys), (query_latents, key_latents), places, (back or 0, 0), strict=True)
    read = [_Side(model, layer, head, port).directions(one, latents, at, pos) for port, one, latents, at, pos in sides]
    return torch.einsum("qd,kd->qk", *read) * model.config.scale


@dataclass(frozen=True)
class _Side:
    """One side of a head's scores: the query that it makes of a stream, or the key that it reads with."""

    model: Transformer
    layer: int
    head: int
    port: str

    @property
    def W(self) -> Float[Tensor, "d_model d_head"]:
        return self.model.weights.port(self.layer, self.head, self.port)[0]

    def directions(self, autoencoder: SparseAutoencoder, latents: Chosen, place, pos: int) -> Float[Tensor, "latent d_head"]:
        """What latents become at a position, but for all scales."""
        directions = written(self.model, autoencoder, latents, place=place)
        at = autoencoder.places[0 if place is None else autoencoder.index(place)]
        if (at.layer or 0) >= self.layer:
            raise SAEError(
                f"head {self.head} of layer {self.layer} reads earlier layers; the autoencoder stands at {str(at)!r}."
            )
        read = directions @ fold(self.model.weights.blocks[self.layer].ln1, self.W, self.model.config)
        return self.turned(read * self.gain, pos)

    def project(self, stream: Stream, cache: ActivationCache, prompt: int, pos: int) -> Float[Tensor, "component d_head"]:
        """What each component becomes in the query or key of a position before it is turned, and last the bias."""
        config, norm = self.model.config, self.model.weights.blocks[self.layer].ln1
        scale = norm_scale(norm, cache["resid_pre", self.layer][prompt, pos].unsqueeze(0), config)
        bias = self.model.weights.port(self.layer, self.head, self.port)[1] + folded_bias(norm, self.W)
        read = torch.cat([stream.vectors @ fold(norm, self.W, config) / scale, bias.unsqueeze(0)])
        if config.qk_norm == "none":
            return read
        whole = cache[self.port, self.layer][prompt, pos]
        normed = whole if config.qk_norm == "all" else whole[self.index]
        return read * self.gain / (normed.square().mean() + config.norm_eps).sqrt()

    def turned(self, read: Float[Tensor, "component d_head"], pos: int) -> Float[Tensor, "component d_head"]:
        rotary = self.model.config.rotary_of(self.layer)
        return read if rotary is None else rotate(read[:, None, None], torch.tensor([[pos]]), rotary)[:, 0, 0]

    @property
    def index(self) -> int:
        """Which head of the site ``q`` or ``k``."""
        return self.head if self.port == "q" else self.model.config.group_of(self.head)

    @property
    def gain(self) -> Float[Tensor, "d_head"] | float:
        """That of the normalisation of queries or keys."""
        block, config = self.model.weights.blocks[self.layer], self.model.config
        norm = block.q_norm if self.port == "q" else block.k_norm
        if norm is None or norm.w is None:
            return 1.0
        return norm.w if config.qk_norm == "head" else norm.w.unflatten(0, (-1, config.d_head))[self.index]


def _check(config: ModelConfig, cache: ActivationCache, layer: int, head: int, query: int, key: int, prompt: int) -> None:
    _check_head(config, layer, head)
    n_prompts, n_pos, _ = cache["embed"].shape
    if not (0 <= query < n_pos and 0 <= key < n_pos and 0 <= prompt < n_prompts):
        raise SAEError(
            f"positions {query} and {key} of prompt {prompt} are asked for; there are {n_prompts} prompts of {n_pos}."
        )
    if config.causal and key > query:
        raise SAEError(f"{config.name} is causal: position {query} does not see position {key}. Choose a key at or before it.")
    if config.causal and (window := config.window_of(layer)) is not None and key <= query - window:
        raise SAEError(
            f"layer {layer} of {config.name} sees {window} positions back: position {query} does not see position {key}. "
            f"Choose a key from {max(0, query - window + 1)} on."
        )


def _check_head(config: ModelConfig, layer: int, head: int) -> None:
    if not (0 <= layer < config.n_layers and 0 <= head < config.n_heads):
        raise SAEError(
            f"head {head} of layer {layer} is not in {config.name}, which has layers 0..{config.n_layers - 1} of heads "
            f"0..{config.n_heads - 1}."
        )
