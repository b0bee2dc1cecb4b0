"""Where things go in a picture of a circuit: rows by layer, few crossings, and edges that bend around other parts.

Three steps. (1) Rows: input below, then per layer its heads, latents and MLP, logits on top. (2) Places in a row: each
part moves to the mean place of its neighbours (the barycentre heuristic of Sugiyama et al. 1981, which we weight by
``|score|``), parts are then pushed apart, up and down the rows in turn; the arrangement with the fewest crossings wins.
(3) Routes: each edge takes that curve, out of a few more or less bent ones, that passes behind the fewest other parts.
"""

from dataclasses import dataclass

import networkx as nx
import numpy as np
from jaxtyping import Float

from circuits.edges import Edge
from mechinterp.nodes import PORTS, Node

GAP = 1.12  # between the centres of two parts in a row; everything here is in this unit
BOX = (0.78, 0.34)  # width and height of a part
_LAYER_STEP, _STAGE_STEP = 1.0, 0.8  # between rows
SIDE = 0.45  # free lanes for edges left and right of the parts
_BENDS = np.array([0.0, 0.35, -0.35, 0.8, -0.8, 1.4, -1.4, 2.1, -2.1])
_SHIFTS = np.array([0.0, 0.45, -0.45, 0.9, -0.9, 1.6, -1.6])  # where on the bar of input or logits an edge ends


@dataclass(frozen=True)
class Layout:
    """Places of whole parts (ports folded), inside ``half_width`` left and right of 0; the logits are at ``top``."""

    places: dict[Node, tuple[float, float]]
    half_width: float
    top: float


def is_bar(node: Node) -> bool:
    """Input and logits are drawn as bars as wide as the picture: they meet edges anywhere."""
    return node.kind in ("input", "logits") and node.pos is None


def arrange(nodes: set[Node], strengths: dict[Edge, float], n_sweeps: int = 24) -> Layout:
    """Steps 1 and 2, for whole parts and the strength of each residual edge between ports. Deterministic."""
    rows = _rows(nodes)
    crowd = len(strengths) / len(rows)  # more edges a row: more height between rows
    heights = _heights(rows, stretch=float(np.clip(0.8 + crowd / 40, 1.0, 1.8)))
    half_width = max(2.5, 0.26 * max(heights.values()), max(map(len, rows)) * GAP / 2)
    links = [(w, r.with_port(None), s) for (w, r), s in strengths.items() if not is_bar(w) and not is_bar(r)]
    x = {node: GAP * (place - (len(row) - 1) / 2) for row in rows for place, node in enumerate(row)}
    best = (np.inf, x)
    for sweep in range(n_sweeps):
        x = dict(x)
        for row in rows if sweep % 2 else reversed(rows):
            _settle(row, x, links, half_width)
        best = min(best, (_crossings(x, heights, links), x), key=lambda found: found[0])
    places = {node: (0.0 if is_bar(node) else float(best[1][node]), heights[node]) for node in nodes}
    return Layout(places, half_width, max(heights.values()))


def route(layout: Layout, edge: Edge, avoid: bool = True) -> Float[np.ndarray, "control=4 xy=2"]:
    """Step 3: the control points of a Bézier curve, from the top of the writer to the reader's port.

    Without ``avoid`` the edge runs directly, ten times as fast: where thousands are drawn, none can avoid all parts.
    """
    writer, reader = edge[0], edge[1].with_port(None)
    start, end = np.array(layout.places[writer]), np.array(layout.places[reader])
    start[1], end[1] = start[1] + BOX[1] / 2, end[1] - BOX[1] / 2
    if edge[1].port:
        end[0] += port_offset(edge[1])
    start[0] += np.clip(0.1 * (end[0] - start[0]), -0.3 * BOX[0], 0.3 * BOX[0])  # fan out at the writer
    candidates = [
        (_curve(s, e, bend), abs(bend) + 0.3 * abs(shift))
        for shift in (_SHIFTS if avoid and (is_bar(writer) or is_bar(reader)) else [0.0])
        for bend in (_BENDS if avoid else _BENDS[:1]) * min(1.0, (end[1] - start[1]) / 3)
        for s, e in [_ends(layout, start, end, shift, writer, reader)]
    ]
    if len(candidates) == 1:
        return candidates[0][0]
    own = (writer, reader)
    others = np.array([place for node, place in layout.places.items() if node not in own and not is_bar(node)])
    costs = [8.0 * _n_hits(curve, others) + 0.5 * cost + 20.0 * _overhang(curve, layout) for curve, cost in candidates]
    return candidates[int(np.argmin(costs))][0]


def port_offset(port: Node) -> float:
    """Edges enter a head on the left (q), in the middle (k) or on the right (v)."""
    return BOX[0] * 0.3 * (PORTS.index(port.port) - 1)


def crossing_count(layout: Layout, graph: nx.DiGraph) -> int:
    """How many pairs of edges cross when drawn straight; bars are left out."""
    links = [(w, r, 1.0) for w, r in graph.edges if not is_bar(w) and not is_bar(r)]
    x, heights = ({node: place[axis] for node, place in layout.places.items()} for axis in (0, 1))
    return int(_crossings(x, heights, links))


def _row_of(node: Node) -> tuple[int, int]:
    layer = node.layer if node.layer is not None else -1 if node.kind == "input" else 1 << 30
    bars = {"input": int(not is_bar(node)), "logits": int(is_bar(node))}
    return layer, ({"head": 0, "group": 0, "latent": 1, "error": 1, "neuron": 2, "mlp": 2} | bars)[node.kind]


def _rows(nodes: set[Node]) -> list[list[Node]]:
    rows: dict[tuple[int, int], list[Node]] = {}
    for node in sorted(nodes):
        rows.setdefault(_row_of(node), []).append(node)
    return [rows[key] for key in sorted(rows)]


def _heights(rows: list[list[Node]], stretch: float) -> dict[Node, float]:
    heights, height, layer = {}, 0.0, None
    for row in rows:
        here = _row_of(row[0])[0]
        if layer is not None:
            height += stretch * (_STAGE_STEP if here == layer else _LAYER_STEP)
        heights |= dict.fromkeys(row, height)
        layer = here
    return heights


def _settle(row: list[Node], x: dict[Node, float], links: list[tuple[Node, Node, float]], half_width: float) -> None:
    """Move the parts of one row to their barycentres, then apart."""
    pull, mass = dict.fromkeys(row, 0.0), dict.fromkeys(row, 0.0)
    for writer, reader, strength in links:
        for here, there in ((writer, reader), (reader, writer)):
            if here in pull:
                pull[here] += strength * x[there]
                mass[here] += strength
    wanted = {node: pull[node] / mass[node] if mass[node] else x[node] for node in row}
    ordered = sorted(row, key=lambda node: (wanted[node], node))
    for node, place in zip(ordered, _push_apart(np.array([wanted[node] for node in ordered]), half_width), strict=True):
        x[node] = place


def _push_apart(wanted: Float[np.ndarray, "place"], half_width: float) -> Float[np.ndarray, "place"]:
    """The places nearest to ``wanted`` (least squares) that are at least ``GAP`` apart and inside the picture.

    With ``k * GAP`` subtracted from the k-th, "apart" becomes "not decreasing": pool neighbours that violate it.
    """
    steps = GAP * np.arange(len(wanted))
    pools: list[tuple[float, int]] = []
    for value in wanted - steps:
        pools.append((float(value), 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (mean, n), (last, m) = pools[-2], pools.pop()
            pools[-1] = ((mean * n + last * m) / (n + m), n + m)
    flat = np.concatenate([np.full(n, mean) for mean, n in pools])
    edge = half_width - GAP / 2
    return np.clip(flat, -edge, max(-edge, edge - steps[-1])) + steps


def _crossings(x: dict[Node, float], heights: dict[Node, float], links: list[tuple[Node, Node, float]]) -> float:
    """Pairs of straight edges that cross between their ends, where both run through the same heights."""
    if not links:
        return 0.0
    x0, y0 = np.array([(x[w], heights[w]) for w, _, _ in links]).T
    x1, y1 = np.array([(x[r], heights[r]) for _, r, _ in links]).T
    slope = (x1 - x0) / np.maximum(y1 - y0, 1e-9)
    low, high = np.maximum(y0[:, None], y0), np.minimum(y1[:, None], y1)
    apart_low, apart_high = (
        (x0 + slope * (level - y0)) - (x0[:, None] + slope[:, None] * (level - y0[:, None])) for level in (low, high)
    )
    crossing = (low < high - 1e-9) & (apart_low * apart_high < -1e-9)
    return float(np.triu(crossing, 1).sum())


def _ends(layout: Layout, start, end, shift: float, writer: Node, reader: Node):
    """An end on a bar goes straight above or below the other end, give or take ``shift``."""
    start, end, room = start.copy(), end.copy(), layout.half_width + SIDE - 0.2
    if is_bar(writer) and is_bar(reader):
        start[0] = end[0] = -room
    elif is_bar(writer):
        start[0] = np.clip(end[0] + shift, -room, room)
    elif is_bar(reader):
        end[0] = np.clip(start[0] + shift, -room, room)
    return start, end


def _curve(start, end, bend: float) -> Float[np.ndarray, "control=4 xy=2"]:
    lift = np.array([bend, 0.38 * (end[1] - start[1])])
    return np.stack([start, start + lift, end + lift * [1, -1], end])


_T = np.linspace(0.03, 0.97, 28)[:, None]
_BERNSTEIN = np.concatenate([(1 - _T) ** 3, 3 * _T * (1 - _T) ** 2, 3 * _T**2 * (1 - _T), _T**3], axis=1)


def _n_hits(curve: Float[np.ndarray, "control=4 xy=2"], others: np.ndarray) -> int:
    """How many parts the curve passes behind."""
    if not len(others):
        return 0
    away = np.abs((_BERNSTEIN @ curve)[:, None] - others)
    return int(((away[..., 0] < BOX[0] / 2 + 0.04) & (away[..., 1] < BOX[1] / 2 + 0.03)).any(0).sum())


def _overhang(curve: Float[np.ndarray, "control=4 xy=2"], layout: Layout) -> float:
    return float(np.maximum(np.abs((_BERNSTEIN @ curve)[:, 0]) - layout.half_width - SIDE, 0).max())
