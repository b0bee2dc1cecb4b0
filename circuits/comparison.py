"""What a comparison of methods found, as data: printed as a table, drawn, saved as JSON."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from circuits.curve_svg import curve_svg
from circuits.curves import Curve
from mechinterp.errors import CircuitError
from mechinterp.files import read_document, to_document, write_text_atomically
from mechinterp.html import from_markdown, panel

_KIND, _VERSION = "mechinterp comparison", 1
FAITHFUL = 0.9


@dataclass(frozen=True)
class Row:
    """One method. ``curve`` cuts by magnitude (CMD), ``signed_curve`` by value (CPR); ``seconds`` are the search alone.

    ``smallest`` is the smallest number of edges found whose faithfulness reaches 0.9; ``stability`` that of circuits of
    this size, or of a tenth of all edges where none is faithful. ``agreement``: AUROC and average precision against each
    known circuit. ``refused`` says why there is nothing else.
    """

    method: str
    seconds: float = math.nan
    items: str = "edge"
    curve: Curve | None = None
    signed_curve: Curve | None = None
    smallest: int | None = None
    stability: float | None = None
    agreement: Mapping[str, tuple[float, float]] | None = None
    refused: str | None = None

    @property
    def cmd(self) -> float | None:
        return self.curve.cmd if self.curve else None

    @property
    def cpr(self) -> float | None:
        return self.signed_curve.cpr if self.signed_curve else None


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found: printed as a table, drawn by ``draw_comparison``, saved as JSON.

    ``clean`` and ``empty`` are the mean metrics of the whole model and with every edge cut, between which faithfulness
    is measured. ``random`` is the curve of random circuits: mean, lowest and highest.
    """

    model: str
    task: str
    corruption: str
    metric: str
    ablation: str
    n_search: int
    n_prompts: int
    n_edges_in_model: int
    clean: float
    empty: float
    rows: tuple[Row, ...]
    random: Curve | None
    seed: int

    def save(self, path: str | os.PathLike) -> None:
        """JSON, whole or not at all."""
        rows = [{**asdict(row), "seconds": None if math.isnan(row.seconds) else row.seconds} for row in self.rows]
        areas = {row.method: {"cpr": row.cpr, "cmd": row.cmd} for row in self.rows}
        write_text_atomically(path, to_document(_KIND, _VERSION, {**asdict(self), "rows": rows, "areas": areas}))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Comparison":
        """What ``save`` wrote. ``CircuitError`` names the file and what is wrong with it."""
        document = read_document(path, _KIND, _VERSION, CircuitError)
        facts = {name: value for name, value in document.items() if name not in ("format", "version", "areas")}
        try:
            facts["rows"] = tuple(_row(row) for row in facts["rows"])
            facts["random"] = facts["random"] and Curve.from_plain(facts["random"])
            return cls(**facts)
        except (TypeError, KeyError, AttributeError) as problem:
            raise CircuitError(f"{os.fspath(path)!r} does not hold a usable comparison: {problem}") from problem

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Column names, and one row of text a method."""
        known = list(dict.fromkeys(name for row in self.rows for name in row.agreement or ()))
        head = ("method", "scores", "seconds", "CMD", "CPR", "edges for 0.9", "stability", *(f"AUROC {name}" for name in known))
        return head, [_cells(row, known) for row in self.rows] + self._random_row(len(head))

    def _random_row(self, width: int) -> list[tuple[str, ...]]:
        if self.random is None:
            return []
        found = (
            "random circuits",
            "",
            "",
            f"{self.random.cmd:.3f}",
            f"{self.random.cpr:.3f}",
            _count(self.random.smallest(FAITHFUL)),
        )
        return [(*found, *[""] * (width - len(found)))]

    def _repr_html_(self) -> str:
        lines = {row.method: row.curve for row in self.rows if row.curve}
        about = f"faithfulness against size by {', '.join(lines)}"
        drawn = [curve_svg(lines, (), self.n_edges_in_model, about, self.random)] if lines else []
        return panel("", from_markdown(str(self)), *drawn)

    def __str__(self) -> str:
        """A Markdown table under a line that says what was compared."""
        head, rows = self.table()
        lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] + ["---:"] * (len(head) - 1), *rows)]
        about = f"{self.task} on {self.model}: {self.n_edges_in_model:,} edges, {self.metric} {self.clean:.3f} whole and "
        about += (
            f"{self.empty:.3f} with every edge cut; {self.ablation} ({self.corruption}); {self.n_search} prompts searched, "
        )
        about += f"{self.n_prompts} measured on"
        refused = [f"{row.method} refused: {row.refused}" for row in self.rows if row.refused]
        return "\n".join([about, "", *lines, *refused])


def _cells(row: Row, known: Sequence[str]) -> tuple[str, ...]:
    if row.refused:
        return (row.method, "", "", "refused", "", "", "", *("" for _ in known))
    agreement = [row.agreement[name][0] if row.agreement and name in row.agreement else None for name in known]
    numbers = [_number(x) for x in (row.cmd, row.cpr)], [_number(x) for x in (row.stability, *agreement)]
    return (row.method, f"{row.items}s", f"{row.seconds:.1f}", *numbers[0], _count(row.smallest), *numbers[1])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _count(n: int | None) -> str:
    return "never" if n is None else f"{n:,}"


def _row(facts: Mapping[str, Any]) -> Row:
    plain = dict(facts)
    plain["seconds"] = math.nan if plain["seconds"] is None else plain["seconds"]
    plain |= {name: plain[name] and Curve.from_plain(plain[name]) for name in ("curve", "signed_curve")}
    if plain.get("agreement") is not None:
        plain["agreement"] = {name: tuple(areas) for name, areas in plain["agreement"].items()}
    return Row(**plain)
