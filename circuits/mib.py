"""Scores in EAP-IG's JSON (``eap_ig`` says what it holds), to MIB's circuit track and from it.

MIB takes either one file of importances for every edge, or nine circuits without scores. Its table ranks importances by
value for CPR and by magnitude for CMD, and expects that *positive helps*, as ours do. EAP-IG computes scores of that sign from
a loss; from a plain metric, as in MIB's example ``ioi-eap-ig.json``, it computes the opposite.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from circuits import eap_ig
from circuits.edges import Edge
from circuits.scores import Scores
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError

Positive = Literal["helps", "hurts"]
MIB_PERCENTAGES = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)  # of the edges, at most; a circuit each


def save_eap_ig(scores: Scores, path: str | os.PathLike, *, positive: str = "helps", d_model: int = 0) -> None:
    """Scores of edges as one file of importances: no edge is ``in_graph`` yet, the ranking decides.

    ``positive="hurts"`` turns the sign round. ``d_model`` is asked for by the format and used for neurons alone: 0 will do.
    ``CircuitError`` for scores of parts, and for a model without MLPs, which the format cannot say.
    """
    _refuse_parts(scores)
    values = dict(zip(scores.wiring.edges, (_sign(positive) * scores.values).tolist(), strict=True))
    about = {"scores": _facts(scores) | {"settings": dict(scores.settings)}, "positive": positive}
    eap_ig.save(path, scores.wiring.facts, values, (), about, d_model)


def load_eap_ig(
    path: str | os.PathLike, *, positive: str | None = None, n_key_value_heads: int | None = None, **facts: str
) -> Scores:
    """The scores in a file, in our sign. ``positive``: what a positive score says there; needed unless we wrote the file.

    ``n_key_value_heads``: of a model whose heads share keys, for a file that we did not write. ``facts``: method, unit,
    model and task, which such files do not tell. Edges that are missing score 0, as they do for EAP-IG. ``CircuitError`` for
    a file of another kind, and for a score that is not finite.
    """
    document = eap_ig.read(path)
    about, shape = document.get("mechinterp", {}), eap_ig.shape_in(document, n_key_value_heads)
    positive = positive or about.get("positive")
    if positive is None:
        raise CircuitError(
            f"{os.fspath(path)!r} does not say its sign. Give positive='helps' (scores of a loss, or written so) or "
            "positive='hurts' (EAP-IG's scores of a metric, such as MIB's example)."
        )
    wiring, sign = Wiring(**shape), _sign(positive)
    found = eap_ig.by_edge(document, shape)
    values = np.array([sign * eap_ig.total(found.get(edge, [])) for edge in wiring.edges])
    unknown = dict.fromkeys(("method", "unit", "model", "task"), "unknown")
    known: dict[str, Any] = unknown | about.get("scores", {}) | facts
    return Scores(wiring, values, **known)


def save_mib_circuits(
    scores: Scores, folder: str | os.PathLike, *, signed: bool = False, d_model: int = 0
) -> dict[float, Path]:
    """MIB's nine circuits without scores: the best .1, .2, .5, 1, 2, 5, 10, 20 and 50 % of the edges at most, a file each.

    MIB wants a folder ``TASK_MODEL``, as in ``ioi_gpt2``; it is made if it is missing. Best by magnitude, or by value if
    ``signed``. An edge that heads share counts once for each, as MIB counts it. ``CircuitError`` for scores of parts, and for a
    model too small to have an edge in the smallest circuit.
    """
    _refuse_parts(scores)
    folder, wiring = Path(folder), scores.wiring
    n_edges = sum(len(wiring.owners(reader)) for _, reader in wiring.edges)
    counts = {percent: int(percent * n_edges / 100 + 1e-9) for percent in MIB_PERCENTAGES}
    if min(counts.values()) < 1:
        raise CircuitError(f"{MIB_PERCENTAGES[0]} % of this model's {n_edges} edges are none; MIB's sizes need 1,000 edges.")
    folder.mkdir(exist_ok=True)
    ranked = [wiring.edges[item] for item in scores.order(signed).tolist()]
    facts = {**wiring.facts, "n_edges_in_model": wiring.n_edges, **_facts(scores), "signed": signed}
    paths = {percent: folder / f"{percent}.json" for percent in counts}
    for percent, path in paths.items():
        kept = dict.fromkeys(_that_fit(wiring, ranked, counts[percent]), None)
        eap_ig.save(path, wiring.facts, kept, kept, {"facts": facts}, d_model)
    return paths


def _that_fit(wiring: Wiring, ranked: list[Edge], n: int) -> Iterator[Edge]:
    for edge in ranked:
        n -= len(wiring.owners(edge[1]))
        if n < 0:
            return
        yield edge


def _facts(scores: Scores) -> dict[str, str]:
    return {name: getattr(scores, name) for name in ("method", "unit", "model", "task")}


def _refuse_parts(scores: Scores) -> None:
    if scores.items != "edge":
        raise CircuitError(f"EAP-IG's files hold scores of edges, and these are {scores.items} scores. Use a method of edges.")


def _sign(positive: str) -> int:
    if positive not in get_args(Positive):
        raise CircuitError(f"positive={positive!r}: say 'helps' or 'hurts', what a positive score means in the file.")
    return 1 if positive == "helps" else -1
