"""Information, permutations and cuts, against definitions and known answers."""

import numpy as np
import pytest

from circuits.code_statistics import (
    beyond_chance,
    check_test,
    columns_of,
    false_discovery_rates,
    information,
    otsu,
    permuted_labels,
    share_changed,
    unique_to_positives,
)
from circuits.statistics import auroc
from mechinterp.errors import CircuitError

RNG = np.random.default_rng(0)
LABELS = np.repeat([1, 0], 20)


def by_definition(codes: np.ndarray, labels: np.ndarray) -> float:
    total = 0.0
    for code in set(codes.tolist()):
        for label in set(labels.tolist()):
            both = ((codes == code) & (labels == label)).mean()
            if both:
                total += both * np.log(both / ((codes == code).mean() * (labels == label).mean()))
    return total


@pytest.mark.parametrize("n_classes", [2, 4])
def test_information_is_its_definition(n_classes):
    values, labels = RNG.integers(0, 5, (40, 7)), RNG.integers(0, n_classes, 40)
    draws = np.concatenate([labels[None], permuted_labels(labels, 5, seed=1)])
    expected = [[by_definition(values[:, part], draw) for part in range(7)] for draw in draws]
    np.testing.assert_allclose(information(values, draws), expected, atol=1e-5)


def test_information_of_what_tells_all_something_and_nothing():
    copies, noise, half = LABELS, np.tile([0, 1], 20), np.where(np.arange(40) < 10, 1, 0)
    found = information(np.stack([copies, copies + 7, noise, np.zeros(40, int), half], 1), LABELS[None])[0]
    expected = [np.log(2), np.log(2), 0, 0, by_definition(half, LABELS)]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_counts_are_sets_of_codes():
    values = RNG.integers(0, 9, (40, 6))
    expected = [len(set(part[LABELS == 1].tolist()) - set(part[LABELS == 0].tolist())) for part in values.T]
    assert unique_to_positives(values, LABELS[None])[0].tolist() == expected


def test_permutations_within_pairs_only_swap():
    draws = permuted_labels(LABELS, 50, seed=0, paired=True)
    assert draws.shape == (50, 40)
    assert (draws[:, :20] + draws[:, 20:] == 1).all()
    assert 0.4 < draws[:, :20].mean() < 0.6
    free = permuted_labels(LABELS, 50, seed=0)
    assert (free.sum(1) == 20).all()
    assert not (free[:, :20] + free[:, 20:] == 1).all()


def test_pairs_need_two_halves():
    with pytest.raises(CircuitError, match="41 examples cannot be pairs"):
        permuted_labels(np.zeros(41, int), 3, seed=0, paired=True)


def test_one_label_tells_nothing():
    with pytest.raises(CircuitError, match="all 40 examples have the label 1"):
        information(np.zeros((40, 2), int), np.ones((1, 40), int))


def test_many_codes_tell_labels_apart_by_chance_alone_and_that_is_taken_off():
    rng = np.random.default_rng(3)
    noise = np.stack([rng.integers(0, n, 40) for n in (2, 8, 30) for _ in range(40)], 1)
    draws = permuted_labels(LABELS, 400, seed=0, paired=True)
    observed = information(noise, LABELS[None])[0]
    values, p = beyond_chance(observed, information(noise, draws))
    raw, corrected = (one.reshape(3, 40).mean(1) for one in (observed, values))
    assert raw[2] > 0.25 > 0.05 > raw[0]
    assert np.abs(corrected).max() < 0.02
    assert 0.3 < np.mean(p) < 0.7
    assert np.mean(p < 0.1) < 0.2


def test_the_count_follows_the_number_of_codes_and_information_the_label():
    """Section 4 of the published method's defects: a head of many codes has many that only positives use."""
    rng, labels = np.random.default_rng(4), np.repeat([1, 0], 100)
    is_wide, knows = rng.permutation(np.arange(144) < 72), rng.permutation(np.arange(144) < 26)
    values = rng.integers(0, np.where(is_wide, 60, 6), (200, 144))
    values = np.where(knows & (labels[:, None] == 1) & (rng.uniform(size=(200, 144)) < 0.5), 0, values)
    null = information(values, permuted_labels(labels, 60, seed=0, paired=True))
    corrected, _ = beyond_chance(information(values, labels[None])[0], null)
    count = unique_to_positives(values, labels[None])[0]
    assert auroc(count, is_wide) > 0.9 > 0.6 > auroc(count, knows)
    assert auroc(corrected, knows) > 0.99
    assert 0.4 < auroc(corrected[~knows], is_wide[~knows]) < 0.6


def test_p_values_count_draws():
    values, p = beyond_chance(np.array([1.0, 0.5]), np.array([[0.0, 0.5], [0.2, 0.7], [0.1, 0.0]]))
    np.testing.assert_allclose(values, [0.9, 0.1])
    np.testing.assert_allclose(p, [1 / 4, 3 / 4])


def test_false_discovery_rates_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    p = np.random.default_rng(5).uniform(size=30) ** 3
    np.testing.assert_allclose(false_discovery_rates(p), stats.false_discovery_control(p))


def test_otsu_finds_the_gap():
    assert otsu(np.array([0.1, 0.0, 0.2, 5.0, 5.2])) == pytest.approx(2.6)
    assert otsu(np.array([3.0, 3.0])) == 3.0
    values = np.random.default_rng(6).uniform(size=25)
    within = [np.var(values[values <= cut]) * (values <= cut).sum() + np.var(values[values > cut]) * (values > cut).sum()
              for cut in np.sort(values)[:-1]]  # fmt: skip
    ranked = np.sort(values)
    best = int(np.argmin(within))
    assert ranked[best] < otsu(values) < ranked[best + 1]


def test_pairs_whose_codes_differ():
    values = np.array([[0, 1], [0, 1], [1, 1], [0, 1]])
    assert share_changed(values).tolist() == [0.5, 0.0]


def test_columns_belong_to_parts():
    hot, owner = columns_of(np.array([[3, 0], [5, 0], [3, 0]]))
    assert hot.tolist() == [[1, 0, 1], [0, 1, 1], [1, 0, 1]]
    assert owner.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_permutations": 0, "level": 0.05}, "n_permutations=0 says nothing of chance"),
        ({"n_permutations": -3, "level": 0.05}, "Give at least 1"),
        ({"n_permutations": 9, "level": 2.0}, "level=2.0 is no rate"),
        ({"n_permutations": 9, "level": float("nan")}, "between 0 and 1"),
    ],
)
def test_a_test_needs_permutations_and_a_level(given, message):
    with pytest.raises(CircuitError, match=message):
        check_test(**given)
