"""Two cheap looks at heads, measured: divergence as a screen, and what attention sinks do for a task.

    python -m benchmarks.screening      # two minutes on one core; writes results/screening.md

1. Which heads does a screen find that exact patching finds? AUROC over the heads (32), the quarter with the largest
   |patching| on the same 48 prompts being true; mean over three seeds of prompts.
2. Heads that rest on sinks (``find_sinks``, 200 prompts): the task with their attention there scaled to .4 and to 0, beside
   the same heads with as many random other positions scaled to 0.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import RESULTS
from circuits import discover
from circuits.scores import Scores
from circuits.sinks import Calibration, sink_effect
from circuits.statistics import auroc
from mechinterp import load
from mechinterp.files import write_text_atomically
from mechinterp.models.transformer import Transformer
from mechinterp.sinks import Sinks, find_sinks
from mechinterp.tasks import TASKS

SCREENS: dict[str, tuple[str, dict[str, Any]]] = {
    "divergence": ("divergence", {}),
    "divergence, blank=mean": ("divergence", {"blank": "mean"}),
    "divergence, relative to spread": ("divergence", {"relative_to": "spread"}),
    "divergence, relative to stream": ("divergence", {"relative_to": "stream"}),
    "codes-change": ("codes-change", {}),
    "atp": ("atp", {}),
}
N_SCREENED, SEEDS, N_SINKS = 48, (0, 1, 2), 200


def main() -> None:
    torch.set_num_threads(1)
    model = load("builtin")
    screens = [(name, [_found(model, task, *how) for task in TASKS]) for name, how in SCREENS.items()]
    head = ["screen", *TASKS, "mean"]
    lines = [(name, *(f"{area:.2f}" for area in areas), f"{np.mean(areas):.3f}") for name, areas in screens]
    sinks = [row for task in TASKS for row in _calibrated(model, task)]
    columns = ["task", "heads", "accuracy", "metric", "keep .4: accuracy", "metric", "keep 0: accuracy", "metric", "control"]
    text = [__doc__ or "", "## Screens: AUROC over heads, by patching", _table(head, lines)]
    text += ["## Sinks calibrated away: changes, with 95 % intervals", _table(columns, sinks)]
    written = "\n\n".join(["# Cheap looks at heads", *text]) + "\n"
    write_text_atomically(RESULTS / "screening.md", written)
    print(written)


def _found(model: Transformer, task: str, method: str, settings: dict[str, Any]) -> float:
    areas = []
    for seed in SEEDS:
        made = TASKS[task](model, n_prompts=N_SCREENED, seed=seed)
        truth = np.abs(_heads(discover(model, made, "patching")))
        wanted = truth >= np.sort(truth)[-len(truth) // 4]
        areas.append(auroc(np.abs(_heads(discover(model, made, method, **settings))), wanted))
    return float(np.mean(areas))


def _heads(scores: Scores) -> np.ndarray:
    return scores.values[[node.kind == "head" for node in scores.wiring.writers]]


def _calibrated(model: Transformer, name: str) -> list[tuple[str, ...]]:
    task = TASKS[name](model, n_prompts=N_SINKS, seed=0)
    found = find_sinks(model, task)
    partly, wholly = (sink_effect(model, task, sinks=found, keep=keep).together for keep in (0.4, 0.0))
    control = sink_effect(model, task, partly.heads, sinks=_elsewhere(found, task.prompts.end), keep=0.0).together
    whole = sink_effect(model, task, partly.heads[:1], sinks=found, keep=1.0)
    first = (name, str(len(partly.heads)), f"{whole.right[0].mean():.3f}", f"{whole.metric[0].mean():.3f}")
    return [(*first, *_changes(partly), *_changes(wholly), _changes(control)[1])]


def _elsewhere(found: Sinks, ends: Tensor) -> Tensor:
    """As many positions as are sinks, drawn from those of the prompt that are none."""
    mask, generator = found.mask, torch.Generator().manual_seed(0)
    inside = torch.arange(mask.shape[-1]) <= ends[:, None]
    chance = torch.rand(mask.shape, generator=generator).masked_fill(mask | ~inside, -1.0)
    rank = chance.argsort(-1, descending=True).argsort(-1)
    return (rank < mask.sum(-1, keepdim=True)) & (chance >= 0)


def _changes(one: Calibration) -> tuple[str, str]:
    return f"{one.accuracy:.3f}", "{:+.3f} [{:+.3f}, {:+.3f}]".format(*one.metric_change)


def _table(head: list[str], rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] + ["---:"] * (len(head) - 1), *rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
