"""What heads do that needs no task: where they look in random tokens said twice, and whether their weights copy.

Attention is measured where random tokens that were said from ``s - n`` on are said again from ``s`` on (Olsson et al. 2022,
arXiv:2209.11895, "prefix matching"; Wang et al. 2022, arXiv:2211.00593, the appendices), as the mean share on one place:

    induction         s + i -> s - n + i + 1     what followed the present token
    duplicate token   s + i -> s - n + i         the present token, said before
    previous token    s + i -> s + i - 1
    first token       s + i -> 0                 a resting place ("sink"); BOS, where prompts begin with it

Weights copy if a token that is read raises its own logit: Elhage et al. 2021 ("A Mathematical Framework for Transformer
Circuits"), by the eigenvalues of the OV circuit.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import ModelError
from mechinterp.models.normalization import centre, scale_of
from mechinterp.models.transformer import Transformer
from mechinterp.models.weights import Norm

BACK = ("induction", "duplicate token", "previous token", "first token")
_LONGEST = 50  # random tokens, said twice
_TOKENS_AT_ONCE = 2048
_ROUNDING = 1e-5  # eigenvalues below this fraction of the norms that they come from are zero


@dataclass(frozen=True, eq=False)
class Repetition:
    """Each head's mean share of attention (0 to 1) on the places of ``BACK``; ``chance`` is what even attention gives.

    Even over all positions that a query may see, in layers without a window; one that looks no further back than ``n_repeated``
    cannot see most of these places, and its heads' shares of them are 0.
    """

    shares: Mapping[str, Float[Tensor, "layer head_index"]]
    chance: float
    n_repeated: int


@torch.no_grad()
def repetition_scores(
    model: Transformer,
    *,
    n_prompts: int = 32,
    among: Int[Tensor, "token"] | None = None,
    seed: int = 0,
    batch_size: int = 8,
) -> Repetition:
    """Where heads look while random tokens are said a second time; ``among``: the tokens to draw from, as ``repeated_tokens``.

    Up to 50 tokens are said twice, fewer where the context is short. Without BOS the first token is one that is
    repeated. Cost: one pass over ``n_prompts``, patterns kept.

    >>> from mechinterp.models.compiled import induction
    >>> planted = induction()
    >>> planted.roles["previous"]
    'a0.h3'
    >>> found = repetition_scores(planted.model)
    >>> print(f"{found.shares['previous token'][0, 3]:.2f}, chance {found.chance:.2f}")
    0.96, chance 0.16
    """
    tokens = repeated_tokens(model, n_prompts, among=among, seed=seed)
    n = (tokens.shape[1] - _n_before(model)) // 2
    query = torch.arange(tokens.shape[1] - n, tokens.shape[1], device=model.device)
    keys = dict(zip(BACK, (query - n + 1, query - n, query - 1, torch.zeros_like(query)), strict=True))
    sums = {name: torch.zeros(model.config.n_layers, model.config.n_heads, dtype=torch.float64) for name in BACK}
    for rows in tokens.to(model.device).split(batch_size):
        _, cache = model.run(rows, record=["pattern"], logits_at="last", logits_of=rows[:, :0])
        for layer in range(model.config.n_layers):
            for name, key in keys.items():
                sums[name][layer] += cache["pattern", layer][:, :, query, key].double().mean(-1).sum(0).cpu()
    visible = (query + 1).double() if model.config.causal else torch.full_like(query, tokens.shape[1]).double()
    return Repetition({name: total / n_prompts for name, total in sums.items()}, visible.reciprocal().mean().item(), n)


def repeated_tokens(
    model: Transformer,
    n_prompts: int,
    n_pos: int | None = None,
    *,
    among: Int[Tensor, "token"] | None = None,
    seed: int = 0,
) -> Int[Tensor, "prompt pos"]:
    """Random tokens, all different, said twice; behind BOS where the model was trained with it.

    ``n_pos``: how long prompts may be; None, a hundred tokens and BOS. ``among``: the tokens to draw from; None, all
    ``ordinary_tokens``. ``ModelError`` where there is no room for three.
    """
    usable, n_before = ordinary_tokens(model) if among is None else among, _n_before(model)
    room = min(n_pos or 2 * _LONGEST + n_before, model.config.n_ctx)
    n = min((room - n_before) // 2, len(usable))
    if n < 3:
        raise ModelError(
            f"{room} positions are read by {model.config.name}, and {len(usable)} tokens may be said: too few to say "
            "three twice, and of two what followed a token is also the token before. Draw from more tokens."
        )
    generator = torch.Generator().manual_seed(seed)
    said = torch.stack([usable[torch.randperm(len(usable), generator=generator)[:n]] for _ in range(n_prompts)])
    bos = [] if model.tokenizer is None else [model.tokenizer.bos_id] * n_before
    return torch.cat([torch.tensor([bos] * n_prompts, dtype=torch.long), said, said], 1)


def ordinary_tokens(model: Transformer) -> Int[Tensor, "token"]:
    """All tokens that stand for text: none that is marked special (padding is), BOS or unknown, and no row without a token."""
    if model.tokenizer is None:
        return torch.arange(model.config.d_vocab)
    backend = model.tokenizer.backend
    special = {token for token, added in backend.get_added_tokens_decoder().items() if added.special}
    special |= {model.tokenizer.bos_id, backend.token_to_id(getattr(backend.model, "unk_token", None) or "")}
    known = min(model.config.d_vocab, backend.get_vocab_size())
    return torch.tensor([token for token in range(known) if token not in special])


def _n_before(model: Transformer) -> int:
    """How many tokens stand before those that are repeated."""
    return int(model.tokenizer is not None and model.tokenizer.prepends_bos and model.tokenizer.bos_id is not None)


@torch.no_grad()
def copying_scores(model: Transformer) -> Float[Tensor, "layer head_index"]:
    """Whether a head's OV circuit copies: ``sum of eigenvalues / sum of their magnitudes``, -1 to 1.

    The circuit is ``E W_V W_O U``, from token to token. 1: every mixture of tokens that is attended to raises its own logits;
    -1: lowers them, as negative heads do; 0 also for a head that the logits do not hear. The sum of the eigenvalues is the sum
    over tokens of what each does to its own logit, above the mean over the vocabulary.

    ``E`` is a token as later layers find it: its embedding and what the first MLP makes of it, as in Wang et al. 2022 (their
    copying score counts names among the five highest logits; Elhage et al. take ``W_E`` alone, which tied embeddings mislead).
    Normalised exactly as the head reads it. Left out: the position, what other parts have written by then, and scales that
    are positive and the same for all tokens, that of the final normalisation and of one after attention; and soft caps of
    logits, which keep their order. Cost: the first MLP on the whole vocabulary, a product
    of ``d_vocab d_model^2``, and the eigenvalues of one ``d_head x d_head`` matrix a head (20 s for GPT-2 small, on one core).
    """
    found = torch.zeros(model.config.n_layers, model.config.n_heads, dtype=torch.float64)
    between = (readout(model) @ token_streams(model)).double()  # [d_model that is written, d_model that is read]
    for layer, block in enumerate(model.weights.blocks):
        W_V = _gained(model.weights.W_V(layer).double(), block.ln1)
        W_V = W_V.repeat_interleave(model.config.n_heads // model.config.n_groups, dim=0)
        W_O = model.weights.W_O(layer).double()
        # E W_V W_O U is d_vocab x d_vocab; its eigenvalues that are not zero are those of W_O U E W_V.
        cycle = torch.einsum("hdm,mn,hne->hde", W_O, between, W_V)
        size = W_O.flatten(1).norm(dim=1) * between.norm() * W_V.flatten(1).norm(dim=1)
        values = torch.linalg.eigvals(cycle.cpu())
        whole = values.abs().sum(1)
        heard = whole > _ROUNDING * size.cpu()
        found[layer] = torch.where(heard, values.real.sum(1) / whole.clamp(min=torch.finfo(whole.dtype).tiny), 0.0)
    return found


@torch.no_grad()
def readout(model: Transformer) -> Float[Tensor, "d_model d_vocab"]:
    """The direction that raises each token's logit above the mean over the vocabulary: ``x @ readout / scale`` for what a part
    adds to the residual stream, with the final normalisation's scale (``ln_final_scale``; 1 without normalisation); before a
    soft cap, where logits are capped."""
    U = _gained(model.weights.W_U, model.weights.ln_final)
    U = U - U.mean(1, keepdim=True)
    return U - U.mean(0, keepdim=True) if model.config.centred else U


@torch.no_grad()
def token_streams(model: Transformer) -> Float[Tensor, "d_vocab d_model"]:
    """Each token as it stands behind the first MLP, alone and without a position; normalised, where heads normalise."""
    config = model.config
    streams = model.weights.W_E if config.embed_scale is None else model.weights.W_E * config.embed_scale
    if config.has_mlp:
        streams = torch.cat([some + model.feed_forward(0, some[None])[0] for some in streams.split(_TOKENS_AT_ONCE)])
    return centre(streams, config) / scale_of(streams, config) if config.has_norms_before else streams


def _gained(W: Float[Tensor, "*some d_model d_out"], norm: Norm | None) -> Float[Tensor, "*some d_model d_out"]:
    """The gain of a normalisation, taken into the weights that read it."""
    return W if norm is None or norm.w is None else norm.w[:, None] * W
