"""From codes to scores: what is measured of each part's code, what chance gives, which parts stand out.

Each score is a function in ``CODE_SCORES``; ``discovery/codes.py`` says what they are for.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from circuits.code_statistics import (
    beyond_chance,
    false_discovery_rates,
    information,
    otsu,
    permuted_labels,
    share_changed,
    unique_to_positives,
)
from circuits.coding import Coded, Examples
from circuits.discovery.walk import scores_of
from circuits.scores import Scores
from circuits.statistics import rank_correlation
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError, nearest
from mechinterp.nodes import Node

Value = Float[np.ndarray, "part"]
Observed = Float[np.ndarray, "place part"]
Null = Float[np.ndarray, "place draw part"]
CodeScore = Callable[[Coded, int, int], tuple[Observed, Null | None]]  # codes, permutations, seed


@dataclass(frozen=True, eq=False)
class Judged:
    """Each part's score and p-value (None where a score has no chance level), and the parts that stand out."""

    values: Value
    p: Value | None
    selected: tuple[Node, ...]


def judge(measure: CodeScore, one: Coded, n_permutations: int, level: float, seed: int) -> Judged:
    """Each part's score, from its codes; see ``stand_out``."""
    return stand_out(one.examples, *measure(one, n_permutations, seed), level)


def stand_out(
    examples: Examples,
    observed: Float[np.ndarray, "place part"],
    null: Float[np.ndarray, "place draw part"] | None,
    level: float,
) -> Judged:
    """The best over places, against the best over places under the same permutations; then what stands out.

    Less than chance gives is chance: it counts as 0.
    """
    best = observed.max(0)
    values, p = (best, None) if null is None else beyond_chance(best, null.max(0))
    values = values.clip(min=0).round(6)  # tables are float32
    keep = values > otsu(values)
    if p is not None:
        keep &= false_discovery_rates(p) <= level
    return Judged(values, p, tuple(part for part, kept in zip(examples.parts, keep, strict=True) if kept))


def in_scores(examples: Examples, values: Value, method: str, unit: str, facts: dict[str, Any]) -> Scores:
    """One number a writer, in wiring order; 0 for what was not coded, which circuits then keep (see ``Scores``)."""
    if examples.written.mlps is None and examples.model.config.has_mlp:
        facts = facts | {"judged": ["head"]}
    by_part = dict(zip(examples.parts, values.tolist(), strict=True))
    writers = np.array([by_part.get(writer, 0.0) for writer in Wiring.of(examples.model.config).writers])
    about: dict[str, Any] = {"settings": facts, "items": "node", "unit": unit, "allow_zero": True}
    return scores_of(examples.model, examples.task, method, writers, None, **about)


def facts_of(examples: Examples, found: Judged) -> dict[str, Any]:
    """What stands in ``Scores.settings``: the parts that stand out, and p-values where there are any."""
    facts: dict[str, Any] = {"selected": [str(part) for part in found.selected]}
    return facts if found.p is None else facts | {"p": _by_name(examples, found.p)}


def facts_of_control(examples: Examples, found: Judged, control: Judged) -> dict[str, Any]:
    """The same of the control, with what stands ``beside`` the result."""
    return facts_of(examples, control) | beside(examples, found.values, control.values)


def beside(examples: Examples, values: Value, control: Value) -> dict[str, Any]:
    """A control's values, and how alike it ranks parts (Spearman)."""
    return {"values": _by_name(examples, control), "rank_correlation": rank_correlation(values, control)}


def known_score(name: str) -> CodeScore:
    """The score of this name; ``CircuitError`` names those that there are."""
    if name not in CODE_SCORES:
        raise CircuitError(f"there is no score {name!r}; there are {', '.join(CODE_SCORES)}.{nearest(name, CODE_SCORES)}")
    return CODE_SCORES[name]


def _information(one: Coded, n: int, seed: int) -> tuple[Observed, Null]:
    return _of_labels(information, one, one.examples.labels, n, seed, paired=True)


def _count(one: Coded, n: int, seed: int) -> tuple[Observed, Null]:
    return _of_labels(unique_to_positives, one, one.examples.labels, n, seed, paired=True)


def _answer(one: Coded, n: int, seed: int) -> tuple[Observed, Null]:
    answers = one.examples.prompts.answer.cpu().numpy()
    clean = replace(one, values=one.values[:, : len(answers)])
    return _of_labels(information, clean, answers, n, seed, paired=False)


def _change(one: Coded, n: int, seed: int) -> tuple[Observed, None]:
    return np.stack([share_changed(values) for values in one.values]), None


def _of_labels(measure: Callable, one: Coded, labels: np.ndarray, n: int, seed: int, *, paired: bool) -> tuple[Observed, Null]:
    """``[place part]`` as observed and ``[place draw part]`` under permutations, the same ones at every place."""
    draws = np.concatenate([labels[None], permuted_labels(labels, n, seed, paired=paired)])
    found = np.stack([measure(values, draws) for values in one.values])
    return found[:, 0], found[:, 1:]


def _by_name(examples: Examples, values: Value) -> dict[str, float]:
    return {str(part): float(f"{value:.6g}") for part, value in zip(examples.parts, values.tolist(), strict=True)}


CODE_SCORES: dict[str, CodeScore] = {"information": _information, "change": _change, "answer": _answer, "count": _count}
CODE_UNITS = {"information": "nats", "change": "share of pairs", "answer": "nats", "count": "codes"}
