"""Indirect object identification: who is said once, who is said twice, and what each corruption touches."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mechinterp.errors import TaskError
from mechinterp.models import builtin
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.tasks.ioi import CORRUPTIONS, TEMPLATES, ioi, ioi_abc
from mechinterp.tasks.words import split_words, words

MODEL = SimpleNamespace(tokenizer=Tokenizer.from_directory(Path(builtin.__path__[0]), "builtin"))
CHANGED = {
    "abc": {"IO", "S1", "S2"},
    "s2-io": {"S2"},
    "io-s1": {"IO", "S1"},
    "s2-rand": {"S2"},
    "s1-rand": {"S1"},
    "io-rand": {"IO"},
    "s-rand": {"S1", "S2"},
}


def word_at(task, name, index, corrupted=False):
    tokens = task.prompts.corrupted if corrupted else task.prompts.clean
    return MODEL.tokenizer.decode([int(tokens[index, task.prompts.positions[name][index]])])


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corruption_changes_exactly_the_names_it_says(corruption):
    prompts = ioi(MODEL, 60, corruption=corruption).prompts
    differs = prompts.clean != prompts.corrupted
    expected = torch.zeros_like(differs)
    for label in CHANGED[corruption]:
        expected[torch.arange(60), prompts.positions[label]] = True
    assert torch.equal(differs, expected)


def test_the_subject_is_said_twice_and_the_indirect_object_is_the_answer():
    task = ioi(MODEL, 60)
    for index in range(60):
        assert word_at(task, "S1", index) == word_at(task, "S2", index) != word_at(task, "IO", index)
        assert task.tokenizer.decode([int(task.prompts.answer[index])]) == word_at(task, "IO", index)


def test_end_is_the_last_token_of_the_sentence():
    task = ioi(MODEL, 60)
    assert torch.equal(task.prompts.end, task.prompts.positions["END"])
    assert {word_at(task, "END", index) for index in range(60)} == {" to", " for"}


def test_the_orders_recorded_are_the_orders_written():
    task = ioi(MODEL, 60)
    is_abba = task.prompts.positions["IO"] < task.prompts.positions["S1"]
    assert ["ABBA" if first else "BABA" for first in is_abba] == list(task.notes["orders"])
    assert int(is_abba.sum()) == 30


def test_abc_corruption_names_three_different_strangers():
    task = ioi(MODEL, 200, corruption="abc")
    for index in range(200):
        before = {word_at(task, label, index) for label in ("IO", "S1")}
        after = {word_at(task, label, index, corrupted=True) for label in ("IO", "S1", "S2")}
        assert len(after) == 3
        assert not before & after


def test_the_s2_io_flip_says_the_answer_twice():
    task = ioi(MODEL, 20, corruption="s2-io")
    assert all(word_at(task, "S2", i, corrupted=True) == word_at(task, "IO", i) for i in range(20))


def test_the_same_seed_gives_the_same_prompts_and_another_seed_does_not():
    assert torch.equal(ioi(MODEL, 16, 3).prompts.corrupted, ioi(MODEL, 16, 3).prompts.corrupted)
    assert not torch.equal(ioi(MODEL, 16, 3, template=0).prompts.clean, ioi(MODEL, 16, 4, template=0).prompts.clean)


def test_held_out_prompts_share_no_name_and_no_sentence_with_train_prompts():
    def used(split):
        task = ioi(MODEL, 400, split=split)
        return {word_at(task, "IO", index) for index in range(400)}, set(task.prompts.groups.tolist())

    for seen, unseen in zip(used("train"), used("held-out"), strict=True):
        assert not seen & unseen
    assert used("held-out")[0] == {f" {name}" for name in split_words(words("names"), "held-out")}


def test_one_template_gives_prompts_of_one_length():
    task = ioi(MODEL, 16, template=4)
    assert set(task.prompts.groups.tolist()) == {4}
    assert len(set(task.prompts.end.tolist())) == 1


def test_the_control_names_three_different_people():
    task = ioi_abc(MODEL, 60)
    for index in range(60):
        assert len({word_at(task, label, index) for label in "ABC"}) == 3
    assert torch.equal((task.prompts.clean != task.prompts.corrupted).sum(1), torch.ones(60, dtype=torch.long))


def test_the_published_convention_has_no_bos_and_the_built_in_model_asks_for_one():
    assert ioi(MODEL, 2).text(0).startswith("<bos>")
    assert not ioi(MODEL, 2, bos=False).text(0).startswith("<bos>")


def test_an_unknown_corruption_lists_the_known_ones_and_the_nearest():
    with pytest.raises(TaskError, match=r"There are: abc, s2-io.*Did you mean 's2-io'\?"):
        ioi(MODEL, corruption="s2-oi")


def test_no_template_begins_with_a_name():
    assert not [template for template in TEMPLATES if template.startswith("{")]
