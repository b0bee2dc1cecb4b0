"""The edges of a circuit graph: which of them carry residual stream, their names, their order, and ports folded away.

A circuit is a directed graph of ``Node``s with two sorts of edge. A *residual* edge, ``m4 -> a9.h6.q``, says that what
the MLP of layer 4 wrote is read by a port; these are the edges that are scored, cut and counted. A *port* edge,
``a9.h6.q -> a9.h6``, only ties a port to its head so that paths run through, and is never counted. Where heads share keys
and values, ``m4 -> a9.g1.k`` is one residual edge however many heads attend by that key, and port edges ``a9.g1.k -> a9.h4``
tie it to those of them that are in the circuit.
"""

from collections.abc import Container, Mapping, Sequence
from typing import Any

import networkx as nx

from mechinterp.errors import CircuitError
from mechinterp.nodes import PORTS, Node

Edge = tuple[Node, Node]

SHAPE = ("n_layers", "n_heads", "has_mlp", "parallel", "n_key_value_heads")


def shape_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a circuit's facts say about the shape of its model. A circuit that tells its heads and no groups has none.

    >>> shape_of({"n_layers": 2, "n_heads": 4, "task": "ioi"})
    {'n_layers': 2, 'n_heads': 4, 'n_key_value_heads': 4}
    """
    facts = {"n_key_value_heads": facts["n_heads"], **facts} if "n_heads" in facts else facts
    return {name: facts[name] for name in SHAPE if name in facts}


def edge_name(writer: Node, reader: Node) -> str:
    """
    >>> edge_name(Node.mlp(4), Node.head(9, 6, "q"))
    'm4->a9.h6.q'
    """
    return f"{writer}->{reader}"


def parse_edge(text: str) -> Edge:
    """The inverse of ``edge_name``. ``CircuitError`` without an arrow, ``UnknownNode`` for an end that is no node."""
    writer, arrow, reader = text.partition("->")
    if not arrow:
        raise CircuitError(f"{text!r} is not the name of an edge. Edges look like 'm4->a9.h6.q' or 'a9.h9->logits'.")
    return Node.parse(writer.strip()), Node.parse(reader.strip())


def is_residual(writer: Node, reader: Node) -> bool:
    """False for the edge that ties a port to its head."""
    return writer.port is None


def sharing(port: Node, a_group: int) -> tuple[Node, ...]:
    """The heads that attend by a port: its own, or the ``a_group`` heads of its group.

    >>> sharing(Node.group(9, 1, "k"), a_group=4)
    (Node('a9.h4'), Node('a9.h5'), Node('a9.h6'), Node('a9.h7'))
    """
    if port.kind != "group":
        return (port.with_port(None),)
    first = (port.index or 0) * a_group
    return tuple(Node.head(port.layer or 0, head).at(port.pos) for head in range(first, first + a_group))


def port_edges(port: Node, a_group: int, present: Container[Node]) -> list[Edge]:
    """What ties a port to the heads that attend by it: those that are ``present``, or all of them if none is.

    A head is present if it writes a kept edge or its query reads one. So a shared key leads to the heads that the circuit
    uses, and where it leads nowhere it hangs in the air as a key of one head's own would.
    """
    heads = sharing(port, a_group)
    return [(port, head) for head in [head for head in heads if head in present] or heads]


def residual_edges(graph: nx.DiGraph) -> list[Edge]:
    """The edges that count, in wiring order: by reader (q of all heads of a layer, k, v, its MLP), then by writer."""
    kept = [(writer, reader) for writer, reader in graph.edges if is_residual(writer, reader)]
    return sorted(kept, key=lambda edge: (_reader_order(edge[1]), edge[0]))


def by_magnitude(graph: nx.DiGraph) -> list[Edge]:
    """Residual edges, largest ``|weight|`` first; wiring order among equals, and edges without a weight last."""
    return sorted(residual_edges(graph), key=lambda edge: -abs(graph.edges[edge].get("weight", 0.0)))


def counted(n: int, word: str) -> str:
    """
    >>> counted(1, "head"), counted(32_491, "edge")
    ('1 head', '32,491 edges')
    """
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def counted_parts(kinds: Sequence[str]) -> list[str]:
    """How many heads and MLPs there are, or, in a circuit of latents, how many latents and errors; and neurons, if any.

    >>> counted_parts(["input", "latent", "latent", "error"])
    ['2 latents', '1 error']
    """
    latents = {"latent": "latent", "error": "error"}
    words = latents if {*latents} & {*kinds} else {"head": "head", "mlp": "MLP"}
    words |= {"neuron": "neuron"} if "neuron" in kinds else {}
    return [counted(kinds.count(kind), word) for kind, word in words.items()]


def fold_ports(graph: nx.DiGraph) -> nx.DiGraph:
    """Heads, MLPs, input and logits, with at most one edge a pair.

    Edge attributes: ``ports`` ("qk": read as query and as key; "" for a reader without ports), ``weight`` (the sum over
    ports, so that a helping query and a hurting key cancel), ``strength`` (the sum of magnitudes, which do not). The
    last two are absent when no edge of the pair is scored. Facts are kept.

    An edge into a key or value that heads share is drawn to each head that it is tied to, and each gets an equal part of
    its weight: what cutting it does through one of them is not known, and so the folded edges still sum to the residual ones.
    """
    folded = nx.DiGraph()
    folded.graph.update(graph.graph)
    folded.add_nodes_from(sorted({part for node in graph.nodes for part in wholes(graph, node)}))
    for writer, reader in filter(lambda edge: is_residual(*edge), graph.edges):
        weight, heads = graph.edges[writer, reader].get("weight"), wholes(graph, reader)
        for whole in heads:
            if not folded.has_edge(writer, whole):
                folded.add_edge(writer, whole, ports="")
            pair = folded.edges[writer, whole]
            pair["ports"] = "".join(port for port in PORTS if port == reader.port or port in pair["ports"])
            if weight is not None:
                pair["weight"] = pair.get("weight", 0.0) + weight / len(heads)
                pair["strength"] = pair.get("strength", 0.0) + abs(weight) / len(heads)
    return folded


def wholes(graph: nx.DiGraph, node: Node) -> list[Node]:
    """The parts that a node belongs to: the heads that a port is tied to, and any other node itself."""
    tied = sorted(graph.successors(node)) if node.port and node in graph else []
    return tied or [node.with_port(None)]


def _reader_order(node: Node) -> tuple[int, int, int, int, int]:
    """Unlike the order of nodes, port by port and not head by head: q, k and v of a layer are three tensors."""
    layer = 1 << 30 if node.layer is None else node.layer
    stage = PORTS.index(node.port) if node.port else len(PORTS)
    pos = -1 if node.pos is None else node.pos
    kinds = ["head", "group", "latent", "error", "mlp", "neuron", "input", "logits"]
    return layer, stage, kinds.index(node.kind), node.index or 0, pos
