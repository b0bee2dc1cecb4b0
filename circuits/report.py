"""What an evaluation found, as data: printed as a table, saved as JSON."""

import json
import os
from dataclasses import asdict, dataclass, field

import numpy as np

from mechinterp.files import write_text_atomically


@dataclass(frozen=True)
class Curve:
    """Faithfulness against the number of edges, with its bootstrap interval."""

    n_edges: tuple[int, ...]
    faithfulness: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def smallest(self, at_least: float) -> int | None:
        """The smallest size from which the curve reaches ``at_least``; None if it never does."""
        return next((n for n, f in zip(self.n_edges, self.faithfulness, strict=True) if f >= at_least), None)


@dataclass(frozen=True)
class Report:
    """One circuit on one task.

    ``clean``, ``corrupted`` and ``circuit`` are mean metrics of the whole model, of no edges and of the circuit.
    ``interval`` is the 95 % bootstrap interval of ``faithfulness`` over prompts, ``quartiles`` those of single prompts.
    ``complement`` is the faithfulness of all *other* edges (small is good: nothing else does the task). ``random`` are
    the faithfulnesses of random circuits of the same size connected to the logits. ``kl`` is KL(model ‖ circuit) in
    nats, summed over the vocabulary. ``choices`` are the six of Miller et al. (2024), without which two faithfulnesses
    cannot be compared.
    """

    model: str
    task: str
    corruption: str
    metric: str
    ablation: str
    n_prompts: int
    n_edges: int
    n_edges_in_model: int
    clean: float
    corrupted: float
    circuit: float
    faithfulness: float
    interval: tuple[float, float]
    quartiles: tuple[float, float, float]
    complement: float
    random: tuple[float, ...]
    groups: dict[str, float]
    curve: Curve | None
    seed: int
    accuracy_model: float
    accuracy_circuit: float
    kl: float
    choices: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        choices = {
            "granularity": "head and MLP, q/k/v apart",
            "component": "edge",
            "ablation": self.ablation,
            "positions": "all",
            "direction": "destroy (cut from the clean run)",
            "set": "circuit",
        }
        object.__setattr__(self, "choices", choices)

    @property
    def beats_random(self) -> float:
        """The share of random circuits of equal size that are less faithful; NaN if none were run."""
        return float(np.mean([r < self.faithfulness for r in self.random])) if self.random else float("nan")

    def save(self, path: str | os.PathLike) -> None:
        """JSON, whole or not at all."""
        write_text_atomically(path, json.dumps({"format": "mechinterp report", "version": 1, **asdict(self)}, indent=2) + "\n")

    def __str__(self) -> str:
        low, high = self.interval
        q1, median, q3 = self.quartiles
        lines = [
            f"{self.task} on {self.model}: {self.n_edges:,} of {self.n_edges_in_model:,} edges, {self.n_prompts} prompts",
            f"  {self.metric:<16} model {self.clean:.3f}   circuit {self.circuit:.3f}   no edges {self.corrupted:.3f}",
            f"  faithfulness     {self.faithfulness:.3f}   95 % interval [{low:.3f}, {high:.3f}]",
            f"  per prompt       median {median:.3f}   quartiles [{q1:.3f}, {q3:.3f}]",
            f"  other edges      {self.complement:.3f}",
            f"  accuracy         model {self.accuracy_model:.3f}   circuit {self.accuracy_circuit:.3f}   KL {self.kl:.3f} nats",
        ]
        if self.random:
            null = f"mean {np.mean(self.random):.3f}   best of {len(self.random)}: {max(self.random):.3f}"
            lines.insert(5, f"  random circuits  {null}")
        lines.append(f"  ablation         {self.ablation} ({self.corruption}); edges; all positions; cut from the clean run")
        return "\n".join(lines)
