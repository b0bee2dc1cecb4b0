"""How well a ranking finds a circuit that is known: one set by hand, compiled, or published.

Four different numbers go by the name of AUROC in the literature; ours says its unit (edge or node), ranks *every* item of
the model, counts ties half, and takes missing items for scored zero. Positives are one to three per cent of the edges, so
average precision stands beside it. A published circuit is what one method found under one ablation: agreement with it is
a sanity check, to be read below faithfulness and never instead of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from circuits.graph import Circuit
from circuits.ground_truth import PublishedCircuit
from circuits.scores import Scores
from circuits.statistics import auroc, average_precision, precision_recall_curve, roc_curve
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError, nearest

Known = Circuit | PublishedCircuit | Iterable[str]
LEVELS = ("edge", "node")


@dataclass(frozen=True)
class Ranking:
    """How well a ranking finds a known circuit. ``positives``: the share of true items, the chance level of precision."""

    auroc: float
    average_precision: float
    positives: float
    roc: tuple[np.ndarray, np.ndarray]
    precision_recall: tuple[np.ndarray, np.ndarray]
    level: str = "edge"


def ranking(scores: Scores, known: Known, *, level: str | None = None) -> Ranking:
    """Areas and points of the ROC and precision-recall curves of a ranking by magnitude against a known circuit.

    ``known``: a circuit, a published one, or names of edges such as ``"a0.h1->a1.h3.k"``. ``level``: "edge" or "node"
    (heads and MLPs; the input is not ranked); None for what the scores count. Edge scores are summed over a part's edges
    for the node level, node scores have no edge level. Where a published list names no MLP, they were not judged, and
    only heads are ranked. Scores must never have seen the list. ``CircuitError`` for foreign edges and other scores.
    """
    level = level or scores.items
    if level not in LEVELS or (level == "edge" and scores.items != "edge") or scores.items not in LEVELS:
        raise CircuitError(
            f"these are {scores.items} scores, to be ranked as {level}s. Edge scores can be ranked as edges and as nodes, node "
            f"scores as nodes.{nearest(str(level), LEVELS)}"
        )
    size, truth = _edges(scores, known) if level == "edge" else _nodes(scores, known)
    return Ranking(
        auroc=auroc(size, truth),
        average_precision=average_precision(size, truth),
        positives=float(truth.mean()),
        roc=roc_curve(size, truth),
        precision_recall=precision_recall_curve(size, truth),
        level=level,
    )


def _edges(scores: Scores, known: Known) -> tuple[Float[np.ndarray, "edge"], Bool[np.ndarray, "edge"]]:
    return np.abs(scores.values), _mask(scores.wiring, known.circuit() if isinstance(known, PublishedCircuit) else known)


def _nodes(scores: Scores, known: Known) -> tuple[Float[np.ndarray, "node"], Bool[np.ndarray, "node"]]:
    wiring = scores.wiring
    if isinstance(known, PublishedCircuit):
        if known.wiring != wiring:
            raise CircuitError(f"{known.name!r} is a circuit of {known.model}, whose shape is not that of {scores.model}.")
        named, judged = {*known.heads(), *known.mlps()}, {"head", "mlp"} if known.mlps() else {"head"}
    else:
        named, judged = {*wiring.circuit(_mask(wiring, known)).components()}, {"head", "mlp"}
    ranked = [index for index, node in enumerate(wiring.writers) if node.kind in judged]
    return np.abs(scores.nodes)[ranked], np.array([wiring.writers[index] in named for index in ranked])


def _mask(wiring: Wiring, known: Circuit | Iterable[str]) -> Bool[np.ndarray, "edge"]:
    if isinstance(known, Circuit):
        return wiring.mask(known)
    mask = np.zeros(wiring.n_edges, dtype=bool)
    mask[[wiring.index_of(name) for name in known]] = True
    return mask
