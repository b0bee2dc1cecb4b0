"""The edges of a circuit graph: which of them carry residual stream, their names, their order, and ports folded away.

A circuit is a directed graph of ``Node``s with two sorts of edge. A *residual* edge, ``m4 -> a9.h6.q``, says that what
the MLP of layer 4 wrote is read by a port; these are the edges that are scored, cut and counted. A *port* edge,
``a9.h6.q -> a9.h6``, only ties a port to its head so that paths run through, and is never counted.
"""

from collections.abc import Sequence

import networkx as nx

from mechinterp.errors import CircuitError
from mechinterp.nodes import PORTS, Node

Edge = tuple[Node, Node]


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
    """How many heads and MLPs there are, or, in a circuit of latents, how many latents and errors.

    >>> counted_parts(["input", "latent", "latent", "error"])
    ['2 latents', '1 error']
    """
    latents = {"latent": "latent", "error": "error"}
    words = latents if {*latents} & {*kinds} else {"head": "head", "mlp": "MLP"}
    return [counted(kinds.count(kind), word) for kind, word in words.items()]


def fold_ports(graph: nx.DiGraph) -> nx.DiGraph:
    """Heads, MLPs, input and logits, with at most one edge a pair.

    Edge attributes: ``ports`` ("qk": read as query and as key; "" for a reader without ports), ``weight`` (the sum over
    ports, so that a helping query and a hurting key cancel), ``strength`` (the sum of magnitudes, which do not). The
    last two are absent when no edge of the pair is scored. Facts are kept.
    """
    folded = nx.DiGraph()
    folded.graph.update(graph.graph)
    folded.add_nodes_from(sorted({node.with_port(None) for node in graph.nodes}))
    for writer, reader in filter(lambda edge: is_residual(*edge), graph.edges):
        whole = reader.with_port(None)
        if not folded.has_edge(writer, whole):
            folded.add_edge(writer, whole, ports="")
        pair, weight = folded.edges[writer, whole], graph.edges[writer, reader].get("weight")
        pair["ports"] = "".join(port for port in PORTS if port == reader.port or port in pair["ports"])
        if weight is not None:
            pair["weight"] = pair.get("weight", 0.0) + weight
            pair["strength"] = pair.get("strength", 0.0) + abs(weight)
    return folded


def _reader_order(node: Node) -> tuple[int, int, int, int, int]:
    """Unlike the order of nodes, port by port and not head by head: q, k and v of a layer are three tensors."""
    layer = 1 << 30 if node.layer is None else node.layer
    stage = PORTS.index(node.port) if node.port else len(PORTS)
    pos = -1 if node.pos is None else node.pos
    return layer, stage, ["head", "latent", "error", "mlp", "input", "logits"].index(node.kind), node.index or 0, pos
