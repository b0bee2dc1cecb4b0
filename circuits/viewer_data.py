"""A circuit as the viewer's data: parts with their places, edges with their curves, and what the page says about them.

Everything is plain JSON. Ports are folded into their heads, as in the static picture and by the same layout; an edge into a
key or value that heads share is one edge with a curve to each of these heads. Names are data:
the page never reads them as HTML.
"""

import json
from collections.abc import Mapping
from typing import Any

import networkx as nx

from circuits.edges import Edge, by_magnitude, counted, counted_parts, edge_name, wholes
from circuits.layout import BOX, SIDE, Layout, arrange, is_bar, port_offset, route
from circuits.picture import drawn_to, line_width, signs_of
from mechinterp.nodes import Node

N_ROUTED = 400  # the strongest edges decide the layout and bend around other parts; the rest run directly
_UNSCORED = 0.5  # the share of the largest |score| that an edge without a score is drawn with
_POINTS_TO_PIXELS = 1.25


def viewer_data(circuit: nx.DiGraph, evidence: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All that the viewer shows: ``parts``, ``edges`` (strongest first), ``layers``, ``size``, words, and ``evidence``.

    Lengths are in units of the layout, heights upwards; line widths in pixels. A part has a ``name`` without its port; an
    edge its ``name``, the parts ``from`` and ``to`` by number, the ``port`` it is read as, a ``score`` (None: not scored) and
    a ``curve`` of four control points for every part in ``to``. About a second for 5,000 edges.
    """
    edges = by_magnitude(circuit)
    heads = {edge: wholes(circuit, edge[1]) for edge in edges}
    present = {part for node in circuit.nodes for part in wholes(circuit, node)}
    kinds = {part.kind for part in present}
    parts = sorted(present | {bar for bar in (Node.input(), Node.logits()) if bar.kind not in kinds})
    shares = _shares(circuit, edges)
    strengths = {
        drawn_to(edge, head): max(shares[edge], 1e-3) / len(heads[edge]) for edge in edges[:N_ROUTED] for head in heads[edge]
    }
    layout = arrange(set(parts), strengths)
    numbers = {part: number for number, part in enumerate(parts)}
    return {
        "title": _title(circuit.graph),
        "counts": _counts(circuit, edges, parts),
        "facts": [[str(name), _in_words(fact)] for name, fact in sorted(circuit.graph.items())],
        "unit": circuit.graph.get("unit") and str(circuit.graph["unit"]),
        "signs": list(signs_of(circuit.graph)),
        "size": {"half_width": _short(layout.half_width + SIDE), "top": _short(layout.top), "box": list(BOX)},
        "layers": _layers(layout),
        "parts": [_part(part, layout) for part in parts],
        "edges": [
            {
                "name": edge_name(*edge),
                "from": numbers[edge[0]],
                "to": [numbers[head] for head in heads[edge]],
                "port": edge[1].port,
                "port_name": str(edge[1]) if edge[1].kind == "group" else None,
                "score": _score(circuit, edge),
                "width": _short(_POINTS_TO_PIXELS * line_width(shares[edge])),
                "opacity": _short(_opacity(shares[edge], len(edges))),
                "curves": [_curve(layout, drawn_to(edge, head), rank < N_ROUTED) for head in heads[edge]],
            }
            for rank, edge in enumerate(edges)
        ],
        "evidence": evidence,
    }


def _shares(circuit: nx.DiGraph, edges: list[Edge]) -> dict[Edge, float]:
    """``|score|`` as a fraction of the largest."""
    largest = max((abs(score) for edge in edges if (score := _score(circuit, edge)) is not None), default=0.0)
    scores = {edge: _score(circuit, edge) for edge in edges}
    return {edge: _UNSCORED if score is None else abs(score) / largest if largest else 0.0 for edge, score in scores.items()}


def _score(circuit: nx.DiGraph, edge: Edge) -> float | None:
    weight = circuit.edges[edge].get("weight")
    return None if weight is None else float(f"{float(weight):.6g}")


def _opacity(share: float, n_edges: int) -> float:
    """Weak edges are paler, and the more so the more there are, lest they cover the strong ones."""
    floor = 0.35 * min(1.0, (400 / n_edges) ** 0.5)
    return floor + (0.9 - floor) * share**0.5


def _curve(layout: Layout, edge: Edge, is_routed: bool) -> list[float]:
    return route(layout, edge, avoid=is_routed).round(3).ravel().tolist()


def _part(part: Node, layout: Layout) -> dict[str, Any]:
    x, y = layout.places[part]
    ports = {port: _short(port_offset(part.with_port(port))) for port in ("q", "k", "v")} if part.kind == "head" else {}
    return {
        "name": str(part),
        "words": _words(part),
        "kind": part.kind,
        "pos": part.pos,
        "is_bar": is_bar(part),
        "x": _short(x),
        "y": _short(y),
        "ports": ports,
    }


def _words(part: Node) -> str:
    """
    >>> _words(Node.head(9, 6).at(14))
    'head 6 of layer 9 at position 14'
    """
    named = {
        "input": "input: the embeddings",
        "logits": "logits: the output",
        "head": f"head {part.index} of layer {part.layer}",
        "group": f"shared keys and values of group {part.index} in layer {part.layer}",
        "mlp": f"MLP of layer {part.layer}",
        "neuron": f"neuron {part.index} of the MLP of layer {part.layer}",
        "latent": f"latent {part.index} of layer {part.layer}",
        "error": f"what the autoencoder of layer {part.layer} leaves over",
    }[part.kind]
    return named if part.pos is None else f"{named} at position {part.pos}"


def _layers(layout: Layout) -> list[dict[str, Any]]:
    """Which heights each layer takes, for the bands behind it."""
    heights: dict[int, list[float]] = {}
    for node, (_, y) in layout.places.items():
        if node.layer is not None:
            heights.setdefault(node.layer, []).append(y)
    return [{"layer": layer, "low": _short(min(ys)), "high": _short(max(ys))} for layer, ys in sorted(heights.items())]


def _title(facts: Mapping[str, Any]) -> str:
    """
    >>> _title({"task": "ioi", "model": "gpt2", "method": "eap"})
    'ioi on gpt2 by eap'
    """
    named = [("", "task"), ("on ", "model"), ("by ", "method")]
    return " ".join(f"{word}{facts[fact]}" for word, fact in named if facts.get(fact)) or "circuit"


def _counts(circuit: nx.DiGraph, edges: list[Edge], parts: list[Node]) -> str:
    total = circuit.graph.get("n_edges_in_model")
    n_edges = counted(len(edges), "edge") if total is None else f"{len(edges):,} of {counted(total, 'edge')}"
    counts = [n_edges, *counted_parts([part.kind for part in parts])]
    if "faithfulness" in circuit.graph:
        counts.append(f"faithfulness {circuit.graph['faithfulness']:.3g}")
    return " · ".join(counts)


def _in_words(fact: Any) -> str:
    return fact if isinstance(fact, str) else json.dumps(fact, default=str, ensure_ascii=False)


def _short(number: float) -> float:
    return round(float(number), 3)
