"""Steering latents: some latents of an autoencoder are raised, set or scaled while the model runs.

    edit = steer_latents(autoencoder, {"f5.17": 3.0, "z.6.h2": {4: 1.0, 9: -1.0}}, at=prompts.end)
    logits, _ = model.run(prompts.clean, patch=combine(edit, scale_heads({"a10.h7": 0.0})))

With the error of the autoencoder added back, nothing but the edit shows: a latent raised by ``c`` moves the activation by ``c``
times its decoder row.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.errors import SAEError, nearest
from mechinterp.interventions import Positions, only_at
from mechinterp.models.trace import Patch
from mechinterp.nodes import Node
from mechinterp.sites import Site
from saes.base import SparseAutoencoder
from saes.places import Place
from saes.splice import spliced

MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda latent, value: latent + value,
    "set": lambda latent, value: value.expand_as(latent),
    "scale": lambda latent, value: latent * value,
}


def steer_latents(
    autoencoder: SparseAutoencoder,
    values: Mapping[Place | Node | str, float | Mapping[int, float]],
    *,
    mode: str = "add",
    at: Positions | None = None,
    with_error: bool = True,
) -> dict[Site | str, Patch]:
    """Latents plus (``"add"``), at (``"set"``) or times (``"scale"``) a value, at one position a prompt or at all.

    ``values``: of a latent by its name (``"f5.17"``: latent 17 of layer 5's heads), or of latents by their place
    (``{"z.5.h3": {17: 3.0}}``). In units of the latent: 3 adds three times its decoder row (where the autoencoder normalises
    its input, to the normalised one). ``add`` and ``set`` also wake latents that are not active, whatever its kind allows.
    ``with_error`` adds what the autoencoder misses, so that nothing but the edit shows; without it, the places steered, and
    no others, carry its reconstruction. An intervention like those of ``mechinterp.interventions``, for ``combine`` and
    ``generate``. ``SAEError`` for a place without autoencoder, latents that it lacks or that are named twice, and modes.
    """
    if mode not in MODES:
        raise SAEError(f"there is no mode {mode!r}; there are {', '.join(MODES)}.{nearest(mode, MODES)}")
    steered = _by_place(autoencoder, values)
    if not steered:
        return {}

    def edit(place: Place, latents: Float[Tensor, "batch pos d_sae"]) -> Tensor:
        which = torch.tensor(list(steered[place]), device=latents.device)
        new = latents.clone()
        new[..., which] = MODES[mode](latents[..., which], torch.tensor(list(steered[place].values())).to(latents))
        return new

    patches: dict[Site | str, Patch] = {**spliced(autoencoder.group(*steered), with_error=with_error, edit=edit)}
    return patches if at is None else only_at(patches, at)


def _by_place(
    autoencoder: SparseAutoencoder, values: Mapping[Place | Node | str, float | Mapping[int, float]]
) -> dict[Place, dict[int, float]]:
    """The value of each latent that is named."""
    found: dict[Place, dict[int, float]] = {}
    for name, given in values.items():
        place, latents = _named(name, given)
        autoencoder.index(place)
        for latent, value in latents.items():
            if not 0 <= latent < autoencoder.d_sae:
                raise SAEError(f"latent {latent} of {str(place)!r} is not there; it has latents 0..{autoencoder.d_sae - 1}.")
            if latent in found.setdefault(place, {}):
                raise SAEError(f"latent {latent} of {str(place)!r} is given two values. Give it one.")
            found[place][latent] = float(value)
    return found


def _named(name: Place | Node | str, given: float | Mapping[int, float]) -> tuple[Place, Mapping[int, float]]:
    if isinstance(name, Node) or (isinstance(name, str) and name[:1] == "f"):
        node = Node.parse(name) if isinstance(name, str) else name
        if node.kind != "latent" or node.layer is None or node.index is None or node.pos is not None:
            raise SAEError(f"{str(name)!r} is no latent at every position. Name one, such as 'f5.17'; positions go into `at`.")
        if isinstance(given, Mapping):
            raise SAEError(f"{str(name)!r} is one latent and takes one value, not {dict(given)!r}.")
        return Place(Site("z", node.layer)), {node.index: given}
    place = Place.parse(name) if isinstance(name, str) else name
    if not isinstance(given, Mapping):
        raise SAEError(f"which latents of {str(place)!r} shall be {given}? Give {{17: {given}}}, or name one latent: 'f5.17'.")
    return place, given
