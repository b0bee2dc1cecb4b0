"""Pictures of a prompt: each token on its colour, red speaks for the answer and blue against it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechinterp.describing import Attributed
from mechinterp.errors import TaskError
from mechinterp.files import write_beside
from mechinterp.html import AGAINST, FOR, visible

SUFFIXES = (".png", ".svg", ".pdf")
_FULL = 96  # characters of a line
_CHARACTER, _GAP, _BOX, _LINE, _LEFT = 0.095, 0.06, 0.25, 0.52, 0.95  # inches


@dataclass(frozen=True)
class _Place:
    """Where a token stands: its line, and its left and right end in inches."""

    line: int
    left: float
    right: float


def draw_text(found: Attributed, path: str | os.PathLike | None = None, *, dpi: int = 160) -> Any:
    """A matplotlib ``Figure``: the tokens, coloured by score, each with its number; below them each round's phrases.

    Colour goes with ``|score|`` as a share of the largest in the picture, so white is nothing (the published picture
    stretches the smallest to white). ``TaskError`` for a suffix that is no picture's.
    """
    from matplotlib.figure import Figure

    if path is not None and Path(path).suffix.lower() not in SUFFIXES:
        raise TaskError(f"{os.fspath(path)!r}: pictures are written as {', '.join(SUFFIXES)}.")
    places = _places([visible(token) for token in found.tokens])
    singles = [(at, at + 1, float(score)) for at, score in enumerate(found.scores)]
    rows = [("tokens", singles)]
    rows += [(f"round {n + 1}", [(p.start, p.stop, p.score) for p in phrases]) for n, phrases in enumerate(found.rounds)]
    a_row = _LINE * (1 + places[-1].line) + 0.08
    width, height = max(place.right for place in places) + 0.25, 0.85 + a_row * len(rows)
    figure = Figure(figsize=(max(width, 5.5), height), dpi=dpi, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, max(width, 5.5)), ylim=(height, 0))
    axes.axis("off")
    _draw_title(axes, found)
    largest = max((abs(score) for _, spans in rows for *_, score in spans), default=0.0) or 1.0
    for n, (label, spans) in enumerate(rows):
        top = 0.85 + n * a_row
        axes.text(0.15, top + _BOX / 2, label, fontsize=7.5, color="#666666", va="center")
        for start, stop, score in spans:
            _draw_span(axes, places[start:stop], top, score, largest)
        inside = {at for start, stop, _ in spans for at in range(start, stop)}
        for at, (token, place) in enumerate(zip(found.tokens, places, strict=True)):
            ink, y = "#222222" if at in inside else "#AAAAAA", top + place.line * _LINE + _BOX / 2
            style = {"fontsize": 8, "ha": "center", "va": "center", "family": "monospace", "parse_math": False}
            axes.text((place.left + place.right) / 2, y, visible(token), color=ink, **style)
    if path is not None:
        with write_beside(path) as beside:
            figure.savefig(beside)
    return figure


def _draw_title(axes: Any, found: Attributed) -> None:
    against = "" if found.foil is None else f" against {found.foil!r}"
    about = ", ".join([found.model, *(f"{name}: {value}" for name, value in found.settings.items())])
    title = f"{found.answer!r}{against}: {found.difference:+.2f} logits"
    axes.text(0.15, 0.25, title, fontsize=11, va="center", weight="bold", parse_math=False)
    axes.text(0.15, 0.52, f"{about}. Red speaks for the answer, blue against it.", fontsize=7.5, va="center", color="#666666")


def _draw_span(axes: Any, places: list[_Place], top: float, score: float, largest: float) -> None:
    """One box for each line that the span touches, and its number under the first."""
    from matplotlib.patches import FancyBboxPatch

    share, colour = abs(score) / largest, FOR if score > 0 else AGAINST
    shade = tuple(1 - 0.85 * share * (1 - channel / 255) for channel in colour)
    for line in range(places[0].line, places[-1].line + 1):
        here = [place for place in places if place.line == line]
        left, right, y = here[0].left, here[-1].right, top + line * _LINE
        box = FancyBboxPatch((left, y), right - left, _BOX, boxstyle="round,pad=0,rounding_size=0.04", facecolor=shade)
        box.set(edgecolor="#BBBBBB", linewidth=0.6)
        axes.add_patch(box)
        if line == places[0].line:
            axes.text((left + right) / 2, y + 0.34, f"{score:+.2f}", fontsize=6, ha="center", va="center", color="#444444")


def _places(words: list[str]) -> list[_Place]:
    """Side by side, a new line where one is full."""
    places, line, left = [], 0, _LEFT
    for word in words:
        right = left + max(len(word) + 1, 5) * _CHARACTER
        if right > _LEFT + _FULL * _CHARACTER and left > _LEFT:
            line, right, left = line + 1, _LEFT + right - left, _LEFT
        places.append(_Place(line, left, right))
        left = right + _GAP
    return places
