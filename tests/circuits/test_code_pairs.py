"""Pairs of codes, against information by its definition, and answers that are known."""

from collections.abc import Sequence

import numpy as np
import pytest

from circuits.code_pairs import (
    PAIR_SCORES,
    conditional,
    conditional_information,
    interaction,
    joint_information,
    judge_pairs,
    known_pair_score,
    pairs_of,
)
from circuits.code_statistics import information, permuted_labels
from mechinterp.errors import CircuitError

LABELS = np.repeat([1, 0], 100)
FREE = np.arange(4)  # of four nodes each may read from all before it
LOG2 = np.log(2)


def mutual(one: Sequence, other: Sequence) -> float:
    """The sum of p(a, b) log p(a, b) / p(a) p(b), cell by cell."""
    pairs = list(zip(one, other, strict=True))

    def share(items: Sequence, item: object) -> float:
        return sum(other == item for other in items) / len(items)

    return sum(
        share(pairs, (a, b)) * np.log(share(pairs, (a, b)) / share(one, a) / share(other, b)) for a, b in sorted(set(pairs))
    )


def given(one: np.ndarray, other: np.ndarray, labels: np.ndarray) -> float:
    kinds = np.unique(labels)
    return sum((labels == kind).mean() * mutual(list(one[labels == kind]), list(other[labels == kind])) for kind in kinds)


def noise(*codes: int, seed: int = 0, n: int = 200) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, size, n) for size in codes], 1)


def pair(one: np.ndarray, other: np.ndarray, measure=interaction, labels: np.ndarray = LABELS) -> float:
    return float(measure(np.stack([one, other], 1), labels, np.array([0, 1]), 200, 0)[0, 0])


def test_pairs_are_ordered_by_reader_and_never_backward():
    writers, readers = pairs_of(np.array([0, 1, 1, 3]))
    assert list(zip(writers, readers, strict=True)) == [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]


def test_joint_information_is_its_definition():
    values, labels = noise(3, 1, 5, 4, n=30), LABELS[85:115]
    draws = np.concatenate([labels[None], permuted_labels(labels, 3, seed=0, paired=True)])
    found = joint_information(values, draws, FREE)
    for row, draw in zip(found, draws, strict=True):
        both = [
            list(zip(values[:, w].tolist(), values[:, r].tolist(), strict=True)) for w, r in zip(*pairs_of(FREE), strict=True)
        ]
        np.testing.assert_allclose(row, [mutual(one, draw.tolist()) for one in both], atol=1e-9)


def test_conditional_information_is_its_definition():
    values, labels = noise(3, 1, 5, 4, n=30), LABELS[85:115]
    orders = np.stack([np.arange(30), np.concatenate([np.arange(15)[::-1], np.arange(15, 30)])])
    found = conditional_information(values, labels, FREE, orders)
    for row, order in zip(found, orders, strict=True):
        expected = [given(values[:, w], values[order, r], labels) for w, r in zip(*pairs_of(FREE), strict=True)]
        np.testing.assert_allclose(row, expected, atol=1e-9)


def test_more_draws_than_are_held_at_once_change_nothing(monkeypatch):
    values, nodes = noise(3, 6, 5, 4), FREE
    whole = [measure(values, LABELS, nodes, 20, 0) for measure in PAIR_SCORES.values()]
    monkeypatch.setattr("circuits.code_pairs._AT_ONCE", 200)
    for one, measure in zip(whole, PAIR_SCORES.values(), strict=True):
        np.testing.assert_allclose(measure(values, LABELS, nodes, 20, 0), one, atol=1e-12)


def test_interaction_is_what_the_label_adds_to_what_two_codes_share():
    """I(y; c1, c2) - I(y; c1) - I(y; c2) = I(c1; c2 | y) - I(c1; c2)."""
    values = noise(3, 4, 5, 2)
    writers, readers = pairs_of(FREE)
    alone = information(values, LABELS[None])[0].astype(float)
    raw = joint_information(values, LABELS[None], FREE)[0] - alone[writers] - alone[readers]
    shared = [mutual(values[:, w].tolist(), values[:, r].tolist()) for w, r in zip(writers, readers, strict=True)]
    given_label = conditional_information(values, LABELS, FREE, np.arange(200)[None])[0]
    np.testing.assert_allclose(raw, given_label - shared, atol=1e-6)


def test_an_exclusive_or_is_synergy_though_neither_code_knows_anything():
    one = np.tile([0, 1], 100)
    assert information(np.stack([one, one ^ LABELS], 1), LABELS[None])[0] == pytest.approx([0, 0], abs=1e-6)
    assert pair(one, one ^ LABELS) == pytest.approx(LOG2, abs=0.01)


def test_a_copy_is_redundancy_by_all_that_it_knows():
    half = np.where(np.arange(200) % 100 < 50, LABELS, 2)
    assert pair(LABELS, LABELS) == pytest.approx(-LOG2, abs=1e-6)
    assert pair(half, half) == pytest.approx(-mutual(half.tolist(), LABELS.tolist()), abs=0.01)


def test_a_copy_that_knows_nothing_of_the_label_is_found_by_the_conditional_alone():
    word = np.tile(np.arange(4), 50)
    assert pair(word, word) == pytest.approx(0, abs=0.01)
    assert pair(word, word, conditional) == pytest.approx(np.log(4), abs=0.05)


@pytest.mark.parametrize("codes", [2, 8, 16])
def test_noise_beside_what_knows_the_label_is_not_redundant(codes):
    """Less the mean under permuted labels alone, it would be, by -0.3 nats for sixteen codes."""
    labels = np.repeat([1, 0], 200)
    found = []
    for seed in range(8):
        one, other = noise(codes // 2, codes, seed=seed, n=400).T
        found.append(pair(one + codes // 2 * labels, other, labels=labels))
    assert np.mean(found) == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("score", PAIR_SCORES)
def test_independent_codes_score_nothing_on_average(score):
    values = noise(*[4] * 20)
    found = PAIR_SCORES[score](values, LABELS, np.arange(20), 100, 0)
    assert found[0].mean() == pytest.approx(0, abs=0.003)
    np.testing.assert_allclose(found[1:].mean(0), 0, atol=1e-9)


@pytest.mark.parametrize("score", PAIR_SCORES)
def test_a_part_of_one_code_scores_nothing(score):
    found = PAIR_SCORES[score](noise(1, 6, 1, 9), LABELS, FREE, 20, 0)
    writers, readers = pairs_of(FREE)
    dull = np.isin(writers, [0, 2]) | np.isin(readers, [0, 2])
    np.testing.assert_allclose(found[:, dull], 0, atol=1e-6)
    judged = judge_pairs(found[None], 0.05)
    assert (judged.p[dull] == 1).all()
    assert (judged.values[dull] == 0).all()
    assert not judged.selected[dull].any()


def test_codes_that_name_each_example_know_nothing():
    names = np.arange(200)
    assert pair(names, names) == 0


@pytest.mark.parametrize("score", PAIR_SCORES)
def test_one_permutation_serves_all_pairs(score):
    """Node 3 is node 1 again: beside node 0 both have the same draws, in the midst of other pairs."""
    one, other = noise(4, 5).T
    nodes = np.array([0, 1, 0, 3])
    found = PAIR_SCORES[score](np.stack([one, other, other + one, other], 1), LABELS, nodes, 20, 0)
    pairs = list(zip(*pairs_of(nodes), strict=True))
    np.testing.assert_allclose(found[:, pairs.index((0, 1))], found[:, pairs.index((0, 3))], atol=1e-12)
    assert found[1:, 0].std() > 0


@pytest.mark.parametrize("score", PAIR_SCORES)
def test_p_values_are_even_where_there_is_nothing(score):
    values = noise(*np.tile([2, 4, 9], 10))
    judged = judge_pairs(PAIR_SCORES[score](values, LABELS, np.arange(30), 100, 0)[None], 0.05)
    for level in (0.05, 0.2, 0.5):
        assert (judged.p <= level).mean() == pytest.approx(level, abs=0.06)
    assert judged.selected.mean() < 0.01


def test_what_is_planted_is_found_among_many():
    values = noise(*[6] * 30)
    values[:, 3], values[:, 20] = np.tile([0, 1], 100), np.tile([0, 1], 100) ^ LABELS
    judged = judge_pairs(interaction(values, LABELS, np.arange(30), 200, 0)[None], 0.05)
    writers, readers = pairs_of(np.arange(30))
    found = [(int(writers[at]), int(readers[at])) for at in np.flatnonzero(judged.selected)]
    assert (3, 20) in found
    assert len(found) <= 3


def test_the_best_place_counts_by_magnitude_and_is_held_against_the_best():
    rng = np.random.default_rng(0)
    found = rng.normal(0, 0.1, (2, 101, 50))
    found[0, 0, 0], found[1, 0, 0] = 0.2, -3.0
    judged = judge_pairs(found, 0.05)
    assert judged.values[0] == -3
    assert judged.p[0] == pytest.approx(1 / 5001)
    assert judged.selected.tolist() == [True] + [False] * 49
    assert judged.p[1:].mean() == pytest.approx(0.5, abs=0.1)


def test_only_those_among_which_we_look_can_stand_out():
    found = np.random.default_rng(0).normal(0, 0.1, (1, 101, 50))
    found[0, 0, :2] = 3
    among = np.arange(50) > 0
    judged = judge_pairs(found, 0.05, among)
    assert judged.selected.tolist() == [False, True] + [False] * 48
    np.testing.assert_array_equal(judged.p[among], judge_pairs(found[:, :, among], 0.05).p)
    assert judged.values[0] == 3


def test_labels_must_be_pairs():
    with pytest.raises(CircuitError, match="not pairs of 1 and 0"):
        joint_information(noise(2, 3), np.tile([1, 0], 100)[None], np.array([0, 1]))


def test_a_misspelt_score_is_told_the_nearest():
    with pytest.raises(CircuitError, match="there are interaction, conditional. Did you mean 'interaction'"):
        known_pair_score("interactoin")
