"""A circuit: the edges of a model that were kept, as a networkx graph.

Nodes are ``Node``s. A residual edge runs from a writer to a port, an MLP or the logits and carries ``weight``, its
score; port edges ``a9.h6.q -> a9.h6`` carry none. Where heads share keys and values, the shared port ``a9.g1.k`` is one
node with one edge from each writer, tied to those heads of its group that the circuit uses. Facts (model, task, method,
...) live in ``circuit.graph``, where networkx copies them along; attributes of the object would vanish on ``copy``.
"""

import os

import networkx as nx

from circuits import export
from circuits.circuit_html import circuit_html
from circuits.describing import Measured, describe_circuit
from circuits.edges import Edge, by_magnitude, edge_name, fold_ports, is_residual, port_edges, residual_edges, sharing
from mechinterp.errors import CircuitError
from mechinterp.nodes import PORTS, Node


class Circuit(nx.DiGraph):
    """A directed graph of ``Node``s. ``copy``, ``subgraph``, ``reverse`` of networkx keep it a circuit.

    ``Scores.top`` and ``Wiring.circuit`` make circuits; by hand it goes edge by edge:

    >>> circuit = Circuit(model="toy", task="greeting")
    >>> circuit.keep("input", "a0.h1.v", weight=0.5)
    >>> circuit.keep("a0.h1", "logits", weight=2.0)
    >>> circuit
    Circuit('greeting' on 'toy': 2 edges, 1 head, 0 MLPs)
    >>> nx.shortest_path(circuit, Node.input(), Node.logits())
    [Node('input'), Node('a0.h1.v'), Node('a0.h1'), Node('logits')]
    """

    def keep(self, writer: Node | str, reader: Node | str, weight: float | None = None) -> None:
        """Add a residual edge, and the port edge if the reader is a port. ``weight``: how much the metric falls if cut.

        A key or value that heads share, ``a9.g1.k``, is tied to them by the facts ``n_heads`` and ``n_key_value_heads``:

        >>> circuit = Circuit(n_heads=4, n_key_value_heads=2)
        >>> circuit.keep("input", "a0.g1.v")
        >>> circuit.keep("a0.h3", "logits")
        >>> circuit.heads
        [Node('a0.h3')]

        ``CircuitError`` if the first cannot write, or the second cannot read, the residual stream, or the second is
        computed before the first. Whether the model has these parts is not asked here: ``Wiring.mask`` does.
        """
        writer, reader = _as_node(writer), _as_node(reader)
        _check_ends(writer, reader)
        if reader.kind == "group" and not self._heads_a_group:
            raise CircuitError(
                f"{str(reader)!r} is shared by several heads, and this circuit does not say by which: start with "
                "Circuit(n_heads=..., n_key_value_heads=...), or make it with Wiring.circuit."
            )
        self.add_edge(writer, reader, **({} if weight is None else {"weight": float(weight)}))
        if reader.kind == "head":
            self.add_edge(reader, reader.with_port(None))
        for part in (writer, reader) if self._heads_a_group else ():
            self._tie_group_of(part)

    @property
    def _heads_a_group(self) -> int:
        """How many heads share a key; 0 where the facts do not say that any do."""
        n_heads, n_groups = self.graph.get("n_heads"), self.graph.get("n_key_value_heads")
        return n_heads // n_groups if n_heads and n_groups else 0

    def _tie_group_of(self, part: Node) -> None:
        """Tie the shared ports of a part's group anew: which heads they lead to changes with the edges kept."""
        if part.kind not in ("head", "group") or part.layer is None or part.index is None:
            return
        a_group = self._heads_a_group
        group = Node.group(part.layer, part.index if part.kind == "group" else part.index // a_group).at(part.pos)
        heads = sharing(group, a_group)
        ports = [port for port in (group.with_port("k"), group.with_port("v")) if port in self]
        self.remove_edges_from([(port, head) for port in ports for head in heads])
        self.remove_nodes_from([head for head in heads if head in self and not self.degree(head)])
        present = {head for head in heads if head in self}  # by an edge that it writes, or by its query
        self.add_edges_from(edge for port in ports for edge in port_edges(port, a_group, present))

    @property
    def edges_kept(self) -> list[Edge]:
        """The residual edges in wiring order (by reader, then by writer); port edges are left out."""
        return residual_edges(self)

    @property
    def n_edges_kept(self) -> int:
        return sum(is_residual(*edge) for edge in self.edges)

    @property
    def heads(self) -> list[Node]:
        """Heads with any kept edge, as whole heads, in order of computation."""
        return sorted({node.with_port(None) for node in self.nodes if node.kind == "head"})

    @property
    def mlps(self) -> list[Node]:
        return sorted(node for node in self.nodes if node.kind == "mlp")

    def components(self) -> nx.DiGraph:
        """Ports folded away: heads, MLPs, input, logits, one edge a pair with ``weight``, ``strength`` and ``ports``.

        ``weight`` is the sum over ports and ``strength`` the sum of magnitudes; ``ports`` is a string such as "qk".
        """
        return fold_ports(self)

    def pruned(self) -> "Circuit":
        """A copy without the edges that lie on no path from the input to the logits.

        Under resampling this changes no number: a part without a kept input computes exactly its corrupted value, and
        one without a kept output is read by nobody. Under zero, mean or optimal ablation a part without a kept input
        computes something other than its replacement, so there pruning **does** change faithfulness. So it does where the
        heads of a layer share a normalisation (``config.has_joint_heads``: Gemma-2, OLMo-2), whatever the ablation: what a
        head on no path gathers scales what its siblings write.
        ``graph["n_edges_pruned"]`` counts what was dropped.
        """
        reached = _reach(self, [node for node in self.nodes if node.kind == "input"], nx.descendants)
        reaching = _reach(self, [node for node in self.nodes if node.kind == "logits"], nx.ancestors)
        kept = self.subgraph(reached & reaching).copy()
        dropped = self.n_edges_kept - kept.n_edges_kept
        kept.graph["n_edges_pruned"] = self.graph.get("n_edges_pruned", 0) + dropped
        return kept

    def save(self, path: str | os.PathLike, format: str | None = None) -> None:
        """Write to a file whose suffix (or ``format``) is a key of ``export.FORMATS``; written whole or not at all.

        ``.json`` (ours, lossless), ``.node-link.json``, ``.graphml``, ``.gexf``, ``.attribution-graph.json`` and
        ``.eap-ig.json`` can be loaded again; ``.html``, ``.dot``, ``.mmd`` and pictures are for looking. ``CircuitError``
        for an unknown suffix, ``OSError`` for a missing folder.
        """
        export.write(self, path, format)

    @classmethod
    def load(cls, path: str | os.PathLike, format: str | None = None) -> "Circuit":
        """Read what ``save`` wrote. ``CircuitError`` names the file and what is wrong with it."""
        return cls(export.read(path, format))

    def to_networkx(self) -> nx.DiGraph:
        """A plain ``DiGraph`` with strings for nodes and their kind, layer, head and position as scalar attributes."""
        return export.with_string_nodes(self)

    def summary(self, n_edges: int = 5) -> str:
        """A few lines for a terminal: what this is, its facts, and its strongest edges."""
        lines = [repr(self)]
        facts = ("method", "unit", "settings", "ties_at_cut", "threshold", "n_edges_pruned", "faithfulness")
        lines += [f"  {fact}: {self.graph[fact]}" for fact in facts if fact in self.graph]
        for writer, reader in by_magnitude(self)[:n_edges]:
            weight = self.edges[writer, reader].get("weight")
            lines.append(f"  {edge_name(writer, reader):<20}" + ("" if weight is None else f" {weight:+.4g}"))
        return "\n".join(lines)

    def describe(self, report: Measured | None = None) -> str:
        """The circuit in plain words, by rules from its numbers: parts, edges, faithfulness, and what is *not* known.

        With the ``Report`` of this circuit it also says under which ablation, on how many prompts and against which random
        circuits. ``CircuitError`` for a report of another circuit.
        """
        return describe_circuit(self, report)

    def __str__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        return circuit_html(repr(self), self, self.describe())

    def __repr__(self) -> str:
        source = " on ".join(repr(self.graph[fact]) for fact in ("task", "model") if fact in self.graph)
        return f"Circuit({source + ': ' if source else ''}{export.size_in_words(self)})"


def _as_node(name: Node | str) -> Node:
    return name if isinstance(name, Node) else Node.parse(name)


def _check_ends(writer: Node, reader: Node) -> None:
    if writer.port or writer.kind in ("group", "logits"):
        own = f"its head {str(writer.with_port(None))!r} does" if writer.port else "nothing follows them"
        remedy = "the heads that share it do" if writer.kind == "group" else own
        raise CircuitError(f"{str(writer)!r} does not write to the residual stream; {remedy}.")
    if reader.kind == "input" or (reader.kind in ("head", "group") and not reader.port):
        ports = ", ".join(repr(str(reader.with_port(port))) for port in (PORTS if reader.kind == "head" else PORTS[1:]))
        remedy = "it only writes" if reader.kind == "input" else f"its ports do: {ports}"
        raise CircuitError(f"{str(reader)!r} does not read the residual stream by itself; {remedy}.")
    if not writer < reader:
        raise CircuitError(f"{edge_name(writer, reader)!r} runs backwards: {str(reader)!r} is computed first.")


def _reach(graph: nx.DiGraph, starts: list[Node], walk) -> set[Node]:
    return set(starts).union(*(walk(graph, start) for start in starts))
