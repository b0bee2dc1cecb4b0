"""What to say to somebody who names a part that a model lacks: what there is, and what was probably meant."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from mechinterp.errors import nearest
from mechinterp.nodes import Node


@dataclass(frozen=True)
class Sizes:
    """How many layers, heads and groups of heads there are, and whether there are MLPs."""

    n_layers: int
    n_heads: int
    n_groups: int
    has_mlp: bool

    def __str__(self) -> str:
        heads = f"{self.n_layers} layers (0..{self.n_layers - 1}) of {self.n_heads} heads (0..{self.n_heads - 1})"
        shared = f" in {self.n_groups} groups (0..{self.n_groups - 1})" if self.n_groups < self.n_heads else ""
        return f"{heads}{shared} {'and an MLP each' if self.has_mlp else 'without MLPs'}"


def absent(node: Node, role: str, among: Collection[Node], sizes: Sizes) -> str:
    """Why ``node`` is no ``role`` ("reader", "writer"), of which there are those ``among``, and the nearest that is."""
    return f"{str(node)!r} is not a {role} here. This wiring has {sizes}.{_remedy(node, among, sizes)}"


def _remedy(node: Node, among: Collection[Node], sizes: Sizes) -> str:
    """The same part in the last layer and head that exist, as a port for readers and whole for writers."""
    if node.pos is not None:
        return " Scores by position are not part of a wiring: name the part without '@'."
    last = (sizes.n_groups if node.kind == "group" else sizes.n_heads) - 1
    layer = None if node.layer is None else min(node.layer, sizes.n_layers - 1)
    inside = replace(node, layer=layer, index=None if node.index is None else min(node.index, last))
    if node.kind == "head" and (shared := _shared(inside, sizes)) in among:
        return f" Did you mean {str(shared)!r}, which its group shares?"
    if node.kind == "group" and sizes.n_groups == sizes.n_heads:
        inside, own = replace(inside, kind="head"), " Here every head has a key and a value of its own."
    elif node.kind == "group" and inside not in among:
        return f" Heads of a group share a k and a v and no more: name a head, or {str(inside.with_port('k'))!r}."
    else:
        own = ""
    likely = [known for known in (inside, inside.with_port(None), inside.with_port("q")) if known in among]
    return f"{own} Did you mean {str(likely[0])!r}?" if likely else own + nearest(str(node), map(str, among))


def _shared(port: Node, sizes: Sizes) -> Node:
    return replace(port, kind="group", index=(port.index or 0) * sizes.n_groups // sizes.n_heads)
