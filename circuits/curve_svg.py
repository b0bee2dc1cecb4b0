"""Faithfulness against size as a small SVG: lines with their bands, single circuits, and both baselines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from circuits.curves import Curve
from mechinterp.html import escape

_WIDTH, _HEIGHT = 460.0, 230.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 112.0, 12.0, 34.0
_LOWEST, _HIGHEST = -0.5, 2.0  # a circuit that hurts, or helps, more than this is drawn at the edge
NULL = "#8A8A8A"  # of what is drawn at random
_COLOURS = ("#3A93CF", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito's, seen on dark and light
_DASHES = ("", "7 3", "2 3", "9 3 2 3")


@dataclass(frozen=True)
class Bar:
    """One size: a value between ``low`` and ``high``."""

    n_edges: int
    value: float
    low: float
    high: float
    label: str
    colour: str = "#D55E00"


@dataclass(frozen=True)
class _Axes:
    """Pixels for edges (logarithmic) and faithfulness."""

    first: float
    last: float
    bottom: float
    top: float

    def x(self, n: int | float) -> float:
        across = (np.log10(max(n, self.first)) - np.log10(self.first)) / (np.log10(self.last) - np.log10(self.first))
        return _LEFT + float(across) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        up = (float(np.clip(value, self.bottom, self.top)) - self.bottom) / (self.top - self.bottom)
        return _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)


def curve_svg(
    lines: Mapping[str, Curve], bars: Sequence[Bar], n_edges_in_model: int, alternative: str, random: Curve | None = None
) -> str:
    """``lines`` by their label; sizes on a logarithmic axis. The baselines: the whole model (1) and every edge cut (0)."""
    drawn = {label: (curve, *_look(count)) for count, (label, curve) in enumerate(lines.items())}
    drawn |= {"random circuits": (random, NULL, "")} if random else {}
    axes = _axes([curve for curve, _, _ in drawn.values()], bars, n_edges_in_model)
    inside = _frame(axes) + "".join(_line(axes, label, *entry) for label, entry in drawn.items())
    inside += "".join(_bar(axes, bar) for bar in bars)
    size = f'width="{_WIDTH:g}" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" style="max-width:100%;height:auto"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size} aria-label="{escape(alternative)}">{inside}</svg>'
    return svg + "".join(["<div>", *(_key(label, colour, dashes) for label, (_, colour, dashes) in drawn.items()), "</div>"])


def _look(count: int) -> tuple[str, str]:
    return _COLOURS[count % len(_COLOURS)], _DASHES[count % len(_DASHES)]


def _axes(curves: Sequence[Curve], bars: Sequence[Bar], n_edges_in_model: int) -> _Axes:
    values = [value for curve in curves for value in (*curve.low, *curve.high)]
    values += [value for bar in bars for value in (bar.low, bar.high)]
    sizes = [n for curve in curves for n in curve.n_edges if n] + [bar.n_edges for bar in bars if bar.n_edges]
    bottom, top = max(min([-0.1, *values]), _LOWEST), min(max([1.1, *values]), _HIGHEST)
    first = max(min([*sizes, n_edges_in_model / 5]) / 2, 1.0)
    return _Axes(first, max(float(n_edges_in_model), 2 * first), bottom, top)


def _key(label: str, colour: str, dashes: str) -> str:
    line = (
        f'<svg width="24" height="8"><path d="M0 4H24" stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dashes}"/></svg>'
    )
    return f'<span style="margin-right:14px;font-size:12px;white-space:nowrap">{line} {escape(label)}</span>'


def _frame(axes: _Axes) -> str:
    right, floor = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [f'<path d="M{_LEFT} {_TOP}V{floor}H{right}" fill="none" stroke="currentColor" opacity=".5"/>']
    for value, label, dashes in ((1.0, "whole model", ""), (0.0, "every edge cut", ' stroke-dasharray="2 3"')):
        y = axes.y(value)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="currentColor" opacity=".55"{dashes}/>')
        parts.append(_text(right + 5, y, label, "start") + _text(_LEFT - 5, y, f"{value:g}", "end"))
    for power in range(int(np.ceil(np.log10(axes.first))), int(np.floor(np.log10(axes.last))) + 1):
        x = axes.x(10**power)
        parts.append(f'<path d="M{x:.1f} {floor}v4" stroke="currentColor" opacity=".5"/>')
        parts.append(_text(x, floor + 12, f"{10**power:,}", "middle"))
    parts.append(_text((_LEFT + right) / 2, floor + 26, "edges kept (logarithmic)", "middle"))
    middle = (_TOP + floor) / 2
    parts.append(_text(12.0, middle, "faithfulness", "middle", f' transform="rotate(-90 12 {middle:.1f})"'))
    return "".join(parts)


def _line(axes: _Axes, label: str, curve: Curve, colour: str, dashes: str) -> str:
    points = sorted(zip(curve.n_edges, curve.faithfulness, curve.low, curve.high, strict=True))
    points = [point for point in points if point[0]]
    if not points:
        return ""
    middle = " ".join(f"{axes.x(n):.1f},{axes.y(value):.1f}" for n, value, _, _ in points)
    around = [(n, low) for n, _, low, _ in points] + [(n, high) for n, _, _, high in reversed(points)]
    band = " ".join(f"{axes.x(n):.1f},{axes.y(value):.1f}" for n, value in around)
    dots = "".join(
        f'<circle cx="{axes.x(n):.1f}" cy="{axes.y(value):.1f}" r="2.5" fill="{colour}">'
        f"<title>{escape(label)}, {n:,} edges: {value:.3f} [{low:.3f}, {high:.3f}]</title></circle>"
        for n, value, low, high in points
    )
    stroke = f'fill="none" stroke="{colour}" stroke-width="1.6" stroke-dasharray="{dashes}"'
    return f'<polygon points="{band}" fill="{colour}" opacity=".18"/><polyline points="{middle}" {stroke}/>{dots}'


def _bar(axes: _Axes, bar: Bar) -> str:
    x, y = axes.x(bar.n_edges), axes.y(bar.value)
    look = f'stroke="{bar.colour}" stroke-width="2"'
    hint = f"{bar.label}, {bar.n_edges:,} edges: {bar.value:.3f} [{bar.low:.3f}, {bar.high:.3f}]"
    span = f'<path d="M{x:.1f} {axes.y(bar.low):.1f}V{axes.y(bar.high):.1f}" {look}/>'
    diamond = f'<path d="M{x - 5:.1f} {y:.1f}l5 -5 5 5 -5 5z" fill="{bar.colour}"/>'
    return f"<g><title>{escape(hint)}</title>{span}{diamond}{_text(x + 8, y, bar.label, 'start')}</g>"


def _text(x: float, y: float, words: str, anchor: str, more: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="10" fill="currentColor" dominant-baseline="central"'
    return f'<text {place} text-anchor="{anchor}"{more}>{escape(words)}</text>'
