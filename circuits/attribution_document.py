"""Attribution-graph JSON, the format of circuit-tracer's and Neuronpedia's pages: checked, written, and read back.

A circuit alone knows no prompt, so it is drawn where it knows its parts to be: nodes with a position in that token's column,
all others in columns of their own that say that no position is known. ``circuits.attribution_graph`` draws it on a prompt.

Each link carries, beside what the pages need, the edges of the circuit that it stands for (``edges``), and each node its
``part``, so that reading a file back gives the circuit: all edges that are shown, with their weights. What a file cannot hold
are attributes of edges other than ``weight``, attributes of ports, and what was left out for its size.
"""

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx

from circuits.attribution_links import Links, Term
from circuits.attribution_nodes import Columns, Sheet
from circuits.edges import residual_edges, wholes
from circuits.picture import signs_of
from mechinterp.errors import CircuitError
from mechinterp.files import write_text_atomically
from mechinterp.nodes import Node

MOST = 20_000  # links in a file: some 6 MB. Pages crawl long before, and break at gigabytes
INDEX = "graph-metadata.json"
_NODE_KEYS = {"node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"}
_PLACELESS = {"input": "(input)", "logits": "(logits)"}  # else:
_ANYWHERE = "(position unknown)"


@dataclass(frozen=True)
class AttributionGraph:
    """A document of this format, whole: ``document`` is what stands in the file.

    Raises ``CircuitError`` unless every required key is there, ids are unique, links end at nodes, and numbers are finite.
    """

    document: Mapping[str, Any]

    def __post_init__(self):
        if problem := next(_problems(self.document), None):
            raise CircuitError(f"this is no attribution graph: {problem}.")

    @property
    def slug(self) -> str:
        """Its name in the menu of a page, and that of its file."""
        return self.document["metadata"]["slug"]

    def save(self, path: str | os.PathLike) -> None:
        """One file, whole or not at all."""
        write_text_atomically(path, _as_text(self.document))

    def save_in(self, folder: str | os.PathLike) -> Path:
        """``<slug>.json`` in a folder that pages serve, and its line in the folder's ``graph-metadata.json``.

        The folder is made if it is missing (the one above it is not); a graph of the same slug is replaced, others stay.
        """
        folder = Path(folder)
        _make(folder)
        index = folder / INDEX
        others = json.loads(index.read_text(encoding="utf-8"))["graphs"] if index.exists() else []
        path = folder / f"{self.slug}.json"
        self.save(path)
        graphs = [*(other for other in others if other["slug"] != self.slug), self.document["metadata"]]
        write_text_atomically(index, _as_text({"graphs": graphs}))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "AttributionGraph":
        """Any file of the format, ours or not. ``CircuitError`` names it and what is wrong."""
        try:
            return cls(json.loads(Path(path).read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError) as problem:
            raise CircuitError(f"{os.fspath(path)!r} is not JSON, or is truncated ({problem}).") from None

    def __repr__(self) -> str:
        return f"AttributionGraph({self.slug!r}: {len(self.document['nodes']):,} nodes, {len(self.document['links']):,} links)"


def _make(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError:
        raise CircuitError(f"{os.fspath(folder)!r} is a file. Name a folder, or a file that ends in .json.") from None
    except FileNotFoundError:
        raise CircuitError(f"cannot make {os.fspath(folder)!r}: there is no folder above it. Create that first.") from None


def write_circuit(circuit: nx.DiGraph, path: Path) -> None:
    """The circuit without a prompt, at most its ``MOST`` strongest links."""
    of_circuit(circuit).save(path)


def read_circuit(path: Path) -> nx.DiGraph:
    """The circuit of a file that this toolkit wrote. Edges on a prompt come back summed over its positions."""
    document = AttributionGraph.load(path).document
    ours = document["metadata"].get("mechinterp")
    if ours is None:
        kinds = ", ".join(sorted({node["feature_type"] for node in document["nodes"]}))
        raise CircuitError(
            f"{os.fspath(path)!r} is an attribution graph of another program (nodes: {kinds}), whose links do not say by which "
            'port they are read. As a plain graph it is nx.node_link_graph(json, edges="links", name="node_id").'
        )
    graph = nx.DiGraph()
    graph.graph.update(ours["facts"])
    part_of = {node["node_id"]: Node.parse(node["part"]) for node in document["nodes"]}
    graph.add_nodes_from((part_of[node["node_id"]], node.get("attributes", {})) for node in document["nodes"])
    weights: dict[tuple[Node, Node], list[float]] = defaultdict(list)
    for link in document["links"]:
        for name, weight in link["edges"].items():
            writer, reader, target = part_of[link["source"]], Node.parse(name), part_of[link["target"]]
            graph.add_edges_from([(writer, reader), *([(reader, target)] if reader.port else [])])
            weights[writer, reader] += [] if weight is None else [weight]
    nx.set_edge_attributes(graph, {edge: math.fsum(parts) for edge, parts in weights.items() if parts}, "weight")
    return graph


def of_circuit(circuit: nx.DiGraph, most: int = MOST) -> AttributionGraph:
    """A circuit in columns for the positions that its nodes name; tokens are the fact ``prompt_tokens``, if there is one.

    Weights are the circuit's own: edges without a score get 1. An edge into a key that heads share leads to each of them in
    equal parts, since more is not known.
    """
    parts = {whole for node in circuit for whole in wholes(circuit, node)}
    columns, column_of = _columns(circuit, parts)
    every = Links.of(_terms(circuit, column_of))
    links = every.at_most(len(columns.tokens) * 2 // 3).strongest(most)
    unit = circuit.graph.get("unit", "the metric")
    positive, _ = signs_of(circuit.graph)
    means = f"how much {unit} falls if its edges are cut (positive: they help)"
    if positive != "helps":
        means = f"the sum of its edges' scores in {unit} (positive: {positive})"
    description = (
        f"A circuit, and no prompt. A link's weight is {means}. No probability is known. Parts without a position stand in "
        "columns of their own."
    )
    slug = "-".join(str(circuit.graph[fact]) for fact in ("task", "model") if fact in circuit.graph)
    attributes = {part: dict(circuit.nodes[part]) for part in parts if part in circuit}
    alone = frozenset(column_of.items()) - every.places
    sheet = Sheet(columns, links, circuit.graph, slug, description, attributes=attributes, alone=alone)
    return AttributionGraph(sheet.document())


def _columns(circuit: nx.DiGraph, parts: set[Node]) -> tuple[Columns, dict[Node, int]]:
    n_positions = max((part.pos + 1 for part in parts if part.pos is not None), default=0)
    known = circuit.graph.get("prompt_tokens", []) if n_positions else []
    tokens = [*map(str, known), *map(str, range(len(known), n_positions))]
    column_of = {part: part.pos for part in parts if part.pos is not None}
    for title in (_PLACELESS["input"], _ANYWHERE, _PLACELESS["logits"]):
        if here := [part for part in parts if part.pos is None and _PLACELESS.get(part.kind, _ANYWHERE) == title]:
            column_of |= dict.fromkeys(here, len(tokens))
            tokens.append(title)
    tokens += [""] * (2 - len(tokens))
    return Columns(tuple(tokens), tuple(range(len(tokens))), " ".join(tokens)), column_of


def _terms(circuit: nx.DiGraph, column_of: Mapping[Node, int]) -> Iterator[Term]:
    for writer, reader in residual_edges(circuit):
        weight, owners = circuit.edges[writer, reader].get("weight"), wholes(circuit, reader)
        for owner, share in zip(owners, _shares(weight, len(owners)), strict=True):
            yield Term((writer, column_of[writer]), (owner, column_of[owner]), reader, share)


def _shares(weight: float | None, n: int) -> list[float | None]:
    """Equal parts; the last takes what rounding leaves, so that they sum to the weight."""
    if weight is None:
        return [None] * n
    return [*[weight / n] * (n - 1), weight - (n - 1) * (weight / n)]


def _problems(document: Any) -> Iterator[str]:
    """What the schema asks for, and what it forgets to ask."""
    if not isinstance(document, Mapping) or (missing := {"metadata", "qParams", "nodes", "links"} - set(document)):
        yield f"it lacks {sorted(missing)}" if isinstance(document, Mapping) else "it is no JSON object"
        return
    if missing := {"slug", "scan", "prompt_tokens", "prompt"} - set(document["metadata"]):
        yield f"its metadata lack {sorted(missing)}"
    if missing := {key for node in document["nodes"] for key in _NODE_KEYS - set(node)}:
        yield f"it has a node without {sorted(missing)}"
        return
    ids = Counter(node["node_id"] for node in document["nodes"])
    yield from (f"{n} nodes are called {name!r}" for name, n in ids.items() if n > 1)
    for link in document["links"]:
        if missing := {"source", "target", "weight"} - set(link):
            yield f"it has a link without {sorted(missing)}"
        else:
            yield from (
                f"a link ends at {end!r}, which is no node" for end in (link["source"], link["target"]) if end not in ids
            )
            if not isinstance(link["weight"], int | float) or not math.isfinite(link["weight"]):
                yield f"the link {link['source']!r} -> {link['target']!r} weighs {link['weight']!r}"


def _as_text(document: Mapping[str, Any]) -> str:
    """Strict JSON, a node or a link a line."""
    try:
        entries = [f"{json.dumps(key)}: {_lines(value)}" for key, value in document.items()]
    except (TypeError, ValueError) as problem:
        raise CircuitError(
            f"This circuit has a fact or weight that JSON cannot hold ({problem}). Remove or convert it."
        ) from None
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _lines(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return json.dumps(value, allow_nan=False)
    return "[\n " + ",\n ".join(json.dumps(entry, allow_nan=False) for entry in value) + "\n]"
