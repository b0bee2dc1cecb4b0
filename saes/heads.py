"""Which heads a latent belongs to, and how many things a head does, from an autoencoder's weights and its activity.

Weight-based head attribution is Kissane et al. 2024 (arXiv:2406.17759): the norm of a decoder row's part at each head, as a
share of all. They read each head's top ten latents by share and asked whether they tell one story; ``head_views`` counts
what can be counted of that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import SAEError
from saes.base import SparseAutoencoder
from saes.places import Place

Shares = Float[Tensor, "group d_sae head_index"]
Labels = Sequence[str | None]  # of every latent of every group


def head_shares(autoencoder: SparseAutoencoder, d_head: int) -> Float[Tensor, "group d_sae head_index"]:
    """``||W_dec[i, head h]|| / sum_h' ||W_dec[i, head h']||``: shares of 1, for autoencoders on concatenated ``z``.

    By the weights alone: neither how often a latent is active nor ``W_O`` is in it. A row of zeros has shares of 0.
    ``SAEError`` for autoencoders elsewhere, and for a ``d_head`` that does not divide their width.
    """
    single = [str(place) for place in autoencoder.places if place.head is not None]
    if single:
        raise SAEError(f"an autoencoder on one head, {single[0]!r}, has no other heads to share with. Use one at 'z.5', say.")
    norms = _part_norms(autoencoder, d_head)
    return norms / norms.sum(-1, keepdim=True).clamp(min=torch.finfo(norms.dtype).tiny)


def top_latents(shares: Shares, head: int, n: int = 10) -> Int[Tensor, "group latent"]:
    """The ``n`` latents of each group with the largest share at a head, largest first."""
    _, d_sae, n_heads = shares.shape
    if not (0 <= head < n_heads and 1 <= n <= d_sae):
        raise SAEError(f"head {head} and n={n}: there are heads 0..{n_heads - 1} and {d_sae} latents.")
    return shares[..., head].topk(n, dim=1).indices


def effective_heads(shares: Shares) -> Float[Tensor, "group d_sae"]:
    """Over how many heads a latent is spread: ``exp`` of its shares' entropy, 1 (one head) to n_heads (evenly)."""
    return torch.special.entr(shares).sum(-1).exp()


@dataclass(frozen=True, eq=False)
class HeadSummary:
    """Of each group: how spread its latents are, and what each head has of them.

    ``effective_heads`` is the mean over latents, ``most_share`` the mean share of a latent's first head; ``n_first``
    counts latents by their first head; ``share`` is the mean share of each head.
    """

    effective_heads: Float[Tensor, "group"]
    most_share: Float[Tensor, "group"]
    n_first: Int[Tensor, "group head_index"]
    share: Float[Tensor, "group head_index"]


def summarize_heads(shares: Shares, live: Bool[Tensor, "group d_sae"] | None = None) -> HeadSummary:
    """A summary of ``shares`` over the ``live`` latents (None: all but rows of zeros); NaN for a group without any."""
    counted = shares.sum(-1) > 0 if live is None else live & (shares.sum(-1) > 0)
    weight = counted / counted.sum(1, keepdim=True)
    first = torch.nn.functional.one_hot(shares.argmax(-1), shares.shape[-1])
    weight = weight.to(shares.dtype)
    return HeadSummary(
        (effective_heads(shares) * weight).sum(1),
        (shares.amax(-1) * weight).sum(1),
        (first * counted.unsqueeze(-1)).sum(1),
        torch.einsum("gih,gi->gh", shares, weight),
    )


@dataclass(frozen=True)
class HeadView:
    """What a head's latents say about how many things it does. See ``head_views`` for what they do not say.

    ``latents`` are those attributed to the head, by ``shares`` (of concatenated autoencoders; largest first) or by activity
    (of the head's own); ``weights`` sum to 1. ``n_latents`` is their effective number, ``1 / sum w_i^2``; ``n_directions``
    that of distinct directions, ``1 / sum_ij w_i w_j cos^2(i, j)``: 1 if all write the same, ``n_latents`` if no two have
    anything in common. ``n_families`` counts labels among the first latents; None without labels.
    """

    place: Place
    latents: tuple[int, ...]
    shares: tuple[float, ...] | None
    weights: tuple[float, ...]
    n_latents: float
    n_directions: float
    n_families: int | None = None


def head_views(
    autoencoder: SparseAutoencoder,
    d_head: int,
    activity: Float[Tensor, "group d_sae"] | None = None,
    *,
    n: int = 10,
    families: Labels | None = None,
) -> tuple[HeadView, ...]:
    """An estimate of each head's polysemanticity: how many directions carry what its latents write.

    Of an autoencoder on concatenated ``z``: the ``n`` live latents with the largest share at the head. Of one on a head:
    all live latents, of which the first ``n`` are asked for their family. ``activity`` is a latent's mean activation
    over data (``autoencoder.encode(x).mean(1)``); a latent counts by activity times the norm of its part at this head.
    Without it all latents are live, and as active as each other. ``families``: a label (or None) for every
    latent of every group, in order: ``[latent.family for latent in measure_families(...)]``.

    This is an estimate. Different directions need not be different jobs: a head that copies names writes many directions
    and tells one story, so a high number alone proves nothing; a number near 1 is good evidence of one thing. It
    cannot exceed d_head, grows with the autoencoder's width (latents split) and misses what the autoencoder misses, and of
    concatenated ones not more than ``n``: compare heads of one autoencoder. Whether the latents tell one story,
    the paper's authors decided by reading them (14 of GPT-2's 144 heads were candidates for a single one).
    """
    norms = _part_norms(autoencoder, d_head)
    activity = torch.ones_like(norms[..., 0]) if activity is None else activity.to(norms)
    if activity.shape != norms.shape[:2]:
        raise SAEError(f"activity {list(activity.shape)} is not that of {list(norms.shape[:2])} (group, d_sae) latents.")
    n_latents = autoencoder.n_groups * autoencoder.d_sae
    if n < 1 or (families is not None and len(families) != n_latents):
        given = "" if families is None else f" and {len(families)} families"
        raise SAEError(f"n={n}{given} were given. Give n >= 1, and a family for each of {n_latents} latents or none.")
    views = []
    for group in range(autoencoder.n_groups):
        labels = None if families is None else families[group * autoencoder.d_sae :]
        for head in range(norms.shape[-1]):
            views.append(_view(autoencoder, group, head, norms[group], activity[group], n, labels))
    return tuple(views)


def _view(autoencoder: SparseAutoencoder, group: int, head: int, norms, activity, n: int, labels) -> HeadView:
    """``norms [d_sae head_index]`` and ``activity [d_sae]`` of one group."""
    d_head, place = autoencoder.d_in // norms.shape[-1], autoencoder.places[group]
    weight = activity.abs() * norms[:, head]
    live = weight.nonzero().squeeze(1)
    whole = place.head is None
    rank = norms[:, head] / norms.sum(1).clamp(min=torch.finfo(norms.dtype).tiny) if whole else weight
    chosen = live[rank[live].argsort(descending=True, stable=True)]
    chosen = chosen[:n] if whole else chosen
    weights = weight[chosen] / weight[chosen].sum()
    parts = autoencoder.W_dec[group, chosen, head * d_head : (head + 1) * d_head]
    names = chosen.tolist()
    found = None if labels is None else len({labels[latent] for latent in names[:n]} - {None})
    return HeadView(
        Place(place.site, head) if whole else place,
        tuple(names),
        tuple(rank[chosen].tolist()) if whole else None,
        tuple(weights.tolist()),
        float(1 / weights.square().sum()) if names else 0.0,
        participation(weights, parts),
        found,
    )


def participation(weights: Float[Tensor, "latent"], directions: Float[Tensor, "latent d"]) -> float:
    """``1 / sum_ij w_i w_j cos^2(i, j)``: the effective rank of ``sum_i w_i d_i d_i^T`` for unit ``d_i``; 0 of nothing.

    >>> participation(torch.tensor([0.5, 0.5]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    2.0
    """
    if not len(weights):
        return 0.0
    unit = directions / directions.norm(dim=1, keepdim=True)
    spread = torch.einsum("i,id,ie->de", weights, unit, unit)
    return float(1 / spread.square().sum())


def _part_norms(autoencoder: SparseAutoencoder, d_head: int) -> Float[Tensor, "group d_sae head_index"]:
    """The norm of each decoder row's part at each head; one head where the autoencoder stands on one."""
    elsewhere = [str(place) for place in autoencoder.places if place.site.name != "z"]
    if elsewhere:
        raise SAEError(f"only z is made of heads, and an autoencoder stands at {elsewhere[0]!r}. Use one at 'z.5' or 'z.5.h3'.")
    n_heads, left = divmod(autoencoder.d_in, max(d_head, 1))
    if left or d_head < 1 or (n_heads > 1 and autoencoder.places[0].head is not None):
        raise SAEError(f"heads of {d_head} numbers do not fit {autoencoder.d_in} at {str(autoencoder.places[0])!r}.")
    return autoencoder.W_dec.unflatten(-1, (n_heads, d_head)).norm(dim=-1)
