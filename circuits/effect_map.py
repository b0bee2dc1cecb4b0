"""The head-effect map: a cell for each head and MLP, by layer; red helps, blue hurts, white is nothing."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from circuits.effects import Panel, decimals, largest_of, panels_of, written
from circuits.picture import SUFFIXES
from circuits.scores import Scores
from mechinterp.errors import CircuitError
from mechinterp.files import write_beside
from mechinterp.hover import plotly

# Blue, white, red through Okabe and Ito's: equally dark at both ends, told apart with every common colour vision.
_STOPS = ((0.0, "#003F63"), (0.25, "#3F95C6"), (0.5, "#FFFFFF"), (0.75, "#E8884A"), (1.0, "#8A3300"))
_CELL, _SMALL, _NUMBERED = 0.44, 0.2, 400  # inches; and up to how many cells have their number written in


def draw_effects(scores: Scores, path: str | os.PathLike | None = None, *, interactive: bool = False, dpi: int = 160) -> Any:
    """A matplotlib ``Figure``, also written to ``path`` (``.png``, ``.svg``, ``.pdf``) if there is one.

    Scores of parts as they are, of edges summed with their signs over all that a part writes, of ports as a map each of
    queries, keys and values. One colour scale for all, with zero in its middle. Numbers stand in the cells up to 400 of
    them; beyond that negative cells are marked with a dash, so that the sign survives grey print. ``interactive``: a plotly
    figure that names part and value under the mouse (extra ``notebook``), which is not written to a file.

    ``CircuitError`` for scores of neurons or latents, another suffix, or a ``path`` for an interactive figure.
    """
    panels = panels_of(scores.wiring, scores.items, scores.values, scores.settings)
    _check(scores, panels, path, interactive)
    title = f"{scores.task} on {scores.model} by {scores.method}"
    if interactive:
        return _hovering(panels, title, scores.unit)
    figure = _drawn(panels, title, scores.unit, dpi)
    if path is not None:
        with write_beside(path) as beside:
            figure.savefig(beside)
    return figure


def _check(scores: Scores, panels: tuple[Panel, ...], path: str | os.PathLike | None, interactive: bool) -> None:
    if not panels:
        raise CircuitError(
            f"these are {scores.items} scores, of which a layer has too many for a map. Read them with strongest(), or "
            "score heads and MLPs, ports or edges."
        )
    if path is not None and interactive:
        raise CircuitError("an interactive figure is not written as a picture. Leave out path, or call its write_html.")
    if path is not None and Path(path).suffix.lower() not in SUFFIXES:
        raise CircuitError(f"{os.fspath(path)!r}: pictures are written as {', '.join(SUFFIXES)}.")


def _drawn(panels: tuple[Panel, ...], title: str, unit: str, dpi: int) -> Any:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    widths = [len(panel.columns) for panel in panels]
    numbered = sum(panel.values.size for panel in panels) <= _NUMBERED
    cell = _CELL if numbered else _SMALL
    size = (max(cell * sum(widths) + 0.6 * len(panels) + 1.3, 4.5), max(cell * len(panels[0].values) + 1.1, 2.4))
    figure = Figure(figsize=size, dpi=dpi, facecolor="white", layout="constrained")
    drawn = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0].tolist()
    largest, colours = largest_of(panels) or 1.0, LinearSegmentedColormap.from_list("effects", _STOPS)
    for axes, panel in zip(drawn, panels, strict=True):
        axes.imshow(panel.values, cmap=colours, vmin=-largest, vmax=largest, origin="lower", interpolation="nearest")
        _label(axes, panel)
        _write(axes, panel, largest, decimals(panels) if numbered else None)
    drawn[0].set_ylabel("layer", fontsize=9)
    bar = figure.colorbar(drawn[0].images[0], ax=drawn, shrink=0.9, aspect=30)
    bar.set_label(unit, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=11)
    return figure


def _label(axes: Any, panel: Panel) -> None:
    axes.set_title(panel.title if len(panel.columns) > 1 else "", fontsize=9)
    n_layers, step = len(panel.values), -(-max(len(panel.values), len(panel.columns)) // 32)
    style = {"fontsize": 7 if max(n_layers, len(panel.columns)) <= 20 else 5}
    axes.set_xticks(range(0, len(panel.columns), step), panel.columns[::step], **style)
    axes.set_yticks(range(0, n_layers, step), range(0, n_layers, step), **style)
    axes.tick_params(length=0)
    axes.spines[:].set_color("#BBBBBB")


def _write(axes: Any, panel: Panel, largest: float, n_decimals: int | None) -> None:
    """The numbers; or, without them, a dash where a cell is negative enough to be seen."""
    for layer, column in np.ndindex(panel.values.shape):
        value = float(panel.values[layer, column])
        text = written(value, n_decimals) if n_decimals is not None else "–" if value < -0.05 * largest else ""
        weight = "normal" if n_decimals is not None else "bold"
        ink = "white" if abs(value) > 0.62 * largest else "#222222"
        axes.text(column, layer, text, ha="center", va="center", fontsize=6, fontweight=weight, color=ink)


def _hovering(panels: tuple[Panel, ...], title: str, unit: str) -> Any:
    graphs, subplots = plotly()
    widths = [len(panel.columns) for panel in panels]
    figure = subplots.make_subplots(1, len(panels), column_widths=widths, subplot_titles=[panel.title for panel in panels])
    largest = largest_of(panels) or 1.0
    scale = {"colorscale": [list(stop) for stop in _STOPS], "zmin": -largest, "zmax": largest, "colorbar": {"title": unit}}
    for count, panel in enumerate(panels):
        cells = {"x": panel.columns, "y": list(range(len(panel.values))), "z": panel.values, "text": panel.names}
        hint = "%{text}<br>%{z:+.4g} " + unit + "<extra></extra>"
        figure.add_trace(graphs.Heatmap(**cells, **scale, hovertemplate=hint, showscale=count == 0), row=1, col=count + 1)
    n_layers = len(panels[0].values)
    figure.update_layout(template="plotly_white", title=title, width=200 + 45 * sum(widths), height=200 + 45 * n_layers)
    return figure
