"""What the built-in model's four tasks share, by chance or not; and what random circuits with the same degrees cost.

    python -m benchmarks.reuse          # about three minutes on one core

Nodes by activation patching and edges by exact patching, 48 prompts a task; faithfulness on 48 others. Each task is scored
a second time on prompts of another seed: what a task shares with itself is the most that two tasks can be expected to.
As a control the edges are compared once more in a model of the same shape whose weights are drawn at random: it has learned
nothing that tasks could share. Path patching is compared stage by stage. Random circuits with the same degrees are timed
on 1,000 edges of GPT-2 small's shape, and their overlap with the circuit that they start from is followed until it levels
off. The tables become ``results/reuse.md``, the numbers ``results/reuse.json``, the picture of the edges
``docs/reuse.png``.
"""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from circuits.discovery.stages import staged
from circuits.reuse.chance import with_same_degrees
from circuits.reuse.comparing import compare_tasks, score_tasks
from circuits.reuse.overlaps import Overlap, stage_overlaps
from circuits.reuse.picture import draw_reuse
from circuits.reuse.report import Reuse, markdown, overlap_table
from circuits.statistics import random_circuits
from circuits.wiring import Wiring
from mechinterp.files import write_text_atomically
from mechinterp.models.load import load
from mechinterp.models.transformer import Transformer
from mechinterp.models.weights import Weights
from mechinterp.tasks import TASKS
from mechinterp.tasks.base import Task

HERE = Path(__file__).parent
N_PROMPTS, SEEDS = 48, {"tasks": 0, "again": 1, "on": 1_000_003}
METHODS, DRAWN, PER_STAGE = ("patching", "exact"), 0.05, 3
TRIES = (1, 2, 5, 10, 20, 40)


def main() -> None:
    torch.set_num_threads(1)
    model = load("builtin")
    made = {
        what: {name: make(model, n_prompts=N_PROMPTS, seed=seed) for name, make in TASKS.items()}
        for what, seed in SEEDS.items()
    }
    found: dict[str, Reuse] = {}
    for method in METHODS:
        scores = score_tasks(model, made["tasks"], method)
        on, again = made["on"], made["again"]
        found[method] = compare_tasks(model, made["tasks"], method, on=on, again=again, scores=scores)
        print(found[method], flush=True)
    blank = without_training(model)
    untrained = {name: make(blank, n_prompts=N_PROMPTS) for name, make in TASKS.items()}
    found["exact, random weights"] = compare_tasks(blank, untrained, "exact", allow_unsolved=True)
    stages, swaps = by_stage(model, made["tasks"]), mixing()
    draw_reuse(found["exact"], HERE.parent / "docs" / "reuse.png", cut=DRAWN)
    facts = {"reuse": {method: asdict(one) for method, one in found.items()}, "swaps": swaps}
    facts["stages"] = [asdict(one) for one in stages]
    write_text_atomically(HERE / "results" / "reuse.json", json.dumps(facts, indent=None, separators=(",", ":")) + "\n")
    write_text_atomically(HERE / "results" / "reuse.md", _text(found, stages, swaps))


def without_training(model: Transformer, seed: int = 0) -> Transformer:
    """The same shape and tokenizer; each weight matrix drawn anew with the mean and spread of the trained one."""
    generator = torch.Generator().manual_seed(seed)
    named = {
        name: of.mean() + of.std(correction=0) * torch.randn(of.shape, generator=generator)
        for name, of in model.weights.named().items()
    }
    config = replace(model.config, name=f"{model.config.name}, random weights")
    return Transformer(Weights.from_named(config, named), model.tokenizer)


def by_stage(model: Transformer, tasks: dict[str, Task]) -> tuple[Overlap, ...]:
    """Heads into the logits, into the queries of the best of these at END, into their keys and values."""
    traces = {name: staged(model, task, stages=("q@END", "kv"), n_per_stage=PER_STAGE) for name, task in tasks.items()}
    return stage_overlaps(traces)


def mixing() -> list[dict[str, float]]:
    """How many edges random circuits keep of the one that they start from, after so many tried swaps an edge; seconds."""
    wiring, rows = Wiring(n_layers=12, n_heads=12), []
    (kept,) = random_circuits(wiring, 1000, 1, seed=0)
    for tries in TRIES:
        began = time.perf_counter()
        drawn = with_same_degrees(wiring, kept, 200, swaps_per_edge=tries)
        seconds = time.perf_counter() - began
        left = (drawn & kept).sum(1)
        rows.append({"tries": tries, "left": float(np.mean(left)), "sd": float(np.std(left)), "seconds": seconds})
    return rows


def _summary(found: dict[str, Reuse]) -> str:
    """Every pair at one cut: trained and with random weights, the ceiling, and what each circuit does for the other task."""
    trained, blank = (
        {one.names: one for one in found[name].overlaps if (one.level, one.cut) == ("edge", DRAWN)}
        for name in ("exact", "exact, random weights")
    )
    itself = {one.names[0]: one.jaccard or 0.0 for one in found["exact"].ceilings if one.cut == DRAWN}
    at = {(one.circuit, one.task): one.faithfulness for one in found["exact"].transfers if one.cut == DRAWN}
    head = ("edges", "shared", "Jaccard", "each with itself", "same degrees", "p", "random weights", "same degrees", "p")
    rows = [(*head, "faithfulness there", "and back"), ("---", *["---:"] * (len(head) + 1))]
    for (one, other), both in ((names, both) for names, both in trained.items() if len(names) == 2):
        alike = blank[one, other]
        rows.append(
            (
                f"{one}, {other}",
                f"{both.n_shared} of {both.sizes[0]}",
                f"{both.jaccard:.2f}",
                f"{itself[one]:.2f}, {itself[other]:.2f}",
                *_null(both),
                str(alike.n_shared),
                *_null(alike),
                *(f"{round(at[way] or 0.0, 2) + 0.0:.2f}" for way in ((one, other), (other, one))),
            )
        )
    title = f"## Edges by exact patching, the best {DRAWN:.0%}"
    return "\n".join([title, "", *(f"| {' | '.join(cells)} |" for cells in rows)])


def _null(one: Overlap) -> tuple[str, str]:
    null = one.same_degrees
    assert null is not None, "edges have one"
    return f"{null.mean:.0f} [{null.low:.0f}, {null.high:.0f}]", f"{null.p_value:.2g}"


def _text(found: dict[str, Reuse], stages: tuple[Overlap, ...], swaps: list[dict[str, float]]) -> str:
    about = (__doc__ or "").partition("one core\n\n")[2].partition(" The tables")[0].strip()
    parts = ["# Re-use of parts across tasks", f"Written by `python -m benchmarks.reuse`.\n\n{about}", _summary(found)]
    for method, one in found.items():
        parts += [f"## {method}", str(one)]
    parts += ["## Path patching, stage by stage", markdown(overlap_table(f"The best {PER_STAGE} heads a stage", stages))]
    lines = [f"| {row['tries']} | {row['left']:.1f} | {row['sd']:.1f} | {row['seconds']:.2f} |" for row in swaps]
    head = "| swaps tried an edge | edges left of 1,000 | standard deviation | seconds for 200 |\n| ---: | ---: | ---: | ---: |"
    parts.append("\n".join(["## Random circuits with the same degrees: GPT-2 small's shape, 1,000 edges", "", head, *lines]))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
