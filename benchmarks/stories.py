"""A trained Llama's circuit for a task that it does, by several methods, beside random circuits of the same size.

    python -m benchmarks.stories stories260K            # a directory with the model; ten minutes on one core

The task is ``addressee.py``. Methods see half of its sentences, circuits are measured on the other half. Writes
results/stories.md and .json.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from benchmarks.addressee import CONTROLS, FILE, TEMPLATES, write
from benchmarks.measure import RESULTS
from circuits import discover, evaluate
from mechinterp import from_file, load
from mechinterp.models.transformer import Transformer
from mechinterp.tasks.base import Task

EDGES, PARTS, N_RANDOM = (10, 25, 50, 100, 200, 400), (3, 6, 9, 12, 20), 20
KEPT = ("n_edges", "faithfulness", "interval", "accuracy_circuit", "complement", "random")
METHODS = {
    "edge": ("exact", "eap", "eap-ig", "relp", "cdt-edges"),
    "node": ("patching", "cdt", "path-patching"),
}


def main(directory: str) -> None:
    torch.set_num_threads(1)
    model = load(directory)
    search, fresh = halves(from_file(model, FILE))
    facts: dict = {"model": model.config.name, "solved": solved(model, search, fresh), "control": solved(model, control(model))}
    about = {"date": datetime.now(UTC), "model": model.config.name, "n": len(search), "random": N_RANDOM}
    about |= facts["solved"] | {f"control_{name}": value for name, value in facts["control"].items()}
    lines = [INTRODUCTION.format(**about)]
    for items, methods in METHODS.items():
        sizes = EDGES if items == "edge" else PARTS
        found = {method: measured(model, search, fresh, method, sizes) for method in methods}
        facts[items] = found
        lines += [f"## {items.title()}s\n", *table(found, sizes), ""]
    RESULTS.joinpath("stories.md").write_text("\n".join(lines), encoding="utf-8")
    RESULTS.joinpath("stories.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


def halves(task: Task) -> tuple[Task, Task]:
    """Every other sentence, with all its names."""
    template = torch.arange(len(task)) // (len(task) // len(TEMPLATES))
    search, fresh = (replace(task, prompts=task.prompts[template % 2 == half]) for half in (0, 1))
    return search, fresh


def control(model: Transformer) -> Task:
    """The same question where the one who asks is named first."""
    with tempfile.TemporaryDirectory() as folder:
        write(file := Path(folder) / "control.jsonl", CONTROLS)
        return from_file(model, file)


@torch.no_grad()
def solved(model: Transformer, *tasks: Task) -> dict[str, float]:
    """How well the whole model does it: the share of prompts where the answer is the likeliest of all tokens."""
    first, gaps, corrupted = [], [], []
    for task in tasks:
        logits = model.run(task.prompts.clean, logits_at=task.prompts.end)[0]
        first += (logits.argmax(-1) == task.prompts.answer).tolist()
        gaps += task.metric(logits, task.prompts).tolist()
        corrupted += task.metric(model.run(task.prompts.corrupted, logits_at=task.prompts.end)[0], task.prompts).tolist()
    return {"top": float(np.mean(first)), "clean": float(np.mean(gaps)), "corrupted": float(np.mean(corrupted))}


def measured(model: Transformer, search: Task, fresh: Task, method: str, sizes: tuple[int, ...]) -> dict:
    began = time.process_time()
    scores = discover(model, search, method)
    seconds = time.process_time() - began
    reports = [evaluate(model, fresh, scores.top(size), n_random=N_RANDOM) for size in sizes]
    kept = [{name: getattr(report, name) for name in KEPT} for report in reports]
    return {"seconds": seconds, "strongest": scores.strongest(8), "reports": kept}


def table(found: dict[str, dict], sizes: tuple[int, ...]) -> Iterator[str]:
    yield f"| method | CPU s | {' | '.join(map(str, sizes))} |"
    yield "| --- | ---: |" + " --- |" * len(sizes)
    for method, facts in found.items():
        yield f"| {method} | {facts['seconds']:.1f} | {' | '.join(map(_cell, facts['reports']))} |"
    chance = [max(value for facts in found.values() for value in facts["reports"][i]["random"]) for i in range(len(sizes))]
    yield f"| best random circuit | | {' | '.join(f'{value:.2f}' for value in chance)} |"
    yield ""
    for method, facts in found.items():
        yield f"* {method}: {', '.join(f'`{name}` {value:.2f}' for name, value in facts['strongest'])}"


def _cell(report: dict) -> str:
    low, high = report["interval"]
    return f"{report['faithfulness']:.2f} [{low:.2f}, {high:.2f}], {report['accuracy_circuit']:.0%}"


INTRODUCTION = """# A trained Llama's circuit: whom does somebody speak to?

Written by `python -m benchmarks.stories` on {date:%Y-%m-%d}. {model}: five layers of eight heads that share four keys and
values, rotary positions, RMSNorm, gated MLPs. Two children, each named twice; one is in trouble and the other asks, "Are you
okay," (the answer is the first token of the name of the one in trouble; corrupted: their parts exchanged). The answer is the
likeliest of all tokens on {top:.0%} of the prompts; its logit is above the other name's by {clean:.2f}, after the corruption by
{corrupted:.2f}. The one in trouble is named first, and the model goes by that too: where the one who asks is, it is right on
{control_top:.0%}, with {control_clean:.2f} between the logits.

Methods see {n} prompt pairs of three sentences, circuits are measured on as many of three other sentences, edges that are cut
carrying the corrupted prompt. A cell is the circuit's faithfulness with its 95 % interval over prompts, and the share of
prompts on which it prefers the right name. Seconds are the search alone, on one thread. Random: {random} circuits of the same
size a method.
"""

if __name__ == "__main__":
    main(*sys.argv[1:])
