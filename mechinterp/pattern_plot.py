"""Attention patterns of chosen heads on one prompt: queries down, keys across, each row a distribution."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import TaskError, UnknownNode
from mechinterp.files import write_beside
from mechinterp.hover import plotly
from mechinterp.html import visible
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node, nodes_of
from mechinterp.plots import SUFFIXES
from mechinterp.sites import Site
from mechinterp.tasks.base import tokenizer_of

_COLOURS = "Blues"  # from light to dark, so that it reads in grey
_INCH_A_TOKEN, _LEAST, _LEGIBLE, _NUMBERED = 0.17, 2.0, 48, 12
_A_ROW = 4


def draw_patterns(
    model: Transformer,
    prompt: str | Sequence[int] | Int[Tensor, "pos"],
    heads: Node | str | Iterable[Node | str],
    path: str | os.PathLike | None = None,
    *,
    bos: bool | None = None,
    interactive: bool = False,
    dpi: int = 160,
) -> Any:
    """A matplotlib ``Figure``, one panel a head, also written to ``path`` (``.png``, ``.svg``, ``.pdf``) if there is one.

    ``prompt``: a text, or token ids as they are; ``bos``: None prepends BOS to a text where the model was trained with it.
    Colour is the share of a query's attention, 0 to 1 in every panel, so panels compare; up to 12 tokens it is written in
    as well. What lies behind the query is blank: no attention can go there. ``interactive``: a plotly figure that names
    query, key and share under the mouse (extra ``notebook``), which is not written to a file.

    Costs one forward pass. ``UnknownNode`` for what is no whole head of this model, ``TaskError`` for a prompt without
    tokens, another suffix, or a ``path`` for an interactive figure.

    >>> from mechinterp.models.load import load
    >>> figure = draw_patterns(load("builtin"), "Then, Mary and John met", ["a0.h1", "a1.h3"])
    >>> [axes.get_title() for axes in figure.axes[:2]]
    ['a0.h1', 'a1.h3']
    """
    _check_path(path, interactive)
    chosen = _whole_heads(model, heads)
    tokens, labels = _tokens(model, prompt, bos)
    with torch.no_grad():
        layers = sorted({head.layer for head in chosen if head.layer is not None})
        _, cache = model.run(tokens[None], record=[Site("pattern", layer) for layer in layers], logits_at="last")
    patterns = {str(head): cache[Site("pattern", head.layer)][0, head.index].float().cpu() for head in chosen}
    if interactive:
        return _hovering(patterns, labels)
    figure = _drawn(patterns, labels, dpi)
    if path is not None:
        with write_beside(path) as beside:
            figure.savefig(beside)
    return figure


def _check_path(path: str | os.PathLike | None, interactive: bool) -> None:
    if path is not None and interactive:
        raise TaskError("an interactive figure is not written as a picture. Leave out path, or call its write_html.")
    if path is not None and Path(path).suffix.lower() not in SUFFIXES:
        raise TaskError(f"{os.fspath(path)!r}: pictures are written as {', '.join(SUFFIXES)}.")


def _whole_heads(model: Transformer, heads: Node | str | Iterable[Node | str]) -> tuple[Node, ...]:
    chosen, config = tuple(dict.fromkeys(nodes_of(heads))), model.config
    for head in chosen:
        if head.kind != "head" or head.port or head.pos is not None:
            raise UnknownNode(f"{str(head)!r} is not a whole head, and only heads have attention. Name some like 'a1.h3'.")
        if (head.layer or 0) >= config.n_layers or (head.index or 0) >= config.n_heads:
            within = f"layers run 0..{config.n_layers - 1} and heads 0..{config.n_heads - 1}"
            raise UnknownNode(f"{str(head)!r} is not in {config.name}, whose {within}.")
    if not chosen:
        raise UnknownNode("there are no heads to draw. Name at least one, such as 'a1.h3', or pass circuit.heads.")
    return chosen


def _tokens(model: Transformer, prompt: Any, bos: bool | None) -> tuple[Int[Tensor, "pos"], list[str]]:
    """The ids, and a label each."""
    ids = tokenizer_of(model).encode(prompt, bos) if isinstance(prompt, str) else torch.as_tensor(prompt).tolist()
    if not ids:
        raise TaskError("the prompt has no tokens. Give at least one word.")
    words = map(str, ids) if model.tokenizer is None else map(visible, model.tokenizer.strings(ids))
    return torch.tensor(ids, device=model.device), list(words)


def _drawn(patterns: dict[str, Float[Tensor, "query_pos key_pos"]], labels: list[str], dpi: int) -> Any:
    from matplotlib.figure import Figure

    rows, columns = _grid(len(patterns))
    side = max(_LEAST, _INCH_A_TOKEN * min(len(labels), _LEGIBLE))
    size = (columns * (side + 0.8) + 0.7, rows * (side + 0.9))
    figure = Figure(figsize=size, dpi=dpi, facecolor="white", layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes, (name, pattern) in zip(panels, patterns.items(), strict=False):
        _panel(axes, name, pattern, labels)
    for axes in panels[len(patterns) :]:
        axes.remove()
    numbers = " (cells: %)" if len(labels) <= _NUMBERED else ""
    bar = figure.colorbar(panels[0].images[0], ax=panels[: len(patterns)], shrink=0.8)
    bar.set_label(f"share of attention{numbers}", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def _panel(axes: Any, name: str, pattern: Float[Tensor, "query_pos key_pos"], labels: list[str]) -> None:
    axes.imshow(_seen(pattern), cmap=_COLOURS, vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(name, fontsize=10)
    step = -(-len(labels) // _LEGIBLE)  # of a long prompt, every second, third, ... token is named
    places = range(0, len(labels), step)
    style = {"fontsize": 6.5, "family": "monospace", "parse_math": False}
    axes.set_xticks(places, [labels[at] for at in places], rotation=90, **style)
    axes.set_yticks(places, [labels[at] for at in places], **style)
    axes.set_xlabel("key", fontsize=8)
    axes.set_ylabel("query", fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_color("#BBBBBB")
    if len(labels) <= _NUMBERED:
        for query in range(len(labels)):
            for key in range(query + 1):
                share = float(pattern[query, key])
                ink = "white" if share > 0.55 else "#222222"
                axes.text(key, query, f"{100 * share:.0f}", ha="center", va="center", fontsize=5, color=ink)


def _hovering(patterns: dict[str, Float[Tensor, "query_pos key_pos"]], labels: list[str]) -> Any:
    graphs, subplots = plotly()
    rows, columns = _grid(len(patterns))
    figure = subplots.make_subplots(rows, columns, subplot_titles=list(patterns), shared_yaxes=True)
    names = [f"{at} {label}" for at, label in enumerate(labels)]  # plotly merges equal labels
    hint = "query %{y}<br>key %{x}<br>share %{z:.3f}<extra></extra>"
    for count, pattern in enumerate(patterns.values()):
        square = {"x": names, "y": names, "z": _seen(pattern), "zmin": 0, "zmax": 1, "colorscale": _COLOURS}
        trace = graphs.Heatmap(**square, hovertemplate=hint, hoverongaps=False, showscale=count == 0)
        figure.add_trace(trace, row=count // columns + 1, col=count % columns + 1)
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False, autorange="reversed")
    figure.update_layout(template="plotly_white", height=380 * rows, width=120 + 380 * columns)
    return figure


def _grid(n: int) -> tuple[int, int]:
    """Rows and columns, as even as can be."""
    rows = -(-n // _A_ROW)
    return rows, -(-n // rows)


def _seen(pattern: Float[Tensor, "query_pos key_pos"]) -> Any:
    """The pattern, blank where a query cannot look."""
    return pattern.masked_fill(torch.ones_like(pattern, dtype=torch.bool).triu(1), float("nan")).numpy()
