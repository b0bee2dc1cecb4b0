"""What breaks the built-in model, and whether it can be repaired by editing where a few heads look.

    python -m benchmarks.repair      # a quarter of an hour on one core; writes results/repair.md, .json and docs/repair.png

1. Every task of ``broken_tasks`` is measured. *Broken* is one that lies 20 points below the same task as the model was
   trained on it (greater-than by its metric, which accuracy cannot stand in for).
2. For each broken task heads and targets are proposed on search prompts and measured on fresh ones, beside random heads:
   *not told*: END may be made to look at places that do not depend on the answer (the word that is asked for, the giver);
   *from discovery*: the same, among the 8 strongest heads (patching) of the task as trained;
   *told*: at places that do depend on it (the answer, the wrong colors), as the paper's edit does.
3. Each search is made three times, with other search prompts, other fresh prompts and other random heads.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.broken_tasks import FAMILIES
from benchmarks.measure import RESULTS
from circuits.discovery import discover
from circuits.repairs.picture import draw_repair
from circuits.repairs.repairing import repair
from circuits.repairs.report import Mean, Repair, markdown
from circuits.repairs.search import Proposal, propose
from circuits.scores import Scores
from mechinterp import load
from mechinterp.metrics import is_preferred, is_top
from mechinterp.models.transformer import Transformer
from mechinterp.tasks.base import Task

N_SEARCH, N_FRESH, BATCH, SEEDS, FRESH = 128, 384, 128, (0, 1, 2), 1_000_003
FALLEN, N_HEADS, N_CANDIDATES, N_RANDOM = 0.2, 4, 8, 20
NOT_TOLD = {
    "giver": ("S2",),
    "first names": ("IO", "S1"),
    "third name": ("D",),
    "question": ("query",),
    "last documented": ("last_doc",),
    "its definition": ("last_def",),
    "start year": ("YY",),
    "start century": ("XX1",),
}
TOLD = {
    "answer": ("IO",),
    "other name": ("S1",),
    "answer color": ("answer_color",),
    "answer thing": ("answer_object",),
    "answer's definition": ("answer_def",),
    "other year": ("ZZ",),
}
PICTURE = Path(__file__).parents[1] / "docs" / "repair.png"
SHOWN = ("colored objects, one more thing after the question", "ioi, the receiver said twice")
Targets = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Tried:
    """One variant of a task and how well the model does it; ``whole`` is the task as trained."""

    family: str
    variant: str
    name: str
    accuracy: Mean
    preferred: Mean
    metric: Mean
    whole: "Tried | None"

    @property
    def is_broken(self) -> bool:
        by_metric = self.family == "greater-than"
        fell = [(of.metric if by_metric else of.accuracy).value for of in (self.whole or self, self)]
        return fell[0] - fell[1] >= FALLEN

    def make(self, model: Transformer, n_prompts: int, seed: int) -> Task:
        return FAMILIES[self.family][0](self.variant, model, n_prompts, seed)


@dataclass(frozen=True)
class Row:
    """A way of searching, on one draw of prompts: what was proposed, and what it did on fresh prompts (None: nothing)."""

    way: str
    proposal: Proposal
    repair: Repair | None
    spearman: float | None


def main() -> None:
    torch.set_num_threads(1)
    model = load("builtin")
    tried = try_all(model)
    rows: dict[str, list[Row]] = {}
    for task in tried:
        if task.is_broken and task.whole is not None:
            rows[task.name] = [row for seed in SEEDS for row in repaired(model, task, seed)]
            print(task.name, *(_change(row) for row in rows[task.name]), sep="\n  ", flush=True)
            write(tried, rows)


def write(tried: Sequence[Tried], rows: Mapping[str, Sequence[Row]]) -> None:
    """The tables, the numbers and the picture, of what is done so far."""
    (RESULTS / "repair.md").write_text(report(tried, rows), encoding="utf-8")
    (RESULTS / "repair.json").write_text(json.dumps(_numbers(tried, rows)) + "\n", encoding="utf-8")
    if shown := [row.repair for name in SHOWN for row in rows.get(name, [])[:1] if row.repair]:
        draw_repair(shown, PICTURE)


def try_all(model: Transformer) -> list[Tried]:
    """Every variant, measured; the first of a family is the task as trained."""
    found: list[Tried] = []
    for family, (make, variants) in FAMILIES.items():
        whole: Tried | None = None
        for variant in variants:
            task = make(variant, model, N_FRESH, FRESH)
            with torch.no_grad():
                logits, _ = model.run(task.prompts.clean, logits_at=task.prompts.end)
            right, preferred, metric = (Mean.of(of(logits, task.prompts).numpy()) for of in (is_top, is_preferred, task.metric))
            found.append(Tried(family, variant, task.name, right, preferred, metric, whole))
            whole = whole or found[-1]
    return found


def repaired(model: Transformer, broken: Tried, seed: int) -> list[Row]:
    """The three ways of searching, on the search and fresh prompts of one seed."""
    search, fresh = broken.make(model, N_SEARCH, seed), broken.make(model, N_FRESH, seed + FRESH)
    whole = (broken.whole or broken).make(model, N_SEARCH, seed)
    scores = discover(model, whole, "patching", allow_unsolved=True, progress=False)
    colors = sorted(name for name in search.prompts.positions if name.startswith("color"))
    not_told = _there(NOT_TOLD | ({"all colors": tuple(colors)} if colors else {}), search)
    told = _there(TOLD | ({"wrong colors": (*colors, "-answer_color")} if colors else {}), search)
    ways: dict[str, tuple[Targets, int | None]] = {"not told": (not_told, None), "from discovery": (not_told, N_CANDIDATES)}
    ways |= {"told": (told, None)}
    return [_row(model, search, fresh, scores, seed, way, *how) for way, how in ways.items() if how[0]]


def _row(model, search: Task, fresh: Task, scores: Scores, seed: int, way: str, targets: Targets, n: int | None) -> Row:
    settings = {"n": N_HEADS, "batch_size": BATCH, "progress": False}
    proposal = propose(model, search, attention=targets, scores=scores, candidates=n, **settings)
    if not proposal.steps:
        return Row(way, proposal, None, proposal.correlation(scores))
    done = repair(model, fresh, **proposal.edit, n_random=N_RANDOM, seed=seed, batch_size=BATCH, progress=False)
    return Row(way, proposal, done, proposal.correlation(scores))


def _there(targets: Targets, task: Task) -> dict[str, tuple[str, ...]]:
    """Targets whose places this task has."""
    known = task.prompts.positions
    return {name: tuple(at) for name, at in targets.items() if all(place.removeprefix("-") in known for place in at)}


def report(tried: Sequence[Tried], rows: Mapping[str, Sequence[Row]]) -> str:
    """The tables, from what was tried to what was repaired, with two repairs in full."""
    about = "# Repair by attention on the built-in model\n\n`python -m benchmarks.repair`. "
    about += f"{N_SEARCH} search and {N_FRESH} fresh prompts; 95 % bootstrap intervals over prompts.\n"
    head = ("task", "accuracy, %", "answer above foils, %", "metric", "broken")
    table = [(t.name, t.accuracy.percent(), t.preferred.percent(), str(t.metric), "yes" if t.is_broken else "") for t in tried]
    parts = [about, "## What was tried\n", markdown(head, table, "lrrrl"), "\n## What was repaired\n", _LEGEND]
    head = ("task", "search", "head: looks at (first draw)", "accuracy, %", "edited, %", "random heads", "best random")
    head += ("fixed", "broken", "Spearman")
    ways = [(name, way, of_task) for name, of_task in rows.items() for way in _ways(of_task)]
    table = [_cells(name, way, [row for row in of_task if row.way == way]) for name, way, of_task in ways]
    parts += [markdown(head, table, "lll" + "r" * 7), "", verdict(_numbers(tried, rows)["repaired"])]
    shown = [(name, row) for name in SHOWN for row in rows.get(name, [])[:1] if row.repair]
    for name, row in shown:
        parts += [f"\n## In full: {name}, {row.way}, first seed\n", str(row.proposal), "", str(row.repair)]
    return "\n".join(parts) + "\n"


_LEGEND = (
    "*not told*: END is made to look at places that do not depend on the answer; *from discovery*: the same, only the 8 heads "
    "that patching finds strongest in the task as trained; *told*: at places that do depend on it, as the paper's edit. "
    f"Numbers are means over {len(SEEDS)} draws (search, fresh prompts and random heads drawn anew), lowest and highest in "
    f"brackets; random heads: {N_RANDOM} a draw, their mean and the best of all. *Fixed* and *broken* are sums. *Spearman*: "
    "over the candidates, gain alone against patching score of the task as trained. Greater-than is given as 100 x prob diff.\n"
)


def verdict(repaired: Mapping[str, Sequence[dict]]) -> str:
    """Of which tasks the edit beats every draw of random heads, on all draws of prompts; and of which it does not."""
    lines = []
    for way in dict.fromkeys(row["way"] for rows in repaired.values() for row in rows):
        beaten = {name: all(_beats_random(row, name) for row in rows if row["way"] == way) for name, rows in repaired.items()}
        good, bad = ([name for name in beaten if beaten[name] is truth] for truth in (True, False))
        lines.append(f"*{way}*: better than all random heads on every draw in {len(good)} of {len(beaten)} tasks; not in: ")
        lines[-1] += f"{'; '.join(bad) or 'none'}."
    return "\n\n".join(lines)


def _beats_random(row: dict, name: str) -> bool:
    if "conditions" not in row:
        return False
    by_metric = name.startswith("greater-than")
    edited = list(row["conditions"].values())[-1][3 if by_metric else 0]
    return edited > max(random[by_metric] for random in row["random"])


def _ways(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.way for row in rows))


def _cells(name: str, way: str, rows: Sequence[Row]) -> tuple[str, ...]:
    field = "metric" if name.startswith("greater-than") else "accuracy"
    chosen = ", ".join(f"{step.head}: {step.target}" for step in rows[0].proposal.steps) or "none helps"
    done = [row.repair for row in rows if row.repair]
    chosen += "" if len(done) == len(rows) else f" (a head helps in {len(done)} of {len(rows)} draws)"
    ranks = [row.spearman for row in rows if row.spearman is not None]
    rank = f"{np.mean(ranks):+.2f}" if ranks else ""
    if not done:
        return (name, way, chosen, *[""] * 6, rank)
    before = [getattr(repair.conditions[0], field).value for repair in done]
    after = [getattr(repair.edited, field).value for repair in done]
    random = [getattr(control, field) for repair in done for control in repair.controls]
    counts = [str(sum(getattr(repair.edited, of) for repair in done)) for of in ("fixed", "broken")]
    numbers = (_spread(before), _spread(after), f"{100 * np.mean(random):.1f}", f"{100 * max(random):.1f}")
    return (name, way, chosen, *numbers, *counts, rank)


def _spread(values: Sequence[float]) -> str:
    return f"{100 * np.mean(values):.1f} [{100 * min(values):.1f}, {100 * max(values):.1f}]"


def _change(row: Row) -> str:
    if row.repair is None:
        return f"{row.way}: no head helps"
    best = max((control.accuracy for control in row.repair.controls), default=0.0)
    before, after = row.repair.conditions[0].accuracy.value, row.repair.edited.accuracy.value
    return f"{row.way}: {before:.3f} -> {after:.3f} ({best:.3f} best of random) {' '.join(row.repair.edited.heads)}"


def _numbers(tried: Sequence[Tried], rows: Mapping[str, Sequence[Row]]) -> dict:
    """What the tables hold, for machines."""
    found = {t.name: {"accuracy": t.accuracy.value, "metric": t.metric.value, "broken": t.is_broken} for t in tried}
    repairs = {
        name: [
            {
                "way": row.way,
                "steps": [[step.head, step.target] for step in row.proposal.steps],
                "spearman": row.spearman,
                **({} if row.repair is None else _outcome(row.repair)),
            }
            for row in of_task
        ]
        for name, of_task in rows.items()
    }
    return {"tried": found, "repaired": repairs}


def _outcome(done: Repair) -> dict:
    conditions = {c.name: [c.accuracy.value, c.accuracy.low, c.accuracy.high, c.metric.value] for c in done.conditions}
    random = [[control.accuracy, control.metric] for control in done.controls]
    return {"conditions": conditions, "fixed": done.edited.fixed, "broken": done.edited.broken, "random": random}


if __name__ == "__main__":
    main()
