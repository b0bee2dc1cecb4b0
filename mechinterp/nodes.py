"""The parts of a transformer that can belong to a circuit, and their names.

``input`` (token and position embedding), ``a9.h6`` (head 6 of layer 9), ``a9.h6.q`` (a port: what the head's query
reads), ``m4`` (the MLP of layer 4), ``m4.n123`` (its hidden neuron 123), ``logits``; ``a9.h6@14`` is the head at position
14. Where query heads share keys and values, those are read once for each group of heads: ``a9.g1.k`` and ``a9.g1.v`` are the
ports of group 1, and of ports of its own a head has ``a9.h6.q`` alone. ``f5.1234`` is latent 1234 of the sparse autoencoder
on layer 5's heads, ``f5.error`` what that autoencoder leaves over. ``str`` and ``Node.parse`` are inverse.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from mechinterp.errors import UnknownNode, nearest

Kind = Literal["input", "head", "group", "latent", "error", "neuron", "mlp", "logits"]
Port = Literal["q", "k", "v"]
PORTS: tuple[Port, ...] = ("q", "k", "v")

_PATTERN = re.compile(
    r"(?P<input>input)|(?P<logits>logits)|a(?P<layer>\d+)\.h(?P<head>\d+)(\.(?P<port>[qkv]))?"
    r"|a(?P<group_layer>\d+)\.g(?P<group>\d+)(\.(?P<group_port>[kv]))?"
    r"|m(?P<mlp>\d+)(\.n(?P<neuron>\d+))?|f(?P<latent_layer>\d+)\.((?P<latent>\d+)|(?P<error>error))"
)


@dataclass(frozen=True)
class Node:
    """A part of a transformer. Nodes sort in the order in which a forward pass computes them.

    >>> Node.parse("a9.h6.q")
    Node('a9.h6.q')
    >>> sorted([Node.parse(name) for name in ("logits", "m0", "a1.h3", "a1.h3.v", "input")])
    [Node('input'), Node('m0'), Node('a1.h3.v'), Node('a1.h3'), Node('logits')]
    """

    kind: Kind
    layer: int | None = None
    index: int | None = None
    port: Port | None = None
    pos: int | None = None

    @classmethod
    def input(cls) -> "Node":
        return cls("input")

    @classmethod
    def logits(cls) -> "Node":
        return cls("logits")

    @classmethod
    def head(cls, layer: int, head: int, port: Port | None = None) -> "Node":
        return cls("head", layer, head, port)

    @classmethod
    def group(cls, layer: int, group: int, port: Port | None = None) -> "Node":
        """A group of query heads that share a key and a value; with a port, that key or value."""
        return cls("group", layer, group, port)

    @classmethod
    def mlp(cls, layer: int) -> "Node":
        return cls("mlp", layer)

    @classmethod
    def neuron(cls, layer: int, neuron: int) -> "Node":
        return cls("neuron", layer, neuron)

    @classmethod
    def latent(cls, layer: int, latent: int) -> "Node":
        return cls("latent", layer, latent)

    @classmethod
    def error(cls, layer: int) -> "Node":
        return cls("error", layer)

    @classmethod
    def parse(cls, text: str) -> "Node":
        """Read a name; ``UnknownNode`` says what a name looks like."""
        name, at, position = text.partition("@")
        found = _PATTERN.fullmatch(name)
        if found is None or (at and not position.isdecimal()):
            raise UnknownNode(
                f"{text!r} is not the name of a node. Names look like 'input', 'a9.h6', 'a9.h6.q', 'm4', 'm4.n123', 'logits', "
                f"'a9.g1.k', 'f5.1234', 'f5.error', each also with a position: 'a9.h6@14'.{nearest(name, ['input', 'logits'])}"
            )
        return replace(_from_match(found), pos=int(position) if at else None)

    def at(self, pos: int | None) -> "Node":
        """The same part at one position (``None``: at all)."""
        return replace(self, pos=pos)

    def with_port(self, port: Port | None) -> "Node":
        """The port of a head or group, or with ``None`` the head or group that a port belongs to."""
        return replace(self, port=port)

    def __str__(self) -> str:
        stem = {
            "input": "input",
            "logits": "logits",
            "mlp": f"m{self.layer}",
            "neuron": f"m{self.layer}.n{self.index}",
            "head": f"a{self.layer}.h{self.index}" + (f".{self.port}" if self.port else ""),
            "group": f"a{self.layer}.g{self.index}" + (f".{self.port}" if self.port else ""),
            "latent": f"f{self.layer}.{self.index}",
            "error": f"f{self.layer}.error",
        }[self.kind]
        return stem if self.pos is None else f"{stem}@{self.pos}"

    def __repr__(self) -> str:
        return f"Node({str(self)!r})"

    def __lt__(self, other: "Node") -> bool:
        return self._order < other._order

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self):
        # Without the cached hash: another process hashes strings differently, and would not find its own nodes.
        return Node, (self.kind, self.layer, self.index, self.port, self.pos)

    @cached_property
    def _hash(self) -> int:
        # Graphs of 30,000 edges hash their nodes a million times; the names never change.
        return hash((self.kind, self.layer, self.index, self.port, self.pos))

    @cached_property
    def _order(self) -> tuple:
        """Layer by layer: ports, heads, latents of the attention output, their error, the MLP's neurons, the MLP."""
        layer = {"input": -1, "logits": 1 << 30}.get(self.kind, self.layer)
        stages = {"input": 0, "group": 0, "head": 0 if self.port else 1, "latent": 2, "error": 3, "neuron": 4, "mlp": 5}
        stage = stages.get(self.kind, len(stages))  # the logits
        port = PORTS.index(self.port) if self.port else 0
        return (layer, stage, self.index or 0, self.kind == "group", port, -1 if self.pos is None else self.pos)


def nodes_of(names: Node | str | Iterable[Node | str]) -> tuple[Node, ...]:
    """One part or several, by name or not, as nodes: what functions take as ``heads``.

    >>> nodes_of("a9.h6"), nodes_of(["a9.h6", Node.mlp(4)])
    ((Node('a9.h6'),), (Node('a9.h6'), Node('m4')))
    """
    several = [names] if isinstance(names, (Node, str)) else names
    return tuple(Node.parse(name) if isinstance(name, str) else name for name in several)


def _from_match(found: re.Match) -> Node:
    if found["input"]:
        return Node.input()
    if found["logits"]:
        return Node.logits()
    if found["group"]:
        return Node.group(int(found["group_layer"]), int(found["group"]), found["group_port"])
    if found["neuron"]:
        return Node.neuron(int(found["mlp"]), int(found["neuron"]))
    if found["mlp"]:
        return Node.mlp(int(found["mlp"]))
    if found["error"]:
        return Node.error(int(found["latent_layer"]))
    if found["latent"]:
        return Node.latent(int(found["latent_layer"]), int(found["latent"]))
    return Node.head(int(found["layer"]), int(found["head"]), found["port"])
