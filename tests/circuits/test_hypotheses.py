"""Hypothesis tests: exact where chances can be counted, fair where nothing is there, and right about planted circuits."""

from dataclasses import asdict, replace
from itertools import permutations
from math import comb

import numpy as np
import pytest

from circuits.graph import Circuit
from circuits.hypotheses import (
    equivalence_test,
    hypothesis_tests,
    independence_test,
    minimality_test,
    partial_necessity_test,
    sufficiency_test,
)
from circuits.nulls import (
    binomial,
    circuits_of_paths,
    equivalence_p_value,
    hsic,
    independence_p_value,
    inflations,
    quantile_p_value,
)
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError
from mechinterp.metrics import METRICS
from mechinterp.models.compiled import COMPILED, Planted


@pytest.fixture(scope="module", params=COMPILED)
def planted(request) -> Planted:
    return COMPILED[request.param](n_prompts=12)


@pytest.fixture(scope="module")
def induction() -> Planted:
    return COMPILED["induction"](n_prompts=24)


def truth(planted: Planted) -> np.ndarray:
    return np.isin(Wiring.of(planted.model.config).edge_names, list(planted.circuit_edges))


def as_circuit(planted: Planted, kept: np.ndarray) -> Circuit:
    return Wiring.of(planted.model.config).circuit(kept)


def whole(model) -> Circuit:
    wiring = Wiring.of(model.config)
    return wiring.circuit(np.ones(wiring.n_edges, bool))


@pytest.mark.parametrize(("n", "p"), [(1, 0.3), (10, 0.5), (57, 0.9), (400, 0.6)])
def test_binomial_chances_are_ways_times_powers(n, p):
    chances = binomial(n, p)
    assert chances.sum() == pytest.approx(1)
    np.testing.assert_allclose(chances, [comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)], rtol=1e-9)


def test_p_values_that_can_be_counted_by_hand():
    assert equivalence_p_value(10, 10, 0.0) == pytest.approx(2 / 1024)
    assert equivalence_p_value(5, 10, 0.0) == pytest.approx(1)
    assert equivalence_p_value(1, 10, 0.0) == equivalence_p_value(9, 10, 0.0) == pytest.approx(22 / 1024)
    assert equivalence_p_value(9.5, 10, 0.0) == pytest.approx(2 / 1024)  # nothing lies between 9.5 and 10 of 10
    assert equivalence_p_value(10, 10, 0.1) == pytest.approx(0.6**10 + 0.4**10)
    assert quantile_p_value(100, 100, 0.9, more=True) == pytest.approx(0.9**100)
    assert quantile_p_value(0, 100, 0.9, more=False) == pytest.approx(0.1**100)
    assert quantile_p_value(7, 20, 0.3, more=True) + quantile_p_value(6, 20, 0.3, more=False) == pytest.approx(1)


def test_a_wider_epsilon_rejects_less():
    p_values = [equivalence_p_value(40, 50, epsilon) for epsilon in (0.0, 0.05, 0.1, 0.2, 0.3)]
    assert p_values == sorted(p_values)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_equivalence_rejects_as_often_as_it_says_where_the_null_just_holds(epsilon):
    """All counts with their chances: no sampling. Counts are coarse, so that 5 % cannot always be reached."""
    n = 200
    p_values = np.array([equivalence_p_value(k, n, epsilon) for k in range(n + 1)])
    for alpha in (0.01, 0.05, 0.2, 0.5):
        for p in (0.5, 0.5 + epsilon, 0.5 - epsilon):
            assert binomial(n, p)[p_values <= alpha].sum() <= alpha + 1e-12
        assert binomial(n, 0.5 + epsilon)[p_values <= alpha].sum() > 0.5 * alpha


@pytest.mark.parametrize("more", [True, False])
def test_the_quantile_test_rejects_as_often_as_it_says(more):
    """A circuit that just beats 90 % of random ones, against 100 random ones; effects drawn evenly."""
    beaten = (np.random.default_rng(0).random((4000, 100)) < 0.9).sum(1)
    p_values = np.array([quantile_p_value(int(k), 100, 0.9, more=more) for k in beaten])
    for alpha in (0.05, 0.2, 0.5):
        assert 0.4 * alpha < (p_values <= alpha).mean() < alpha + 0.02


def test_hsic_is_its_definition():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=9), rng.normal(size=9)

    def kernel(values):
        distances = [abs(a - b) for i, a in enumerate(values) for b in values[i + 1 :]]
        return np.array([[np.exp(-((a - b) ** 2) / (2 * np.median(distances) ** 2)) for b in values] for a in values])

    K, L, n = kernel(x), kernel(y), 9
    H = np.eye(n) - 1 / n
    assert hsic(x, y) == pytest.approx(np.trace(K @ H @ L @ H) / (n - 1) ** 2)
    four = sum(K[i, j] * L[q, r] for i in range(n) for j in range(n) for q in range(n) for r in range(n)) / n**4
    three = sum(K[i, j] * L[i, q] for i in range(n) for j in range(n) for q in range(n)) / n**3
    assert hsic(x, y) == pytest.approx(((K * L).mean() + four - 2 * three) * n**2 / (n - 1) ** 2)


def test_the_permutation_p_value_nears_that_of_all_orders():
    rng = np.random.default_rng(2)
    x = rng.normal(size=6)
    y = x + rng.normal(size=6)
    every = np.mean([hsic(x, y[list(order)]) >= hsic(x, y) * (1 - 1e-9) for order in permutations(range(6))])
    _, p_value = independence_p_value(x, y, n_permutations=3000)
    assert p_value == pytest.approx(every, abs=0.03)


def test_independence_is_fair_to_independent_scores_and_sees_what_no_correlation_does():
    rng = np.random.default_rng(3)
    p_values = np.array([independence_p_value(rng.normal(size=20), rng.normal(size=20), 99, seed)[1] for seed in range(300)])
    for alpha in (0.05, 0.2, 0.5, 0.8):
        assert (p_values <= alpha).mean() == pytest.approx(alpha, abs=0.07)
    x = rng.normal(size=80)
    assert independence_p_value(x, x**2 - 1)[1] < 0.01
    assert independence_p_value(x, x)[0] == pytest.approx(1)
    assert independence_p_value(x, 1e-6 * x + 5)[0] == pytest.approx(1)  # each kernel has a width of its own


@pytest.mark.parametrize("n_groups", [None, 1])
def test_an_inflated_circuit_has_a_path_more_and_loses_an_edge_of_it(n_groups):
    wiring = Wiring(n_layers=3, n_heads=2, n_key_value_heads=n_groups)
    kept = np.random.default_rng(4).random(wiring.n_edges) < 0.3
    inflated, brought = inflations(wiring, kept, 20, seed=0)
    for mask, edge in zip(inflated, brought, strict=True):
        assert (mask >= kept).all()
        assert mask[edge]
        assert not kept[edge]
        added = wiring.circuit(mask & ~kept | np.isin(np.arange(wiring.n_edges), np.flatnonzero(kept)))
        assert added.n_edges_kept <= kept.sum() + 2 * wiring.n_layers + 1
        assert wiring.circuit(mask).pruned().has_edge(*wiring.edges[edge])
    assert inflations(wiring, np.ones_like(kept), 5, seed=0) is None


@pytest.mark.parametrize("n_groups", [None, 1])
def test_circuits_of_paths_keep_to_their_edges_and_lie_on_paths(n_groups):
    wiring = Wiring(n_layers=3, n_heads=2, n_key_value_heads=n_groups)
    among = np.random.default_rng(5).random(wiring.n_edges) < 0.5
    masks = circuits_of_paths(wiring, among, 15, 5, seed=0)
    assert not (masks & ~among).any()
    for mask in masks:
        assert 15 <= mask.sum() < 15 + 2 * wiring.n_layers + 1
        assert wiring.circuit(mask).pruned().n_edges_kept == mask.sum()
    most = wiring.circuit(among).pruned().n_edges_kept
    with pytest.raises(CircuitError, match=f"only {most} of these edges lie on a path"):
        circuits_of_paths(wiring, among, most + 1, 1, seed=0)


def test_the_whole_model_is_equivalent_to_itself_and_leaves_nothing(plain, make_task):
    found = {test.name: test for test in hypothesis_tests(plain, make_task(plain), whole(plain), n_random=3)}
    assert found["equivalence"].p_value == found["independence"].p_value == 1
    assert found["equivalence"].effect == 0.5
    assert found["sufficiency"].effect == 1
    assert (found["minimality"].p_value, found["minimality"].passed) == (None, None)
    assert "nothing inflates it" in str(found["minimality"])


def test_what_the_ablation_alone_says_of_the_model_is_not_held_against_a_circuit(plain, make_task):
    """A metric that reads the prompt: with every edge cut it still goes along with the model's score."""

    def with_difficulty(logits, prompts):
        return METRICS["logit_diff"](logits, prompts) + prompts.clean[:, 0] * 100.0

    task = replace(make_task(plain, n_prompts=40), metric=with_difficulty)
    assert independence_test(plain, task, whole(plain)).p_value == 1
    assert independence_test(plain, task, whole(plain), beyond_nothing=False).p_value < 0.01


def test_a_planted_circuit_passes_every_test(planted):
    """Random circuits of the model may share the one edge that breaks everything: those outside cannot."""
    given = planted.model, planted.task, as_circuit(planted, truth(planted))
    *tests, _ = hypothesis_tests(*given, n_random=60)
    assert [test.name for test in tests if not test.passed] == []
    assert partial_necessity_test(*given, n_random=60, outside=True).effect == 1


def test_edges_that_were_added_for_nothing_are_named_and_no_others(planted):
    kept = truth(planted)
    added = np.random.default_rng(0).choice(np.flatnonzero(~kept), 20, replace=False)
    kept[added] = True
    test = minimality_test(planted.model, planted.task, as_circuit(planted, kept), n_random=60)
    assert not test.passed
    assert set(test.named) == {Wiring.of(planted.model.config).edge_names[edge] for edge in added}
    assert test.effect == pytest.approx(20 / kept.sum())


def test_an_edge_left_out_can_be_told(induction):
    for edge in np.flatnonzero(truth(induction)):
        kept = truth(induction)
        kept[edge] = False
        circuit = as_circuit(induction, kept)
        assert not equivalence_test(induction.model, induction.task, circuit).passed


def test_the_model_without_the_circuit_is_seen_to_depend_on_the_model():
    """A circuit that lacks one of two movers: the other one still does the task outside it, prompt by prompt."""
    movers = COMPILED["indirect-object"](n_prompts=40)
    weighed = replace(
        movers.task,
        metric=lambda logits, prompts: METRICS["logit_diff"](logits, prompts) * (1 + prompts.candidates[:, 0]),
    )
    wiring = Wiring.of(movers.model.config)
    late = wiring.circuit(wiring.edge_names == np.array(f"{movers.roles['late_mover']}->logits"))
    test = independence_test(movers.model, weighed, late)
    assert not test.passed
    assert test.effect > 0.3
    assert independence_test(movers.model, weighed, as_circuit(movers, truth(movers))).passed


def test_random_circuits_of_any_size_can_be_the_reference(induction):
    circuit = as_circuit(induction, truth(induction))
    small = sufficiency_test(induction.model, induction.task, circuit, size=0.1, n_random=40)
    assert small.settings["size"] == 11
    assert small.passed
    everything = partial_necessity_test(induction.model, induction.task, circuit, size=110, n_random=5)
    assert not everything.passed  # nothing can be lost that is worse than all
    outside = partial_necessity_test(induction.model, induction.task, circuit, size=20, outside=True, n_random=40)
    assert outside.passed
    assert outside.effect == 1
    assert "40 of 40 random circuits of 20 edges" in str(outside)


def test_a_random_circuit_does_not_pass_for_a_good_one(induction):
    wiring = Wiring.of(induction.model.config)
    idle = np.flatnonzero(~truth(induction))[:10]
    circuit = wiring.circuit(np.isin(np.arange(wiring.n_edges), idle))
    tests = {test.name: test for test in hypothesis_tests(induction.model, induction.task, circuit, n_random=30)}
    assert not any(tests[name].passed for name in ("equivalence", "minimality", "partial necessity"))


def test_tests_repeat_with_the_seed_and_are_plain_data(induction):
    circuit = as_circuit(induction, truth(induction))
    first, again = (hypothesis_tests(induction.model, induction.task, circuit, n_random=5, seed=1) for _ in range(2))
    assert first == again
    assert asdict(first[0])["settings"]["epsilon"] == 0.1
    assert [test.settings["seed"] for test in first] == [1] * 5


def test_settings_that_mean_nothing_are_refused(plain, make_task):
    task, circuit = make_task(plain), whole(plain)
    with pytest.raises(CircuitError, match="epsilon=0.5 must be at least 0 and below 0.5"):
        equivalence_test(plain, task, circuit, epsilon=0.5)
    with pytest.raises(CircuitError, match="quantile=1.0 is a share: give a number between 0 and 1"):
        sufficiency_test(plain, task, circuit, quantile=1.0)
    with pytest.raises(CircuitError, match=r"size=2.0 have 344 edges; there must be 1 to 172"):
        sufficiency_test(plain, task, circuit, size=2.0)
