"""A circuit in a notebook: the layered drawing as SVG in the page itself, in the colours of the page, without script.

The same view as ``picture.draw``: ports folded into their head, width by ``|score|``, dashes for negative scores. Resting the
mouse on a part or an edge tells its name and score.
"""

from collections.abc import Iterable
from typing import Any

import networkx as nx

from circuits.edges import Edge, edge_name
from circuits.layout import BOX, SIDE, Layout, is_bar, route
from circuits.picture import FILL, INK, View, drawn_to, line_width
from mechinterp.html import escape, note, panel
from mechinterp.nodes import PORTS, Node

_SCALE, _LEFT, _RIGHT = 62.0, 58.0, 30.0  # pixels of a unit of the layout; left of it layers are named, right of it edges bend
_MOST = 200  # edges; the whole circuit is for the viewer
_EDGE = "#8A8A8A"  # grey that a dark page shows as well as a light one
_COLOURS: dict[str | None, str] = {"q": "#3A93CF", "k": "#E0701A", "v": "#12A67C", None: _EDGE}  # likewise
_READ_AS: dict[str | None, str] = {"q": "query (left)", "k": "key (middle)", "v": "value (right)", None: "MLP or logits"}
_BEHIND = "rgba(128,128,128,.07)"


def circuit_html(title: str, circuit: nx.DiGraph, alternative: str, max_edges: int = _MOST) -> str:
    """``alternative``: what is read aloud in place of the drawing. At most ``max_edges`` edges are drawn, the strongest."""
    view = View.of(circuit, max_edges)
    width = 2 * (view.layout.half_width + SIDE) * _SCALE + _LEFT + _RIGHT
    height = (view.layout.top + 1) * _SCALE
    aloud = escape(" ".join(alternative.split()))
    drawn = "".join([*_bands(view.layout, width), *_edges(view), *_parts(view)])
    style = f'style="max-width:100%;height:auto" width="{width:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {style} aria-label="{aloud}">{drawn}</svg>'
    n, total = len(view.scores), len(view.scores) + view.n_hidden
    which = "The strongest" if view.largest else "Evenly chosen"
    some = f"{which} {n:,} of {total:,} edges are drawn. " if view.n_hidden else ""
    about = f"{some}Width grows with |score|; dashes: negative. Rest the mouse on a line to read it."
    return panel(title, svg, _legend(view), note(about))


def _at(layout: Layout, x: int | float, y: float) -> tuple[float, float]:
    """Pixels, from the upper left corner."""
    return _LEFT + (x + layout.half_width + SIDE) * _SCALE, (layout.top + 0.5 - y) * _SCALE


def _bands(layout: Layout, width: float) -> Iterable[str]:
    heights: dict[int, list[float]] = {}
    for node, (_, y) in layout.places.items():
        if node.layer is not None:
            heights.setdefault(node.layer, []).append(y)
    for count, (layer, ys) in enumerate(sorted(heights.items())):
        top, bottom = _at(layout, 0, max(ys) + 0.42)[1], _at(layout, 0, min(ys) - 0.42)[1]
        if count % 2 == 0:
            yield f'<rect x="{_LEFT}" y="{top:.1f}" width="{width - _LEFT:.1f}" height="{bottom - top:.1f}" fill="{_BEHIND}"/>'
        yield _text(_LEFT - 6, (top + bottom) / 2, f"layer {layer}", 11.0, 'text-anchor="end" opacity=".75"')


def _edges(view: View) -> Iterable[str]:
    for edge, score in view.scores.items():
        for head in view.heads[edge]:
            yield _edge(view, edge, head, score)


def _edge(view: View, edge: Edge, head: Node, score: float | None) -> str:
    start, one, two, end = (_at(view.layout, *point) for point in route(view.layout, drawn_to(edge, head)).tolist())
    path = "M{:.1f} {:.1f}C{:.1f} {:.1f} {:.1f} {:.1f} {:.1f} {:.1f}".format(*start, *one, *two, *end)
    share = view.share(edge)
    dashes = ' stroke-dasharray="7 4"' if score is not None and score < 0 else ""
    look = f'stroke="{_COLOURS[edge[1].port]}" stroke-width="{line_width(share):.2f}" opacity="{0.5 + 0.45 * share**0.5:.2f}"'
    name = edge_name(*edge) + ("" if score is None else f": {score:+.4g} {view.facts.get('unit', '')}")
    return f'<path d="{path}" fill="none" {look}{dashes}><title>{escape(name)}</title></path>'


def _parts(view: View) -> Iterable[str]:
    reach = view.layout.half_width + SIDE
    for node, (x, y) in view.layout.places.items():
        across, up = _at(view.layout, x, y)
        half = (reach - 0.05 if is_bar(node) else BOX[0] / 2) * _SCALE
        yield _part(node, across, up, half, BOX[1] / 2 * _SCALE)


def _part(node: Node, x: float, y: float, half: float, rise: float) -> str:
    """Heads are rounded, MLPs angular, latents and errors ellipses, as in the picture; dark on light on every page."""
    look = f'fill="{FILL[node.kind]}" stroke="{_EDGE}"'
    if node.kind == "mlp":
        cut, ends = 8, (x - half, x + half)
        corners = [(ends[0] + cut, y - rise), (ends[1] - cut, y - rise), (ends[1], y), (ends[1] - cut, y + rise)]
        corners += [(ends[0] + cut, y + rise), (ends[0], y)]
        shape = f'<polygon points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in corners)}"'
    elif node.kind in ("latent", "error"):
        shape = f'<ellipse cx="{x:.1f}" cy="{y:.1f}" rx="{half:.1f}" ry="{rise:.1f}"'
    else:
        corner = 2 if is_bar(node) else 8
        size = f'width="{2 * half:.1f}" height="{2 * rise:.1f}" rx="{corner}"'
        shape = f'<rect x="{x - half:.1f}" y="{y - rise:.1f}" {size}'
    size = 11.0 if len(str(node)) < 8 else 8.5
    name = _text(x, y, str(node), size, 'text-anchor="middle"', INK)
    return f"<g><title>{node}</title>{shape} {look}/>{name}</g>"


def _text(x: float, y: float, words: str, size: float, more: str, ink: str = "currentColor") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{ink}" dominant-baseline="central"'
    return f"<text {place} {more}>{escape(words)}</text>"


def _legend(view: View) -> str:
    present: set[Any] = {reader.port for _, reader in view.scores}
    keys = [
        f'<span style="margin-right:14px;white-space:nowrap"><span style="display:inline-block;width:22px;height:0;'
        f'border-top:3px solid {_COLOURS[port]};vertical-align:middle"></span> {_READ_AS[port]}</span>'
        for port in (*PORTS, None)
        if port in present
    ]
    return f'<div style="font-size:12px;margin:4px 0">Read as: {"".join(keys)}</div>' if keys else ""
