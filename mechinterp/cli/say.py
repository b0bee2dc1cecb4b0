"""What ``mechinterp discover`` prints on its way."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mechinterp.cli.words import answer_in_words, dropped_in_words, model_in_words, numbers, shortened, table

N_SHOWN = 12  # components in the table


def warn(text: str) -> None:
    """One line on stderr."""
    print(f"mechinterp: warning: {text}", file=sys.stderr)


def what_is_analysed(name: str, transformer: Any, task: Any) -> None:
    """The model, the task by example, and how well the one does the other."""
    from circuits.statistics import may_be_zero

    clean, corrupted, right = _measure(transformer, task)
    print(f"Model   {name}: {model_in_words(transformer.config)}")
    print(f"Task    {task.name}: {len(task)} prompts, such as {shortened(task.text(0))}, then {answer_in_words(task)}")
    print(f"        corrupted ({task.corruption}): {shortened(task.text(0, corrupted=True))}")
    if dropped := dropped_in_words(task.notes.get("dropped")):
        print(f"        left out: {dropped}")
    print(f"Metric  {task.metric_name}: {clean.mean():.3g} on clean prompts, {corrupted.mean():.3g} on corrupted ones")
    print(f"        the best answer beats every foil in {right.mean():.0%} of the clean prompts")
    if right.mean() < 0.6:
        warn("the model hardly does this task, so its circuit means little.")
    if may_be_zero(clean - corrupted):
        warn(f"corrupting by {task.corruption!r} may not change {task.metric_name} at all: another --corruption shows more.")


def circuit_found(circuit: Any, unit: str, roles: Mapping[Any, Sequence[Any]]) -> None:
    """The strongest parts: what flows out of each along the kept edges, and where heads look."""
    folded = circuit.components()
    effect = {node: folded.out_degree(node, weight="strength") for node in folded if node.kind in ("head", "mlp")}
    strongest = sorted(effect, key=lambda node: -effect[node])
    shown = strongest[:N_SHOWN]
    rows = [
        (str(node), strength, str(folded.in_degree(node)), str(folded.out_degree(node)), _looks(roles.get(node, ())))
        for node, strength in zip(shown, numbers([effect[node] for node in shown]), strict=True)
    ]
    print(f"\nThe {circuit.n_edges_kept:,} strongest edges join {len(circuit.heads)} heads and {len(circuit.mlps)} MLPs.")
    print(table(("part", "effect", "in", "out", "attention on clean prompts"), rows, right=(1, 2, 3)))
    if len(strongest) > len(shown):
        print(f"... and {len(strongest) - len(shown)} more, in the circuit's file")
    print(f"effect: sum of |score| over kept edges out, in {unit}; in, out: how many parts it reads from and feeds")


def parts_ranked(scores: Any, roles: Mapping[Any, Sequence[Any]]) -> None:
    """Node scores rank parts and cut no circuit."""
    best = scores.order()[:N_SHOWN]
    nodes, values = [scores.wiring.writers[item] for item in best], numbers(scores.values[best].tolist(), sign="+")
    rows = [(str(node), value, _looks(roles.get(node, ()))) for node, value in zip(nodes, values, strict=True)]
    print("\n" + table(("part", "score", "attention on clean prompts"), rows, right=(1,)))
    print(f"score: how much {scores.unit} falls if the part is cut. A circuit needs a method that scores edges.")


def how_faithful(report: Any, is_fresh: bool) -> None:
    """The report, and on which prompts."""
    on = "prompts that the search has not seen" if is_fresh else "the same prompts"
    print(f"\nMeasured on {on}, with every other edge ablated:\n{report}")
    if report.curve and (enough := report.curve.smallest(0.9)):
        print(f"  size             the {enough:,} strongest edges reach a faithfulness of 0.9")


def _looks(gazes: Sequence[Any]) -> str:
    """The most telling gaze, and the next where it tells much too."""
    return ", ".join(str(gaze) for index, gaze in enumerate(gazes) if index == 0 or gaze.share * gaze.change >= 0.25)


def _measure(transformer: Any, task: Any) -> tuple[Any, Any, Any]:
    """Each prompt's metric, clean and corrupted, and whether its best answer beats every foil."""
    import torch

    from mechinterp.metrics import is_preferred

    rows = []
    with torch.no_grad():
        for prompts in task.batches(64):
            prompts = prompts.to(transformer.device)
            clean, corrupted = (
                transformer.run(tokens, logits_at=prompts.end)[0].float() for tokens in (prompts.clean, prompts.corrupted)
            )
            found = [task.metric(clean, prompts), task.metric(corrupted, prompts), is_preferred(clean, prompts)]
            rows.append(torch.stack(found).cpu())
    return tuple(torch.cat(rows, dim=1).double().numpy())
