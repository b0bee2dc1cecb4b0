"""Metrics against answers worked out by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from mechinterp.metrics import METRICS, is_preferred, is_top, kl_divergence, logit_diff, logit_diff_max, prob_diff
from mechinterp.prompts import PromptBatch

# Two prompts over a vocabulary of four. Prompt 0: answers 0 and 1, foil 2. Prompt 1: answer 3, foils 0 and 1.
CANDIDATES = torch.tensor([[0, 1, 2], [3, 0, 1]])
ROLES = torch.tensor([[1, 1, -1], [1, -1, -1]])
PROBABILITIES = torch.tensor([[0.1, 0.3, 0.2, 0.4], [0.2, 0.1, 0.2, 0.5]], dtype=torch.float64)
LOGITS = torch.tensor([[3.0, 5.0, 1.0, 9.0], [1.0, 4.0, 8.0, 2.0]])


@pytest.fixture(scope="module")
def prompts():
    clean, ends = torch.zeros(2, 3, dtype=torch.long), torch.tensor([2, 1])
    return PromptBatch(clean, clean + 1, ends, CANDIDATES, ROLES, torch.zeros(2, dtype=torch.long), {})


def test_logit_diff_is_mean_answer_minus_mean_foil(prompts):
    assert logit_diff(LOGITS, prompts).tolist() == [4 - 1, 2 - 2.5]


def test_logit_diff_max_takes_the_strongest_foil(prompts):
    assert logit_diff_max(LOGITS, prompts).tolist() == [4 - 1, 2 - 4]


def test_prob_diff_is_summed_probability_over_the_whole_vocabulary(prompts):
    assert_close(prob_diff(PROBABILITIES.log(), prompts), torch.tensor([0.1 + 0.3 - 0.2, 0.5 - 0.2 - 0.1]).double())
    assert_close(prob_diff(PROBABILITIES.log() + 7, prompts), prob_diff(PROBABILITIES.log(), prompts))


def test_is_preferred_compares_the_best_answer_with_the_best_foil(prompts):
    assert is_preferred(LOGITS, prompts).tolist() == [1, 0]


def test_is_top_looks_at_the_whole_vocabulary(prompts):
    assert is_top(LOGITS, prompts).tolist() == [0, 0]
    assert is_top(PROBABILITIES.log(), prompts).tolist() == [0, 1]


def test_unused_candidates_count_for_nothing(prompts):
    """Where prompts have different numbers of candidates, role 0 fills up with whatever token: here, likely ones."""
    padded = PromptBatch(
        prompts.clean,
        prompts.corrupted,
        prompts.end,
        torch.cat([CANDIDATES, torch.tensor([[3], [2]])], 1),
        torch.cat([ROLES, torch.zeros(2, 1, dtype=torch.long)], 1),
        prompts.groups,
        {},
    )
    for metric in METRICS.values():
        assert_close(metric(LOGITS, padded), metric(LOGITS, prompts))


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_gives_each_prompt_its_own_number(prompts, name):
    """What a prompt scores does not depend on the others in its batch."""
    both = METRICS[name](LOGITS, prompts)
    assert both.shape == (2,)
    assert torch.equal(both[1:], METRICS[name](LOGITS[1:], prompts[1:]))


@pytest.mark.parametrize("name", METRICS)
def test_higher_is_better(prompts, name):
    better, worse = LOGITS.clone(), LOGITS.clone()
    better.scatter_(1, CANDIDATES, 20.0 * ROLES)
    worse.scatter_(1, CANDIDATES, -20.0 * ROLES)
    assert bool((METRICS[name](better, prompts) > METRICS[name](worse, prompts)).all())


def test_kl_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]).double(), torch.tensor([[0.25, 0.75]]).double()
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert_close(kl_divergence(p.log(), q.log()), torch.tensor([expected]).double())
    assert_close(kl_divergence(LOGITS, LOGITS + 3), torch.zeros(2))
