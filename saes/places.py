"""Where an autoencoder reads and writes: a whole site (``z.5``: all heads, concatenated) or one head's part (``z.5.h3``).

Where query heads share keys and values, the heads of ``k``, ``v`` and what they read are those that are shared: ``v.5.h1``.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.cache import ActivationCache
from mechinterp.errors import SAEError, UnknownSite, nearest
from mechinterp.models.config import ModelConfig
from mechinterp.sites import Site, all_sites, resolve


@dataclass(frozen=True)
class Place:
    """A site, or one head's part of it. ``str`` and ``Place.parse`` are inverse.

    >>> Place.parse("z.5.h3")
    Place(site=Site(name='z', layer=5), head=3)
    >>> str(Place.parse("blocks.5.attn.hook_z"))
    'z.5'
    """

    site: Site
    head: int | None = None

    def __post_init__(self):
        if self.head is not None and not {"head_index", "group"} & set(self.site.axes.split()):
            raise SAEError(f"the site {str(self.site)!r} has no heads, so no head {self.head}. Leave the head out.")
        if self.site.axes.split()[-1] == "key_pos" or self.site.axes.endswith(" 1"):
            raise SAEError(f"an autoencoder reads one vector a position; {str(self.site)!r} holds none. Use 'z.5', say.")

    @classmethod
    def parse(cls, text: str) -> "Place":
        """Read ``"z.5"``, ``"z.5.h3"`` or one of TransformerLens' hook names."""
        found = re.fullmatch(r"(.+)\.h(\d+)", text)
        return cls(Site.parse(found[1]), int(found[2])) if found else cls(Site.parse(text))

    def __str__(self) -> str:
        return str(self.site) if self.head is None else f"{self.site}.h{self.head}"

    @property
    def layer(self) -> int | None:
        return self.site.layer

    def width(self, config: ModelConfig) -> int:
        """How many numbers stand here at each position; ``SAEError`` or ``UnknownSite`` where the model has no such place."""
        resolve(config, [self.site])
        sizes = {"d_model": config.d_model, "d_head": config.d_head, "d_mlp": config.d_mlp, "d_vocab": config.d_vocab}
        n_heads = _n_heads(self.site, config)
        if self.head is not None and self.head >= n_heads:
            raise SAEError(f"{str(self)!r} is not in {config.name}, whose layers have heads 0..{n_heads - 1} there.")
        return (sizes[self.site.axes.split()[-1]] or 0) * (n_heads if self.head is None else 1)

    def part(self, value: Float[Tensor, "batch pos *axes"]) -> Float[Tensor, "batch pos d_in"]:
        """What the autoencoder sees of the activation at its site."""
        return value.flatten(2) if self.head is None else value[:, :, self.head]

    def read(self, cache: ActivationCache) -> Float[Tensor, "batch pos d_in"]:
        return self.part(cache[self.site])

    def write(
        self, value: Float[Tensor, "batch pos *axes"], new: Float[Tensor, "batch pos d_in"]
    ) -> Float[Tensor, "batch pos *axes"]:
        """``value`` with this place's part replaced, and nothing else."""
        if self.head is None:
            return new.reshape(value.shape)
        heads = list(value.unbind(2))
        heads[self.head] = new
        return torch.stack(heads, 2)


def each_layer(config: ModelConfig, site: str = "z", layers: Iterable[int] | None = None) -> tuple[Place, ...]:
    """One place a layer: at ``z``, all heads concatenated."""
    wanted = None if layers is None else set(layers)
    return tuple(Place(found) for found in resolve(config, [site]) if wanted is None or found.layer in wanted)


def each_head(config: ModelConfig, site: str = "z", layers: Iterable[int] | None = None) -> tuple[Place, ...]:
    """One place for every head of every layer (of ``layers``), layer by layer; at ``k`` and ``v``, of those that are shared."""
    return tuple(Place(at.site, head) for at in each_layer(config, site, layers) for head in range(_n_heads(at.site, config)))


def places_named(config: ModelConfig, names: Iterable["Place | str"]) -> tuple[Place, ...]:
    """The places meant, which must be of one width: ``"z"`` is every layer, ``"z.*.h*"`` every head, ``"z.5.h*"`` a layer's.

    Raises ``SAEError`` for a place named twice, for widths that differ and for places that ``config`` lacks.
    """
    found: list[Place] = []
    for name in names:
        if isinstance(name, Place):
            found.append(name)
        elif heads := re.fullmatch(r"(\w+)\.(\*|\d+)\.h\*", name):
            found += each_head(config, heads[1], None if heads[2] == "*" else [_layer(config, name, int(heads[2]))])
        elif layers := re.fullmatch(r"(\w+)(\.\*)?", name):
            found += each_layer(config, layers[1])
        else:
            found.append(_parse(config, name))
    widths = {place: place.width(config) for place in found}
    if not found:
        raise SAEError("no place is named. Name some: 'z' (every layer), 'z.5', 'z.5.h3' or 'z.*.h*' (every head).")
    if len(widths) < len(found):
        twice = next(place for place in found if found.count(place) > 1)
        raise SAEError(f"the place {str(twice)!r} is named twice. Name each once.")
    if len(set(widths.values())) > 1:
        shown = ", ".join(f"{place} {width}" for place, width in list(widths.items())[:4])
        raise SAEError(f"places of different widths cannot be trained together ({shown}, ...). Train them one after another.")
    return tuple(found)


def _n_heads(site: Site, config: ModelConfig) -> int:
    """How many heads stand at a site, side by side."""
    return {"head_index": config.n_heads, "group": config.n_groups}.get(site.axes.split()[2], 1)


def _layer(config: ModelConfig, name: str, layer: int) -> int:
    if layer >= config.n_layers:
        raise SAEError(f"{name!r} is not in {config.name}, whose layers run 0..{config.n_layers - 1}.")
    return layer


def _parse(config: ModelConfig, name: str) -> Place:
    try:
        return Place.parse(name)
    except UnknownSite:
        known = [str(site) for site in all_sites(config)]
        raise SAEError(
            f"{name!r} names no place for an autoencoder. Places look like 'z.5' (all heads of layer 5), 'z.5.h3' (one of "
            f"them), 'z' (every layer) or 'z.*.h*' (every head).{nearest(name, known)}"
        ) from None
