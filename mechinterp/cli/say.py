"""What ``mechinterp discover`` prints on its way."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mechinterp.cli import watched
from mechinterp.cli.words import answer_in_words, dropped_in_words, model_in_words, numbers, shortened, table

N_SHOWN = 12  # components in the table


def warn(text: str) -> None:
    """One line on stderr."""
    print(f"mechinterp: warning: {text}", file=sys.stderr)


def what_is_analysed(name: str, transformer: Any, task: Any, allow_unsolved: bool) -> None:
    """The model, the task by example, and how well the one does the other; ``TaskError`` where it does not."""
    from circuits.solving import fitness
    from circuits.statistics import may_be_zero

    print(f"Model   {name}: {model_in_words(transformer.config)}")
    print(f"Task    {task.name}: {len(task)} prompts, such as {shortened(task.text(0))}, then {answer_in_words(task)}")
    print(f"        corrupted ({task.corruption}): {shortened(task.text(0, corrupted=True))}")
    if dropped := dropped_in_words(task.notes.get("dropped")):
        print(f"        left out: {dropped}")
    found = fitness(transformer, task, allow_unsolved=allow_unsolved)
    means = f"{found.clean.mean():.3g} on clean prompts, {found.corrupted.mean():.3g} on corrupted ones"
    print(f"Metric  {task.metric_name}: {means}")
    print(f"        the best answer beats every foil in {found.accuracy:.0%} of the clean prompts")
    if found.accuracy < 0.6:
        warn("the model hardly does this task, so its circuit means little.")
    if may_be_zero(found.clean - found.corrupted):
        warn(f"corrupting by {task.corruption!r} may not change {task.metric_name} at all: another --corruption shows more.")


def circuit_found(circuit: Any, scores: Any, roles: Mapping[Any, Sequence[Any]]) -> None:
    """The strongest parts: what flows out of each along the kept edges, and where heads look."""
    joined = f"join {len(circuit.heads)} heads and {len(circuit.mlps)} MLPs."
    if scores.items == "node":
        chosen = "parts that stand out" if circuit.graph.get("selection") == "named" else "best parts"
        beside = ", and all MLPs, which were not scored" if "judged" in scores.settings else ""
        print(f"\nAmong the {chosen}{beside}, {circuit.n_edges_kept:,} edges {joined}")
        return
    folded = circuit.components()
    effect = {node: folded.out_degree(node, weight="strength") for node in folded if node.kind in ("head", "mlp")}
    strongest = sorted(effect, key=lambda node: -effect[node])
    shown = strongest[:N_SHOWN]
    rows = [
        (str(node), strength, str(folded.in_degree(node)), str(folded.out_degree(node)), _looks(roles.get(node, ())))
        for node, strength in zip(shown, numbers([effect[node] for node in shown]), strict=True)
    ]
    print(f"\nThe {circuit.n_edges_kept:,} strongest edges {joined}")
    print(table(("part", "effect", "in", "out", "attention on clean prompts"), rows, right=(1, 2, 3)))
    if len(strongest) > len(shown):
        print(f"... and {len(strongest) - len(shown)} more, in the circuit's file")
    print(f"effect: sum of |score| over kept edges out, in {scores.unit}; in, out: how many parts it reads from and feeds")
    if watched.is_watched(scores):
        watched.what_was_counted(scores)
    if note := scores.settings.get("edges_are"):
        warn(f"an edge by {scores.method!r} is {note}. Do not take a circuit from these scores alone.")


def parts_ranked(scores: Any, roles: Mapping[Any, Sequence[Any]]) -> None:
    """The best heads and MLPs, ports or neurons."""
    looks = {str(node): _looks(gazes) for node, gazes in roles.items()}
    if watched.is_watched(scores):
        watched.parts_ranked(scores, looks, N_SHOWN)
        return
    best = scores.order()[:N_SHOWN]
    names, values = [scores.names[item] for item in best], numbers(scores.values[best].tolist(), sign="+")
    rows = [(name, value, looks.get(name, "")) for name, value in zip(names, values, strict=True)]
    print("\n" + table(("part", "score", "attention on clean prompts" if roles else ""), rows, right=(1,)))
    print(f"score: how much {scores.unit} falls if the part is cut")


def how_faithful(report: Any, is_fresh: bool) -> None:
    """The report, and on which prompts."""
    on = "prompts that the search has not seen" if is_fresh else "the same prompts"
    print(f"\nMeasured on {on}, with every other edge ablated:\n{report}")
    if report.curve and (enough := report.curve.smallest(0.9)):
        print(f"  size             the {enough:,} strongest edges reach a faithfulness of 0.9")


def _looks(gazes: Sequence[Any]) -> str:
    """The most telling gaze, and the next where it tells much too."""
    return ", ".join(str(gaze) for index, gaze in enumerate(gazes) if index == 0 or gaze.share * gaze.change >= 0.25)


def compared(found: Any) -> None:
    """Several methods in one table, and why any of them refused."""
    head, rows = found.table()
    print("\n" + table(head, rows, right=range(2, len(head))))
    print("CMD: area between faithfulness and 1 over all sizes, best 0; CPR: area under it; stability: Jaccard over resamples")
    for row in found.rows:
        if row.refused:
            print(f"{row.method} refused: {row.refused}")
