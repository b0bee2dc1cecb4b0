"""Re-use as one picture: which task uses which part, how many parts are shared beside chance, and what overlap is worth.

No circles, whose areas lie as soon as there are three. Left a map of all heads and MLPs, each cell with a stripe for every
task that keeps it. In the middle one bar for each pair of tasks and for all of them, with what chance alone would share;
below it the dots say whose bar it is. Right the faithfulness of each task's circuit on each task's prompts.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from circuits.picture import SUFFIXES
from circuits.reuse.overlaps import Overlap
from circuits.reuse.report import RANDOM, Reuse, Transfer
from mechinterp.errors import CircuitError
from mechinterp.files import write_beside
from mechinterp.nodes import Node

# Okabe and Ito's palette, told apart with every common colour vision; the place of a stripe in its cell says the same.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_INK, _PALE, _CHANCE, _DEGREES = "#222222", "#EFEFF1", "#888888", "#000000"
_CELL = 0.3  # inches of a cell of the map
_TITLE = 3.0  # inches of the title of the bars, which may be few


def draw_reuse(
    found: Reuse,
    path: str | os.PathLike | None = None,
    *,
    cut: float | None = None,
    node_cut: float | None = None,
    dpi: int = 160,
) -> Any:
    """A matplotlib ``Figure``, also written to ``path`` (``.png``, ``.svg``, ``.pdf``) if there is one.

    ``cut``: which of ``found.cuts`` is drawn (None: the largest). ``node_cut``: where heads and MLPs are cut (None: at
    ``cut`` if nodes were scored; of edge scores at the largest cut, as few edges may join most nodes). ``CircuitError`` for
    another suffix, for a cut that was not made, and for more than seven tasks.
    """
    from matplotlib.figure import Figure

    if path is not None and Path(path).suffix.lower() not in SUFFIXES:
        raise CircuitError(f"{os.fspath(path)!r}: pictures are written as {', '.join(SUFFIXES)}.")
    cut, node_cut = _cuts(found, cut, node_cut)
    levels = {one.level: cut if one.level == found.items else node_cut for one in found.overlaps}
    bars = {level: _bars(found, level, at) for level, at in levels.items()}
    columns, rows = found.n_heads + (1.6 if found.has_mlp else 0), found.n_layers
    n_bars = max(map(len, bars.values()))
    widths = columns * _CELL + 0.8, max(0.55 * (1 + n_bars), _TITLE), 0.55 * len(found.tasks) + 1.6
    height = max(rows * _CELL + 1.6, 2.7 * len(levels) + 0.9)
    figure = Figure(figsize=(sum(widths) + 1.6, height), dpi=dpi, facecolor="white", layout="constrained")
    parts = figure.add_gridspec(len(levels), 3, width_ratios=widths)
    _draw_map(figure.add_subplot(parts[:, 0]), found, node_cut)
    for row, level in enumerate(levels):
        _draw_bars(figure.add_subplot(parts[row, 1]), found.tasks, bars[level])
    _draw_transfers(figure.add_subplot(parts[:, 2]), found, cut)
    _draw_legend(figure, found)
    figure.suptitle(f"{found.model} by {found.method}: circuits of {100 * cut:.3g} % of the {found.items}s", fontsize=11)
    if path is not None:
        with write_beside(path) as beside:
            figure.savefig(beside)
    return figure


def _cuts(found: Reuse, cut: float | None, node_cut: float | None) -> tuple[float, float]:
    """Where items and nodes are cut, if all that is asked for can be drawn."""
    if len(found.tasks) > len(COLOURS):
        raise CircuitError(f"{len(found.tasks)} tasks cannot be told apart by colour. Draw at most {len(COLOURS)}.")
    cut = max(found.cuts) if cut is None else cut
    node_cuts = sorted({parts.cut for parts in found.parts})
    node_cut = node_cut or (cut if found.items == "node" else node_cuts[-1])
    for asked, there in ((cut, found.cuts), (node_cut, node_cuts)):
        if asked not in there:
            raise CircuitError(f"nothing was cut at {asked}. There are circuits of {', '.join(map(str, there))} of the items.")
    return cut, node_cut


def _draw_map(axes: Any, found: Reuse, cut: float) -> None:
    """Layers upwards, heads to the right, MLPs in a column of their own; each task's stripe has its own place."""
    from matplotlib.patches import Rectangle

    kept = {parts.task: {Node.parse(name) for name in parts.names} for parts in found.parts if parts.cut == cut}
    heads = [Node.head(layer, head) for layer in range(found.n_layers) for head in range(found.n_heads)]
    mlps = [Node.mlp(layer) for layer in range(found.n_layers)] if found.has_mlp else []
    stripe = 0.84 / len(found.tasks)
    for node in heads + mlps:
        x, y = found.n_heads + 0.6 if node.index is None else node.index, node.layer or 0
        axes.add_patch(Rectangle((x - 0.42, y - 0.42), 0.84, 0.84, facecolor=_PALE, linewidth=0, gid=str(node)))
        for place, task in enumerate(found.tasks):
            if node in kept[task]:
                left = x - 0.42 + place * stripe
                axes.add_patch(Rectangle((left, y - 0.42), stripe, 0.84, facecolor=COLOURS[place], linewidth=0))
    right = found.n_heads - 0.5 + (1.6 if found.has_mlp else 0)
    ticks = [*range(0, found.n_heads, 1 + found.n_heads // 13), *([found.n_heads + 0.6] if found.has_mlp else [])]
    labels = [str(tick) if isinstance(tick, int) else "MLP" for tick in ticks]
    axes.set(xlim=(-0.6, right), ylim=(-0.6, found.n_layers - 0.4), aspect="equal")
    axes.set_xlabel("head", fontsize=9)
    axes.set_ylabel("layer", fontsize=9)
    axes.set_xticks(ticks, labels, fontsize=8)
    axes.set_yticks(range(found.n_layers), map(str, range(found.n_layers)), fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"who uses what ({100 * cut:.3g} % of the nodes)", fontsize=9, loc="left")


def _bars(found: Reuse, level: str, cut: float) -> list[Overlap]:
    """Of the cut, or (heads are fewer than nodes, so that two cuts may be one) of the largest below it."""
    there = [one for one in found.overlaps if one.level == level]
    at = max(one.cut for one in there if one.cut is not None and one.cut <= cut)
    return [one for one in there if one.cut == at]


def _draw_bars(axes: Any, tasks: Sequence[str], bars: Sequence[Overlap]) -> None:
    nulls = [[null for null in (one.chance, one.same_degrees) if null is not None] for one in bars]
    tops = [max(one.n_shared, *(null.high for null in beside)) for one, beside in zip(bars, nulls, strict=True)]
    top = max([*tops, 1]) * 1.18
    for x, one in enumerate(bars):
        axes.bar(x, one.n_shared, width=0.62, color="#B9C7D6", edgecolor=_INK, linewidth=0.6)
        axes.text(x, tops[x] + 0.02 * top, f"{one.n_shared:,}", ha="center", va="bottom", fontsize=8, color=_INK)
        _mark(axes, x - 0.13, one.chance, _CHANCE, "o")
        if one.same_degrees is not None:
            _mark(axes, x + 0.13, one.same_degrees, _DEGREES, "D")
    step = 0.085 * top
    for row, task in enumerate(tasks):
        y = -step * (row + 1)
        holds = [task in one.names for one in bars]
        axes.plot(range(len(bars)), [y] * len(bars), ls="", marker="o", ms=5.5, color="#DDDDDD", clip_on=False)
        axes.plot([x for x, h in enumerate(holds) if h], [y] * sum(holds), ls="", marker="o", ms=5.5, color=COLOURS[row])
    low = -step * (len(tasks) + 0.6)
    axes.set(xlim=(-0.6, len(bars) - 0.4), ylim=(low, top))
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= top and tick == int(tick)])
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_bounds(0, top)
    axes.tick_params(labelsize=8)
    axes.axhline(0, color=_INK, linewidth=0.8)
    sizes = sorted({size for one in bars for size in one.sizes})
    kept = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    axes.set_title(f"{bars[0].level}s shared, of {kept} each ({bars[0].n_items:,} in all)", fontsize=9, loc="left")


def _mark(axes: Any, x: float, chance: Any, colour: str, marker: str) -> None:
    axes.plot([x, x], [chance.low, chance.high], color=colour, linewidth=1.6, solid_capstyle="butt", zorder=3)
    axes.plot(x, chance.mean, marker=marker, ms=4.5, color=colour, mec="white", mew=0.6, zorder=4)


def _draw_transfers(axes: Any, found: Reuse, cut: float) -> None:
    """A square a pair, darker the more faithful, with the number; what is undefined stays empty."""
    at = {(one.circuit, one.task): one for one in found.transfers if one.cut == cut}
    circuits = [*found.tasks, *([RANDOM] if any(circuit == RANDOM for circuit, _ in at) else [])]
    for y, circuit in enumerate(circuits):
        for x, task in enumerate(found.tasks):
            _draw_square(axes, x, y, at.get((circuit, task)))
    axes.set(xlim=(-0.5, len(found.tasks) - 0.5), ylim=(len(circuits) - 0.5, -0.5), aspect="equal", anchor="W")
    axes.set_xticks(range(len(found.tasks)), found.tasks, rotation=35, ha="right", fontsize=8)
    axes.set_yticks(range(len(circuits)), _short(circuits), fontsize=8)
    axes.set_xlabel("on the prompts of", fontsize=9)
    axes.set_ylabel("circuit of", fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("faithfulness across tasks", fontsize=9, loc="left")


def _draw_square(axes: Any, x: int, y: int, one: Transfer | None) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    if one is None or one.faithfulness is None:
        axes.text(x, y, "–", ha="center", va="center", fontsize=9, color=_CHANCE)
        return
    share = min(max(one.faithfulness, 0.0), 1.0)
    axes.add_patch(Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, facecolor=colormaps["Blues"](0.05 + 0.8 * share), linewidth=0))
    ink = "white" if share > 0.6 else _INK
    axes.text(x, y, f"{round(one.faithfulness, 2) + 0.0:.2f}", ha="center", va="center", fontsize=8.5, color=ink)


def _draw_legend(figure: Any, found: Reuse) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=COLOURS[place], label=task) for place, task in enumerate(found.tasks)]
    handles.append(Line2D([], [], color=_CHANCE, marker="o", ms=4.5, mec="white", label="by chance (95 %)"))
    if any(one.same_degrees is not None for one in found.overlaps):
        label = "by chance, same degrees"
        handles.append(Line2D([], [], color=_DEGREES, marker="D", ms=4.5, mec="white", label=label))
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=8.5)


def _short(names: Sequence[str]) -> list[str]:
    return ["random" if name == RANDOM else name for name in names]
