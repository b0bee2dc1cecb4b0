"""Codes as a method: what cannot know scores nothing, what knows is found, and the control stands beside."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from circuits import Scores, discover
from circuits.coding import Examples, coded, examples_of
from circuits.discovery.code_scores import CODE_SCORES, judge
from circuits.discovery.codes import codes
from mechinterp.errors import CircuitError, SAEError
from mechinterp.store import ActivationStore
from saes.code_rows import Written
from saes.codes import CodeSettings

FEW = {"n_train": 6, "steps": 60, "n_permutations": 100, "d_sae": 6}
KNOWING = (1, 5)


@pytest.fixture
def task(plain, make_task):
    return make_task(plain, n_prompts=30)


@pytest.fixture
def at_start(task):
    """The same prompts, with a name for a position before anything that differs."""
    start = torch.ones(30, dtype=torch.int64)
    return replace(task, prompts=replace(task.prompts, positions={"start": start, "END": task.prompts.end}))


def planted(model, task, strength: float = 3.0) -> Examples:
    """Random rows; two heads lean one way on clean prompts and the other way on corrupted ones."""
    real = examples_of(model, task, "END", n_train=6, mlps=False)
    rows = torch.randn(real.written.heads.shape, generator=torch.Generator().manual_seed(0))
    rows[:, :30, KNOWING, 0] += strength
    rows[:, 30:, KNOWING, 0] -= strength
    return replace(real, written=Written(rows, None))


def test_before_anything_differs_no_code_knows_anything(plain, at_start):
    for score in ("information", "change", "count"):
        scores = codes(plain, at_start, score=score, positions="start", **FEW)
        assert not scores.values.any()
        assert scores.settings["selected"] == []
        assert set(scores.settings.get("p", {"": 1.0}).values()) == {1.0}


def test_heads_that_know_are_found_and_no_others(plain, task):
    examples = planted(plain, task)
    for score in ("information", "change"):
        found = judge(CODE_SCORES[score], coded(examples, CodeSettings(n_train=6, steps=100)), 1000, 0.05, seed=0)
        assert set(np.argsort(-found.values)[:2]) == set(KNOWING)
    information = judge(CODE_SCORES["information"], coded(examples, CodeSettings(n_train=6, steps=100)), 1000, 0.05, seed=0)
    assert [examples.parts.index(part) for part in information.selected] == list(KNOWING)
    assert 0.4 < information.values[list(KNOWING)].min() <= information.values.max() <= np.log(2)


def test_where_no_head_knows_none_is_selected(plain, task):
    examples = planted(plain, task, strength=0.0)
    selected = [
        judge(
            CODE_SCORES["information"], coded(examples, CodeSettings(n_train=6, steps=30, seed=seed)), 400, 0.05, seed
        ).selected
        for seed in range(10)
    ]
    assert sum(map(bool, selected)) <= 2


def test_of_several_positions_each_part_counts_where_it_changes_most(plain, at_start):
    both, end, start = (
        codes(plain, at_start, score="change", positions=at, **FEW) for at in (("start", "END"), "END", "start")
    )
    np.testing.assert_array_equal(both.values, np.maximum(end.values, start.values))
    assert both.settings["positions"] == ["start", "END"]


def test_what_is_counted_was_not_trained_on(plain, task):
    examples = examples_of(plain, task, "END", n_train=6, seed=3)
    trained_pairs = set((examples.training % 30).tolist())
    assert len(examples.training) == 6
    assert (examples.training < 30).sum() == 3
    assert trained_pairs.isdisjoint(examples.counted.tolist())
    assert len(trained_pairs) + len(examples.counted) == 30
    assert codes(plain, task, **FEW).settings["n_counted"] == 2 * 27


def test_scores_are_those_of_any_method(plain, task, tmp_path):
    scores = discover(plain, task, "codes", allow_unsolved=True, **FEW)
    assert (scores.items, scores.unit, scores.method) == ("node", "nats", "codes")
    assert scores.values[0] == 0  # the input is not coded
    assert (scores.values >= 0).all()
    assert scores.values.max() <= np.log(2)
    assert scores.top(3).n_edges_kept > 0
    scores.save(tmp_path / "scores.json")
    assert Scores.load(tmp_path / "scores.json") == scores


def test_the_control_stands_beside(plain, task):
    scores = codes(plain, task, score="change", **FEW)
    control, untrained = scores.settings["untrained"], coded(
        examples_of(plain, task, "END", 6), CodeSettings(n_train=6, steps=60, d_sae=6, trained=False)
    )  # fmt: skip
    changed = judge(CODE_SCORES["change"], untrained, 100, 0.05, 0).values
    np.testing.assert_allclose(list(control["values"].values()), changed, rtol=1e-5)
    assert list(control["values"]) == [str(part) for part in untrained.examples.parts]
    assert -1 <= control["rank_correlation"] <= 1
    assert {"l0", "silent", "codes_a_part", "n_train", "d_sae", "seed"} <= set(scores.settings)


def test_the_same_seed_gives_the_same_scores_and_a_store_changes_none(plain, task, tmp_path):
    one, same, other = (codes(plain, task, seed=seed, **FEW) for seed in (0, 0, 1))
    stored = codes(plain, task, store=ActivationStore(tmp_path), **FEW)
    assert one == same == stored
    assert one != other


def test_the_answer_is_asked_of_clean_prompts_alone(plain, task):
    examples = planted(plain, task, strength=0.0)
    answers = task.prompts.answer % 3
    rows = examples.written.heads.clone()
    rows[:, :30, 4] += 4 * torch.eye(5)[answers]
    few = task.prompts.candidates.clone()
    few[:, 0] = answers
    examples = replace(examples, written=Written(rows, None), task=replace(task, prompts=replace(task.prompts, candidates=few)))
    found = judge(CODE_SCORES["answer"], coded(examples, CodeSettings(n_train=6, steps=100)), 400, 0.05, seed=0)
    assert found.values.argmax() == 4


def test_wrong_input_is_told(plain, task, at_start, make_task):
    with pytest.raises(CircuitError, match=r"no score 'informtion'.*Did you mean 'information'"):
        codes(plain, task, score="informtion")
    with pytest.raises(SAEError, match=r"no position 'S2'; there are start, END, mean"):
        codes(plain, at_start, positions="S2", **FEW)
    with pytest.raises(SAEError, match=r"3 positive examples cannot train on 3.*Give 5 or more"):
        codes(plain, make_task(plain, n_prompts=3), **FEW)
    with pytest.raises(SAEError, match=r"1 positive examples cannot train"):
        codes(plain, make_task(plain, n_prompts=1), n_train=2)
    same = replace(task, prompts=replace(task.prompts, clean=task.prompts.clean[:1].repeat(30, 1),
                                         corrupted=task.prompts.clean[:1].repeat(30, 1),
                                         end=task.prompts.end[:1].repeat(30)))  # fmt: skip
    with pytest.raises(SAEError, match="no part writes anything different"):
        codes(plain, same, **FEW)


@pytest.mark.parametrize("settings", [{"k": 2}, {"architecture": "relu", "sparsity": 0.1}, {"positions": "mean"}])
def test_every_way_of_coding_gives_scores(plain, task, settings):
    scores = codes(plain, task, **(FEW | settings))
    assert np.isfinite(scores.values).all()
    assert len(scores.settings["untrained"]["values"]) == 12
