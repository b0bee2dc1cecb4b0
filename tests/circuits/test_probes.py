"""The linear probe: known answers, the same numbers by a plain loop, and nothing that units could change."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from circuits.coding import Examples, examples_of
from circuits.discovery.probes import areas, fitted, probe, roc_areas
from circuits.statistics import auroc
from mechinterp.errors import CircuitError, SAEError
from mechinterp.nodes import Node
from mechinterp.store import ActivationStore
from saes.code_rows import Written

N_PAIRS, TELLING, NOISE, CONSTANT = 40, 0, 1, 2


@pytest.fixture(scope="module")
def task(plain, make_task):
    return make_task(plain, n_prompts=N_PAIRS)


@pytest.fixture(scope="module")
def examples(plain, task) -> Examples:
    """The nine heads of three layers: the first tells clean from corrupted, the second is noise, the others are constant."""
    heads = torch.ones(1, 2 * N_PAIRS, 9, 5)
    heads[..., NOISE, :] = torch.randn(1, 2 * N_PAIRS, 5, generator=torch.Generator().manual_seed(3))
    heads[..., TELLING, :] += 0.1 * torch.randn(1, 2 * N_PAIRS, 5, generator=torch.Generator().manual_seed(4))
    heads[:, :N_PAIRS, TELLING, 0] += 3
    return replace(examples_of(plain, task, "END", 10, mlps=False), written=Written(heads, None))


def test_a_part_that_tells_has_the_whole_area_and_a_constant_one_half_of_it(examples):
    observed, null = areas(examples, 1.0, 50, 0)
    assert observed[0, TELLING] == 1
    assert (observed[0, CONSTANT:] == 0.5).all()
    assert abs(observed[0, NOISE] - 0.5) < 0.2
    assert null.shape == (1, 50, 9)
    assert (null[..., CONSTANT:] == 0.5).all()
    assert np.allclose(null.mean(1), 0.5, atol=0.05)


def test_neither_units_nor_origin_of_a_part_change_what_its_probe_tells(examples):
    moved = replace(examples, written=Written(1000 * examples.written.heads.double() + 7, None))
    observed, null = areas(examples, 1.0, 20, 0)
    again, null_again = areas(moved, 1.0, 20, 0)
    assert np.allclose(observed, again, atol=1e-9)
    assert np.allclose(null, null_again, atol=1e-9)


def test_it_is_ridge_regression_part_by_part():
    """The primal form, in the width of the part, where ours is as large as the examples are many."""
    rows = torch.randn(30, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    training, signs = torch.arange(0, 30, 3), torch.tensor([1.0, -1, 1, 1, -1, -1, 1, -1, 1, 1], dtype=torch.float64)
    told = fitted(rows, training, signs, 0.7)
    for part in range(3):
        mean = rows[training, part].mean(0)
        X = rows[:, part] - mean
        X = X / X[training].square().mean().sqrt()
        seen = X[training]
        w = torch.linalg.inv(seen.T @ seen + 0.7 * 8 * torch.eye(8, dtype=torch.float64)) @ seen.T @ (signs - signs.mean())
        assert torch.allclose(told[:, part], X @ w)


def test_areas_are_those_of_the_roc_curve_with_ties_at_half():
    values = torch.randint(5, (12, 4), generator=torch.Generator().manual_seed(1)).double()
    labels = torch.stack([torch.arange(12) % 2, torch.arange(12) // 6])
    found = roc_areas(values, labels).numpy()
    expected = [[auroc(values[:, part].numpy(), label.numpy() == 1) for part in range(4)] for label in labels]
    assert np.allclose(found, expected)


def test_scores_name_what_stands_out_and_how_it_was_found(plain, task, monkeypatch, examples):
    monkeypatch.setattr("circuits.discovery.probes.examples_of", lambda *_, **__: examples)
    scores = probe(plain, task, n_permutations=200)
    assert scores.items == "node"
    assert scores.method == "probe"
    assert scores.unit == "AUROC above chance"
    by_name = dict(zip(scores.names, scores.values, strict=True))
    assert by_name["input"] == 0
    assert by_name["a0.h2"] == 0
    assert 0.45 < by_name[str(Node("head", 0, TELLING))] <= 0.55
    assert scores.settings["selected"] == ["a0.h0"]
    assert scores.settings["p"]["a0.h0"] == pytest.approx(1 / 201, rel=1e-3)
    assert scores.settings["n_train"] == 10
    assert scores.settings["n_counted"] == 70


def test_a_model_is_probed_at_its_heads_and_mlps_and_a_store_changes_nothing(plain, task, tmp_path):
    scores = probe(plain, task, positions=["END", "mean"], n_permutations=20)
    assert len(scores.settings["p"]) == 12
    assert (scores.values >= 0).all()
    assert (scores.values <= 0.75).all()
    store = ActivationStore(tmp_path)
    for _ in range(2):
        again = probe(plain, task, positions=["END", "mean"], n_permutations=20, store=store)
        assert np.allclose(again.values, scores.values, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan")])
def test_a_probe_needs_a_ridge(examples, ridge):
    with pytest.raises(CircuitError, match=r"ridge=.*Give more than 0"):
        areas(examples, ridge, 2, 0)


def test_parts_that_all_write_the_same_are_refused(examples):
    still = replace(examples, written=Written(torch.ones(1, 2 * N_PAIRS, 9, 5), None))
    with pytest.raises(SAEError, match="no part writes anything different"):
        areas(still, 1.0, 2, 0)


def test_too_few_prompts_are_refused(plain, make_task):
    with pytest.raises(SAEError, match="cannot train on 5"):
        probe(plain, make_task(plain, n_prompts=6))


@pytest.mark.parametrize("n_train", [0, 1])
def test_a_probe_needs_an_example_of_each_kind(plain, task, n_train):
    with pytest.raises(SAEError, match="cannot hold a positive and a negative example"):
        probe(plain, task, n_train=n_train)
