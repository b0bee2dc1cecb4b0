"""Scores in a notebook: a map of layers by heads, the MLPs beside it, and the strongest items."""

from collections.abc import Sequence

from circuits.effects import Panel, decimals, largest_of, written
from mechinterp.html import beside, escape, note, panel, shade, table

_HEAD = "font-weight:400;font-size:10px;opacity:.8;padding:1px 3px;text-align:center;background:none"
_WIDEST = 16  # columns with numbers in them; wider maps are colour and hover


def scores_html(
    title: str, panels: tuple[Panel, ...], strongest: Sequence[tuple[str, float]], unit: str, is_summed: bool
) -> str:
    """``is_summed``: the map holds sums over the edges of a part. Hovering gives a cell's name and value."""
    largest, n_decimals = largest_of(panels) or 1.0, decimals(panels)
    if max((len(found.columns) for found in panels), default=0) > _WIDEST:
        n_decimals = None
    maps = [_map(found, unit, largest, n_decimals) for found in panels]
    items = table(("strongest", unit), [(name, f"{value:+.4g}") for name, value in strongest])
    about = "Red is positive and blue negative; colour goes with the magnitude, from zero on."
    summed = " A cell is the signed sum over the edges that a part writes." if is_summed else ""
    lines = [note(about + summed)] if panels else []
    return panel(title, beside(*maps, items), *lines)


def _map(found: Panel, unit: str, largest: float, n_decimals: int | None) -> str:
    """The first layer below, as in every picture of ours. Without decimals a dash marks what is clearly negative."""
    numbered = n_decimals is not None
    rows = []
    for layer in reversed(range(len(found.values))):
        drawn = ""
        for name, value in zip(found.names[layer], found.values[layer].tolist(), strict=True):
            text = written(value, n_decimals) if n_decimals is not None else "–" if value < -0.05 * largest else ""
            drawn += _cell(f"{name}: {value:+.4g} {unit}", value / largest, text, numbered)
        rows.append(f'<tr><th scope="row" style="{_HEAD};text-align:right">{layer}</th>{drawn}</tr>')
    names = "".join(f'<th scope="col" style="{_HEAD}">{name if numbered else name[1:]}</th>' for name in found.columns)
    caption = f'<caption style="text-align:left;font-weight:600;font-size:12px;white-space:nowrap">{found.title}</caption>'
    foot = f'<tr><th style="{_HEAD}"></th>{names}</tr>'
    style = "border-collapse:separate;border-spacing:1px;margin:4px 0"
    return f'<table style="{style}">{caption}<tbody>{"".join(rows)}{foot}</tbody></table>'


def _cell(hint: str, share: float, text: str, numbered: bool) -> str:
    size = "min-width:30px;padding:3px 4px" if numbered else "min-width:13px;height:14px;line-height:1;padding:0"
    style = f"{size};text-align:center;font-size:11px;{shade(share)};outline:1px solid rgba(128,128,128,.15)"
    return f'<td style="{style}" title="{escape(hint)}">{text}</td>'
