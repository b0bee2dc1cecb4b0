"""EAP-IG's JSON, which MIB's circuit track takes: every node and every edge of a model, with a score and whether it is in.

    {"cfg": {"n_layers": 12, ...}, "nodes": {"a0.h1": {"in_graph": true}, ...},
     "edges": {"m4->a9.h6<q>": {"score": -0.0003, "in_graph": false}, ...}}

All edges are listed, kept or not, and every one has a score: their reader raises on an edge without, takes a missing one for
outside with score 0, and MIB's AUROC counts a missing true edge as found. Beside these stands ``mechinterp``, with what the
format has no place for; their reader does not look there.

**Sign.** The file does not say which sign helps. A circuit is written in ours, the fall of the metric if the edge is cut:
*positive helps*. Of a file that we did not write, scores are kept as they stand, and the fact ``positive`` says so;
``load_eap_ig`` turns them round if asked.

**Shared keys.** The format has no groups. An edge into a key that four heads share is written as four, a quarter of the score
each, and read back as their sum.
"""

import json
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from math import fsum
from pathlib import Path
from typing import Any

import networkx as nx

from circuits.edges import Edge, edge_name, is_residual, port_edges, shape_of, sharing
from mechinterp.errors import CircuitError
from mechinterp.files import write_text_atomically
from mechinterp.nodes import PORTS, Node

Entries = list[Mapping[str, Any]]  # what a file says of one of our edges: one a head that shares it


def write_circuit(circuit: nx.DiGraph, path: Path) -> None:
    """A circuit: its edges ``in_graph`` with their scores (1 where it has none), all others outside with score 0.

    ``CircuitError`` for a circuit whose facts do not tell its model's shape, or with parts that the format does not know.
    """
    kept = {edge: circuit.edges[edge].get("weight") for edge in circuit.edges if is_residual(*edge)}
    known = {} if "positive" in circuit.graph else {"positive": "helps"}  # read from a file that did not say, nor do we
    save(path, circuit.graph, kept, kept, {"facts": dict(circuit.graph), **known})


def read_circuit(path: Path) -> nx.DiGraph:
    """The edges that are ``in_graph``, with their scores as they stand in the file."""
    document = read(path)
    shape, about = shape_in(document), document.get("mechinterp", {})
    circuit = nx.DiGraph()
    circuit.graph.update(about.get("facts", shape | {"positive": "not said by the file"}))
    kept = {edge: entries for edge, entries in by_edge(document).items() if all(entry["in_graph"] for entry in entries)}
    for edge, entries in kept.items():
        scored = all(entry.get("scored", True) for entry in entries)
        circuit.add_edge(*edge, **({"weight": total(entries)} if scored else {}))
    present = {end.with_port(None) for end in circuit if end.kind != "group"}
    for port in [node for node in circuit if node.port]:
        circuit.add_edges_from(port_edges(port, _heads_a_group(shape), present))
    return circuit


def save(
    path: str | os.PathLike,
    shape: Mapping[str, Any],
    values: Mapping[Edge, float | None],
    kept: Collection[Edge],
    about: Mapping[str, Any],
    d_model: int = 0,
) -> None:
    """A file of a model of this ``shape`` (facts as a circuit has them): ``values`` (else 0; None: unscored), ``kept`` edges.

    ``d_model`` is asked for by the format and used for neurons alone.
    """
    edges = list(edges_of(shape))
    if strange := {*values} - {edge for _, edge in edges}:
        named = edge_name(*min(strange))
        raise CircuitError(f"{named!r} is no edge that EAP-IG's files have in a model of {_in_words(shape)}. Save as .json.")
    parts = {owner for edge in kept for end in edge for owner in sharing(end, _heads_a_group(shape))}
    cfg = {"n_layers": shape["n_layers"], "n_heads": shape["n_heads"], "parallel_attn_mlp": bool(shape.get("parallel", False))}
    document = {
        "cfg": cfg | {"d_model": d_model},
        "nodes": {str(node): {"in_graph": node in parts or node.layer is None} for node in _nodes(shape)},
        "edges": {name: _entry(name, edge, values.get(edge, 0.0), edge in kept, shape) for name, edge in edges},
        "mechinterp": {"shape": shape_of(shape), **about},
    }
    try:
        text = json.dumps(document, allow_nan=False)
    except (TypeError, ValueError) as problem:
        raise CircuitError(
            f"This circuit has a fact or weight that JSON cannot hold ({problem}). Remove or convert it."
        ) from None
    write_text_atomically(path, text)


def read(path: str | os.PathLike) -> dict[str, Any]:
    """The document in a file. ``CircuitError`` says which file is none of EAP-IG's, and why."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        if missing := {"cfg", "nodes", "edges"} - set(document):
            raise CircuitError(f"it lacks {sorted(missing)}")
        known = dict(edges_of(shape_in(document)))
        for name, entry in document["edges"].items():
            if name not in known:
                raise CircuitError(f"{name!r} is no edge of a model of {_in_words(shape_in(document))}")
            if missing := {"score", "in_graph"} - set(entry):
                raise CircuitError(f"the edge {name!r} lacks {sorted(missing)}")
    except (ValueError, LookupError, TypeError, AttributeError) as problem:
        what = f"it lacks {problem}" if isinstance(problem, KeyError) else problem
        raise CircuitError(f"{os.fspath(path)!r} is not a file of EAP-IG's, or is truncated: {what}") from None
    return document


def shape_in(document: Mapping[str, Any], n_key_value_heads: int | None = None) -> dict[str, Any]:
    """The shape of a file's model, as facts of a circuit. Only our files say how many keys there are."""
    if "mechinterp" in document:
        return dict(document["mechinterp"]["shape"])
    cfg = document["cfg"]
    shape = {"n_layers": int(cfg["n_layers"]), "n_heads": int(cfg["n_heads"]), "has_mlp": True}
    groups = {} if n_key_value_heads is None else {"n_key_value_heads": n_key_value_heads}
    return shape | {"parallel": bool(cfg.get("parallel_attn_mlp", False))} | groups


def by_edge(document: Mapping[str, Any], shape: Mapping[str, Any] | None = None) -> dict[Edge, Entries]:
    """What a file says of each of our edges."""
    found, known = defaultdict(list), dict(edges_of(shape or shape_in(document)))
    for name, entry in document["edges"].items():
        found[known[name]].append(entry)
    return dict(found)


def total(entries: Entries) -> float:
    """An edge's score: that of one entry, or the sum over those who share it."""
    return fsum(float(entry["score"]) for entry in entries)


def edges_of(shape: Mapping[str, Any]) -> Iterator[tuple[str, Edge]]:
    """Their names in their order, and our edge; where heads share a key it has several names."""
    _refuse_unsayable(shape)
    stream = [Node.input()]
    for layer in range(shape["n_layers"]):
        heads, mlp = [Node.head(layer, head) for head in range(shape["n_heads"])], Node.mlp(layer)
        if shape.get("parallel", False):
            for writer in stream:
                yield from _into_heads(writer, heads, shape)
                yield f"{writer}->{mlp}", (writer, mlp)
            stream += heads
        else:
            for writer in stream:
                yield from _into_heads(writer, heads, shape)
            stream += heads
            yield from ((f"{writer}->{mlp}", (writer, mlp)) for writer in stream)
        stream.append(mlp)
    yield from ((f"{writer}->logits", (writer, Node.logits())) for writer in stream)


def _into_heads(writer: Node, heads: list[Node], shape: Mapping[str, Any]) -> Iterator[tuple[str, Edge]]:
    a_group = _heads_a_group(shape)
    for head in heads:
        for port in PORTS:
            shared = a_group > 1 and port != "q"
            reader = Node.group(head.layer or 0, (head.index or 0) // a_group, port) if shared else head.with_port(port)
            yield f"{writer}->{head}<{port}>", (writer, reader)


def _nodes(shape: Mapping[str, Any]) -> Iterator[Node]:
    yield Node.input()
    for layer in range(shape["n_layers"]):
        yield from (Node.head(layer, head) for head in range(shape["n_heads"]))
        yield Node.mlp(layer)
    yield Node.logits()


def _entry(name: str, edge: Edge, value: float | None, inside: bool, shape: Mapping[str, Any]) -> dict[str, Any]:
    """An edge's score, or a head's part of it; the last head takes what rounding leaves, so that they sum to it."""
    if value is None:
        return {"score": 1.0, "in_graph": inside, "scored": False}
    owners = sharing(edge[1], _heads_a_group(shape)) if edge[1].kind == "group" else ()
    share = value / max(len(owners), 1)
    is_last = bool(owners) and name.startswith(f"{edge[0]}->{owners[-1]}<")
    return {"score": value - share * (len(owners) - 1) if is_last else share, "in_graph": inside}


def _heads_a_group(shape: Mapping[str, Any]) -> int:
    return shape["n_heads"] // (shape.get("n_key_value_heads") or shape["n_heads"])


def _refuse_unsayable(shape: Mapping[str, Any]) -> None:
    if missing := {"n_layers", "n_heads"} - set(shape):
        raise CircuitError(
            f"EAP-IG's files list every edge of a model, and this circuit does not say which there are: circuit.graph lacks "
            f"{sorted(missing)}. Set them, or save as .json."
        )
    if not shape.get("has_mlp", True):
        raise CircuitError("EAP-IG's files are of models with MLPs, and this one has none. Save as .json.")


def _in_words(shape: Mapping[str, Any]) -> str:
    return f"{shape['n_layers']} layers of {shape['n_heads']} heads"
