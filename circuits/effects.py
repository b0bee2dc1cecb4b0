"""Scores laid out by layer: one panel for heads and one for MLPs, or one for each port."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from circuits.wiring import Wiring
from mechinterp.nodes import Node


@dataclass(frozen=True, eq=False)
class Panel:
    """One number a layer and column; ``names`` are those of the parts, ``columns`` say ``h3``, ``g1`` or ``MLP``."""

    title: str
    columns: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]
    values: Float[np.ndarray, "layer column"]


def panels_of(wiring: Wiring, items: str, values: Float[np.ndarray, "item"], settings: Mapping[str, Any]) -> tuple[Panel, ...]:
    """Heads and MLPs for scores of nodes and of edges (a part's edges summed, with their signs, over all that it writes);
    queries, keys and values for scores of ports. Parts that the method did not judge are left out, and so is the input.
    Nothing for neurons and latents, of which a layer has too many.

    >>> panels = panels_of(Wiring(1, 2), "node", np.array([0.0, 1.0, -2.0, 3.0]), {})
    >>> [(panel.title, panel.values.tolist()) for panel in panels]
    [('heads', [[1.0, -2.0]]), ('MLPs', [[3.0]])]
    """
    if items == "port":
        parts = [reader for reader in wiring.readers if reader.port]
    elif items in ("edge", "node"):
        judged = settings.get("judged", ["head", "mlp"])
        parts = [writer if writer.kind in judged else None for writer in wiring.writers]
        if items == "edge":
            values = np.bincount(wiring.edge_writer, weights=values, minlength=len(parts))
    else:
        return ()
    found: dict[str, list[tuple[Node, float]]] = {}
    for part, value in zip(parts, values.tolist(), strict=True):
        if part is not None:
            found.setdefault(_title(part), []).append((part, value))
    return tuple(_panel(title, entries, wiring.n_layers) for title, entries in found.items())


def decimals(panels: tuple[Panel, ...]) -> int:
    """How many decimals write the largest number with three digits, but no more than 6."""
    largest = largest_of(panels)
    return int(np.clip(2 - np.floor(np.log10(largest)), 0, 6)) if largest else 0


def largest_of(panels: tuple[Panel, ...]) -> float:
    """The largest magnitude: both ends of a colour scale that is centred on zero."""
    return max((float(np.abs(panel.values).max()) for panel in panels), default=0.0)


def written(value: float, n_decimals: int) -> str:
    """With its sign and no zero in front of the point; what rounds to nothing has no sign.

    >>> written(-0.25, 2), written(1.5, 1), written(-0.001, 2)
    ('-.25', '+1.5', '0')
    """
    if not round(value, n_decimals):
        return "0"
    text = f"{value:+.{n_decimals}f}"
    return text[0] + text[2:] if text[1:3] == "0." else text


def _title(part: Node) -> str:
    if part.port:
        return {"q": "queries", "k": "keys", "v": "values"}[part.port]
    return "heads" if part.kind == "head" else "MLPs"


def _panel(title: str, entries: list[tuple[Node, float]], n_layers: int) -> Panel:
    width = len(entries) // n_layers
    rows = [entries[layer * width : (layer + 1) * width] for layer in range(n_layers)]
    names = tuple(tuple(str(part) for part, _ in row) for row in rows)
    values = np.array([[value for _, value in row] for row in rows])
    letter = {"head": "h", "group": "g"}
    columns = tuple(f"{letter[part.kind]}{part.index}" if part.kind in letter else "MLP" for part, _ in rows[0])
    return Panel(title, columns, names, values)
