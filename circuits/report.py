"""What an evaluation found, as data: printed as a table, saved as JSON."""

import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from circuits.curve_svg import NULL, Bar, curve_svg
from circuits.curves import Curve
from mechinterp.errors import CircuitError
from mechinterp.files import read_document, to_document, write_text_atomically
from mechinterp.html import beside, note, panel, table

_KIND, _VERSION = "mechinterp report", 1


@dataclass(frozen=True)
class Report:
    """One circuit on one task.

    ``clean``, ``corrupted`` and ``circuit`` are mean metrics of the whole model, of no edges and of the circuit.
    ``interval`` is the 95 % bootstrap interval of ``faithfulness`` over prompts, ``quartiles`` those of single prompts.
    ``complement`` is the faithfulness of all *other* edges (small is good: nothing else does the task). ``random`` are
    the faithfulnesses of random circuits of the same size, each edge on a path from input to logits. ``groups`` is the
    faithfulness of each template and order of names. An accuracy is the share of prompts whose best answer beats every
    foil (not the whole vocabulary). ``kl`` is KL(model ‖ circuit) in nats, summed over the vocabulary.

    With scores, ``curve`` cuts them by magnitude and ``signed_curve`` by value: MIB's CMD and CPR. ``stability`` is how
    much of the circuit other prompts would find again: the mean Jaccard index between the circuits of this size on all
    prompts and on prompts drawn again with replacement. Méloux et al. 2025 ask for 0.8.
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
    signed_curve: Curve | None = None
    stability: float | None = None
    items: str = "edge"

    @property
    def cpr(self) -> float | None:
        """MIB's area under faithfulness, of the circuits of the largest values; None without scores, or in an older file."""
        return self.signed_curve.cpr if self.signed_curve and self.signed_curve.shares else None

    @property
    def cmd(self) -> float | None:
        """MIB's area between faithfulness and 1, of the circuits of the largest magnitudes; None without scores."""
        return self.curve.cmd if self.curve and self.curve.shares else None

    @property
    def choices(self) -> dict[str, str]:
        """The six of Miller et al. (2024), without which two faithfulnesses cannot be compared."""
        return {
            "granularity": "head and MLP, q/k/v apart" if self.items == "edge" else "head and MLP",
            "component": self.items,
            "ablation": self.ablation,
            "positions": "all",
            "direction": "destroy (cut from the clean run)",
            "set": "circuit",
        }

    def differs_from(self, other: "Report") -> dict[str, tuple[str, str]]:
        """What keeps these two faithfulnesses from being compared: the choices that differ, with both values.

        Empty where model, task, corruption, metric and all six choices are the same.
        """
        mine, theirs = ({**report._about, **report.choices} for report in (self, other))
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}

    @property
    def _about(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in ("model", "task", "corruption", "metric")}

    @property
    def beats_random(self) -> float:
        """The share of random circuits of equal size that are less faithful; NaN if none were run."""
        return float(np.mean([r < self.faithfulness for r in self.random])) if self.random else float("nan")

    @property
    def facts(self) -> dict[str, Any]:
        """What a circuit carries of its report, as plain values: ``circuit.graph.update(report.facts)``.

        Its picture then shows the faithfulness, and ``circuit.describe()`` also says how that was measured.
        """
        low, high = self.interval
        facts = {"faithfulness": self.faithfulness, "faithfulness_low": low, "faithfulness_high": high}
        facts |= {name: getattr(self, name) for name in ("ablation", "corruption", "metric", "n_prompts", "complement")}
        facts |= {"metric_model": self.clean, "metric_circuit": self.circuit, "metric_no_edges": self.corrupted}
        if self.random:
            facts |= {"n_random": len(self.random), "beats_random": self.beats_random, "best_random": max(self.random)}
        return facts

    def save(self, path: str | os.PathLike) -> None:
        """JSON, whole or not at all."""
        write_text_atomically(path, to_document(_KIND, _VERSION, {**asdict(self), "choices": self.choices}))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Report":
        """What ``save`` wrote, equal. ``CircuitError`` names the file and what is wrong with it."""
        document = read_document(path, _KIND, _VERSION, CircuitError)
        facts = {name: value for name, value in document.items() if name not in ("format", "version", "choices")}
        facts |= {name: tuple(facts[name]) for name in ("interval", "quartiles", "random") if name in facts}
        try:
            for name in ("curve", "signed_curve"):
                facts[name] = facts.get(name) and Curve.from_plain(facts[name])
            return cls(**facts)
        except TypeError as problem:
            raise CircuitError(f"{os.fspath(path)!r} does not hold a usable report: {problem}") from problem

    def __str__(self) -> str:
        return "\n".join([self._title, *(f"  {name:<16} {text}" for name, text in self._rows)])

    def _repr_html_(self) -> str:
        """The table, and beside it the curve, or the one size there is, between both baselines."""
        bars = [Bar(self.n_edges, self.faithfulness, *self.interval, "this circuit")]
        if self.random:
            null = float(np.mean(self.random)), min(self.random), max(self.random)
            bars.insert(0, Bar(self.n_edges, *null, "random", NULL))
        lines = {"largest magnitudes": self.curve} if self.curve else {}
        rows = [(name, text.replace("   ", " · ")) for name, text in self._rows]
        drawn = curve_svg(lines, bars, self.n_edges_in_model, str(self))
        about = "Bars and band: 95 % interval over prompts; random circuits: lowest to highest."
        return panel(self._title, beside(table(("", ""), rows, left=2), drawn), note(about))

    @property
    def _title(self) -> str:
        kept = f"{self.n_edges:,} of {self.n_edges_in_model:,} edges"
        return f"{self.task} on {self.model}: {kept}, {self.n_prompts} prompts"

    @property
    def _rows(self) -> list[tuple[str, str]]:
        low, high = self.interval
        q1, median, q3 = self.quartiles
        rows = [
            (self.metric, f"model {self.clean:.3f}   circuit {self.circuit:.3f}   no edges {self.corrupted:.3f}"),
            ("faithfulness", f"{self.faithfulness:.3f}   95 % interval [{low:.3f}, {high:.3f}]"),
            ("per prompt", f"median {median:.3f}   quartiles [{q1:.3f}, {q3:.3f}]"),
            ("other edges", f"{self.complement:.3f}"),
        ]
        if self.random:
            null = f"mean {np.mean(self.random):.3f}   best of {len(self.random)}: {max(self.random):.3f}"
            rows.append(("random circuits", null))
        accuracies = f"model {self.accuracy_model:.3f}   circuit {self.accuracy_circuit:.3f}"
        rows.append(("accuracy", f"{accuracies}   KL {self.kl:.3f} nats"))
        if self.stability is not None:
            rows.append(("stability", f"{self.stability:.3f}   of the circuit is found again on prompts drawn again"))
        if self.cpr is not None and self.cmd is not None:
            rows.append(("all sizes", f"CPR {self.cpr:.3f} (largest values)   CMD {self.cmd:.3f} (largest magnitudes)"))
        how = f"{self.ablation} ({self.corruption}); {self.items}s; all positions; cut from the clean run"
        return [*rows, ("ablation", how)]
