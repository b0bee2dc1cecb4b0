"""Every edge that a model could use, and the only place that converts between edge vector, grid and graph.

A *writer* adds to the residual stream: the input, each head, each MLP. A *reader* takes from it: the q, k and v port of
each head (k and v of each group of heads, where heads share them), each MLP, the logits. Each reader may take from the
writers computed before it, and those pairs are the edges. They are ordered by reader, then by writer; because writers stand
in order of computation, the writers open to a reader are the first so many, and the whole wiring is described by one count
a reader.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from circuits.edges import SHAPE, Edge, edge_name, is_residual, parse_edge, port_edges, shape_of, sharing
from circuits.graph import Circuit
from circuits.hints import Sizes, absent
from mechinterp.errors import CircuitError, UnknownNode
from mechinterp.nodes import PORTS, Node


@dataclass(frozen=True)
class Wiring:
    """The edges of a transformer with this many layers and heads.

    ``parallel``: attention and MLP of a layer read the same stream (GPT-J, Pythia), so heads do not feed their own MLP.
    ``n_key_value_heads``: of how many groups of heads each shares one key and one value (None: every head has its own).
    Then a group's key is *one* reader, ``a9.g1.k``, with one edge from each writer, which serves all heads of the group;
    to count it once for each of them would be to cut a thing several times that is computed once.

    >>> wiring = Wiring(n_layers=12, n_heads=12)
    >>> len(wiring.writers), len(wiring.readers), wiring.n_edges
    (157, 445, 32491)
    >>> wiring.index("m4", "a9.h6.q"), wiring.edge_names[wiring.index("m4", "a9.h6.q")]
    (18530, 'm4->a9.h6.q')
    >>> [str(reader) for reader in Wiring(n_layers=1, n_heads=4, n_key_value_heads=1, has_mlp=False).readers]
    ['a0.h0.q', 'a0.h1.q', 'a0.h2.q', 'a0.h3.q', 'a0.g0.k', 'a0.g0.v', 'logits']
    """

    n_layers: int
    n_heads: int
    has_mlp: bool = True
    parallel: bool = False
    n_key_value_heads: int | None = None

    def __post_init__(self):
        if self.n_layers < 1 or self.n_heads < 1:
            raise CircuitError(f"A wiring needs at least one layer and one head, not {self.n_layers} x {self.n_heads}.")
        if self.n_groups < 1 or self.n_heads % self.n_groups:
            raise CircuitError(f"{self.n_heads} heads cannot share {self.n_groups} keys and values evenly.")
        if self.n_key_value_heads == self.n_heads:
            object.__setattr__(self, "n_key_value_heads", None)

    @classmethod
    def of(cls, source: Any) -> "Wiring":
        """The wiring of a config (``n_layers n_heads d_mlp parallel``; ``d_mlp=None``: no MLPs) or of a circuit.

        ``CircuitError`` for a circuit that does not say which shape of model it belongs to.
        """
        if not isinstance(source, nx.DiGraph):
            groups = getattr(source, "n_key_value_heads", None)
            return cls(source.n_layers, source.n_heads, source.d_mlp is not None, source.parallel, groups)
        if missing := {"n_layers", "n_heads"} - set(source.graph):
            raise CircuitError(
                f"This circuit does not say which wiring it belongs to: circuit.graph lacks {sorted(missing)}. "
                "Set them, or use Wiring.of(model.config)."
            )
        return cls(**{name: source.graph[name] for name in SHAPE if name in source.graph})

    @property
    def facts(self) -> dict[str, int | bool]:
        """The fields, as every circuit of this wiring carries them in ``circuit.graph``; groups where there are any."""
        return {name: fact for name in SHAPE if (fact := getattr(self, name)) is not None}

    @property
    def n_groups(self) -> int:
        """How many keys, and how many values, the heads of a layer have."""
        return self.n_heads if self.n_key_value_heads is None else self.n_key_value_heads

    @property
    def heads_a_group(self) -> int:
        """How many heads attend by one key, and gather one value."""
        return self.n_heads // self.n_groups

    @property
    def readers_a_layer(self) -> int:
        return self.n_heads + 2 * self.n_groups + self.has_mlp

    def port_slice(self, layer: int, ports: str = "qkv") -> slice:
        """Where the readers of a layer's heads stand: of one port ("q", "k", "v"), or of all ("qkv")."""
        starts = {"q": 0, "k": self.n_heads, "v": self.n_heads + self.n_groups}
        stops = {"q": self.n_heads, "k": self.n_heads + self.n_groups, "v": self.n_heads + 2 * self.n_groups}
        first = layer * self.readers_a_layer
        return slice(first + starts[ports[0]], first + stops[ports[-1]])

    def mlp_reader(self, layer: int) -> int:
        """Which reader a layer's MLP is."""
        return (layer + 1) * self.readers_a_layer - 1

    def head_slice(self, layer: int) -> slice:
        """Where the heads of a layer stand among the writers."""
        first = 1 + layer * (self.n_heads + self.has_mlp)
        return slice(first, first + self.n_heads)

    @cached_property
    def writers(self) -> tuple[Node, ...]:
        """Input, then per layer its heads and its MLP."""
        return (Node.input(), *(part for layer in range(self.n_layers) for part in self._parts(layer)))

    @cached_property
    def readers(self) -> tuple[Node, ...]:
        """Per layer q of all heads, k of all heads (or groups), v of all of them, then the MLP; last the logits."""
        shared = Node.head if self.n_key_value_heads is None else Node.group
        ports = (
            [Node.head(layer, head, "q") for head in range(self.n_heads)]
            + [shared(layer, index, port) for port in PORTS[1:] for index in range(self.n_groups)]
            + self._mlp(layer)
            for layer in range(self.n_layers)
        )
        return (*(reader for layer in ports for reader in layer), Node.logits())

    @cached_property
    def writers_before(self) -> Int[np.ndarray, "reader"]:
        """How many writers each reader may take from: always the first so many."""
        per_layer, ports = self.n_heads + self.has_mlp, self.n_heads + 2 * self.n_groups
        before_attention = 1 + per_layer * np.arange(self.n_layers)
        before_mlp = before_attention + (0 if self.parallel else self.n_heads)
        by_layer = np.concatenate(
            [np.tile(before_attention[:, None], ports), np.tile(before_mlp[:, None], int(self.has_mlp))], 1
        )
        return np.append(by_layer.ravel(), 1 + per_layer * self.n_layers)

    @cached_property
    def allowed(self) -> Bool[np.ndarray, "writer reader"]:
        """Which pairs are edges."""
        return np.arange(len(self.writers))[:, None] < self.writers_before

    @cached_property
    def edge_writer(self) -> Int[np.ndarray, "edge"]:
        """The index of each edge's writer in ``writers``."""
        return np.arange(self.n_edges) - np.repeat(self._first_edge, self.writers_before)

    @cached_property
    def edge_reader(self) -> Int[np.ndarray, "edge"]:
        """The index of each edge's reader in ``readers``; never decreasing."""
        return np.repeat(np.arange(len(self.readers)), self.writers_before)

    @cached_property
    def reads(self) -> Bool[np.ndarray, "part reader"]:
        """Through which readers each part takes what it takes: writers in their order, last the logits.

        A head reads through three ports, of which it may share key and value with others; an MLP through itself.
        """
        reads = np.zeros((len(self.writers) + 1, len(self.readers)), dtype=bool)
        heads = np.arange(self.n_heads)
        for layer in range(self.n_layers):
            parts = self.head_slice(layer).start + heads
            for port in PORTS:
                own = heads if port == "q" else heads // self.heads_a_group
                reads[parts, self.port_slice(layer, port).start + own] = True
            if self.has_mlp:
                reads[self.head_slice(layer).stop, self.mlp_reader(layer)] = True
        reads[-1, -1] = True
        return reads

    @cached_property
    def edges_into(self) -> tuple[Int[np.ndarray, "edge"], ...]:
        """The edges that each writer reads through, by any port; last those of the logits. Heads may share some."""
        ends = zip(self._first_edge.tolist(), self.writers_before.tolist(), strict=True)
        into = [np.arange(first, first + n) for first, n in ends]
        through = (np.flatnonzero(reads).tolist() for reads in self.reads)
        return tuple(np.concatenate([np.arange(0), *(into[reader] for reader in readers)]) for readers in through)

    def owners(self, reader: Node) -> tuple[Node, ...]:
        """The parts that read through a reader: one, or the heads of a group."""
        return sharing(reader, self.heads_a_group)

    @property
    def n_edges(self) -> int:
        return int(self.writers_before.sum())

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        pairs = zip(self.edge_writer.tolist(), self.edge_reader.tolist(), strict=True)
        return tuple((self.writers[writer], self.readers[reader]) for writer, reader in pairs)

    @cached_property
    def edge_names(self) -> tuple[str, ...]:
        """``m4->a9.h6.q`` and so on, in order of the edge vector."""
        writers, readers = list(map(str, self.writers)), list(map(str, self.readers))
        pairs = zip(self.edge_writer.tolist(), self.edge_reader.tolist(), strict=True)
        return tuple(f"{writers[writer]}->{readers[reader]}" for writer, reader in pairs)

    def grid(self, values: Shaped[np.ndarray, "*batch edge"]) -> Shaped[np.ndarray, "*batch writer reader"]:
        """Edge values laid out by writer and reader; zero (False) where there is no edge."""
        grid = np.zeros((*values.shape[:-1], len(self.writers), len(self.readers)), dtype=values.dtype)
        grid[..., self.edge_writer, self.edge_reader] = values
        return grid

    def vector(self, grid: Shaped[np.ndarray, "*batch writer reader"]) -> Shaped[np.ndarray, "*batch edge"]:
        """The edges of a grid, in order; what stands where there is no edge is ignored."""
        return grid[..., self.edge_writer, self.edge_reader]

    def index(self, writer: Node | str, reader: Node | str) -> int:
        """Where an edge stands in the edge vector.

        ``UnknownNode`` for a part that this wiring lacks, ``CircuitError`` for two parts without an edge.
        """
        w = self._find(writer, self._writer_index, "writer")
        r = self._find(reader, self._reader_index, "reader")
        if w >= self.writers_before[r]:
            raise CircuitError(f"There is no edge {self._name_of(w, r)!r}: {self._why_closed(w, r)}.")
        return int(self._first_edge[r] + w)

    def index_of(self, name: str) -> int:
        """``index`` by the name of the edge, ``m4->a9.h6.q``."""
        return self.index(*parse_edge(name))

    def circuit(
        self, mask: Bool[np.ndarray, "edge"], weights: Float[np.ndarray, "edge"] | None = None, **facts: Any
    ) -> Circuit:
        """The circuit of the edges where ``mask`` is true, with ``weights`` and those facts that are not ``None``.

        All 32,491 edges of GPT-2 small cost about a tenth of a second, so stay with vectors while computing.
        """
        self._check_edge_vector("mask", mask)
        circuit = Circuit()
        facts = {**self.facts, "n_edges_in_model": self.n_edges, **facts}
        circuit.graph.update((name, fact) for name, fact in facts.items() if fact is not None)
        kept = np.flatnonzero(mask)
        pairs = zip(self.edge_writer[kept].tolist(), self.edge_reader[kept].tolist(), strict=True)
        ends = [(self.writers[writer], self.readers[reader]) for writer, reader in pairs]
        read = [self.readers[reader] for reader in np.unique(self.edge_reader[kept])]
        wrote = [self.writers[writer] for writer in np.unique(self.edge_writer[kept])]
        present = {*wrote, *(reader.with_port(None) for reader in read if reader.kind == "head")}
        ports = [tie for reader in read if reader.port for tie in port_edges(reader, self.heads_a_group, present)]
        circuit.add_nodes_from(sorted({*wrote, *read, *(head for _, head in ports)}))
        circuit.add_edges_from(ends)
        circuit.add_edges_from(ports)
        if weights is not None:
            self._check_edge_vector("weights", weights)
            nx.set_edge_attributes(circuit, dict(zip(ends, weights[kept].tolist(), strict=True)), "weight")
        return circuit

    def mask(self, circuit: nx.DiGraph) -> Bool[np.ndarray, "edge"]:
        """Which edges a circuit keeps. Errors as in ``index``, and ``CircuitError`` for a circuit of another wiring."""
        theirs = shape_of(circuit.graph)
        for name, fact in shape_of(self.facts).items():
            if theirs.get(name, fact) != fact:
                raise CircuitError(f"This circuit was made for a model with {name}={theirs[name]}, this one has {name}={fact}.")
        mask = np.zeros(self.n_edges, dtype=bool)
        mask[[self.index(*edge) for edge in circuit.edges if is_residual(*edge)]] = True
        return mask

    @cached_property
    def _first_edge(self) -> Int[np.ndarray, "reader"]:
        return np.cumsum(self.writers_before) - self.writers_before

    @cached_property
    def _writer_index(self) -> dict[Node, int]:
        return {node: index for index, node in enumerate(self.writers)}

    @cached_property
    def _reader_index(self) -> dict[Node, int]:
        return {node: index for index, node in enumerate(self.readers)}

    def _parts(self, layer: int) -> list[Node]:
        return [Node.head(layer, head) for head in range(self.n_heads)] + self._mlp(layer)

    def _mlp(self, layer: int) -> list[Node]:
        return [Node.mlp(layer)] if self.has_mlp else []

    def _name_of(self, writer: int, reader: int) -> str:
        return edge_name(self.writers[writer], self.readers[reader])

    def _why_closed(self, writer: int, reader: int) -> str:
        if self.parallel and self.writers[writer].layer == self.readers[reader].layer:
            return "in a parallel block, attention and MLP of a layer read the same stream"
        return f"{str(self.writers[writer])!r} is computed after {str(self.readers[reader])!r} has read"

    def _find(self, name: Node | str, among: Mapping[Node, int], role: str) -> int:
        node = name if isinstance(name, Node) else Node.parse(name)
        if node in among:
            return among[node]
        raise UnknownNode(absent(node, role, among, Sizes(self.n_layers, self.n_heads, self.n_groups, self.has_mlp)))

    def _check_edge_vector(self, what: str, values: np.ndarray) -> None:
        if np.shape(values) != (self.n_edges,):
            raise CircuitError(f"{what} must have one entry an edge, {self.n_edges}, but has shape {np.shape(values)}.")
