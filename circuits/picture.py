"""A picture of a circuit: layers upwards from the input to the logits, to be read by people at 10 to 200 edges.

Ports are folded into their head: an edge that is read as query enters it on the left, as key in the middle, as value
on the right, each in its colour. Width grows with ``|score|``; dashed edges have negative scores. An edge into a key or value
that heads share is drawn to each of them that the circuit uses, and counted once.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx

from circuits.edges import Edge, by_magnitude, counted, counted_parts, edge_name, wholes
from circuits.layout import BOX, SIDE, Layout, arrange, is_bar, port_offset, route
from mechinterp.errors import CircuitError
from mechinterp.files import write_beside
from mechinterp.nodes import PORTS, Node

# Okabe and Ito's palette, told apart with every common colour vision; ``None``: into an MLP or the logits.
PORT_COLOURS: dict[str | None, str] = {"q": "#0072B2", "k": "#D55E00", "v": "#009E73", None: "#5F5F5F"}
SUFFIXES = (".png", ".svg", ".pdf")
_INCHES = 0.8  # of a unit of the layout
_LEFT, _RIGHT, _BOTTOM, _TOP = 0.75, 2.0, 0.25, 0.8  # margins, in inches
INK = "#222222"
FILL = {
    "head": "#FFFFFF",
    "group": "#FFFFFF",
    "mlp": "#F1E6C8",
    "neuron": "#F1E6C8",
    "latent": "#E4E4F4",
    "error": "#F7DADA",
    "input": "#DDDDDD",
    "logits": "#DDDDDD",
}
_READ_AS: dict[str | None, str] = {
    "q": "read as query (left)",
    "k": "read as key (middle)",
    "v": "read as value (right)",
    None: "read by MLP, logits",
}
_DASHES = (0, (3, 1.6))
SIGNS = {  # of scores that are no effects of a cut: what a positive one says, and a negative one
    "codes-edges": ("more than each alone", "less than each alone"),
    "codes-edges-conditional": ("more than chance", "less than chance"),
}


def signs_of(facts: Mapping[str, Any]) -> tuple[str, str]:
    """What a positive score of a circuit says, and a negative one.

    >>> signs_of({"method": "eap"}), signs_of({"positive": "not said by the file"})
    (('helps', 'hurts'), ('not said by the file', 'not said by the file'))
    """
    told = facts.get("positive", "helps")  # of scores that another program wrote: see eap_ig.read_circuit
    return SIGNS.get(str(facts.get("method")), ("helps", "hurts") if told == "helps" else (str(told), str(told)))


def draw(circuit: nx.DiGraph, path: str | os.PathLike | None = None, *, max_edges: int = 400, dpi: int = 160) -> Any:
    """A matplotlib ``Figure`` of a circuit, also written to ``path`` (``.png``, ``.svg``, ``.pdf``) if there is one.

    Only the ``max_edges`` strongest edges are drawn, and the title says so. Scores are optional: without them all edges
    look alike, and too many are thinned out evenly. In SVG files every edge and part has its name as ``id`` (an edge into what
    heads share also that of the head: ``m4->a9.g1.k->a9.h4``). The figure belongs to no window and needs no closing. About a
    second for 200 edges. ``CircuitError`` for another suffix.
    """
    from matplotlib.figure import Figure

    if path is not None and Path(path).suffix.lower() not in SUFFIXES:
        raise CircuitError(f"{os.fspath(path)!r}: pictures are written as {', '.join(SUFFIXES)}.")
    view = View.of(circuit, max_edges)
    reach = view.layout.half_width + SIDE
    size = 2 * reach * _INCHES, (view.layout.top + 1) * _INCHES
    width, height = size[0] + _LEFT + _RIGHT, size[1] + _BOTTOM + _TOP
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
    axes = figure.add_axes((_LEFT / width, _BOTTOM / height, size[0] / width, size[1] / height))
    axes.set(xlim=(-reach, reach), ylim=(-0.5, view.layout.top + 0.5))
    axes.axis("off")
    _draw_layers(axes, view.layout)
    _draw_edges(axes, view)
    _draw_parts(axes, view)
    _draw_title(figure, view, width, height)
    _draw_legend(axes, view)
    if path is not None:
        _save(figure, path)
    return figure


@dataclass(frozen=True)
class View:
    """What is drawn: the shown edges, weakest first, with their scores (``None``: not scored), and where.

    ``heads``: the parts that each edge is drawn to, more than one where heads share what it is read as.
    """

    facts: dict[str, Any]
    scores: dict[Edge, float | None]
    heads: dict[Edge, list[Node]]
    n_hidden: int
    largest: float | None
    layout: Layout

    @classmethod
    def of(cls, circuit: nx.DiGraph, max_edges: int) -> "View":
        ranked = by_magnitude(circuit)
        is_scored = any("weight" in circuit.edges[edge] for edge in ranked)
        shown = ranked[:max_edges] if is_scored else _spread(ranked, max_edges)
        scores = {edge: circuit.edges[edge].get("weight") for edge in reversed(shown)}
        largest = max((abs(score) for score in scores.values() if score is not None), default=0.0)
        heads = {edge: wholes(circuit, edge[1]) for edge in scores}
        shown_nodes = {node for edge in scores for node in edge} or set(circuit.nodes)
        parts = {part for node in shown_nodes for part in wholes(circuit, node)}
        parts |= {bar for bar in (Node.input(), Node.logits()) if bar.kind not in {node.kind for node in parts}}
        shares = {edge: abs(score) / largest if score and largest else 1e-3 for edge, score in scores.items()}
        strengths = {drawn_to(edge, head): share / len(heads[edge]) for edge, share in shares.items() for head in heads[edge]}
        return cls(circuit.graph, scores, heads, len(ranked) - len(scores), largest or None, arrange(parts, strengths))

    def share(self, edge: Edge) -> float:
        """``|score|`` as a fraction of the largest; half for an edge without a score."""
        score = self.scores[edge]
        return 0.5 if score is None or self.largest is None else abs(score) / self.largest


def drawn_to(edge: Edge, head: Node) -> Edge:
    """The edge with the reader's port on the head itself, which is where it is drawn."""
    return edge[0], head.with_port(edge[1].port)


def _spread(edges: list[Edge], n: int) -> list[Edge]:
    """At most ``n`` of them, at even steps."""
    return edges if len(edges) <= n else [edges[at * len(edges) // n] for at in range(n)]


def line_width(share: float) -> float:
    """Points for a share of the largest ``|score|``: the square root, so that weak edges stay visible."""
    return 0.6 + 4.0 * share**0.5


def _draw_layers(axes: Any, layout: Layout) -> None:
    """A pale band behind every layer, named on the left."""
    heights: dict[int, list[float]] = {}
    for node, (_, y) in layout.places.items():
        if node.layer is not None:
            heights.setdefault(node.layer, []).append(y)
    for count, (layer, ys) in enumerate(sorted(heights.items())):
        if count % 2 == 0:
            axes.axhspan(min(ys) - 0.42, max(ys) + 0.42, color="#F5F6F8", zorder=0)
        place = (-layout.half_width - SIDE - 0.12, (min(ys) + max(ys)) / 2)
        axes.text(*place, f"layer {layer}", ha="right", va="center", fontsize=8, color="#666666")


def _draw_edges(axes: Any, view: View) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    drawn = [(edge, head) for edge in view.scores for head in view.heads[edge]]
    for depth, (edge, head) in enumerate(drawn):
        share, score = view.share(edge), view.scores[edge]
        controls = route(view.layout, drawn_to(edge, head))
        curve = PathPatch(
            Curve(controls, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4]),
            facecolor="none",
            edgecolor=PORT_COLOURS[edge[1].port],
            linewidth=line_width(share),
            linestyle=_DASHES if score is not None and score < 0 else "solid",
            alpha=0.35 + 0.55 * share**0.5,
            zorder=1 + depth / (1 + len(drawn)),
            gid=edge_name(*edge) + (f"->{head}" if len(view.heads[edge]) > 1 else ""),
            clip_on=False,
        )
        axes.add_patch(curve)


def _draw_parts(axes: Any, view: View) -> None:
    ports = {head.with_port(edge[1].port) for edge in view.scores if edge[1].port for head in view.heads[edge]}
    for node, (x, y) in view.layout.places.items():
        width = 2 * (view.layout.half_width + SIDE) - 0.1 if is_bar(node) else BOX[0]
        axes.add_patch(_shape(node, x, y, width))
        small = {"fontsize": 8.5 if is_bar(node) else 7.5 if len(str(node)) < 8 else 6.0}
        axes.text(x, y, str(node), ha="center", va="center", color=INK, zorder=4, **small)
    for port in sorted(ports):
        x, y = view.layout.places[port.with_port(None)]
        place = (x + port_offset(port), y - BOX[1] / 2)
        axes.plot(*place, marker="o", ms=4, color=PORT_COLOURS[port.port], mec="white", mew=0.5, zorder=5)


def _shape(node: Node, x: float, y: float, width: float) -> Any:
    """Heads are rounded boxes, MLPs hexagons, latents and their errors ellipses, input and logits bars."""
    from matplotlib.patches import Ellipse, FancyBboxPatch, Polygon

    half, rise = width / 2, BOX[1] / 2
    look = {"facecolor": FILL[node.kind], "edgecolor": INK, "linewidth": 0.9, "zorder": 3, "gid": str(node)}
    if node.kind == "mlp":
        cut = 0.12
        upper = [(x - half, y), (x - half + cut, y + rise), (x + half - cut, y + rise)]
        lower = [(2 * x - across, 2 * y - up) for across, up in upper]  # turned by half a circle
        return Polygon(upper + lower, closed=True, **look)
    if node.kind in ("latent", "error"):
        return Ellipse((x, y), width, BOX[1], **look)
    rounding = 0.02 if is_bar(node) else 0.1
    style = f"round,pad=0,rounding_size={rounding}"
    return FancyBboxPatch((x - half, y - rise), width, BOX[1], boxstyle=style, **look)


def _draw_title(figure: Any, view: View, width: float, height: float) -> None:
    named = [view.facts.get("task"), view.facts.get("model") and f"on {view.facts['model']}"]
    named += [view.facts.get("method") and f"by {view.facts['method']}"]
    title = " ".join(str(words) for words in named if words) or "circuit"
    kinds = [node.kind for node in view.layout.places]
    counts = [counted(len(view.scores), "edge"), *counted_parts(kinds)]
    if view.n_hidden:
        some = f"{len(view.scores):,} of {len(view.scores) + view.n_hidden:,} edges"
        counts[0] = f"the strongest {some}" if view.largest else f"{some}, evenly chosen as none is scored"
    elif total := view.facts.get("n_edges_in_model"):
        counts[0] = f"{len(view.scores):,} of {total:,} edges"
    if "faithfulness" in view.facts:
        counts.append(f"faithfulness {view.facts['faithfulness']:.3g}")
    if "faithfulness_low" in view.facts and "faithfulness_high" in view.facts:
        counts[-1] += f" [{view.facts['faithfulness_low']:.3g}, {view.facts['faithfulness_high']:.3g}]"
    left = 0.2 / width
    figure.text(left, 1 - 0.33 / height, title, fontsize=12, fontweight="bold", va="center", color=INK)
    figure.text(left, 1 - 0.6 / height, " · ".join(counts), fontsize=9, va="center", color="#444444")


def _draw_legend(axes: Any, view: View) -> None:
    from matplotlib.lines import Line2D

    scores = [score for score in view.scores.values() if score is not None]
    ports = {reader.port for _, reader in view.scores}
    lines = [
        Line2D([], [], color=PORT_COLOURS[port], linewidth=2.5, label=_READ_AS[port])
        for port in (*PORTS, None)
        if port in ports
    ]
    if view.largest:
        for share in (1.0, 0.25, 0.05):
            label = f"|score| {share * view.largest:.2g}"
            lines.append(Line2D([], [], color="#999999", linewidth=line_width(share), label=label))
    if any(score < 0 for score in scores):
        positive, negative = signs_of(view.facts)
        lines.append(Line2D([], [], color="#555555", linewidth=1.8, label=f"positive: {positive}"))
        lines.append(Line2D([], [], color="#555555", linewidth=1.8, linestyle=_DASHES, label=f"negative: {negative}"))
    if any(len(heads) > 1 for heads in view.heads.values()):
        lines.append(Line2D([], [], ls="", label="to several heads: one edge,\nwhich these heads share"))
    marks = {"head": ("s", "head"), "mlp": ("H", "MLP"), "latent": ("o", "SAE latent"), "error": ("o", "SAE error")}
    present = {node.kind for node in view.layout.places}
    for kind, (marker, label) in marks.items():
        if kind in present:
            lines.append(Line2D([], [], ls="", marker=marker, ms=9, mfc=FILL[kind], mec=INK, label=label))
    unit = view.facts.get("unit")
    title = f"score: {unit}" if unit and view.largest else None
    style = {"fontsize": 7.5, "title_fontsize": 8, "frameon": False, "alignment": "left"}
    axes.legend(handles=lines, title=title, loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0, **style)


def _save(figure: Any, path: str | os.PathLike) -> None:
    """Without dates and random ids, so that equal circuits make equal files."""
    from matplotlib import rc_context

    dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with write_beside(path) as beside, rc_context({"svg.hashsalt": "circuit", "svg.fonttype": "none"}):
        figure.savefig(beside, metadata=dates.get(beside.suffix.lower()))
