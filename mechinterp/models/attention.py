"""Softmax attention over whole prompts, over one query a prompt, and over a prefix computed before."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.cache import ActivationCache
from mechinterp.models.trace import Trace


@dataclass(frozen=True)
class Prefix:
    """Keys and values of every layer at the first ``length`` positions, to be attended to but not computed again."""

    keys: Sequence[Float[Tensor, "batch prefix head_index d_head"]]
    values: Sequence[Float[Tensor, "batch prefix head_index d_head"]]
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


def attend(
    q: Float[Tensor, "batch query_pos head_index d_head"],
    k: Float[Tensor, "batch key_pos head_index d_head"],
    v: Float[Tensor, "batch key_pos head_index d_head"],
    scale: float,
    causal: bool,
    only: Int[Tensor, "batch"] | None,
    prefix: Prefix | None,
    trace: Trace,
    layer: int,
) -> Float[Tensor, "batch query_pos head_index d_head"]:
    """``softmax(q k^T * scale) v``, under the causal mask if ``causal``.

    ``only`` is the position of the single query of each prompt (None: a query at every position after the prefix).
    Scores and pattern are made only if somebody touches them; otherwise the fused kernel runs.
    """
    if not (trace.touches("attn_scores", layer) or trace.touches("pattern", layer)):
        is_triangle = causal and only is None and prefix is None
        mask = _mask(q, k, only, prefix) if causal and not is_triangle else None
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_triangle, scale=scale).transpose(1, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = scores.masked_fill(~_mask(q, k, only, prefix), -torch.inf) if causal else scores
    scores = trace("attn_scores", layer, scores)
    pattern = trace("pattern", layer, scores.softmax(-1))
    return torch.einsum("bhqk,bkhd->bqhd", pattern, v)


def mix(
    q: Float[Tensor, "*source batch query_pos head_index d_head"],
    k: Float[Tensor, "*source batch key_pos head_index d_head"],
    v: Float[Tensor, "*source batch key_pos head_index d_head"],
    scale: float,
    seen: Bool[Tensor, "#batch 1 query_pos key_pos"] | None,
) -> Float[Tensor, "*source batch query_pos head_index d_head"]:
    """``softmax(q k^T * scale) v`` by the fused kernel, under a mask (None: every key is seen), also for stacks of batches."""
    stack = q.shape[:-3]
    q, k, v = (x.flatten(0, -4).transpose(1, 2) for x in (q, k, v))
    if seen is not None and len(stack) == 2:
        seen = seen.expand(stack[1], -1, -1, -1).repeat(stack[0], 1, 1, 1) if seen.shape[0] > 1 else seen
    return F.scaled_dot_product_attention(q, k, v, seen, scale=scale).transpose(1, 2).unflatten(0, stack)


def visible(queries: Int[Tensor, "#batch query_pos"], n_keys: int) -> Bool[Tensor, "#batch 1 query_pos key_pos"]:
    """Which keys a causal model shows to queries at these positions: those at or before their own."""
    return torch.arange(n_keys, device=queries.device) <= queries[:, None, :, None]


def _mask(q, k, only, prefix) -> Bool[Tensor, "#batch 1 query_pos key_pos"]:
    queries = torch.arange(q.shape[1], device=q.device)[None] if only is None else only[:, None]
    return visible(queries + (prefix.length if prefix else 0), k.shape[1])
