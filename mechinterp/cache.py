"""What one forward pass recorded: a read-only mapping from places to activations."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mechinterp.errors import UnknownNode, UnknownSite
from mechinterp.models.weights import Weights
from mechinterp.nodes import Node
from mechinterp.sites import Site


class ActivationCache(Mapping[Site, Tensor]):
    """The activations of one pass. ``cache[Site("z", 9)]`` and ``cache["z", 9]`` are the same tensor.

    The tensors are the pass's own, not copies: clone before writing into one. ``first`` is the position that they begin
    with: more than 0 in a pass that resumed after a prefix.
    """

    def __init__(self, values: Mapping[Site, Tensor], weights: Weights, first: int = 0):
        self._values = MappingProxyType(values)
        self._weights = weights
        self.first = first

    def __getitem__(self, key: "Site | str | tuple[str, int]") -> Tensor:
        site = _site(key)
        if site not in self._values:
            have = ", ".join(map(str, self._values)) or "nothing"
            raise UnknownSite(f"this pass did not record {str(site)!r}; it recorded {have}. Add it to `record`.")
        return self._values[site]

    def __contains__(self, key: object) -> bool:
        try:
            return _site(key) in self._values
        except (UnknownSite, TypeError):
            return False

    def __iter__(self) -> Iterator[Site]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def output(self, node: Node | str) -> Float[Tensor, "batch pos d_model"]:
        """What a writer added to the residual stream, rebuilt from ``embed``, ``pos_embed``, ``z`` or ``mlp_out``.

        The bias of an attention layer, ``b_O``, belongs to no head: the heads' outputs and ``b_O`` sum to ``attn_out``.
        Where what heads write is normalised, a head's output is its share of that: rebuilt from ``z_written``.
        """
        node = Node.parse(node) if isinstance(node, str) else node
        if node.pos is not None:
            instead = f"output({str(node.at(None))!r})[:, {node.pos}]"
            raise UnknownNode(f"{str(node)!r} is a part at one position. Ask for {instead}.")
        if node.kind == "input":
            return self.embedded
        if node.kind == "mlp" and node.layer is not None:
            return self["mlp_out", node.layer]
        if node.kind == "head" and node.port is None and node.layer is not None and node.index is not None:
            config = self._weights.config
            if not (node.layer < config.n_layers and node.index < config.n_heads):
                there = f"layers 0..{config.n_layers - 1} of heads 0..{config.n_heads - 1}"
                raise UnknownNode(f"{str(node)!r} is not in {config.name}, which has {there}.")
            z = self[config.write_site, node.layer]
            return z[:, :, node.index] @ self._weights.W_O(node.layer)[node.index]
        raise UnknownNode(f"{str(node)!r} writes nothing to the residual stream. Writers are the input, heads and MLPs.")

    @property
    def embedded(self) -> Float[Tensor, "batch pos d_model"]:
        """What the input wrote: token embeddings and, where there are any, learned positions."""
        return self["embed"] + self["pos_embed"] if self._weights.config.learned_positions else self["embed"]

    def to_transformer_lens(self) -> dict[str, Tensor]:
        """The same tensors under TransformerLens' hook names, but for those that it does not have.

        These are ``z_written`` and, under a soft cap, ``logits``: its ``unembed.hook_out`` is before the cap. Where a model
        normalises after its heads and MLP alone (OLMo-2), its ``ln1`` and ``ln2`` are our ``ln1_post`` and ``ln2_post``.
        """
        config = self._weights.config
        named = {
            site.hook_name: tensor for site, tensor in self.items() if not (config.logit_soft_cap and site.name == "logits")
        }
        own = "." if config.norms == "after" else "_post."
        return {name.replace("_post.", own): tensor for name, tensor in named.items() if name is not None}

    def __repr__(self) -> str:
        return f"ActivationCache({', '.join(f'{site} {tuple(value.shape)}' for site, value in self.items())})"


def _site(key: Any) -> Site:
    return key if isinstance(key, Site) else Site.parse(key) if isinstance(key, str) else Site(*key)
