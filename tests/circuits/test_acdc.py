"""ACDC against the plain loop that it replaces: one run of the whole circuit for each edge, one decision after another.

The loop itself runs once. Everywhere else its *path* is replayed: the circuits that it would visit if it decided as we
did, all measured in one stack. If every decision on that path follows the rule, then by induction it is the loop's path.
"""

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch

from circuits.ablation import replacement_for
from circuits.discovery.acdc import ORDERS, acdc, readers_in_order, writers_in_order
from circuits.running import measure_circuits, run_circuits
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError, TaskError
from mechinterp.metrics import kl_divergence
from mechinterp.models.compiled import COMPILED


def edges_in_order(wiring: Wiring, order: str) -> list[int]:
    pairs = ((writer, reader) for reader in readers_in_order(wiring) for writer in writers_in_order(wiring, reader, order))
    return [wiring.index(wiring.writers[writer], wiring.readers[reader]) for writer, reader in pairs]


def distances(model, task, circuits: np.ndarray, objective: str, ablation: str) -> np.ndarray:
    replaced = replacement_for(model, task, ablation).writes
    whole = run_circuits(model, task.prompts, np.ones_like(circuits[:1]), replaced)[0]
    measure = task.metric if objective == "metric" else lambda logits, _: kl_divergence(whole, logits)
    value = measure_circuits(model, task.prompts, circuits, replaced, [measure])[0].double().mean(1).numpy()
    return value if objective == "kl" else -value


def replayed(model, task, decisions, objective="kl", order: str = "published", ablation="resample") -> np.ndarray:
    """What each edge costs when it is tried, if the edges tried before it were kept or cut as in ``decisions``."""
    kept, path, edges = np.ones_like(decisions), [], edges_in_order(Wiring.of(model.config), order)
    for edge in edges:
        kept[edge] = False
        path.append(kept.copy())
        kept[edge] = decisions[edge]
    here, *then = distances(model, task, np.stack([np.ones_like(kept), *path]), objective, ablation)
    costs = np.zeros(len(kept))
    for edge, value in zip(edges, then, strict=True):
        costs[edge] = value - here
        here = here if decisions[edge] else value
    return costs


def is_the_plain_loop(model, task, threshold, *, signed=True, **settings) -> np.ndarray:
    found = acdc(model, task, threshold=threshold, signed=signed, **settings)
    kept = found.wiring.mask(found.above(threshold, signed=signed))
    costs = replayed(model, task, kept, **settings)
    np.testing.assert_allclose(found.values, costs, atol=1e-10)
    np.testing.assert_array_equal(kept, (costs if signed else np.abs(costs)) >= threshold)
    return kept


@pytest.fixture(scope="module", params=["plain", "olmo2"])
def small(request, make_model):
    """Heads by themselves, and heads that share everything that heads can share."""
    groups = {"n_key_value_heads": 1} if request.param == "olmo2" else {}
    return make_model(request.param, n_layers=2, n_heads=2, **groups)


def test_the_loop_itself_run_once(make_model, make_task):
    model = make_model(n_layers=2, n_heads=1)
    task, wiring = make_task(model), Wiring.of(model.config)
    kept, costs = np.ones(wiring.n_edges, dtype=bool), np.zeros(wiring.n_edges)
    (here,) = distances(model, task, kept[None], "kl", "resample")
    for edge in edges_in_order(wiring, "published"):
        kept[edge] = False
        (then,) = distances(model, task, kept[None], "kl", "resample")
        costs[edge] = then - here
        kept[edge] = costs[edge] >= 1e-3
        here = here if kept[edge] else then
    found = acdc(model, task, threshold=1e-3)
    np.testing.assert_allclose(found.values, costs, atol=1e-10)
    np.testing.assert_array_equal(found.wiring.mask(found.above(1e-3, signed=True)), kept)
    assert 0 < kept.sum() < len(kept)


def test_costs_and_circuit_are_those_of_the_plain_loop(model, make_task):
    kept = is_the_plain_loop(model, make_task(model), 1e-3)
    assert 0 < kept.sum() < len(kept)


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "metric"},
        {"objective": "metric", "signed": False},
        {"signed": False},
        {"order": "reverse"},
        {"order": "forward"},
        {"ablation": "mean"},
        {"ablation": "zero"},
    ],
    ids=str,
)
def test_every_setting_is_that_of_the_plain_loop(small, make_task, settings):
    kept = is_the_plain_loop(small, make_task(small, "prob_diff"), 1e-3, **settings)
    assert 0 < kept.sum() < len(kept)


@pytest.mark.parametrize("variant", ["plain", "attention_only", "parallel", "mpt"])
def test_models_of_one_head_and_prompts_that_differ_from_the_start_are_no_exception(make_model, make_task, variant):
    model = make_model(variant, n_layers=2, n_heads=1)
    is_the_plain_loop(model, make_task(model, changed=(0, 5)), 1e-3)


@pytest.mark.parametrize("objective", ["kl", "metric"])
@pytest.mark.parametrize("name", COMPILED)
def test_circuits_set_by_hand_are_those_of_the_plain_loop(name, objective):
    """The greedy circuit may be smaller than the truth, where two parts do the same, but holds nothing beside it."""
    planted = COMPILED[name](n_prompts=4)
    kept = is_the_plain_loop(planted.model.to(dtype=torch.float64), planted.task, 0.1, objective=objective)
    names = np.array(Wiring.of(planted.model.config).edge_names)
    assert set(names[kept]) <= planted.circuit_edges


def test_the_induction_circuit_is_found_whole():
    planted = COMPILED["induction"](n_prompts=8)
    scores = acdc(planted.model, planted.task, threshold=0.1)
    assert {name for name, cost in zip(scores.names, scores.values, strict=True) if cost >= 0.1} == planted.circuit_edges


def test_how_many_guesses_run_at_once_changes_nothing(small, make_task, monkeypatch):
    task = make_task(small)
    expected = acdc(small, task, threshold=1e-4).values
    for tokens in (1, 10**6):
        monkeypatch.setattr(import_module("circuits.discovery.acdc"), "TOKENS_AT_ONCE", tokens)
        monkeypatch.setattr(import_module("circuits.discovery.acdc"), "LOGITS_AT_ONCE", tokens)
        np.testing.assert_allclose(acdc(small, task, threshold=1e-4).values, expected, atol=1e-12)


def test_the_published_order_tries_the_latest_layer_first_and_its_mlp_before_its_heads():
    wiring = Wiring(n_layers=2, n_heads=2)
    orders = {
        order: [str(wiring.writers[w]) for w in writers_in_order(wiring, len(wiring.readers) - 1, order)] for order in ORDERS
    }
    assert orders["published"] == ["m1", "a1.h0", "a1.h1", "m0", "a0.h0", "a0.h1", "input"]
    assert orders["forward"] == orders["reverse"][::-1]
    assert orders["reverse"] == ["m1", "a1.h1", "a1.h0", "m0", "a0.h1", "a0.h0", "input"]


def test_scores_say_how_they_came_about(small, make_task):
    scores = acdc(small, make_task(small), threshold=1e-4, order="forward")
    assert (scores.method, scores.unit) == ("acdc", "kl_divergence")
    told = {name: scores.settings[name] for name in ("threshold", "objective", "order", "signed", "ablation")}
    assert told == {"threshold": 1e-4, "objective": "kl", "order": "forward", "signed": True, "ablation": "resample"}


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan"), float("inf")])
def test_a_threshold_that_decides_nothing_is_refused(plain, make_task, threshold):
    with pytest.raises(CircuitError, match="finite number above 0"):
        acdc(plain, make_task(plain), threshold=threshold)


def test_unknown_settings_are_refused_with_the_known_ones(plain, make_task):
    cases: list[tuple[dict[str, Any], str]] = [
        ({"objective": "kld"}, "objective must be one of kl, metric.*Did you mean 'kl'"),
        ({"order": "random"}, "order must be one of published, reverse, forward"),
    ]
    for unknown, told in cases:
        with pytest.raises(CircuitError, match=told):
            acdc(plain, make_task(plain), **unknown)


def test_an_objective_that_is_not_finite_is_refused(plain, make_task):
    task = make_task(plain)
    broken = type(task)(**{**vars(task), "metric": lambda logits, _: logits[:, 0] / 0})
    with pytest.raises(TaskError, match="not finite"):
        acdc(plain, broken, objective="metric")
