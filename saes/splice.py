"""Putting autoencoders into the model: patches that replace an activation by its reconstruction, at their places alone.

    logits, cache = model.run(tokens, patch=spliced(autoencoder))                    # the model as the latents see it
    logits, cache = model.run(tokens, patch=spliced(autoencoder, with_error=True))   # the model itself: the error is added

An autoencoder of one head changes that head and no other (SAELens' ``run_with_saes`` applies it to every head of its hook).
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.cache import ActivationCache
from mechinterp.models.trace import Patch
from mechinterp.sites import Site
from saes.base import SparseAutoencoder
from saes.places import Place

LatentsOf = Mapping[Place, Float[Tensor, "batch pos d_sae"]]
Edit = Callable[[Place, Float[Tensor, "batch pos d_sae"]], Float[Tensor, "batch pos d_sae"]]


def spliced(
    autoencoder: SparseAutoencoder,
    *,
    with_error: bool = False,
    edit: Edit | None = None,
    where: Bool[Tensor, "batch pos"] | None = None,
) -> dict[Site, Patch]:
    """Patches for ``Transformer.run`` that send activations through ``autoencoder``.

    ``edit(place, latents) -> latents`` changes latents before they are decoded. ``with_error`` adds what the autoencoder
    misses (``x - reconstruction`` of the unedited latents), so that without an edit the run is unchanged, and with one
    nothing but the edit shows. Elsewhere than ``where`` (the trained positions, say, without BOS) values stay as they are.
    """
    groups: dict[Site, list[int]] = {}
    for group, place in enumerate(autoencoder.places):
        groups.setdefault(place.site, []).append(group)
    return {site: _patch(autoencoder.group(*numbers), with_error, edit, where) for site, numbers in groups.items()}


def ablated(
    places: "tuple[Place, ...] | list[Place]",
    values: Float[Tensor, "group d_in"] | None = None,
    where: Bool[Tensor, "batch pos"] | None = None,
) -> dict[Site, Patch]:
    """Patches that write a constant at each place: ``values`` (its mean, say), or zero."""
    at: dict[Site, list[tuple[Place, Tensor | None]]] = {}
    for group, place in enumerate(places):
        at.setdefault(place.site, []).append((place, None if values is None else values[group]))

    def constant(replaced: list[tuple[Place, Tensor | None]]) -> Patch:
        def patch(value: Tensor, _: ActivationCache) -> Tensor:
            for place, mean in replaced:
                part = place.part(value)
                new = torch.zeros_like(part) if mean is None else mean.to(part).expand_as(part)
                value = place.write(value, _only(where, new, part))
            return value

        return patch

    return {site: constant(replaced) for site, replaced in at.items()}


def _patch(autoencoder: SparseAutoencoder, with_error: bool, edit: Edit | None, where: Tensor | None) -> Patch:
    """The patch of one site; ``autoencoder`` holds the groups that stand there."""

    def edited(latents: Float[Tensor, "group batch pos d_sae"]) -> Tensor:
        assert edit is not None
        return torch.stack([edit(place, own) for place, own in zip(autoencoder.places, latents, strict=True)])

    def patch(value: Tensor, _: ActivationCache) -> Tensor:
        x = torch.stack([place.part(value) for place in autoencoder.places])
        new = autoencoder.reconstruct(x.to(autoencoder.W_enc.dtype), edited if edit else None).to(x.dtype)
        if with_error:
            new = new + (x - autoencoder.reconstruct(x.to(autoencoder.W_enc.dtype)).to(x.dtype)).detach()
        for place, old, own in zip(autoencoder.places, x, new, strict=True):
            value = place.write(value, _only(where, own, old))
        return value

    return patch


def _only(where: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if where is None else torch.where(where.unsqueeze(-1), new, old)
