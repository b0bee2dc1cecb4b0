"""A picture of repairs: accuracy in each condition, with its interval, and what random heads do in grey."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from circuits.picture import SUFFIXES
from circuits.repairs.report import UNEDITED, Repair
from mechinterp.errors import CircuitError
from mechinterp.files import write_beside

_UNEDITED, _EDITED, _RANDOM = "#999999", "#0072B2", "#D55E00"  # Okabe and Ito's palette


def draw_repair(
    repairs: Repair | Sequence[Repair],
    path: str | os.PathLike | None = None,
    *,
    titles: Sequence[str] | None = None,
    dpi: int = 160,
) -> Any:
    """A matplotlib ``Figure``, one panel a repair, also written to ``path`` (``.png``, ``.svg``, ``.pdf``) if there is one.

    Bars are accuracies over the whole vocabulary, with 95 % bootstrap intervals over prompts; ``random heads`` is the mean
    of the draws, and each draw is a dot. ``titles``: one a panel, instead of the tasks' names.
    """
    from matplotlib.figure import Figure

    panels = [repairs] if isinstance(repairs, Repair) else list(repairs)
    if not panels or (path is not None and Path(path).suffix.lower() not in SUFFIXES):
        raise CircuitError(f"{len(panels)} repairs for {path!r}: give one or more, and a file of {', '.join(SUFFIXES)}.")
    widths = [len(repair.conditions) + bool(repair.controls) + 0.6 for repair in panels]
    figure = Figure(figsize=(1.0 + 1.05 * sum(widths), 4.2), dpi=dpi, facecolor="white", layout="constrained")
    for axes, repair, title in zip(
        figure.subplots(1, len(panels), sharey=True, width_ratios=widths, squeeze=False)[0],
        panels,
        titles or [repair.facts["task"] for repair in panels],
        strict=True,
    ):
        _draw(axes, repair)
        axes.set_title(title, fontsize=9)
    figure.axes[0].set_ylabel("accuracy over the whole vocabulary, %")
    if path is not None:
        with write_beside(path) as beside:
            figure.savefig(beside)
    return figure


def _draw(axes: Any, repair: Repair) -> None:
    for x, condition in enumerate(repair.conditions):
        mean = condition.accuracy
        reach = 100 * np.array([[max(mean.value - mean.low, 0)], [max(mean.high - mean.value, 0)]])
        colour = _UNEDITED if condition.name == UNEDITED else _EDITED
        axes.bar(x, 100 * mean.value, 0.7, yerr=reach, color=colour, error_kw={"linewidth": 1, "capsize": 3})
        axes.text(x, 100 * mean.high + 1.5, f"{100 * mean.value:.0f}", ha="center", va="bottom", fontsize=8)
    names = [f"{c.name}\n{_lines(c.heads)}" for c in repair.conditions]
    if repair.controls:
        x, reached = len(names), [100 * control.accuracy for control in repair.controls]
        axes.bar(x, np.mean(reached), 0.7, color=_RANDOM, alpha=0.35)
        spread = np.linspace(-0.22, 0.22, len(reached)) if len(reached) > 1 else [0.0]
        axes.scatter(x + np.array(spread), reached, s=9, color=_RANDOM, linewidths=0)
        names.append(f"random heads\n{len(reached)} draws")
    axes.set_xticks(range(len(names)), names, fontsize=7.5)
    axes.set_ylim(0, 108)
    axes.spines[["top", "right"]].set_visible(False)


def _lines(heads: Sequence[str], width: int = 2) -> str:
    return "\n".join(" ".join(heads[start : start + width]) for start in range(0, len(heads), width))
