"""Circuits as files: one dictionary of formats, chosen by the suffix of the file or by name.

Functions here take any graph of ``Node``s (a ``Circuit`` is one) and return a plain ``DiGraph``; ``Circuit.save`` and
``Circuit.load`` are the usual way in. A new format is a writer, a reader if possible, and one line in ``FORMATS``.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import networkx as nx

from circuits import attribution_document, eap_ig
from circuits.edges import counted, counted_parts, edge_name, is_residual, parse_edge, residual_edges
from circuits.mermaid import write_mermaid
from circuits.picture import PORT_COLOURS, draw
from circuits.viewer import write_page
from mechinterp.errors import CircuitError, nearest
from mechinterp.files import read_document, to_document, write_beside
from mechinterp.nodes import Node

_KIND, _VERSION = "mechinterp circuit", 1
_ADDED_TO_GRAPH = ("node_default", "edge_default", "mode")  # by networkx when it reads XML
_NOT_XML = re.compile("[\x00-\x08\x0b-\x1f\ufffe\uffff]")  # characters that XML forbids, or changes (a bare \\r)


@dataclass(frozen=True)
class Format:
    """How one kind of file is written, and read if it can be. ``write`` gets a path with the right suffix.

    ``what``: in a few words, who opens such a file and what of a circuit it holds.
    """

    what: str
    suffix: str
    write: Callable[[nx.DiGraph, Path], None]
    read: Callable[[Path], nx.DiGraph] | None = None


def write(circuit: nx.DiGraph, path: str | os.PathLike, format: str | None = None) -> None:
    """Write a circuit, whole or not at all. ``CircuitError`` for an unknown format or a fact that it cannot hold."""
    chosen = _choose(path, format)
    with write_beside(path, chosen.suffix) as beside:
        chosen.write(circuit, beside)


def read(path: str | os.PathLike, format: str | None = None) -> nx.DiGraph:
    """The graph in a file. ``CircuitError`` for a format that is for looking only, or a file that is no circuit.

    ``FileNotFoundError`` where there is none.
    """
    chosen = _choose(path, format, reads=True)
    if chosen.read is None:
        readable = ", ".join(known.suffix for known in FORMATS.values() if known.read)
        raise CircuitError(f"{os.fspath(path)!r}: {chosen.suffix} files are for looking, not for loading. Save as {readable}.")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(path)!r}. Name one that `save` or `mechinterp discover` wrote.")
    try:
        return chosen.read(Path(path))
    except (ElementTree.ParseError, nx.NetworkXException, LookupError, TypeError, ValueError, AttributeError) as problem:
        if os.fspath(path) in str(problem):
            raise
        what = f"it lacks {problem}" if isinstance(problem, KeyError) else problem
        raise CircuitError(f"{os.fspath(path)!r} is not a circuit, or is truncated: {what}") from problem


def size_in_words(circuit: nx.DiGraph) -> str:
    """ "200 of 32,491 edges, 41 heads, 7 MLPs"; without the total where the facts do not say it."""
    kinds = [node.kind for node in {node.with_port(None) for node in circuit.nodes}]
    n_edges, total = sum(is_residual(*edge) for edge in circuit.edges), circuit.graph.get("n_edges_in_model")
    edges = counted(n_edges, "edge") if total is None else f"{n_edges:,} of {counted(total, 'edge')}"
    return ", ".join([edges, *counted_parts(kinds)])


def with_string_nodes(circuit: nx.DiGraph) -> nx.DiGraph:
    """The same graph for other programs: strings for nodes, and their parts as scalar attributes."""
    graph = nx.DiGraph()
    graph.graph.update(circuit.graph)
    graph.add_nodes_from((str(node), _parts(node) | attributes) for node, attributes in circuit.nodes(data=True))
    graph.add_edges_from((str(writer), str(reader), attributes) for writer, reader, attributes in circuit.edges(data=True))
    return graph


def _choose(path: str | os.PathLike, format: str | None, reads: bool = False) -> "Format":
    if format is not None:
        if format not in FORMATS:
            raise CircuitError(f"{format!r} is not a format. Known: {', '.join(FORMATS)}.{nearest(format, FORMATS)}")
        return FORMATS[format]
    name = Path(path).name.lower()
    if fitting := [known for known in FORMATS.values() if name.endswith(known.suffix)]:
        return max(fitting, key=lambda known: len(known.suffix))
    known = ", ".join(known.suffix for known in FORMATS.values() if known.read or not reads)
    does = "read" if reads else "write"
    raise CircuitError(f"{os.fspath(path)!r} has no suffix that says how to {does} a circuit. Known: {known}; or give format=.")


def _write_json(circuit: nx.DiGraph, path: Path) -> None:
    content = {
        "facts": circuit.graph,
        "nodes": {str(node): attributes for node, attributes in circuit.nodes(data=True)},
        "edges": {edge_name(writer, reader): attributes for writer, reader, attributes in circuit.edges(data=True)},
    }
    path.write_text(_as_json(lambda: to_document(_KIND, _VERSION, content)), encoding="utf-8", newline="\n")


def _read_json(path: Path) -> nx.DiGraph:
    document = read_document(path, _KIND, _VERSION, CircuitError)
    graph = nx.DiGraph()
    graph.graph.update(document["facts"])
    graph.add_nodes_from((Node.parse(name), attributes) for name, attributes in document["nodes"].items())
    graph.add_edges_from((*parse_edge(name), attributes) for name, attributes in document["edges"].items())
    if len(graph) > len(document["nodes"]):
        raise CircuitError("it has edges between nodes that it does not list")
    return graph


def _write_node_link(circuit: nx.DiGraph, path: Path) -> None:
    data = nx.node_link_data(with_string_nodes(circuit), edges="edges")
    path.write_text(_as_json(lambda: json.dumps(data, indent=1, allow_nan=False)), encoding="utf-8")


def _read_node_link(path: Path) -> nx.DiGraph:
    return _with_nodes(nx.node_link_graph(json.loads(path.read_text(encoding="utf-8")), edges="edges"))


def _write_graphml(circuit: nx.DiGraph, path: Path) -> None:
    graph = with_string_nodes(circuit)
    _check_scalars(graph, "GraphML")
    nx.write_graphml_xml(graph, path)


def _read_graphml(path: Path) -> nx.DiGraph:
    return _with_nodes(nx.read_graphml(path))


def _write_gexf(circuit: nx.DiGraph, path: Path) -> None:
    """networkx writes no facts of the graph into GEXF, so they go into the description, as JSON."""
    graph = with_string_nodes(circuit)
    _check_scalars(graph, "GEXF")
    facts, graph.graph = _as_json(lambda: json.dumps(graph.graph, allow_nan=False)), {}
    root = ElementTree.fromstring("\n".join(nx.generate_gexf(graph)))
    about = root.find("{*}meta")
    assert about is not None, "networkx writes one"
    about.attrib.clear()  # the date, so that equal circuits make equal files
    ElementTree.SubElement(about, about.tag.replace("meta", "description")).text = facts
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def _read_gexf(path: Path) -> nx.DiGraph:
    graph = nx.read_gexf(path)
    graph.graph |= json.loads(ElementTree.parse(path).findtext("{*}meta/{*}description") or "{}")
    return _with_nodes(graph)


def _write_dot(circuit: nx.DiGraph, path: Path) -> None:
    """Graphviz text, ports folded into their head: colour and label say which port reads. The score is ``score``,
    because Graphviz takes ``weight`` for a wish about the layout. A key or value that heads share is a part of its own, with
    plain edges to them, so that each score stands there once."""
    shapes = {"group": "circle", "mlp": "hexagon", "latent": "ellipse", "error": "ellipse"}
    parts = sorted({_whole(node) for node in circuit.nodes})
    lines = ["digraph circuit {", "  rankdir=BT;"]
    lines += [f"  {_quoted(name)}={_quoted(fact)};" for name, fact in circuit.graph.items()]
    lines += [f"  {_quoted(node)} [shape={shapes.get(node.kind, 'box')}];" for node in parts]
    for writer, reader in residual_edges(circuit):
        score = circuit.edges[writer, reader].get("weight")
        looks = {"label": reader.port, "color": PORT_COLOURS[reader.port], "score": score}
        looks["style"] = "dashed" if score is not None and score < 0 else None
        listed = ", ".join(f"{name}={_quoted(look)}" for name, look in looks.items() if look is not None)
        lines.append(f"  {_quoted(writer)} -> {_quoted(_whole(reader))} [{listed}];")
    ties = sorted(tie for tie in circuit.edges if tie[0].kind == "group")
    lines += [f"  {_quoted(port)} -> {_quoted(head)} [color={_quoted(PORT_COLOURS[port.port])}];" for port, head in ties]
    path.write_text("\n".join([*lines, "}", ""]), encoding="utf-8", newline="\n")


def _whole(node: Node) -> Node:
    return node if node.kind == "group" else node.with_port(None)


def _quoted(value: Any) -> str:
    return json.dumps(str(value), ensure_ascii=False)


def _as_json(write_text: Callable[[], str]) -> str:
    try:
        return write_text()
    except (TypeError, ValueError) as problem:
        raise CircuitError(
            f"This circuit has a fact or weight that JSON cannot hold ({problem}). Remove or convert it."
        ) from None


def _check_scalars(graph: nx.DiGraph, format: str) -> None:
    everything = [("circuit", graph.graph), *graph.nodes(data=True)]
    everything += [(f"{writer}->{reader}", attributes) for writer, reader, attributes in graph.edges(data=True)]
    for where, attributes in everything:
        for name, value in attributes.items():
            if not isinstance(value, bool | int | float | str) or (isinstance(value, str) and _NOT_XML.search(value)):
                raise CircuitError(
                    f"{format} holds only numbers, truth values and text, but {name!r} of {where} is {value!r}. "
                    "Save as .json, or store it as a JSON string."
                )


def _with_nodes(graph: nx.Graph) -> nx.DiGraph:
    """Strings back to ``Node``s, without what ``with_string_nodes`` and networkx' XML readers added."""
    if not graph.is_directed() or graph.is_multigraph():
        raise CircuitError("a circuit is directed, with one edge a pair")
    restored = nx.DiGraph()
    restored.graph.update((name, fact) for name, fact in graph.graph.items() if name not in _ADDED_TO_GRAPH)
    for name, attributes in graph.nodes(data=True):
        node = Node.parse(str(name))
        added = {**_parts(node), "label": name}
        restored.add_node(node, **{key: value for key, value in attributes.items() if added.get(key) != value})
    for writer, reader, attributes in graph.edges(data=True):
        kept = {key: value for key, value in attributes.items() if key != "id"}
        restored.add_edge(Node.parse(str(writer)), Node.parse(str(reader)), **kept)
    return restored


def _parts(node: Node) -> dict[str, str | int]:
    """Scalar attributes for other programs; the name says it all."""
    parts = {"kind": node.kind, "layer": node.layer, "port": node.port, "position": node.pos}
    parts |= {node.kind: node.index} if node.kind in ("head", "group") else {}
    return {name: part for name, part in parts.items() if part is not None}


def _picture(circuit: nx.DiGraph, path: Path) -> None:
    draw(circuit, path)


FORMATS: dict[str, Format] = {
    "json": Format("ours, without loss", ".json", _write_json, _read_json),
    "node-link": Format("networkx and D3, without loss", ".node-link.json", _write_node_link, _read_node_link),
    "graphml": Format("yEd, Cytoscape, networkx; facts that are numbers or text", ".graphml", _write_graphml, _read_graphml),
    "gexf": Format("Gephi; facts that are numbers or text", ".gexf", _write_gexf, _read_gexf),
    "attribution-graph": Format(
        "circuit-tracer's and Neuronpedia's pages; edges with their weights",
        ".attribution-graph.json",
        attribution_document.write_circuit,
        attribution_document.read_circuit,
    ),
    "eap-ig": Format(
        "EAP-IG and MIB; edges with their scores, all others of the model as not kept",
        ".eap-ig.json",
        eap_ig.write_circuit,
        eap_ig.read_circuit,
    ),
    "dot": Format("Graphviz, to look at", ".dot", _write_dot),
    "mermaid": Format("Markdown pages, to look at", ".mmd", write_mermaid),
    "html": Format("a page to look around in, one file that needs no network", ".html", write_page),
    "png": Format("a picture", ".png", _picture),
    "svg": Format("a picture with names in it", ".svg", _picture),
    "pdf": Format("a picture for print", ".pdf", _picture),
}
