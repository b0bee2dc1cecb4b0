"""What latents of attention heads do, told by measured signatures: where in the text their attribution comes from.

Kissane et al. 2024 (arXiv:2406.17759, section 4) sort latents by hand into induction, local context and high-level context.
Here the sorting is arithmetic. A latent's direct feature attribution ``DFA[h, q, s]`` (``attribution.py``) says how much
each source position puts in; of what speaks for the latent, the part from a kind of source is its *share*:

    share(kind) = sum_q |f[q]| (sum of from[q, s] over s of the kind / sum of from[q, s]) / sum_q |f[q]|
    from[q, s] = max(0, sign(f[q]) sum_h DFA[h, q, s])          f[q]: the latent's activation

measured on text, and on random tokens said twice, where nothing but repetition can be learned from the context. ``family``
applies the thresholds below. A family is a signature and not a meaning: "local" does not say what is looked for nearby, an
induction latent of one word may be silent on random tokens, and one latent can do several things.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.cache import ActivationCache
from mechinterp.head_scores import repeated_tokens
from mechinterp.models.transformer import Transformer
from mechinterp.sites import Site
from saes.attribution import per_head
from saes.base import SparseAutoencoder
from saes.examples import Active, active_latents
from saes.linear import alone, frozen_encoder, heads_of, layer_of
from saes.positions import default_keep, tokenizer_of

MIN_ACTIVE = 5  # positions: below this nothing is said about a latent
POSITIONAL = 0.5  # of the activation's variance is between positions
MOST = 0.5  # of the attribution comes from one kind of source
NEARLY_ALL = 0.8  # of it comes from the last few positions
REPEATS = 1 / 3  # (second - first) / (second + first): twice as active on the second copy
N_NEAR = 4  # the query's own position and the three before
SPREAD = 5.0  # sources share the attribution, as if equally
_AT_ONCE = 1 << 22  # numbers of attribution made at once

FAMILIES = {
    "silent": f"active at fewer than {MIN_ACTIVE} positions of the text",
    "positional": f"the position alone explains {POSITIONAL:.0%} or more of the variance of its activation",
    "induction": f"{MOST:.0%} or more of the attribution comes from the token after an earlier occurrence of the present one, "
    "on random tokens said twice, where it is also twice as active the second time, or on the text",
    "previous token": f"{MOST:.0%} or more comes from one position back",
    "present token": f"{MOST:.0%} or more comes from the position itself",
    "first position": f"{MOST:.0%} or more comes from position 0",
    "local": f"{NEARLY_ALL:.0%} or more comes from the last {N_NEAR} positions",
    "context": f"{SPREAD:g} or more sources share the attribution",
    "mixed": "none of these",
}
KINDS_OF_SOURCE = ("present", "previous", "near", "first", "induction")


@dataclass(frozen=True)
class Signature:
    """What was measured of one latent; shares are fractions of the attribution that speaks for it, 0 to 1.

    ``near`` holds ``present`` and ``previous``; ``first`` and ``induction`` may overlap with any. ``sources`` is the mean of
    ``1 / sum share^2``: as many equal sources would be as spread. ``positional``: variance of the activation explained by
    position, corrected for chance. ``to_first``: attention to position 0 of the heads, weighted by their part in the
    attribution. On random tokens said twice: ``repeat_induction`` and ``repeats``, the contrast of mean activation on the
    second and first copy, -1 to 1 (both None where it is active at fewer than ``MIN_ACTIVE``
    positions).
    """

    place: str
    latent: int
    n_active: int
    present: float
    previous: float
    near: float
    first: float
    induction: float
    sources: float
    positional: float
    to_first: float
    repeat_induction: float | None
    repeats: float | None

    @property
    def family(self) -> str:
        """The first of ``FAMILIES`` that holds."""
        repeated = (self.repeat_induction or 0) >= MOST and (self.repeats or 0) >= REPEATS
        holds = {
            "silent": self.n_active < MIN_ACTIVE,
            "positional": self.positional >= POSITIONAL,
            "induction": repeated or self.induction >= MOST,
            "previous token": self.previous >= MOST,
            "present token": self.present >= MOST,
            "first position": self.first >= MOST,
            "local": self.near >= NEARLY_ALL,
            "context": self.sources >= SPREAD,
            "mixed": True,
        }
        return next(name for name in FAMILIES if holds[name])


def measure_families(
    model: Transformer,
    autoencoder: SparseAutoencoder,
    tokens: Int[Tensor, "prompt pos"],
    *,
    keep: Bool[Tensor, "prompt pos"] | None = None,
    repeated: Int[Tensor, "repeated twice"] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Signature, ...]:
    """The signature of every latent of every group, which must stand at ``z`` (concatenated, or of single heads).

    ``tokens`` is text, and ``keep`` its positions that count (None: all but BOS and padding; sources are never left out).
    ``repeated`` is what ``repeated_tokens`` draws; None draws 64 prompts as long as the text's. A latent that asks for one
    word hardly meets it among random tokens; the text then decides whether it is an induction latent (where a frequent word
    has many earlier occurrences, and chance alone a larger share).

    Cost: a pass over both, and for every active latent of every position one row of each of its heads' attention.
    Memory: a number a latent and position. ``SAEError`` for places other than ``z``, ``ModelError`` for prompts of fewer
    than six tokens.
    """
    keep = default_keep(tokens, tokenizer_of(model)) if keep is None else keep
    if repeated is None:
        repeated = repeated_tokens(model, 64, tokens.shape[1], seed=seed)
    first_of_second = repeated.shape[1] - repeated.shape[1] // 2
    both = default_keep(repeated, tokenizer_of(model))
    text = _measure(model, autoencoder, tokens, keep, 0, batch_size, "families", progress)
    twice = _measure(model, autoencoder, repeated, both, first_of_second, batch_size, "families, repeated", progress)
    return _signatures(autoencoder, text, twice, first_of_second)


def dfa_at(
    autoencoder: SparseAutoencoder,
    cache: ActivationCache,
    prompt: int,
    pos: Int[Tensor, "pair"],
    latent: Int[Tensor, "pair"],
) -> Float[Tensor, "pair head_index key_pos"]:
    """Direct feature attribution of single pairs of a query and a latent, in one prompt of the batch.

    Equal to ``dfa_from_cache``, which takes every latent at every query: here most pairs are never wanted.
    ``autoencoder`` is a single group at ``z``; ``v``, ``pattern`` and ``z`` of its layer are read from the cache.
    """
    layer = layer_of(autoencoder)
    heads = list(heads_of(autoencoder, cache["pattern", layer].shape[1]))
    pattern = cache["pattern", layer][prompt, heads][:, pos]
    v = per_head(cache["v", layer][prompt : prompt + 1], cache["pattern", layer].shape[1])[0, :, heads]
    W, scale = frozen_encoder(autoencoder, autoencoder.places[0].read(cache)[prompt, pos].to(autoencoder.W_enc.dtype))
    u = torch.einsum("shd,hdp->phs", v.to(W.dtype), W[:, latent].unflatten(0, v.shape[1:]))
    return torch.einsum("hps,p,phs->phs", pattern.to(W.dtype), scale, u)


def _kinds(tokens: Int[Tensor, "pos"], queries: Int[Tensor, "pair"]) -> dict[str, Bool[Tensor, "pair pos"]]:
    """Which source positions are of which kind, for each query of a prompt."""
    source = torch.arange(len(tokens), device=tokens.device)
    back = queries[:, None] - source
    follows = torch.zeros_like(back, dtype=torch.bool)
    follows[:, 1:] = tokens[:-1] == tokens[queries][:, None]
    kinds = (back == 0, back == 1, (back >= 0) & (back < N_NEAR), (source == 0).expand_as(back), follows & (back > 0))
    return dict(zip(KINDS_OF_SOURCE, kinds, strict=True))


@dataclass(frozen=True, eq=False)
class _Totals:
    """Sums over active positions, a row a latent; ``size`` of activations and their squares, by position."""

    n_active: Int[Tensor, "row"]
    size: Float[Tensor, "row pos"]
    squares: Float[Tensor, "row"]
    n_at: Int[Tensor, "pos"]
    weight: Float[Tensor, "row"]
    sums: Float[Tensor, "row measure"]  # of KINDS_OF_SOURCE, sources and to_first, weighted

    def add(self, row: Int[Tensor, "entry"], pos: Int[Tensor, "entry"], value: Float[Tensor, "entry"]) -> None:
        self.n_active.index_add_(0, row, torch.ones_like(row))
        self.size.view(-1).index_add_(0, row * self.size.shape[1] + pos, value.abs().double())
        self.squares.index_add_(0, row, value.double().square())

    def mean(self, measure: int) -> Float[Tensor, "row"]:
        return self.sums[:, measure] / self.weight.clamp(min=torch.finfo(torch.float64).tiny)

    def positional(self) -> Float[Tensor, "row"]:
        """Variance between positions over all variance, less what chance would give (adjusted R^2); 0 if undecidable."""
        n, n_groups = self.n_at.sum(), (self.n_at > 0).sum()
        between = (self.size.square() / self.n_at.clamp(min=1)).sum(1)
        total = self.squares - self.size.sum(1).square() / n
        if n <= n_groups:
            return torch.zeros_like(total)
        unexplained = (self.squares - between) / (n - n_groups) / (total.clamp(min=1e-300) / (n - 1))
        return torch.where(total > 0, 1 - unexplained, 0).clamp(min=0)


def _measure(
    model: Transformer,
    autoencoder: SparseAutoencoder,
    tokens: Int[Tensor, "prompt pos"],
    keep: Bool[Tensor, "prompt pos"],
    first_query: int,
    batch_size: int,
    title: str,
    progress: bool,
) -> _Totals:
    """One pass: activations at kept positions, attribution at those from ``first_query`` on."""
    groups = [alone(autoencoder, place) for place in autoencoder.places]
    autoencoder.check_fits(model.config)
    sites = {Site(name, layer_of(one)) for one in groups for name in ("z", "v", "pattern")}
    totals = _empty(autoencoder, keep)
    shown = {"desc": title, "unit": "batch", "delay": 2, "disable": None if progress else True}
    for start in tqdm(range(0, len(tokens), batch_size), **shown):
        some, kept = (x[start : start + batch_size].to(model.device) for x in (tokens, keep))
        with torch.no_grad():
            _, cache = model.run(some, record=sites, logits_at="last")
            for number, one in enumerate(groups):
                for found in active_latents(one, one.read(cache), kept):
                    row = number * one.d_sae + found.latent
                    totals.add(row.cpu(), found.pos.cpu(), found.value.cpu())
                    _attribute(totals, one, cache, some, found, row, first_query)
    return totals


def _empty(autoencoder: SparseAutoencoder, keep: Bool[Tensor, "prompt pos"]) -> _Totals:
    n_rows = autoencoder.n_groups * autoencoder.d_sae
    zeros, size = torch.zeros(n_rows, dtype=torch.float64), torch.zeros(n_rows, keep.shape[1], dtype=torch.float64)
    sums = torch.zeros(n_rows, len(KINDS_OF_SOURCE) + 2, dtype=torch.float64)
    return _Totals(zeros.long(), size, zeros, keep.sum(0).cpu(), zeros.clone(), sums)


def _attribute(
    totals: _Totals,
    one: SparseAutoencoder,
    cache: ActivationCache,
    tokens: Int[Tensor, "batch pos"],
    found: Active,
    row: Int[Tensor, "entry"],
    first_query: int,
) -> None:
    """Add the weighted shares of a batch's active latents, prompt by prompt."""
    patterns = cache["pattern", layer_of(one)]
    patterns = patterns[:, list(heads_of(one, patterns.shape[1]))]
    size_of_pair = one.d_in + patterns.shape[1] * patterns.shape[3]
    for prompt in found.prompt.unique().tolist():
        own = ((found.prompt == prompt) & (found.pos >= first_query)).nonzero().squeeze(1)
        for pairs in own.split(max(1, _AT_ONCE // size_of_pair)):
            pos, value = found.pos[pairs], found.value[pairs]
            speaks = dfa_at(one, cache, prompt, pos, found.latent[pairs]) * value.sign()[:, None, None]
            share = _fractions(speaks.sum(1))
            heads = _fractions(speaks.sum(2))
            measures = [(share * kind).sum(1) for kind in _kinds(tokens[prompt], pos).values()]
            measures.append(share.sum(1) / share.square().sum(1).clamp(min=torch.finfo(share.dtype).tiny))
            measures.append((heads * patterns[prompt, :, pos, 0].mT.to(heads.dtype)).sum(1))
            at, weight = row[pairs].cpu(), value.abs().double().cpu()
            totals.weight.index_add_(0, at, weight)
            totals.sums.index_add_(0, at, torch.stack(measures, 1).double().cpu() * weight[:, None])


def _fractions(parts: Float[Tensor, "pair part"]) -> Float[Tensor, "pair part"]:
    """Positive parts, as shares of their sum."""
    positive = parts.clamp(min=0)
    return positive / positive.sum(1, keepdim=True).clamp(min=torch.finfo(parts.dtype).tiny)


def _signatures(autoencoder: SparseAutoencoder, text: _Totals, twice: _Totals, first_of_second: int) -> tuple[Signature, ...]:
    names = [(str(place), latent) for place in autoencoder.places for latent in range(autoencoder.d_sae)]
    on_text = torch.stack([text.mean(measure) for measure in range(len(KINDS_OF_SOURCE) + 1)], 1).tolist()
    first, second = twice.size[:, :first_of_second].sum(1), twice.size[:, first_of_second:].sum(1)
    n_first, n_second = twice.n_at[:first_of_second].sum(), twice.n_at[first_of_second:].sum()
    first, second = first / n_first, second / n_second
    repeats = ((second - first) / (second + first)).tolist()
    positional, to_first = text.positional().tolist(), text.mean(len(KINDS_OF_SOURCE) + 1).tolist()
    again = twice.mean(KINDS_OF_SOURCE.index("induction")).tolist()
    found = []
    for row, (place, latent) in enumerate(names):
        heard = int(twice.n_active[row]) >= MIN_ACTIVE
        measured = dict(zip((*KINDS_OF_SOURCE, "sources"), on_text[row], strict=True))
        measured |= {"positional": positional[row], "to_first": to_first[row]}
        repeated = (again[row], repeats[row]) if heard else (None, None)
        found.append(
            Signature(place, latent, int(text.n_active[row]), **measured, repeat_induction=repeated[0], repeats=repeated[1])
        )
    return tuple(found)
