"""What the built-in model must do before anyone may analyse it, measured on words and sentences it never saw in a task.

python -m mechinterp.models.builtin.gates --prompts 2000
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.metrics import is_preferred, is_top, prob_diff
from mechinterp.prompts import PromptBatch
from mechinterp.tasks.base import Task
from mechinterp.tasks.colored_objects import colored_objects
from mechinterp.tasks.docstring import docstring
from mechinterp.tasks.greater_than import cutoff_sharpness, greater_than, greater_than_control
from mechinterp.tasks.ioi import ioi, ioi_abc


@dataclass(frozen=True)
class Gate:
    """A figure of a task and the range in which it must lie. A gate is never lowered: a task below it is not shipped."""

    task: Callable[..., Task]
    metric: Callable
    low: float
    high: float = 1.0


def first_probability(logits: Float[Tensor, "batch d_vocab"], prompts: PromptBatch) -> Float[Tensor, "batch"]:
    """Probability of the first candidate, over the full vocabulary."""
    return logits.softmax(-1).gather(1, prompts.candidates[:, :1])[:, 0]


def second_probability(logits: Float[Tensor, "batch d_vocab"], prompts: PromptBatch) -> Float[Tensor, "batch"]:
    """Probability of the second candidate, over the full vocabulary."""
    return logits.softmax(-1).gather(1, prompts.candidates[:, 1:2])[:, 0]


# Held-out words and sentences; the docstring gate is the published shape, which is held out as well.
GATES = {
    "ioi: IO above S": Gate(ioi, is_preferred, 0.99),
    "ioi-abc: probability of the first name": Gate(ioi_abc, first_probability, 0.45, 0.55),
    "ioi-abc: probability of the second name": Gate(ioi_abc, second_probability, 0.45, 0.55),
    "greater-than: probability difference": Gate(greater_than, prob_diff, 0.9),
    "greater-than-control: probability difference": Gate(greater_than_control, prob_diff, -0.05, 0.05),
    "colored-objects: right color is the top token": Gate(colored_objects, is_top, 0.97),
    "docstring: C is the top token": Gate(docstring, is_top, 0.95),
}
# Reported beside the gates, without a bound.
ALSO = {
    "ioi: IO is the top token": Gate(ioi, is_top, 0.0),
    "ioi-abc: first name above second": Gate(ioi_abc, is_preferred, 0.0),
    "greater-than: cutoff sharpness (ideal 0.05)": Gate(greater_than, cutoff_sharpness, 0.0),
}


@torch.no_grad()
def measure(model, n_prompts: int = 2000, seed: int = 1, split: str = "held-out") -> dict[str, float]:
    """The mean of every gate's metric over ``n_prompts`` prompts of ``split``."""
    return {name: _mean(model, gate, n_prompts, seed, split) for name, gate in (GATES | ALSO).items()}


def failures(figures: dict[str, float]) -> list[str]:
    """The gates that ``figures`` miss, each with its figure and its range."""
    return [
        f"{name} is {figures[name]:.3f}, and must lie in [{gate.low}, {gate.high}]"
        for name, gate in GATES.items()
        if not gate.low <= figures[name] <= gate.high
    ]


def _mean(model, gate: Gate, n_prompts: int, seed: int, split: str) -> float:
    task = gate.task(model, n_prompts, seed, split=split)
    scores = [gate.metric(model.run(batch.clean, logits_at=batch.end)[0], batch) for batch in task.batches(batch_size=250)]
    return float(torch.cat(scores).mean())


def main() -> None:
    from mechinterp.models.load import load

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--split", default="held-out", choices=("held-out", "train", "all"))
    asked = parser.parse_args()
    figures = measure(load(asked.model), asked.prompts, asked.seed, asked.split)
    print(json.dumps({name: round(figure, 4) for name, figure in figures.items()}, indent=2))
    missed = failures(figures)
    print("\n".join(missed) if missed else "every gate is passed")


if __name__ == "__main__":
    main()
