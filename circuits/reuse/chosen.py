"""What one circuit keeps of what was judged, as edges, as nodes (heads and MLPs) or as heads: what overlaps are made of.

Only what was judged can be kept or left out: a method that scored heads alone, or a published list that names no MLP, says
nothing of MLPs.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float

from circuits import selection
from circuits.discovery import CUT_GREEDILY
from circuits.graph import Circuit
from circuits.ground_truth import PublishedCircuit
from circuits.scores import Scores
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError, nearest

Level = Literal["edge", "node", "head"]
Source = Circuit | PublishedCircuit | Scores


@dataclass(frozen=True)
class Chosen:
    """What one circuit keeps of what was judged: an entry an edge, or (levels "node" and "head") a writer."""

    wiring: Wiring
    level: Level
    judged: Bool[np.ndarray, "item"]
    kept: Bool[np.ndarray, "item"]

    @classmethod
    def of(cls, source: Source, level: Level, n: int | None = None) -> "Chosen":
        """Scores keep the ``n`` items of largest magnitude, and never one that scores exactly zero: it does nothing.

        Edge scores are summed over a part's edges for nodes (``Scores.nodes``). ``CircuitError`` for node scores asked for
        edges, for scores without ``n``, for what is no circuit.
        """
        if level not in get_args(Level):
            raise CircuitError(f"{level!r} is no level. Circuits share an edge, node or head.{nearest(level, get_args(Level))}")
        if isinstance(source, Scores):
            if n is None or n < 1:
                raise CircuitError(f"Scores are no circuit until they are cut: give n, at least 1, not {n}.")
            judged = judged_by(source, level)
            return cls(source.wiring, level, judged, judged & _cut(source, level, judged, n))
        if isinstance(source, PublishedCircuit):
            judged = _of_kinds(source.wiring, level, ("head", "mlp") if source.mlps() else ("head",))
            kept = source.edge_truth() if level == "edge" else source.node_truth()
            return cls(source.wiring, level, judged, judged & kept)
        if isinstance(source, Circuit):
            wiring = Wiring.of(source)
            judged, nodes = _of_kinds(wiring, level, _kinds_of(source)), {*source.heads, *source.mlps}
            kept = wiring.mask(source) if level == "edge" else np.array([writer in nodes for writer in wiring.writers])
            return cls(wiring, level, judged, judged & kept)
        raise CircuitError(f"{type(source).__name__} is no circuit. Give a Circuit, a PublishedCircuit or Scores.")


def values_at(scores: Scores, level: Level) -> Float[np.ndarray, "item"]:
    """One score an item of the level, signed."""
    return scores.values if level == "edge" else scores.nodes


def _cut(scores: Scores, level: Level, judged: Bool[np.ndarray, "item"], n: int) -> Bool[np.ndarray, "item"]:
    sizes = np.where(judged, np.abs(values_at(scores, level)), 0.0)
    if level == "edge" and scores.method in CUT_GREEDILY:
        return selection.greedy(scores.wiring, sizes, min(n, len(sizes))) & (sizes > 0)
    return selection.strongest(sizes, n) & (sizes > 0)


def judged_by(scores: Scores, level: Level) -> Bool[np.ndarray, "item"]:
    """Which items a method looked at; ``CircuitError`` where it did not look at this level."""
    if scores.items not in ("edge", "node") or (level == "edge" and scores.items != "edge"):
        raise CircuitError(
            f"these are {scores.items} scores by {scores.method!r}, which cannot be compared as {level}s. Edge scores are "
            'compared as edges, nodes and heads; node scores as nodes and heads: give level="node".'
        )
    judged = _of_kinds(scores.wiring, level, scores.settings.get("judged", ("head", "mlp")))
    if scores.items != "node" or "senders" not in scores.settings:
        return judged
    wiring, senders = scores.wiring, scores.settings["senders"]  # path patching: who does not send scores zero unjudged
    receivers = set(scores.settings["receivers"])
    before = max(int(n) for reader, n in zip(wiring.readers, wiring.writers_before, strict=True) if str(reader) in receivers)
    if isinstance(senders, str):
        senders = [str(writer) for writer in wiring.writers[:before] if senders == "all" or writer.kind == "head"]
    return judged & np.array([str(writer) in set(senders) for writer in wiring.writers])


def _of_kinds(wiring: Wiring, level: Level, kinds: Collection[str]) -> Bool[np.ndarray, "item"]:
    """The items of a level that a method judges which looks at heads, MLPs, or both; the input is nobody's finding.

    Where MLPs were not judged, neither were the edges that touch them, nor the one from input to logits, which rules keep
    along with them.
    """
    if level != "edge":
        there_are = ("head", "mlp") if level == "node" else ("head",)
        return np.array([writer.kind in kinds and writer.kind in there_are for writer in wiring.writers])
    if "mlp" in kinds:
        return np.ones(wiring.n_edges, dtype=bool)
    writes, reads = (np.array([end.kind != "mlp" for end in ends]) for ends in (wiring.writers, wiring.readers))
    judged = writes[wiring.edge_writer] & reads[wiring.edge_reader]
    judged[wiring.index("input", "logits")] = False
    return judged


def _kinds_of(circuit: Circuit) -> Collection[str]:
    """What the method behind a circuit judged, where its settings tell."""
    try:
        return json.loads(circuit.graph["settings"]).get("judged", ("head", "mlp"))
    except (KeyError, TypeError, ValueError, AttributeError):
        return ("head", "mlp")
