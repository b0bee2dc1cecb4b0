"""Docstring: arguments A, B, C of a definition, A and B documented, C asked for."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mechinterp.models import builtin
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.tasks.docstring import CORRUPTIONS, PUBLISHED, SHAPES, docstring
from mechinterp.tasks.words import split_words

MODEL = SimpleNamespace(tokenizer=Tokenizer.from_directory(Path(builtin.__path__[0]), "builtin"))


def word_at(task, name, index, corrupted=False):
    tokens = task.prompts.corrupted if corrupted else task.prompts.clean
    return MODEL.tokenizer.decode([int(tokens[index, task.prompts.positions[name][index]])])


@pytest.mark.parametrize(("corruption", "labels"), CORRUPTIONS.items())
def test_a_corruption_renames_exactly_the_arguments_it_says(corruption, labels):
    prompts = docstring(MODEL, 50, corruption=corruption).prompts
    expected = torch.zeros_like(prompts.clean, dtype=torch.bool)
    for label in labels:
        expected[torch.arange(50), prompts.positions[label]] = True
    assert torch.equal(prompts.clean != prompts.corrupted, expected)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_new_names_are_new_and_different(corruption):
    task = docstring(MODEL, 50, corruption=corruption)
    labels = CORRUPTIONS[corruption]
    for index in range(50):
        fresh = [word_at(task, label, index, corrupted=True) for label in labels]
        assert len(set(fresh)) == len(labels)
        assert not any(f"{name}," in task.text(index) or f"{name})" in task.text(index) for name in fresh)


def test_the_answer_is_the_third_matching_argument():
    task = docstring(MODEL, 50, template=None)
    for index in range(50):
        assert MODEL.tokenizer.decode([int(task.prompts.answer[index])]) == word_at(task, "C_def", index)
        assert word_at(task, "A_def", index) == word_at(task, "A_doc", index)
        assert word_at(task, "B_def", index) == word_at(task, "B_doc", index)


def test_the_foils_are_the_thirteen_other_names():
    prompts = docstring(MODEL, 50, template=None).prompts
    assert torch.equal((prompts.roles < 0).sum(1), torch.full((50,), 13))
    assert all(len(set(row.tolist())) == 14 for row in prompts.candidates)


def test_no_name_of_a_prompt_is_also_a_noun_of_its_text():
    task = docstring(MODEL, 200, template=None)
    for index in range(200):
        text = task.text(index).split('"""')[1]
        described = {word.strip(":") for line in text.splitlines() for word in line.split(":")[-1].split()}
        names = {word.strip() for word in MODEL.tokenizer.strings(task.prompts.candidates[index].tolist())}
        assert not {word for word in described if word != "param"} & names or text.rstrip().endswith("-")


def test_the_default_shape_is_the_published_one():
    task = docstring(MODEL, 3)
    assert (SHAPES[PUBLISHED].marker, SHAPES[PUBLISHED].n_before, SHAPES[PUBLISHED].n_after) == (":param", 2, 1)
    definition, *lines = task.text(0).splitlines()
    assert definition.count(",") == 6
    assert [line.split()[0] for line in lines if line.strip().startswith(":")] == [":param"] * 3
    assert len(lines[0].split()) == 1 + 3
    assert SHAPES[PUBLISHED] in split_words(SHAPES, "held-out")


def test_all_published_prompts_have_one_length_and_end_at_the_marker():
    task = docstring(MODEL, 30)
    assert len(set(task.prompts.end.tolist())) == 1
    assert {word_at(task, "END", index) for index in range(30)} == {"param"}
    assert torch.equal(task.prompts.positions["B_def"] + 1, task.prompts.positions["B_def+1"])


def test_bos_stands_in_front_as_published():
    assert docstring(MODEL, 1).text(0).startswith("<bos>def ")
    assert docstring(MODEL, 1, bos=False).text(0).startswith("def ")


def test_what_the_tokenizer_lacks_is_counted():
    assert docstring(MODEL, 1).notes["dropped"]["description_nouns"] > 0
    assert docstring(MODEL, 1).notes["dropped"]["variables"] == 0
