"""How an autoencoder splits what a layer's heads gather into latents and an error.

    z = latents W_dec + b_dec + error            (all heads of a layer, concatenated)

is true of every ``z``: the error is what the autoencoder leaves over. An autoencoder on concatenated ``z`` has its own
numbers for its latents. Those on single heads are read as one block-diagonal autoencoder of their layer: latent i of head
h is ``h * d_sae + i``, and there is one error a layer, the heads' errors side by side. A head without an autoencoder is all
error, and its latents are never active. Latents are in units of ``z`` (times a decoder row): where the autoencoder
normalises its inputs, that scale is taken back, and the mean it takes away counts to the error.

They are parts of what heads *gather*. Where a model normalises what the heads of a layer write together (Gemma-2, OLMo-2),
to replace a latent is to let the layer write what it then writes, under the scale that it then has.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.scores import Scores
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError, SAEError, UnknownNode
from mechinterp.models.config import ModelConfig
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node
from mechinterp.sites import Site
from saes.base import NORMALIZATIONS, SparseAutoencoder
from saes.places import Place

Z = Float[Tensor, "batch pos head_index d_head"]
Parts = tuple[Float[Tensor, "batch pos latent"], Float[Tensor, "batch pos d_z"]]  # latents and error
Mask = Bool[np.ndarray, "item"]


@dataclass(frozen=True, eq=False)
class LayerLatents:
    """The autoencoder of one layer: one group for all heads together, or one for each head in order."""

    layer: int
    n_heads: int
    autoencoder: SparseAutoencoder

    @property
    def width(self) -> int:
        """How many latents the layer has."""
        return self.autoencoder.n_groups * self.autoencoder.d_sae

    @property
    def site(self) -> Site:
        return Site("z", self.layer)

    def split(self, z: Z) -> Parts:
        """Latents and error. Differentiable in ``z``."""
        x = self._by_group(z)
        latents = self.autoencoder.encode(x) * self._scale(x)
        return _side_by_side(latents), _side_by_side(x - self.autoencoder.decode(latents))

    def error(self, z: Z, latents: Float[Tensor, "batch pos latent"]) -> Float[Tensor, "batch pos d_z"]:
        """What these latents leave over of ``z``."""
        return _side_by_side(self._by_group(z) - self._decode(latents))

    def join(self, latents: Float[Tensor, "batch pos latent"], error: Float[Tensor, "batch pos d_z"]) -> Z:
        """The ``z`` that has these latents and this error: the inverse of ``split``."""
        return (_side_by_side(self._decode(latents)) + error).unflatten(-1, (self.n_heads, -1))

    def pull_back(self, gradient: Z) -> Float[Tensor, "batch pos latent"]:
        """The gradient at the latents of a gradient at ``z``: its product with each decoder row."""
        return _side_by_side(torch.einsum("gbpi,gsi->gbps", self._by_group(gradient), self.autoencoder.W_dec))

    def rows(self, latents: list[int]) -> Float[Tensor, "some_latent d_z"]:
        """What each of these latents writes into concatenated ``z`` at activation 1."""
        W_dec, at = self.autoencoder.W_dec, torch.tensor(latents, dtype=torch.long)
        group, own = at // self.autoencoder.d_sae, at % self.autoencoder.d_sae
        rows = W_dec.new_zeros((len(latents), self.autoencoder.n_groups, self.autoencoder.d_in))
        rows[torch.arange(len(latents)), group] = W_dec[group, own]
        return rows.flatten(1)

    def _by_group(self, z: Z) -> Float[Tensor, "group batch pos d_in"]:
        groups = z.flatten(2).unflatten(2, (self.autoencoder.n_groups, -1))
        return groups.movedim(2, 0).to(self.autoencoder.W_enc.dtype)

    def _decode(self, latents: Float[Tensor, "batch pos latent"]) -> Float[Tensor, "group batch pos d_in"]:
        return self.autoencoder.decode(latents.unflatten(2, (self.autoencoder.n_groups, -1)).movedim(2, 0))

    def _scale(self, x: Float[Tensor, "group batch pos d_in"]) -> Float[Tensor, "group batch pos 1"] | float:
        """By what the autoencoder divides its inputs before it encodes them."""
        if self.autoencoder.normalize == "none":
            return 1.0
        flat = x.flatten(1, 2)
        _, undo = NORMALIZATIONS[self.autoencoder.normalize](flat)
        scale = undo(torch.ones_like(flat)) - undo(torch.zeros_like(flat))  # undoing is affine
        return scale[..., :1].unflatten(1, x.shape[1:3])


def layers_of(model: Transformer, autoencoder: SparseAutoencoder) -> tuple[LayerLatents, ...]:
    """The layers that have an autoencoder, in order. ``SAEError`` where it does not fit, or stands elsewhere than at ``z``."""
    autoencoder.check_fits(model.config)
    if wrong := [place for place in autoencoder.places if place.site.name != "z"]:
        raise SAEError(
            f"latents as parts of a circuit are those of what heads gather, 'z', and this autoencoder stands at "
            f"{str(wrong[0])!r}. Train one on 'z' (each layer) or 'z.*.h*' (each head)."
        )
    here = autoencoder.to(device=model.device)
    here = replace(here, **{name: tensor.detach() for name, tensor in here.tensors.items()})
    layers = sorted({place.layer for place in here.places if place.layer is not None})
    return tuple(LayerLatents(layer, model.config.n_heads, _at_layer(here, layer, model.config)) for layer in layers)


def facts_of(layers: tuple[LayerLatents, ...], autoencoder: SparseAutoencoder) -> dict[str, str | dict[str, int]]:
    """What scores say of the autoencoder: a hash of it (0.7 s per GB), and how many latents each layer has."""
    about = [autoencoder.kind, str(autoencoder.k), autoencoder.normalize, *map(str, autoencoder.places)]
    digest = hashlib.sha256(repr(about).encode())
    for name, tensor in sorted(autoencoder.tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return {"autoencoder": digest.hexdigest()[:16], "latents": {str(at.layer): at.width for at in layers}}


def check_scores(scores: Scores, model: Transformer, facts: Mapping[str, Any]) -> None:
    """``CircuitError`` for scores that are not those of this autoencoder's latents."""
    if scores.items != "latent" or scores.wiring != Wiring.of(model.config):
        raise CircuitError(f"these are {scores.items} scores of {scores.model!r}. Give those of latents() on this model.")
    if any(scores.settings.get(name) != fact for name, fact in facts.items()):
        raise CircuitError("these scores are of another autoencoder, whose latents mean something else. Score this one first.")


def strongest_of(scores: Scores, n: int | None = None, threshold: float | None = None) -> dict[str, float]:
    """Names and scores of the strongest ``n``, or of those whose magnitude is at least ``threshold``."""
    if (n is None) == (threshold is None):
        raise CircuitError("say how many latents the circuit shall have, or from which score on: n=50 or threshold=0.1.")
    taken = int((np.abs(scores.values) >= threshold).sum()) if n is None else n
    if not 1 <= taken <= len(scores):
        largest = np.abs(scores.values).max()
        raise CircuitError(f"there is no circuit of {taken} latents: {len(scores)} are scored, the largest {largest:.3g}.")
    return dict(scores.strongest(taken))


def nodes_among(layers: tuple[LayerLatents, ...], names: "list[Node | str]") -> list[Node]:
    """Latents and errors by name, sorted and once each; ``UnknownNode`` for those that the autoencoder lacks."""
    widths = {at.layer: at.width for at in layers}
    nodes = {Node.parse(name) if isinstance(name, str) else name for name in names}
    for node in nodes:
        known = node.pos is None and node.kind in ("latent", "error") and node.layer in widths
        if not known or (node.index or 0) >= widths[node.layer or 0]:
            there = ", ".join(f"f{layer}.0 to f{layer}.{width - 1} and f{layer}.error" for layer, width in widths.items())
            raise UnknownNode(f"{str(node)!r} is not a part of this autoencoder, which has {there}, each at all positions.")
    return sorted(nodes)


def _side_by_side(x: Float[Tensor, "group batch pos own"]) -> Float[Tensor, "batch pos side_by_side"]:
    return x.movedim(0, 2).flatten(2)


def _at_layer(autoencoder: SparseAutoencoder, layer: int, config: ModelConfig) -> SparseAutoencoder:
    """The layer's one group, or a group for each head; the heads that have none get one that is never active."""
    whole, numbers = Place(Site("z", layer)), [i for i, place in enumerate(autoencoder.places) if place.layer == layer]
    places = [autoencoder.places[number] for number in numbers]
    if len(set(places)) < len(places) or (whole in places and len(places) > 1):
        raise SAEError(f"layer {layer} has two autoencoders at one place ({', '.join(map(str, places))}). Give one.")
    if places == [whole]:
        return autoencoder.group(*numbers)
    heads = torch.tensor([place.head for place in places])
    every = tuple(Place(whole.site, head) for head in range(config.n_heads))

    def with_every_head(tensor: Tensor) -> Tensor:
        return tensor.new_zeros((config.n_heads, *tensor.shape[1:])).index_copy(0, heads.to(tensor.device), tensor[numbers])

    return replace(autoencoder, places=every, **{name: with_every_head(x) for name, x in autoencoder.tensors.items()})
