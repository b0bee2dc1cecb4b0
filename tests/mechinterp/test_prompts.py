"""Prompt batches: checked when made, cut without losing alignment."""

import pytest
import torch

from mechinterp.errors import TaskError
from mechinterp.prompts import PromptBatch

FACTS = {
    "clean": torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0], [5, 6, 7, 0]]),
    "corrupted": torch.tensor([[5, 6, 1, 8], [5, 6, 2, 0], [5, 6, 7, 3]]),
    "end": torch.tensor([3, 2, 3]),
    "candidates": torch.tensor([[1, 2], [3, 4], [5, 6]]),
    "roles": torch.tensor([[1, -1], [-1, 1], [1, 1]]),
    "groups": torch.tensor([0, 1, 0]),
    "positions": {"S2": torch.tensor([1, 2, 0])},
}


@pytest.fixture(scope="module")
def prompts():
    return PromptBatch(**FACTS)


def test_cutting_keeps_every_column_aligned(prompts):
    whole = list(prompts.split(2))
    assert [len(part) for part in whole] == [2, 1]
    by_mask, by_index = prompts[torch.tensor([False, True, False])], prompts[torch.tensor([1])]
    for part in (by_mask, by_index):
        assert part.clean.tolist() == [[5, 6, 9, 0]]
        assert (part.end.item(), part.answer.item(), part.positions["S2"].item()) == (2, 4, 2)


def test_the_answer_is_the_first_with_role_plus_one(prompts):
    assert prompts.answer.tolist() == [1, 4, 5]


def test_the_shared_prefix_is_what_no_pair_changes(prompts):
    assert prompts.shared_prefix == 2
    assert prompts[2:].shared_prefix == 3
    assert PromptBatch(**FACTS | {"corrupted": FACTS["clean"]}).shared_prefix == 4


def test_moving_moves_everything(prompts):
    moved = prompts.to("cpu")
    assert torch.equal(moved.clean, prompts.clean)
    assert moved.positions["S2"].tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"end": torch.tensor([4, 0, 0])}, "inside the 4 positions; it runs to 4"),
        ({"end": torch.tensor([-1, 0, 0])}, "inside the 4 positions"),
        ({"roles": torch.tensor([[1, -1], [-1, 0], [1, 1]])}, r"at least one answer \(role \+1\)"),
    ],
)
def test_prompts_that_do_not_align_are_refused(change, message):
    with pytest.raises(TaskError, match=message):
        PromptBatch(**FACTS | change)


def test_no_prompts_are_refused(prompts):
    with pytest.raises(TaskError, match="there are no prompts. Ask for at least one"):
        prompts[:0]
