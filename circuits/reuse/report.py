"""What the circuits of several tasks share, as data: printed as tables, drawn by ``draw_reuse``, saved as JSON."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from circuits.reuse.chance import Chance
from circuits.reuse.overlaps import Overlap, RankCorrelation
from mechinterp.errors import CircuitError
from mechinterp.files import read_document, to_document, write_text_atomically
from mechinterp.html import from_markdown, panel

_KIND, _VERSION = "mechinterp reuse", 1
RANDOM = "random circuits"
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


@dataclass(frozen=True)
class Transfer:
    """The faithfulness on ``task`` of the circuit found for another (``circuit``; for itself: the ceiling), at one cut.

    ``low`` and ``high``: 95 % bootstrap interval over prompts. For ``RANDOM``, circuits of as many edges as the task's own:
    the mean, the lowest and the highest. All None where the ablation cannot be told to move the metric.
    """

    circuit: str
    task: str
    cut: float
    n_edges: int
    faithfulness: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Parts:
    """The heads and MLPs that a task keeps at one cut, as in the overlaps at level "node"."""

    task: str
    cut: float
    names: tuple[str, ...]


@dataclass(frozen=True)
class Reuse:
    """What ``compare_tasks`` found.

    ``overlaps``: every pair, and all tasks together, at every level and cut. ``ceilings``: a task with itself, found again on
    other prompts. ``transfers``: every circuit on every task. ``clean`` and ``empty``: each task's mean metric, of the whole
    model and with every edge cut, between which faithfulness is measured.
    """

    model: str
    tasks: tuple[str, ...]
    method: str
    items: str
    ablation: str
    n_layers: int
    n_heads: int
    has_mlp: bool
    n_search: tuple[int, ...]
    n_prompts: tuple[int, ...]
    corruptions: tuple[str, ...]
    metrics: tuple[str, ...]
    clean: tuple[float, ...]
    empty: tuple[float, ...]
    overlaps: tuple[Overlap, ...]
    ranks: tuple[RankCorrelation, ...]
    transfers: tuple[Transfer, ...]
    parts: tuple[Parts, ...]
    ceilings: tuple[Overlap, ...] = ()
    seed: int = 0

    @property
    def cuts(self) -> tuple[float, ...]:
        """The shares of all items that circuits were cut at."""
        return tuple(dict.fromkeys(transfer.cut for transfer in self.transfers))

    def save(self, path: str | os.PathLike) -> None:
        """JSON, whole or not at all."""
        write_text_atomically(path, to_document(_KIND, _VERSION, asdict(self)))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Reuse":
        """What ``save`` wrote, equal. ``CircuitError`` names the file and what is wrong with it."""
        document = read_document(path, _KIND, _VERSION, CircuitError)
        facts = {name: value for name, value in document.items() if name not in ("format", "version")}
        try:
            for name in ("overlaps", "ceilings"):
                facts[name] = [Overlap.from_plain(each) for each in facts[name]]
            facts["ranks"] = [RankCorrelation(**each | {"names": tuple(each["names"])}) for each in facts["ranks"]]
            facts["transfers"] = [Transfer(**each) for each in facts["transfers"]]
            facts["parts"] = [Parts(**each | {"names": tuple(each["names"])}) for each in facts["parts"]]
            plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
            return cls(**plain)
        except (TypeError, KeyError, AttributeError) as problem:
            raise CircuitError(f"{os.fspath(path)!r} does not hold usable findings on re-use: {problem}") from problem

    def about(self) -> str:
        """What was compared, in a sentence."""
        text = f"{', '.join(self.tasks)} on {self.model} by {self.method} ({self.items}s): {_range(self.n_search)} prompts "
        text += f"a task searched, {_range(self.n_prompts)} measured on; what is cut carries {self.ablation}"
        return f"{text} ({', '.join(dict.fromkeys(self.corruptions))})."

    def tables(self) -> list[Table]:
        """Title, column names and rows of text: overlaps by level, ceilings, rank correlations, faithfulness by cut."""
        levels = dict.fromkeys(found.level for found in self.overlaps)
        found = [overlap_table(f"Shared {level}s", self._of_level(level)) for level in levels]
        if self.ceilings:
            found.append(overlap_table("The same task on other prompts: the most that can be expected", self.ceilings))
        return [*found, self._rank_table(), *(self._transfer_table(cut) for cut in self.cuts)]

    def _of_level(self, level: str) -> list[Overlap]:
        return [found for found in self.overlaps if found.level == level]

    def _rank_table(self) -> Table:
        rows = [
            (*_who(rank.names, self.tasks), f"{rank.n_items:,} {rank.level}s", _number(rank.magnitude), _number(rank.signed))
            for rank in self.ranks
        ]
        return "Rank correlation of all scores (Spearman)", ("circuits", "over", "by magnitude", "by value"), rows

    def _transfer_table(self, cut: float) -> Table:
        here = [transfer for transfer in self.transfers if transfer.cut == cut]
        at = {(transfer.circuit, transfer.task): transfer for transfer in here}
        circuits = dict.fromkeys(transfer.circuit for transfer in here)
        rows = [(circuit, *(_faithfulness(at[circuit, task]) for task in self.tasks)) for circuit in circuits]
        return f"Faithfulness of circuits of {_percent(cut)} of the {self.items}s", ("circuit of", *self.tasks), rows

    def _repr_html_(self) -> str:
        return panel("", from_markdown(str(self)))

    def __str__(self) -> str:
        """Markdown: what was compared, and the tables."""
        return "\n\n".join([self.about(), *(markdown(table) for table in self.tables())])


def overlap_table(title: str, overlaps: Sequence[Overlap]) -> Table:
    """One row a pair (or group) and cut. Brackets are central 95 % intervals of the null; p: as many, or more, by chance."""
    staged, drawn = (any(getattr(one, name) is not None for one in overlaps) for name in ("stage", "same_degrees"))
    head = ("stage",) if staged else ("kept",)
    head += ("circuits", "of", "sizes", "shared", "Jaccard", "overlap", "by chance", "p")
    head += ("same degrees", "p") if drawn else ()
    everyone = max((one.names for one in overlaps), key=len, default=())
    return title, head, [_row(one, everyone, staged, drawn) for one in overlaps]


def left_columns(head: Sequence[str]) -> int:
    """How many columns hold words rather than numbers."""
    return 2 if head[1] == "circuits" else 1


def markdown(table: Table) -> str:
    title, head, rows = table
    left = left_columns(head)
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join([f"### {title}", "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def _row(one: Overlap, everyone: Sequence[str], staged: bool, drawn: bool) -> tuple[str, ...]:
    first = one.stage or "" if staged else "as given" if one.cut is None else _percent(one.cut)
    sizes = "/".join(f"{size:,}" for size in (one.sizes[:1] if len(set(one.sizes)) == 1 else one.sizes))
    cells = (first, *_who(one.names, everyone), f"{one.n_items:,}", sizes, f"{one.n_shared:,}")
    cells += (_number(one.jaccard), _number(one.coefficient), *_null(one.chance))
    return cells + (_null(one.same_degrees) if drawn else ())


def _who(names: Sequence[str], everyone: Sequence[str]) -> tuple[str]:
    return ("all" if len(names) > 2 and tuple(names) == tuple(everyone) else ", ".join(names),)


def _null(chance: Chance | None) -> tuple[str, ...]:
    if chance is None:
        return "", ""
    mean, low, high = (f"{n:,.0f}" if n >= 100 else f"{n:.3g}" for n in (chance.mean, chance.low, chance.high))
    return f"{mean} [{low}, {high}]", _p_value(chance)


def _p_value(chance: Chance) -> str:
    if chance.n_draws is not None and chance.p_value <= 1 / (1 + chance.n_draws):
        return f"≤ {chance.p_value:.2g}"
    return f"{chance.p_value:.2g}" if chance.p_value >= 1e-300 else "< 1e-300"


def _faithfulness(one: Transfer) -> str:
    if one.faithfulness is None:
        return "undefined"
    return _number(one.faithfulness) + ("" if one.low is None else f" [{_number(one.low)}, {_number(one.high)}]")


def _number(value: float | None) -> str:
    """Two decimals, and no minus before a zero."""
    return "" if value is None else f"{round(value, 2) + 0.0:.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _range(counts: Iterable[int]) -> str:
    low, high = min(counts := list(counts)), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
