"""What sinks do for a task: the plain run and the edited ones, prompt by prompt."""

import numpy as np
import pytest
import torch

import mechinterp as mi
from circuits.sinks import sink_effect
from mechinterp.errors import TaskError
from mechinterp.metrics import is_preferred
from mechinterp.models.compiled import indirect_object
from mechinterp.nodes import Node
from mechinterp.sinks import calibrate, find_sinks
from mechinterp.tasks import TASKS


@pytest.fixture(scope="module")
def builtin():
    return mi.load("builtin")


@pytest.fixture(scope="module")
def task(builtin):
    return TASKS["ioi"](builtin, 30)


def test_each_row_is_the_task_with_these_heads_calibrated(builtin, task):
    sinks = find_sinks(builtin, task)
    effect = sink_effect(builtin, task, ["a1.h5", "a3.h7"], sinks=sinks, keep=0.2, batch_size=7)
    assert effect.heads == (Node.parse("a1.h5"), Node.parse("a3.h7"))
    for row, heads in enumerate([[], ["a1.h5", "a3.h7"], ["a1.h5"], ["a3.h7"]]):
        edit = calibrate(heads, sinks.mask, keep=0.2)
        logits, _ = builtin.run(task.prompts.clean, patch=edit, logits_at=task.prompts.end)
        np.testing.assert_allclose(effect.metric[row], task.metric(logits, task.prompts).numpy(), rtol=1e-4, atol=1e-4)
        assert (effect.right[row] == is_preferred(logits, task.prompts).numpy()).all()
    mean, low, high = effect.together.metric_change
    assert mean == pytest.approx(effect.metric[1].mean() - effect.metric[0].mean())
    assert low < mean < high
    assert effect.together.heads == effect.heads


def test_keeping_all_changes_nothing(builtin, task):
    effect = sink_effect(builtin, task, keep=1.0)
    np.testing.assert_allclose(effect.metric, effect.metric[:1].repeat(len(effect.metric), 0), atol=1e-4)
    assert effect.together.accuracy_change == (0, 0, 0)


def test_heads_that_rest_are_chosen_and_a_mask_says_where(builtin, task):
    sinks = find_sinks(builtin, task)
    assert sink_effect(builtin, task).heads == sinks.heads()
    assert sink_effect(builtin, task, sinks=sinks.first).heads == sinks.heads(sinks.first)


def test_a_planted_head_without_its_place_to_rest_fires_where_it_should_not():
    """Names said once then seem to be said before. The second name points to the first: in ABBA, that inhibits the answer."""
    planted = indirect_object()
    sinks = find_sinks(planted.model, planted.task)
    effect = sink_effect(planted.model, planted.task, [planted.roles["duplicate"]], sinks=sinks.first, keep=0.0)
    assert effect.right[0].all()
    assert (effect.right[1] == planted.task.prompts.groups.numpy()).all()  # ABBA is group 0, BABA group 1
    assert effect.together.metric_change[2] < 0


def test_those_that_help_rise_above_nothing(builtin, task):
    effect = sink_effect(builtin, task)
    rows = {row.heads[0]: row for row in effect.alone}
    assert all((rows[head].metric_change[1] > 0) == (head in effect.helped) for head in effect.heads)
    sizes = [abs(row.metric_change[0]) for row in effect.alone]
    assert sizes == sorted(sizes, reverse=True)


def test_the_table_says_all_of_it(builtin, task):
    effect = sink_effect(builtin, task, ["a1.h5"])
    lines = str(effect).splitlines()
    assert lines[0] == "builtin on ioi, 30 prompts; attention on sinks times 0.4"
    assert [line.split("  ")[0] for line in lines[2:]] == ["none", "all of them", "a1.h5"]
    assert f"{effect.together.metric:.4f}" in lines[3]


def test_no_head_that_rests_is_said(builtin, task):
    nowhere = torch.zeros(4, 8, 30, task.prompts.clean.shape[1], dtype=torch.bool)
    with pytest.raises(TaskError, match="no head of builtin rests on a sink.*threshold=0.2"):
        sink_effect(builtin, task, sinks=nowhere)
