"""What is refused before anything is computed, and that each refusal names its remedy."""

from dataclasses import replace

import numpy as np
import pytest

from circuits import discover, evaluate
from circuits.solving import fitness
from mechinterp.errors import CircuitError, TaskError
from mechinterp.models.compiled import COMPILED


@pytest.fixture(scope="module")
def planted():
    return COMPILED["induction"](n_prompts=8)


def with_metric(task, metric):
    return replace(task, metric=metric, metric_name="mine")


def test_a_task_that_the_model_does_is_measured(planted):
    found = fitness(planted.model, planted.task)
    assert found.accuracy == 1
    assert (found.clean > found.corrupted).all()
    assert len(found.clean) == len(planted.task)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda logits, _: logits.mean(), r"one number a prompt.*drop \.mean\(\)"),
        (lambda logits, _: logits[:, :3], r"one number a prompt, 8 here, and gave shape \(8, 3\)"),
        (lambda logits, _: 1.5, r"gave float"),
        (lambda logits, _: logits[:, 0] * float("nan"), r"not finite on 16 of 16.*float32"),
        (lambda logits, _: logits[:, 0] * 0 + 2, r"is 2 on every prompt.*Use a metric of the answers' logits"),
    ],
)
def test_a_metric_that_says_nothing_is_refused(planted, metric, message):
    task = with_metric(planted.task, metric)
    with pytest.raises(TaskError, match=message):
        discover(planted.model, task, "eap")
    with pytest.raises(TaskError, match=message):
        evaluate(planted.model, task, discover(planted.model, planted.task, "eap").top(5))


def test_a_task_that_the_model_does_not_do_is_refused_unless_asked_for(planted):
    prompts = planted.task.prompts
    wrong = replace(planted.task, prompts=replace(prompts, roles=-prompts.roles))
    with pytest.raises(TaskError, match=r"does not do 'induction'.*in 0% of 8 clean prompts.*allow_unsolved=True"):
        discover(planted.model, wrong, "eap")
    scores = discover(planted.model, wrong, "eap", allow_unsolved=True)
    np.testing.assert_allclose(scores.values, -discover(planted.model, planted.task, "eap").values)
    with pytest.raises(TaskError, match="does not do"):
        evaluate(planted.model, wrong, scores.top(5))
    assert evaluate(planted.model, wrong, scores.top(5), allow_unsolved=True).faithfulness == pytest.approx(1, abs=1e-3)


def test_corrupted_prompts_that_equal_the_clean_ones_are_refused(planted):
    prompts = planted.task.prompts
    same = replace(planted.task, prompts=replace(prompts, corrupted=prompts.clean))
    with pytest.raises(TaskError, match=r"equals its clean one.*another corruption"):
        discover(planted.model, same, "eap")


def test_a_mistyped_setting_is_named_with_those_that_there_are(planted):
    with pytest.raises(CircuitError, match=r"'eap-ig' has no setting 'step'; it has steps.*Did you mean 'steps'"):
        discover(planted.model, planted.task, "eap-ig", step=3)
    with pytest.raises(CircuitError, match=r"'eap' has no setting 'steps'"):
        discover(planted.model, planted.task, "eap", steps=3)
