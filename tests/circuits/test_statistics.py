"""Numbers that can be worked out by hand, and scikit-free definitions to hold the fast ones against."""

import numpy as np
import pytest

from circuits.statistics import (
    auroc,
    average_precision,
    bootstrap_interval,
    may_be_zero,
    precision_recall_curve,
    random_circuits,
    ratio_of_means,
    roc_curve,
)
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    scores, truth = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.3
    above = scores[truth][:, None] - scores[~truth][None]
    assert auroc(scores, truth) == pytest.approx(((above > 0) + 0.5 * (above == 0)).mean())


def test_perfect_reversed_and_constant_rankings():
    truth = np.array([True, True, False, False, False])
    assert auroc(np.array([5.0, 4, 3, 2, 1]), truth) == average_precision(np.array([5.0, 4, 3, 2, 1]), truth) == 1
    assert auroc(np.array([1.0, 2, 3, 4, 5]), truth) == 0
    assert auroc(np.zeros(5), truth) == 0.5
    assert average_precision(np.zeros(5), truth) == pytest.approx(2 / 5)


def test_average_precision_by_hand():
    """Positives at ranks 1 and 3: (1/1 + 2/3) / 2."""
    assert average_precision(np.array([4.0, 3, 2, 1]), np.array([True, False, True, False])) == pytest.approx(5 / 6)


def test_a_ranking_needs_both_kinds():
    with pytest.raises(CircuitError, match="some are and some are not"):
        auroc(np.arange(3.0), np.ones(3, bool))


def test_a_constant_ratio_has_an_interval_of_no_width():
    whole = np.array([1.0, 2.0, 5.0])
    low, high = bootstrap_interval(0.8 * whole, whole)
    assert (low, high) == (pytest.approx(0.8), pytest.approx(0.8))


def test_the_interval_covers_the_ratio_and_narrows_with_prompts():
    rng = np.random.default_rng(1)
    widths = []
    for n in (20, 2000):
        whole, part = 1 + rng.random(n), rng.random(n)
        low, high = bootstrap_interval(part, whole)
        assert low < ratio_of_means(part, whole) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 5


@pytest.mark.parametrize("facts", [{}, {"parallel": True}, {"n_key_value_heads": 1}])
def test_every_edge_of_a_random_circuit_lies_on_a_path_from_input_to_logits(facts):
    wiring = Wiring(n_layers=3, n_heads=2, **facts)
    for n_edges in (1, 2, 10, wiring.n_edges):
        for mask in random_circuits(wiring, n_edges, 5, seed=3):
            circuit = wiring.circuit(mask)
            assert circuit.n_edges_kept == circuit.pruned().n_edges_kept == n_edges


def test_the_curves_enclose_their_areas():
    rng = np.random.default_rng(2)
    scores, truth = rng.integers(0, 9, 60).astype(float), rng.random(60) < 0.2
    false_positive, true_positive = roc_curve(scores, truth)
    assert (false_positive[0], true_positive[0], false_positive[-1], true_positive[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(true_positive, false_positive) == pytest.approx(auroc(scores, truth))
    precision, recall = precision_recall_curve(scores, truth)
    assert (precision[-1], recall[-1]) == (pytest.approx(truth.mean()), 1)


def test_a_gap_is_told_from_zero_only_when_it_can_be():
    rng = np.random.default_rng(3)
    assert may_be_zero(rng.normal(size=50))
    assert not may_be_zero(1 + rng.normal(size=50))


@pytest.mark.parametrize("n_groups", [None, 1])
def test_random_circuits_differ_from_each_other_and_repeat_with_the_seed(n_groups):
    wiring = Wiring(n_layers=2, n_heads=3, n_key_value_heads=n_groups)
    first = random_circuits(wiring, 12, 4, seed=0)
    assert len({mask.tobytes() for mask in first}) == 4
    np.testing.assert_array_equal(first, random_circuits(wiring, 12, 4, seed=0))
