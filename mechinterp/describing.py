"""A token attribution in words: sentences by rules from its numbers, which say nothing that the numbers do not say."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

RULE_WORDS = {
    "tail": "the effect of replacing it by the baseline with the scales of the norms held",
    "held": "the effect of replacing it by the baseline with the scales of the norms and the attention patterns held",
    "exact": "the effect of replacing it by the baseline, nothing held",
}


@runtime_checkable
class Attributed(Protocol):
    """What is described, drawn and shown: see ``TextAttribution``."""

    @property
    def tokens(self) -> tuple[str, ...]: ...
    @property
    def scores(self) -> np.ndarray: ...
    @property
    def answer(self) -> str: ...
    @property
    def foil(self) -> str | None: ...
    @property
    def difference(self) -> float: ...
    @property
    def model(self) -> str: ...
    @property
    def settings(self) -> Any: ...
    @property
    def rounds(self) -> tuple[Any, ...]: ...


def describe_text(found: Attributed, n: int = 5) -> str:
    """A paragraph each on what was asked, the ``n`` strongest tokens each way, phrases, and what is *not* known."""
    order = np.argsort(-np.abs(found.scores), kind="stable").tolist()
    parts = [_question(found), _tokens(found, order, n)]
    if found.rounds and found.rounds[-1]:
        parts.append(_phrases(found.rounds[-1], len(found.rounds), n))
    return "\n\n".join([*parts, _unknown(found)])


def listed(items: Sequence[str], n: int, of: str) -> str:
    """The first ``n`` items, and how many were left out.

    >>> listed(["a", "b", "c"], 2, "tokens"), listed(["a", "b"], 2, "tokens"), listed(["a", "b", "c"], 3, "tokens")
    ('a, b, and 1 more of 3 tokens', 'a and b', 'a, b and c')
    """
    if len(items) > n:
        return f"{', '.join(items[:n])}, and {len(items) - n:,} more of {len(items):,} {of}"
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def _question(found: Attributed) -> str:
    if found.foil is None:
        logit = f"a logit of {found.difference:+.3g}"
        return f"At the end of this prompt of {len(found.tokens)} tokens {found.model} gives {found.answer!r} {logit}."
    answer, foil = (found.answer, found.foil) if found.difference >= 0 else (found.foil, found.answer)
    prefers = f"gives {answer!r} a logit {abs(found.difference):.3g} above that of {foil!r}"
    if not found.difference:
        prefers = f"gives {answer!r} and {foil!r} the same logit"
    return f"At the end of this prompt of {len(found.tokens)} tokens {found.model} {prefers}."


def _tokens(found: Attributed, order: list[int], n: int) -> str:
    against = "" if found.foil is None else f" against {found.foil!r}"
    sentences = []
    for sign, verb in ((1, f"speak for {found.answer!r}{against}"), (-1, "speak the other way")):
        names = [f"{found.tokens[at]!r} at {at} ({found.scores[at]:+.3g})" for at in order if found.scores[at] * sign > 0]
        these = f"These {verb}, strongest first, in logits: {listed(names, n, 'such tokens')}."
        sentences.append(these if names else f"None {verb}.")
    size = np.abs(found.scores)
    if size.sum() and len(order) > 1:
        k = min(3, len(order) - 1)
        share = size[order[:k]].sum() / size.sum()
        most = f"The {k} strongest tokens hold" if k > 1 else "The strongest token holds"
        sentences.append(f"{most} {share:.0%} of the sum of all magnitudes.")
    sentences.append(f"All scores add up to {found.scores.sum():+.3g}, where the whole is {found.difference:+.3g}.")
    return " ".join(sentences)


def _phrases(phrases: Sequence[Any], n_rounds: int, n: int) -> str:
    ranked = sorted(phrases, key=lambda phrase: -abs(phrase.score))
    names = [f"{phrase.text!r} ({phrase.score:+.3g})" for phrase in ranked]
    after = "" if n_rounds == 1 else f" after {n_rounds} rounds of merging"
    return f"As phrases, each scored as one source{after}: {listed(names, n, 'phrases')}."


def _unknown(found: Attributed) -> str:
    rules, baseline = found.settings.get("rules"), found.settings.get("baseline")
    words = f": {RULE_WORDS[rules]}" if rules in RULE_WORDS else ""
    how = f"by the rules {rules!r}{words}" if rules else "by rules that were not recorded"
    against = f"against the {baseline!r} baseline" if baseline else "against a baseline that was not recorded"
    return (
        f"A score is what is due to a token {how}, {against}. Not known from these numbers: what other rules or another "
        "baseline would give, what tokens do only together, through which heads any of this runs, and whether another prompt "
        "behaves alike."
    )
