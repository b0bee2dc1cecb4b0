"""Direct feature attribution (DFA): which heads and which source positions make a latent what it is.

A head's output is a weighted sum over source positions, and a latent's pre-activation is linear in it. So with the
attention pattern ``A`` held fixed, and ``u[s,h,i] = v[s,h] . W_pre[h,:,i]``,

    DFA[h,q,s,i] = A[h,q,s] u[s,h,i]        pre_i[q] = sum_h sum_s DFA[h,q,s,i] + c_i,    c_i = b_enc_i - b_dec . W_pre_i

exactly (Kissane et al. 2024, arXiv:2406.17759). Their code forms ``A[h,q,s] v[s,h]`` for every dimension of every
head, sums over heads at once and leaves ``c_i`` out; the product with ``u`` comes tens of times cheaper and keeps heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.cache import ActivationCache
from mechinterp.errors import SAEError
from mechinterp.models.transformer import Transformer
from mechinterp.sites import Site
from saes.base import SparseAutoencoder
from saes.linear import Chosen, alone, constant, frozen_encoder, heads_of, layer_of, numbers
from saes.places import Place

Queries = Sequence[int] | Int[Tensor, "prompt query_pos"] | None


@dataclass(frozen=True, eq=False)
class DFA:
    """The pre-activations of ``latents`` at ``queries``, as sums over heads and source positions.

    In units of the latents; positive: it speaks for the latent. What is explained is the pre-activation, also of a latent
    that stays closed. ``constant`` belongs to no head and no position.
    """

    place: Place
    latents: tuple[int, ...]
    heads: tuple[int, ...]
    queries: Int[Tensor, "batch query_pos"]
    by_head_and_source: Float[Tensor, "batch latent head_index query_pos key_pos"]
    constant: Float[Tensor, "latent"]

    @property
    def by_source(self) -> Float[Tensor, "batch latent query_pos key_pos"]:
        return self.by_head_and_source.sum(2)

    @property
    def by_head(self) -> Float[Tensor, "batch latent head_index query_pos"]:
        """``z[q,h] . W_pre[h,:,i]``: no approximation even with the pattern free."""
        return self.by_head_and_source.sum(-1)

    @property
    def pre_activations(self) -> Float[Tensor, "batch latent query_pos"]:
        return self.by_head.sum(2) + self.constant[:, None]

    def top_sources(
        self, n: int = 5
    ) -> tuple[Float[Tensor, "batch latent query_pos source"], Int[Tensor, "batch latent query_pos source"]]:
        """What the ``n`` source positions that speak most for each latent contribute, and which they are."""
        found = self.by_source.topk(min(n, self.by_source.shape[-1]))
        return found.values, found.indices

    def by_offset(self) -> Float[Tensor, "batch latent query_pos offset"]:
        """``by_source`` by how far back the source stands: 0 is the query's own position. Later sources are left out."""
        by_source = self.by_source
        back = torch.arange(by_source.shape[-1], device=by_source.device)
        source = self.queries.to(by_source.device)[:, None, :, None] - back
        return by_source.gather(-1, source.clamp(min=0).expand_as(by_source)) * (source >= 0)

    def by_token(
        self,
        tokens: Int[Tensor, "batch key_pos"],
        d_vocab: int,
        where: Bool[Tensor, "batch latent query_pos"] | None = None,
    ) -> Float[Tensor, "latent d_vocab"]:
        """What each token of the vocabulary contributes as a source, summed over prompts and queries.

        ``where`` keeps some queries of some latents: those at which the latent is active, say.
        """
        by_source = self.by_source if where is None else self.by_source * where.unsqueeze(-1)
        summed = by_source.sum(2).transpose(0, 1).flatten(1)
        return summed.new_zeros(len(summed), d_vocab).index_add_(1, tokens.to(summed.device).flatten(), summed)


def dfa(
    model: Transformer,
    autoencoder: SparseAutoencoder,
    tokens: Int[Tensor, "batch pos"],
    latents: Chosen,
    *,
    place: Place | str | None = None,
    queries: Queries = None,
) -> DFA:
    """Run the model, then ``dfa_from_cache``. Cost: one pass, and what is said there.

    >>> from mechinterp.models.load import load
    >>> model, place = load("builtin"), Place.parse("z.1")
    >>> autoencoder = SparseAutoencoder.random([place], d_in=128, d_sae=512)
    >>> found = dfa(model, autoencoder, torch.tensor([[1, 2, 3, 2]]), [7], queries=[3])
    >>> found.by_head_and_source.shape  # prompt, latent, head, query, source
    torch.Size([1, 1, 8, 1, 4])
    """
    one = alone(autoencoder, place)
    one.check_fits(model.config)
    with torch.no_grad():
        _, cache = model.run(tokens, record=dfa_sites(one), logits_at="last")
    return dfa_from_cache(one, cache, latents, queries=queries)


def dfa_sites(autoencoder: SparseAutoencoder, place: Place | str | None = None) -> list[Site]:
    """What a pass must record for ``dfa_from_cache``: values, pattern and ``z``."""
    layer = layer_of(alone(autoencoder, place))
    return [Site(name, layer) for name in ("v", "pattern", "z")]


def dfa_from_cache(
    autoencoder: SparseAutoencoder,
    cache: ActivationCache,
    latents: Chosen,
    *,
    place: Place | str | None = None,
    queries: Queries = None,
) -> DFA:
    """Direct feature attribution of ``latents`` (None: all) at ``queries`` (None: every position; a tensor: each prompt's own).

    Reads ``dfa_sites`` from the cache. A gated autoencoder's latents are explained by their magnitude, ``W_pre``; whether
    a gate or a threshold lets them through is not. Inputs that the autoencoder normalises are held at their scale.

    Memory: batch × latents × heads × queries × positions numbers, in the autoencoder's precision: choose latents and
    queries. ``SAEError`` for autoencoders that do not stand at ``z``, for matching pursuits, and for latents and queries
    that are not there; ``UnknownSite`` for what the cache lacks.
    """
    one = alone(autoencoder, place)
    chosen, layer = numbers(one, latents), layer_of(one)
    pattern = cache["pattern", layer].to(one.W_enc.dtype)
    heads = list(heads_of(one, pattern.shape[1]))
    v = per_head(cache["v", layer], pattern.shape[1]).to(pattern.dtype)[:, :, heads]
    if v.shape[2] * v.shape[3] != one.d_in:
        raise SAEError(f"the autoencoder reads {one.d_in} numbers a position; these heads have {v.shape[2]} × {v.shape[3]}.")
    at = _queries(queries, pattern)
    pattern = pattern[:, heads]
    if queries is not None:
        pattern = pattern.gather(2, at[:, None, :, None].expand(-1, len(heads), -1, pattern.shape[-1]))
    W, scale = _frozen(one, cache, at)
    u = torch.einsum("bshd,hdi->bish", v, W[:, chosen].unflatten(0, v.shape[2:]))
    by_head_and_source = torch.einsum("bhqs,bish->bihqs", pattern * scale[:, None, :, None], u)
    return DFA(one.places[0], tuple(chosen.tolist()), tuple(heads), at, by_head_and_source, constant(one)[chosen])


def per_head(v: Float[Tensor, "batch pos group d_head"], n_heads: int) -> Float[Tensor, "batch pos head_index d_head"]:
    """The values that each head reads, also where several heads share one key and value."""
    return v if v.shape[2] == n_heads else v.repeat_interleave(n_heads // v.shape[2], 2)


def _frozen(
    one: SparseAutoencoder, cache: ActivationCache, at: Int[Tensor, "batch query_pos"]
) -> tuple[Float[Tensor, "d_in d_sae"], Float[Tensor, "batch query_pos"]]:
    """The encoder, and what the autoencoder scales each query's input by (1 without normalisation)."""
    x = one.places[0].read(cache).to(one.W_enc.dtype)
    x = x.gather(1, at.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    W, scale = frozen_encoder(one, x.flatten(0, 1))
    return W, scale.unflatten(0, at.shape)


def _queries(queries: Queries, pattern: Float[Tensor, "batch head_index pos key_pos"]) -> Int[Tensor, "batch query_pos"]:
    n_prompts, _, n_pos, _ = pattern.shape
    at = torch.as_tensor(range(n_pos) if queries is None else queries, dtype=torch.long, device=pattern.device)
    at = at.expand(n_prompts, -1) if at.dim() == 1 else at
    if at.dim() != 2 or len(at) != n_prompts:
        raise SAEError(f"queries {list(at.shape)} fit no {n_prompts} prompts. Give positions, or [batch, query] of them.")
    if at.numel() and not 0 <= int(at.min()) <= int(at.max()) < n_pos:
        raise SAEError(f"queries stand at {int(at.min())} to {int(at.max())}; these prompts have positions 0 to {n_pos - 1}.")
    return at
