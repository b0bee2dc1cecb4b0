"""AtP*'s QK fix: what a changed query or key does through the softmax, recomputed instead of linearised.

Kramár et al. 2024, arXiv:2403.00745, section 3.1.1. Where attention is saturated the gradient of the scores is next to
nothing, and a first-order method sees no query and no key however much cutting them costs. But a softmax is cheap. So the
changed pattern A' is computed as it is, and only what lies *behind* it is linear, by ``d = dm/dA`` on the clean run: the
effect is ``<d, A' - A>``.

* A changed **query** changes its own row: one softmax.
* A changed **key** changes one score by ``δ`` in the row of every query that sees it. With σ the logistic function and
  ``a`` the key's log-odds against all other keys of the row, the key's share of the attention moves by ``σ(a + δ) - σ(a)``,
  and each unit of it is worth ``gap = d_t - (mean of d over the other keys)``. No key needs a softmax of its own.

The paper writes the second as ``A_t (e^δ - 1) / (1 + A_t (e^δ - 1)) · (d_t - d̄)``. That is the same number, but in single
precision it divides 0 by 0 where ``A_t`` is 1, in the very rows that the fix is for.

As in the paper a node is one query or one key: effects of several positions are added, not computed jointly.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.models.attention import Heads


@dataclass(frozen=True)
class Rows:
    """The attention of one layer on the clean run, and what the metric makes of it by each ``run`` of gradients.

    ``q`` and ``k`` are as they meet in the softmax (``Heads``), keys once for every head. ``pull`` is ``d_t - d̄``, what the
    metric gains by a unit of attention that t takes from all keys alike; ``gap``, by one that it takes from the other keys.
    """

    heads: Heads
    q: Float[Tensor, "batch query_pos head_index d_head"]
    k: Float[Tensor, "batch key_pos head_index d_head"]
    odds: Float[Tensor, "batch head_index query_pos key_pos"]
    pull: Float[Tensor, "run batch head_index query_pos key_pos"]
    gap: Float[Tensor, "run batch head_index query_pos key_pos"]

    @classmethod
    def of(
        cls,
        q: Float[Tensor, "batch query_pos head_index d_head"],
        k: Float[Tensor, "batch key_pos group d_head"],
        v: Float[Tensor, "batch key_pos group d_head"],
        heads: Heads,
        dz: Float[Tensor, "run batch query_pos head_index d_head"],
    ) -> "Rows":
        """From queries, keys and values as the projection made them in the clean run and the metric's gradients at ``z``:
        ``dm/dA`` is ``<dz of the query, v of the key>``.
        """
        q, k, v = heads.turn_q(q), heads.for_every_head(heads.turn_k(k)), heads.for_every_head(v)
        scores = heads.scores(q, k)
        d = torch.einsum("rbqhd,bkhd->rbhqk", dz, v)
        log_share = scores.log_softmax(-1)
        share = log_share.exp()
        pull = d - (share * d).sum(-1, keepdim=True)
        # All keys but the strongest have at most half of the attention, so nothing is lost in 1 - share. For the strongest
        # of a saturated row everything would be: its rivals get a softmax among themselves.
        is_first = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.argmax(-1, keepdim=True), True)
        rivals = scores.masked_fill(is_first, -torch.inf)
        first_odds = scores - rivals.logsumexp(-1, keepdim=True)
        odds = torch.where(is_first, first_odds, log_share - torch.log1p(-share))
        among_rivals = rivals.softmax(-1).nan_to_num()  # a query that sees one key has no rivals, and nothing to shift
        first_gap = d - (among_rivals * d).sum(-1, keepdim=True)
        gap = torch.where(is_first, first_gap, pull / (1 - share).masked_fill(is_first, 1))
        return cls(heads, q, k, odds, pull, gap)

    def of_queries(
        self, changed: Float[Tensor, "source batch query_pos head_index d_head"]
    ) -> Float[Tensor, "run source batch query_pos head_index"]:
        """By how much the metric rises if each query alone is ``changed``."""
        pattern = self.heads.scores(self.heads.turn_q(changed), self.k).softmax(-1)
        return torch.einsum("sbhqk,rbhqk->rsbqh", pattern, self.pull)

    def of_keys(
        self, changed: Float[Tensor, "source batch key_pos group d_head"]
    ) -> Float[Tensor, "run source batch key_pos head_index"]:
        """By how much the metric rises, head by head, if each key alone is ``changed``, summed over the queries that see it."""
        config = self.heads.config
        change = self.heads.for_every_head(self.heads.turn_k(changed)) - self.k
        shift = config.scale * torch.einsum("bqhd,sbkhd->sbhqk", self.q, change)
        if (cap := config.attention_soft_cap) is not None:
            before = torch.einsum("bqhd,bkhd->bhqk", self.q, self.k) * (config.scale / cap)
            # tanh(a + x) - tanh(a) = tanh(x) (1 - tanh(a) tanh(a + x)), which loses nothing where x is small.
            shift = cap * torch.tanh(shift / cap) * (1 - torch.tanh(before) * torch.tanh(before + shift / cap))
        return torch.einsum("sbhqk,rbhqk->rsbkh", _moved(self.odds, shift), self.gap)


def _moved(odds: Float[Tensor, "..."], shift: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``σ(odds + shift) - σ(odds)``, to full relative precision: for small shifts, and for shares next to 0 or 1."""
    up, down = shift.clamp(min=0), (-shift).clamp(min=0)
    return -shift.sign() * torch.expm1(-shift.abs()) * torch.sigmoid(odds + up) * torch.sigmoid(down - odds)
