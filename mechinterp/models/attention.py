"""Softmax attention over whole prompts, over one query a prompt, and over a prefix computed before.

What families differ in stands in ``Heads``: normalised and turned queries and keys, keys and values that heads share,
windows, distances, soft-capped scores.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.cache import ActivationCache
from mechinterp.models.config import ModelConfig
from mechinterp.models.rotary import rotate
from mechinterp.models.trace import Trace
from mechinterp.models.weights import Norm, Weights


@dataclass(frozen=True)
class Prefix:
    """Keys and values of every layer at the first ``length`` positions, to be attended to but not computed again.

    Keys are as the projection makes them: they are turned with those that follow.
    """

    keys: Sequence[Float[Tensor, "batch prefix group d_head"]]
    values: Sequence[Float[Tensor, "batch prefix group d_head"]]
    length: int

    @classmethod
    def of(cls, cache: ActivationCache, n_layers: int, length: int) -> "Prefix":
        """The first ``length`` positions of a pass that recorded ``k`` and ``v``."""
        keys = [cache["k", layer][:, :length] for layer in range(n_layers)]
        values = [cache["v", layer][:, :length] for layer in range(n_layers)]
        return cls(keys, values, length)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Prefix and new positions joined. Where ``k`` stacks several variants of the batch, each gets the prefix."""
        variants = k.shape[0] // self.keys[layer].shape[0]
        joined = (
            torch.cat([old.expand(variants, *old.shape).flatten(0, 1), new], dim=1)
            for old, new in ((self.keys[layer], k), (self.values[layer], v))
        )
        return tuple(joined)  # type: ignore[return-value]


@dataclass(frozen=True)
class Heads:
    """How a layer's heads compare queries with keys: all that the weights do not say.

    ``queries``: the position of every query, counted from the prompt's beginning; keys stand at 0, 1, 2, ... ``only``: these
    heads alone, each with a key and a value of its own (which a normalisation over all heads does not allow).
    """

    config: ModelConfig
    layer: int
    queries: Int[Tensor, "#batch query_pos"]
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    only: Sequence[int] | None = None

    @classmethod
    def of(
        cls, weights: Weights, layer: int, queries: Int[Tensor, "#batch query_pos"], only: Sequence[int] | None = None
    ) -> "Heads":
        block = weights.blocks[layer]
        return cls(weights.config, layer, queries, block.q_norm, block.k_norm, only)

    def turn_q(self, q: Float[Tensor, "*source batch query_pos head_index d_head"]) -> Tensor:
        """Queries as they meet keys: normalised and turned, where the model does so."""
        return self._turn(self._normalize(q, self.q_norm), self.queries)

    def turn_k(self, k: Float[Tensor, "*source batch key_pos group d_head"]) -> Tensor:
        return self._turn(self._normalize(k, self.k_norm), torch.arange(k.shape[-3], device=k.device)[None])

    def seen(self, n_keys: int) -> Bool[Tensor, "#batch 1 query_pos key_pos"] | None:
        """Which keys queries see; None: all."""
        return visible(self.queries, n_keys, self.config.window_of(self.layer)) if self.config.causal else None

    def bias(self, n_keys: int) -> Float[Tensor, "#batch head_index query_pos key_pos"] | None:
        """What is added to the scores for the distance between query and key (ALiBi, Press et al. 2021), if anything."""
        if not self.config.alibi:
            return None
        distance = torch.arange(n_keys, device=self.queries.device) - self.queries[:, None, :, None]
        slopes = alibi_slopes(self.config.n_heads).to(self.queries.device)
        return distance * (slopes if self.only is None else slopes[list(self.only)])[:, None, None]

    def mask(self, n_keys: int, dtype: torch.dtype) -> Tensor | None:
        """Both of these as the fused kernel takes them: true where a key is seen, or what is added to its score."""
        bias, seen = self.bias(n_keys), self.seen(n_keys)
        if bias is None or seen is None:
            return seen if bias is None else bias.to(dtype)
        return bias.to(dtype).masked_fill(~seen, -torch.inf)

    def scores(self, q: Tensor, k: Tensor) -> Float[Tensor, "*source batch head_index query_pos key_pos"]:
        """What the softmax is taken of, from turned queries and keys; minus infinity where a key is not seen."""
        config, n_keys = self.config, k.shape[-3]
        scores = torch.einsum("...qhd,...khd->...hqk", q, self.for_every_head(k)) * config.scale
        if config.attention_soft_cap is not None:
            scores = soft_cap(scores, config.attention_soft_cap)
        mask = self.mask(n_keys, scores.dtype)
        if mask is None:
            return scores
        return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask

    def for_every_head(
        self, x: Float[Tensor, "*source batch pos group d_head"]
    ) -> Float[Tensor, "*source batch pos head_index d_head"]:
        """Keys or values of groups as those of the heads that share them."""
        n_heads = self.config.n_heads if self.only is None else len(self.only)
        return x if x.shape[-2] == n_heads else x.repeat_interleave(n_heads // x.shape[-2], dim=-2)

    def _turn(self, x: Tensor, positions: Tensor) -> Tensor:
        rotary = self.config.rotary_of(self.layer)
        return x if rotary is None else rotate(x, positions, rotary)

    def _normalize(self, x: Tensor, norm: Norm | None) -> Tensor:
        if norm is None:
            return x
        if self.config.qk_norm == "head":
            return F.rms_norm(x, x.shape[-1:], norm.w, self.config.norm_eps)
        return F.rms_norm(x.flatten(-2), (x.shape[-2] * x.shape[-1],), norm.w, self.config.norm_eps).unflatten(-1, x.shape[-2:])


def attend(
    q: Float[Tensor, "batch query_pos head_index d_head"],
    k: Float[Tensor, "batch key_pos group d_head"],
    v: Float[Tensor, "batch key_pos group d_head"],
    heads: Heads,
    trace: Trace,
    is_triangle: bool,
) -> Float[Tensor, "batch query_pos head_index d_head"]:
    """``z = softmax(scores) v`` for a pass that may be watched.

    Scores and pattern are made only if somebody touches them; otherwise the fused kernel runs. ``is_triangle``: queries
    and keys stand at the same positions.
    """
    layer = heads.layer
    q, k = trace("rot_q", layer, heads.turn_q(q)), trace("rot_k", layer, heads.turn_k(k))
    if not (trace.touches("attn_scores", layer) or trace.touches("pattern", layer)):
        return mix(q, k, v, heads, is_triangle=is_triangle)
    scores = trace("attn_scores", layer, heads.scores(q, k))
    pattern = trace("pattern", layer, scores.softmax(-1))
    return torch.einsum("bhqk,bkhd->bqhd", pattern, heads.for_every_head(v))


def mix(
    q: Float[Tensor, "*source batch query_pos head_index d_head"],
    k: Float[Tensor, "*source batch key_pos group d_head"],
    v: Float[Tensor, "*source batch key_pos group d_head"],
    heads: Heads,
    *,
    is_triangle: bool = False,
) -> Float[Tensor, "*source batch query_pos head_index d_head"]:
    """``z`` from turned queries and keys, by the fused kernel where it can (soft-capped scores it cannot), also for stacks."""
    config, stack = heads.config, q.shape[:-3]
    k, v = heads.for_every_head(k), heads.for_every_head(v)
    if config.attention_soft_cap is not None:
        return torch.einsum("...hqk,...khd->...qhd", heads.scores(q, k).softmax(-1), v)
    plain = config.causal and is_triangle and config.window_of(heads.layer) is None and not config.alibi
    mask = None if plain else heads.mask(k.shape[-3], q.dtype)
    if mask is not None and len(stack) == 2 and mask.shape[0] > 1:
        mask = mask.repeat(stack[0], 1, 1, 1)
    q, k, v = (x.flatten(0, -4).transpose(1, 2) for x in (q, k, v))
    z = F.scaled_dot_product_attention(q, k, v, mask, is_causal=plain, scale=config.scale)
    return z.transpose(1, 2).unflatten(0, stack)


def visible(
    queries: Int[Tensor, "#batch query_pos"], n_keys: int, window: int | None = None
) -> Bool[Tensor, "#batch 1 query_pos key_pos"]:
    """Which keys a causal model shows to queries at these positions: those at or before their own, of a window the last."""
    keys, queries = torch.arange(n_keys, device=queries.device), queries[:, None, :, None]
    return keys <= queries if window is None else (keys <= queries) & (keys > queries - window)


def alibi_slopes(n_heads: int) -> Float[Tensor, "head_index"]:
    """Powers of ``2^(-8/n)``; where ``n_heads`` is no power of two, those of the next one are taken in turn."""
    power = 2 ** math.ceil(math.log2(n_heads))
    slopes = torch.tensor([2.0 ** (-8 * (i + 1) / power) for i in range(power)])
    return slopes if power == n_heads else torch.cat([slopes[1::2], slopes[::2]])[:n_heads]


def soft_cap(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)
