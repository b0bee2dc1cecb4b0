"""A token attribution in words: every number comes from the object, and changes with it."""

import re
from dataclasses import replace

import numpy as np
import pytest

from mechinterp.attribution import Phrase, TextAttribution

FOUND = TextAttribution(
    tokens=(" Then", " Mary", " and", " John", " to"),
    scores=np.array([0.0, 2.5, -0.125, -1.75, 0.375]),
    answer=" Mary",
    foil=" John",
    difference=3.25,
    model="toy",
    settings={"rules": "tail", "baseline": "mean"},
    rounds=((Phrase(1, 2, " Mary", 2.5),), (Phrase(1, 4, " Mary and John", 0.875),)),
)


def numbers(text: str) -> set[float]:
    return {float(number) for number in re.findall(r"[-+]?\d+(?:\.\d+)?", text)}


def test_every_number_is_a_number_of_the_object():
    size = np.abs(FOUND.scores)
    share = round(100 * np.sort(size)[::-1][:3].sum() / size.sum())
    known = {*FOUND.scores, FOUND.scores.sum(), FOUND.difference, 0.875, share, 2}  # two rounds
    assert numbers(FOUND.describe()) <= known | set(range(6))  # positions, counts


def test_other_numbers_make_another_text():
    other = replace(FOUND, scores=-FOUND.scores, difference=-3.25)
    assert "speak for ' Mary' against ' John', strongest first, in logits: ' Mary' at 1 (+2.5)" in FOUND.describe()
    assert "speak for ' Mary' against ' John', strongest first, in logits: ' John' at 3 (+1.75)" in other.describe()
    assert "toy gives ' Mary' a logit 3.25 above that of ' John'" in FOUND.describe()
    assert "toy gives ' John' a logit 3.25 above that of ' Mary'" in other.describe()


def test_long_lists_are_cut_and_say_so():
    many = replace(FOUND, tokens=("x",) * 40, scores=np.linspace(1, 2, 40), rounds=())
    assert "and 35 more of 40 such tokens" in many.describe()
    assert "None speak the other way" in many.describe()
    assert "phrases" not in many.describe()


def test_what_is_not_known_is_said():
    assert "by the rules 'tail': the effect of replacing it" in FOUND.describe()
    bare = replace(FOUND, settings={})
    assert "rules that were not recorded" in bare.describe()
    assert "Not known from these numbers" in bare.describe()


@pytest.mark.parametrize("scores", [np.zeros(5), np.array([1.0, 0, 0, 0, 0])])
def test_scores_that_vanish_are_described_too(scores):
    text = replace(FOUND, scores=scores, foil=None, rounds=()).describe()
    assert "gives ' Mary' a logit of +3.25" in text
    assert "nan" not in text
