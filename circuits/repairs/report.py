"""What an edit of attention did to a task, as data: printed as Markdown, saved as JSON."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import comb
from typing import Any

import numpy as np
from jaxtyping import Float

from circuits.scores import Scores
from circuits.statistics import bootstrap_means, interval, rank_correlation
from mechinterp.errors import CircuitError
from mechinterp.files import read_document, to_document, write_text_atomically
from mechinterp.html import from_markdown, panel

_KIND, _VERSION = "mechinterp repair", 1
UNEDITED = "unedited"


@dataclass(frozen=True)
class Mean:
    """A mean over prompts with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Float[np.ndarray, "prompt"]) -> "Mean":
        """Of one number a prompt."""
        return cls.each(values[None])[0]

    @classmethod
    def each(cls, values: Float[np.ndarray, "variant prompt"]) -> "list[Mean]":
        """One mean a variant, the prompts drawn again in the same way for all."""
        low, high = interval(bootstrap_means(values.astype(np.float64)))
        return [cls(float(m), float(a), float(b)) for m, a, b in zip(values.mean(1), low, high, strict=True)]

    def percent(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Condition:
    """The task with these ``heads`` edited.

    ``accuracy``: the likeliest token of the whole vocabulary is an answer. ``preferred``: the best answer beats every foil.
    ``fixed`` prompts are right here and wrong unedited, ``broken`` ones the reverse. ``said`` counts, by template group, what
    was said: ``answer``, a ``foil`` or a ``word`` of the prompt and where it stands there, or ``anything else``.
    """

    name: str
    heads: tuple[str, ...]
    accuracy: Mean
    preferred: Mean
    metric: Mean
    fixed: int
    broken: int
    said: Mapping[str, Mapping[str, int]]

    @property
    def p_value(self) -> float:
        """McNemar's exact test: how often a fair coin would split ``fixed`` and ``broken`` as unevenly."""
        n, least = self.fixed + self.broken, min(self.fixed, self.broken)
        return min(1.0, 2 * sum(comb(n, k) for k in range(least + 1)) / 2**n)

    def errors(self) -> dict[str, int]:
        """What the wrong answers were, over all groups, most frequent first."""
        counts: dict[str, int] = {}
        for of_group in self.said.values():
            for role, n in of_group.items():
                counts[role] = counts.get(role, 0) + n
        counts.pop("answer", None)
        return dict(sorted(counts.items(), key=lambda count: -count[1]))


@dataclass(frozen=True)
class Control:
    """Random heads in place of the chosen ones: as many, from the same layers, made to look at the same places."""

    heads: tuple[str, ...]
    accuracy: float
    preferred: float
    metric: float


@dataclass(frozen=True)
class Downstream:
    """What all groups together change in a later head that is not edited itself.

    ``looks``: the share of its attention from END on each named position, unedited and edited (``the edited to`` is what
    the edited heads were made to look at). ``before`` and ``after``: what it adds by itself to the logit of the answers less
    that of the foils (its direct logit attribution at END, in logits); ``change`` is the difference.
    """

    head: str
    looks: Mapping[str, tuple[float, float]]
    before: float
    after: float
    change: Mean

    def shifts(self, n: int = 3) -> list[tuple[str, float]]:
        """The named positions where its attention changed most."""
        moved = [(name, after - before) for name, (before, after) in self.looks.items()]
        return sorted(moved, key=lambda shift: -abs(shift[1]))[:n]


@dataclass(frozen=True)
class Repair:
    """A task without and with an edit of attention: the conditions, random heads, and what follows in later heads."""

    facts: Mapping[str, Any]
    conditions: tuple[Condition, ...]
    controls: tuple[Control, ...]
    downstream: tuple[Downstream, ...]

    def __getitem__(self, name: str) -> Condition:
        """The condition of this name; ``CircuitError`` names those that there are."""
        found = {condition.name: condition for condition in self.conditions}
        if name not in found:
            raise CircuitError(f"there is no condition {name!r}; there are {', '.join(found)}.")
        return found[name]

    @property
    def edited(self) -> Condition:
        """All groups together."""
        return self.conditions[-1]

    @property
    def as_good_at_random(self) -> float | None:
        """The share of random draws, the edit itself counted among them, that reach the edit's accuracy."""
        if not self.controls:
            return None
        reached = sum(control.accuracy >= self.edited.accuracy.value for control in self.controls)
        return (1 + reached) / (1 + len(self.controls))

    def correlation(self, scores: Scores) -> float | None:
        """Spearman's, over later heads: how much a head's direct logit attribution moved, and how important ``scores`` say
        it is (both as magnitudes). None where one of the two has no order."""
        nodes = dict(zip(map(str, scores.wiring.writers), np.abs(scores.nodes), strict=True))
        moved = np.array([abs(effect.change.value) for effect in self.downstream])
        return rank_correlation(moved, np.array([nodes[effect.head] for effect in self.downstream])) if len(moved) > 1 else None

    def save(self, path: str | os.PathLike) -> None:
        """JSON, whole or not at all."""
        write_text_atomically(path, to_document(_KIND, _VERSION, asdict(self)))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Repair":
        """What ``save`` wrote, equal. ``CircuitError`` names the file and what is wrong with it."""
        document = read_document(path, _KIND, _VERSION, CircuitError)
        try:
            conditions = tuple(_condition(facts) for facts in document["conditions"])
            controls = tuple(Control(**{**facts, "heads": tuple(facts["heads"])}) for facts in document["controls"])
            return cls(document["facts"], conditions, controls, tuple(_downstream(facts) for facts in document["downstream"]))
        except (TypeError, KeyError, AttributeError, ValueError) as problem:
            raise CircuitError(f"{os.fspath(path)!r} does not hold a usable repair: {problem}") from problem

    def _repr_html_(self) -> str:
        return panel("", from_markdown(str(self)))

    def __str__(self) -> str:
        """Markdown: the conditions with random heads below them, the errors, and the later heads that changed most."""
        facts = self.facts
        about = f"{facts['task']} on {facts['model']}, {facts['n_prompts']:,} prompts; from {facts['at']} the edited heads "
        about += f"attend to {_places(facts['attention'])}" + (f" (share {facts['share']:g})" if facts["share"] != 1 else "")
        return "\n\n".join([about, self._results(), self._errors(), *([self._later()] if self.downstream else [])])

    def _results(self) -> str:
        head = ("edited", "heads", "accuracy, %", "answer above foils, %", self.facts["metric"], "fixed", "broken", "p")
        rows = [
            (c.name, " ".join(c.heads), c.accuracy.percent(), c.preferred.percent(), str(c.metric))
            + (("", "", "") if c.name == UNEDITED else (str(c.fixed), str(c.broken), f"{c.p_value:.1g}"))
            for c in self.conditions
        ]
        if self.controls:
            n = f"{len(self.controls)} draws"
            columns = ([getattr(c, name) for c in self.controls] for name in ("accuracy", "preferred", "metric"))
            accuracy, preferred, metric = ((float(np.mean(column)), max(column)) for column in columns)
            for word, i in (("mean", 0), ("best", 1)):
                numbers = (f"{100 * accuracy[i]:.1f}", f"{100 * preferred[i]:.1f}", f"{metric[i]:.3f}", "", "", "")
                rows.append((f"random heads, {word}", n, *numbers))
        return markdown(head, rows, "ll" + "r" * 6)

    def _errors(self) -> str:
        kept = [self.conditions[0], self.edited]
        roles = list(dict.fromkeys(role for condition in kept for role in condition.errors()))
        rows = [(role, *(f"{condition.errors().get(role, 0):,}" for condition in kept)) for role in roles]
        return markdown(("wrong answers", *(condition.name for condition in kept)), rows, "lrr")

    def _later(self, n: int = 6) -> str:
        rows = [
            (
                effect.head,
                f"{effect.before:+.3f}",
                f"{effect.after:+.3f}",
                f"{effect.change.value:+.3f} [{effect.change.low:+.3f}, {effect.change.high:+.3f}]",
                ", ".join(f"{name} {shift:+.1%}" for name, shift in effect.shifts()),
            )
            for effect in self.downstream[:n]
        ]
        return markdown(("later head", "direct, unedited", "edited", "change", "attention from END"), rows, "lrrrl")


def _places(attention: Mapping[str, Any]) -> str:
    texts = {name: " ".join(places) if isinstance(places, list | tuple) else str(places) for name, places in attention.items()}
    return next(iter(texts.values())) if len(set(texts.values())) == 1 else "; ".join(f"{k}: {v}" for k, v in texts.items())


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]], sides: str) -> str:
    """A Markdown table; ``sides`` says of each column whether it stands left or right."""
    rule = ["---:" if side == "r" else "---" for side in sides]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _condition(facts: Mapping[str, Any]) -> Condition:
    means = {name: Mean(**facts[name]) for name in ("accuracy", "preferred", "metric")}
    return Condition(**{**facts, **means, "heads": tuple(facts["heads"])})


def _downstream(facts: Mapping[str, Any]) -> Downstream:
    looks = {name: tuple(shares) for name, shares in facts["looks"].items()}
    return Downstream(**{**facts, "looks": looks, "change": Mean(**facts["change"])})
