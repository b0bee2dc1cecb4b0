"""An autoencoder on ``z`` as two linear maps: what its latents read of each head, and what they write to the stream.

Both are exact where a latent is active, once what depends on the whole input is held at its value (``normalize``, and the
scale of a normalisation after attention). Attributions to latents stand on these maps.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.cache import ActivationCache
from mechinterp.errors import SAEError
from mechinterp.models.config import ModelConfig
from mechinterp.models.transformer import Transformer
from mechinterp.sites import Site
from saes.base import NORMALIZATIONS, SparseAutoencoder
from saes.places import Place

Chosen = Sequence[int] | Int[Tensor, "latent"] | None


def alone(autoencoder: SparseAutoencoder, place: Place | str | None = None) -> SparseAutoencoder:
    """The one group at ``place`` (None: the only one there is), which must be ``z`` of a layer or of a head of it."""
    if place is None and autoencoder.n_groups > 1:
        names = ", ".join(map(str, autoencoder.places[:4]))
        raise SAEError(
            f"{autoencoder.n_groups} autoencoders stand here, at {names}, ...; say which is meant, with "
            f"place={str(autoencoder.places[0])!r}."
        )
    one = autoencoder.group(0 if place is None else place)
    if one.places[0].site.name != "z":
        raise SAEError(
            f"this reads latents through heads' outputs, and the autoencoder stands at {str(one.places[0])!r}. "
            "Use one at 'z.5' (all heads of layer 5) or at 'z.5.h3' (one of them)."
        )
    return one


def layer_of(autoencoder: SparseAutoencoder) -> int:
    """The layer at which a single group stands."""
    layer = autoencoder.places[0].layer
    assert layer is not None
    return layer


def heads_of(autoencoder: SparseAutoencoder, n_heads: int) -> tuple[int, ...]:
    """The heads that a single group reads: all of its layer, or one."""
    head = autoencoder.places[0].head
    return tuple(range(n_heads)) if head is None else (head,)


def numbers(autoencoder: SparseAutoencoder, latents: Chosen) -> Int[Tensor, "latent"]:
    """The latents chosen, as a tensor (None: all). ``SAEError`` for one that is not there."""
    if latents is None:
        return torch.arange(autoencoder.d_sae, device=autoencoder.W_enc.device)
    found = torch.as_tensor(latents, dtype=torch.long, device=autoencoder.W_enc.device).flatten()
    if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < autoencoder.d_sae:
        raise SAEError(
            f"latents {int(found.min())} to {int(found.max())} are asked for; this autoencoder has latents "
            f"0 to {autoencoder.d_sae - 1}."
        )
    return found


def frozen_encoder(
    autoencoder: SparseAutoencoder, x: Float[Tensor, "row d_in"]
) -> tuple[Float[Tensor, "d_in d_sae"], Float[Tensor, "row"]]:
    """``W, scale`` with ``pre_activations(x) = scale (x W) + constant(autoencoder)``; linear in ``x`` at a fixed ``scale``.

    Where ``normalize`` is "none", ``W`` is ``W_pre`` and ``scale`` is 1. "layer_norm" centres its input; the mean is
    linear and moves into ``W``. ``SAEError`` for a matching pursuit, whose latents are no function of this kind.
    """
    if autoencoder.kind == "matching_pursuit":
        raise SAEError(
            "a matching pursuit has no encoder: what one latent gets hangs on those chosen before it, and is no linear "
            "function of the input. Its decoder can be read (head_shares, logit_effects), its latents cannot be attributed."
        )
    W = autoencoder.W_pre[0]
    if autoencoder.normalize == "none":
        return W, torch.ones_like(x[:, 0])
    if autoencoder.normalize == "layer_norm":
        W = W - W.mean(0)
    normalized = NORMALIZATIONS[autoencoder.normalize](x.unsqueeze(0))[0][0]
    centred = x - frozen_decoder(autoencoder, x)[1]
    return W, (normalized * centred).sum(-1) / centred.square().sum(-1)  # one is a multiple of the other


def constant(autoencoder: SparseAutoencoder) -> Float[Tensor, "d_sae"]:
    """What pre-activations are without any input: ``b_enc - b_dec W_pre``."""
    return autoencoder.b_enc[0] - autoencoder.b_dec[0] @ autoencoder.W_pre[0]


def frozen_decoder(
    autoencoder: SparseAutoencoder, x: Float[Tensor, "row d_in"]
) -> tuple[Float[Tensor, "row 1"], Float[Tensor, "row 1"]]:
    """``scale, shift`` with ``reconstruct(x) = scale (latents W_dec + b_dec) + shift``."""
    undo = NORMALIZATIONS[autoencoder.normalize](x.unsqueeze(0))[1]
    zero = x.new_zeros(1, len(x), 1)
    shift = undo(zero)
    return (undo(zero + 1) - shift)[0], shift[0]


def output_weights(model: Transformer, autoencoder: SparseAutoencoder) -> Float[Tensor, "d_in d_model"]:
    """The rows of ``W_O`` through which what stands at a single group's place reaches the stream, in the model's precision.

    Under a normalisation after attention, but for its scale (``write_scale``).
    """
    W_O = model.weights.W_O(layer_of(autoencoder))
    head = autoencoder.places[0].head
    return W_O.flatten(0, 1) if head is None else W_O[head]


def write_scale(model: Transformer, cache: ActivationCache, layer: int) -> Float[Tensor, "batch pos 1"]:
    """By what a layer's normalisation after attention divides all that its heads write; 1 without one.

    It is the site ``ln1_post_scale``, where a model has it (``write_scale_sites``).
    """
    if model.config.has_norms_after:
        return cache["ln1_post_scale", layer]
    return model.weights.W_E.new_ones(1, 1, 1).expand(*cache["z", layer].shape[:2], 1)


def write_scale_sites(config: ModelConfig, layer: int) -> list[Site]:
    """What a pass must record for ``write_scale``."""
    return [Site("z", layer), *[Site("ln1_post_scale", layer)] * config.has_norms_after]


def written(
    model: Transformer, autoencoder: SparseAutoencoder, latents: Chosen = None, *, place: Place | str | None = None
) -> Float[Tensor, "latent d_model"]:
    """``W_dec[i] W_O``: what each latent adds to the residual stream, per unit of its activation.

    In the model's precision. Where ``normalize`` is not "none", an activation of 1 adds this times the input's own scale.
    Where a model normalises what its heads write (Gemma-2, OLMo-2), a latent adds its share: this, with the normalisation's
    gain in it, divided by the scale that all heads of that position make together (the site ``ln1_post_scale``).
    ``SAEError`` for an autoencoder that does not fit the model, does not stand at ``z``, or has several groups and no
    ``place`` named.
    """
    one = alone(autoencoder, place)
    one.check_fits(model.config)
    return one.W_dec[0][numbers(one, latents)].to(model.dtype) @ output_weights(model, one)
