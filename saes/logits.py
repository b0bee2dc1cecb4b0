"""What latents say to the vocabulary directly: ``W_dec[i] W_O W_U``, past every layer in between.

The effect that a latent has through later layers is not in it: the earlier the layer, the less it tells. The pages of
Kissane et al. 2024 (arXiv:2406.17759) show its top and bottom tokens for every latent.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import SAEError
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.models.transformer import Transformer
from saes.base import SparseAutoencoder
from saes.components import fold
from saes.linear import Chosen, alone, numbers, written
from saes.places import Place

_CHUNK = 1 << 25  # numbers of a latents × d_vocab block: 128 MB in float32


@dataclass(frozen=True, eq=False)
class TokenEffects:
    """The tokens that each latent raises most (``top``, largest first) and lowers most (``bottom``, lowest first)."""

    latents: tuple[int, ...]
    top: Int[Tensor, "latent token"]
    top_effects: Float[Tensor, "latent token"]
    bottom: Int[Tensor, "latent token"]
    bottom_effects: Float[Tensor, "latent token"]

    def words(self, latent: int, tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
        """The top and the bottom tokens of a latent, written out."""
        if latent not in self.latents:
            raise SAEError(f"latent {latent} is not among those looked at: {', '.join(map(str, self.latents[:8]))}, ...")
        row = self.latents.index(latent)
        return tokenizer.strings(self.top[row].tolist()), tokenizer.strings(self.bottom[row].tolist())


def logit_effects(
    model: Transformer, autoencoder: SparseAutoencoder, latents: Chosen = None, *, place: Place | str | None = None
) -> Float[Tensor, "latent d_vocab"]:
    """What a unit of each latent adds to each logit directly, times the final normalisation's scale at that position.

    Exactly what adding ``written(...)`` to the last residual stream does to the logits with ``ln_final_scale`` held fixed,
    once divided by it: the gain and the centring of the final normalisation are in it. Where logits are soft-capped (Gemma-2)
    it is what the logits before the cap gain. A constant over the vocabulary changes no probability (before a cap); compare
    tokens, or subtract the mean. Memory: latents × d_vocab, and a copy of ``W_U``.
    """
    return written(model, autoencoder, latents, place=place) @ _readout(model)


def top_tokens(
    model: Transformer,
    autoencoder: SparseAutoencoder,
    latents: Chosen = None,
    *,
    n: int = 10,
    place: Place | str | None = None,
) -> TokenEffects:
    """The ``n`` tokens that each latent (None: all) raises and lowers most, directly.

    Effects are less their mean over the vocabulary, as a softmax sees them. In chunks: no more memory than 128 MB and a
    copy of ``W_U``. ``SAEError`` for an ``n`` that the vocabulary has not.
    """
    one = alone(autoencoder, place)
    chosen = numbers(one, latents)
    if not 1 <= n <= model.config.d_vocab:
        raise SAEError(f"n={n} tokens cannot be shown of {model.config.d_vocab}. Give 1 <= n <= {model.config.d_vocab}.")
    U = _readout(model)
    U = U - U.mean(1, keepdim=True)
    top, bottom = [], []
    for some in chosen.split(max(1, _CHUNK // model.config.d_vocab)):
        effects = written(model, one, some) @ U
        top.append(effects.topk(n))
        bottom.append(effects.topk(n, largest=False))
    best, worst = (torch.cat([found.indices for found in side]) for side in (top, bottom))
    most, least = (torch.cat([found.values for found in side]) for side in (top, bottom))
    return TokenEffects(tuple(chosen.tolist()), best, most, worst, least)


def _readout(model: Transformer) -> Float[Tensor, "d_model d_vocab"]:
    return fold(model.weights.ln_final, model.weights.W_U, model.config)
