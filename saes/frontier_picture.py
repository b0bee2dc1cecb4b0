"""A frontier as one plot: a panel for each measure, a line and a band over seeds for each architecture, L0 on a log axis."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mechinterp.errors import SAEError
from mechinterp.files import write_beside
from mechinterp.plots import SUFFIXES

# Okabe and Ito's palette, told apart with every common colour vision; markers tell apart in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_LOWEST = -0.5  # what is worse is drawn at the edge


@dataclass(frozen=True, eq=False)
class Line:
    """An architecture's way through a picture, sparsest first: medians over seeds, and their lowest and highest."""

    settings: tuple[float, ...]
    l0: Float[np.ndarray, "setting"]
    middle: Float[np.ndarray, "setting"]
    low: Float[np.ndarray, "setting"]
    high: Float[np.ndarray, "setting"]


def draw_lines(
    panels: Mapping[str, Mapping[str, Line]], title: str, path: str | os.PathLike | None = None, *, dpi: int = 160
) -> Any:
    """A matplotlib ``Figure``, also written to ``path`` (``.png``, ``.svg``, ``.pdf``) if there is one.

    ``panels``: for each measure, by its label, the line of each architecture.
    """
    from matplotlib.figure import Figure

    if path is not None and Path(path).suffix.lower() not in SUFFIXES:
        raise SAEError(f"{os.fspath(path)!r}: pictures are written as {', '.join(SUFFIXES)}.")
    figure = Figure(figsize=(4.6 * len(panels) + 0.4, 4.4), dpi=dpi, facecolor="white", layout="constrained")
    drawn = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (label, lines) in zip(drawn, panels.items(), strict=True):
        _draw(axes, lines, label)
    figure.suptitle(title, fontsize=11)
    handles, labels = drawn[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    if path is not None:
        with write_beside(path) as beside:
            figure.savefig(beside)
    return figure


def _draw(axes: Any, lines: Mapping[str, Line], label: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set(xlabel="L0 (latents a position, logarithmic)", ylabel=label)
    axes.spines[["top", "right"]].set_visible(False)
    if not any((np.isfinite(line.middle) & (line.l0 > 0)).any() for line in lines.values()):
        axes.text(0.5, 0.5, "undefined in every run", transform=axes.transAxes, ha="center", color="#666666")
        return
    for index, (name, line) in enumerate(lines.items()):
        colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
        low, middle, high = (np.clip(values, _LOWEST, None) for values in (line.low, line.middle, line.high))
        axes.plot(line.l0, middle, color=colour, marker=marker, markersize=4, linewidth=1.5, label=name)
        axes.fill_between(line.l0, low, high, color=colour, alpha=0.15, linewidth=0)
    low, high = axes.get_ylim()
    for at, style in ((0, ":"), (1, "-")):
        if low <= at <= high + 0.1 * (high - low):
            axes.axhline(at, color="#888888", linewidth=0.8, linestyle=style, zorder=0)
    axes.set(xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
