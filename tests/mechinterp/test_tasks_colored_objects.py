"""Colored objects: which color belongs to what, asked about one of three things."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mechinterp.errors import TaskError
from mechinterp.models import builtin
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.tasks.colored_objects import CORRUPTIONS, colored_objects

MODEL = SimpleNamespace(tokenizer=Tokenizer.from_directory(Path(builtin.__path__[0]), "builtin"))
CHANGED = {"query": {"query"}, "swap-objects": {"answer_object", "foil_object"}, "absent": {"query"}}


def word_at(task, name, index, corrupted=False):
    tokens = task.prompts.corrupted if corrupted else task.prompts.clean
    return MODEL.tokenizer.decode([int(tokens[index, task.prompts.positions[name][index]])])


def candidate(task, index, role):
    prompts = task.prompts
    return MODEL.tokenizer.decode(prompts.candidates[index][prompts.roles[index] == role].tolist())


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corruption_changes_exactly_the_objects_it_says(corruption):
    prompts = colored_objects(MODEL, 50, corruption=corruption).prompts
    expected = torch.zeros_like(prompts.clean, dtype=torch.bool)
    for label in CHANGED[corruption]:
        expected[torch.arange(50), prompts.positions[label]] = True
    assert torch.equal(prompts.clean != prompts.corrupted, expected)


def test_the_answer_is_the_asked_color_in_title_case_and_the_foil_is_the_minimal_pairs():
    task = colored_objects(MODEL, 50, corruption="query")
    for index in range(50):
        assert candidate(task, index, 1) == word_at(task, "answer_color", index).title()
        assert candidate(task, index, -1) == word_at(task, "foil_color", index).title()
        assert word_at(task, "query", index) == word_at(task, "answer_object", index)
        assert word_at(task, "query", index, corrupted=True) == word_at(task, "foil_object", index)


def test_the_color_stands_in_front_of_its_object():
    positions = colored_objects(MODEL, 50).prompts.positions
    for number in (1, 2, 3):
        assert torch.equal(positions[f"color{number}"] + 1, positions[f"object{number}"])


def test_the_two_questions_share_no_color_and_no_object():
    task = colored_objects(MODEL, 50)
    for index in range(50):
        for part in ("color", "object"):
            said = [word_at(task, f"{prefix}{part}{n}", index) for prefix in ("", "example_") for n in (1, 2, 3)]
            assert len(set(said)) == 6


def test_the_solved_question_is_solved():
    task = colored_objects(MODEL, 50)
    for index in range(50):
        objects = [word_at(task, f"example_object{n}", index) for n in (1, 2, 3)]
        number = objects.index(word_at(task, "example_query", index)) + 1
        assert word_at(task, "example_answer", index) == word_at(task, f"example_color{number}", index).title()


def test_an_absent_object_is_nowhere_else_in_the_prompt():
    task = colored_objects(MODEL, 50, corruption="absent")
    for index in range(50):
        assert task.text(index, corrupted=True).count(f"{word_at(task, 'query', index, corrupted=True)}") == 1


def test_without_a_shot_there_is_one_question():
    task = colored_objects(MODEL, 20, shots=0)
    assert all(task.text(index).count("Q:") == 1 for index in range(20))
    assert "example_query" not in task.prompts.positions


def test_end_is_the_colon_that_the_answer_follows():
    task = colored_objects(MODEL, 20)
    assert all(task.text(index).endswith("\nA:") for index in range(20))


def test_every_place_in_the_scene_is_asked_for():
    positions = colored_objects(MODEL, 300).prompts.positions
    asked = [int((positions["answer_object"] == positions[f"object{n}"]).sum()) for n in (1, 2, 3)]
    assert sum(asked) == 300
    assert min(asked) > 60


def test_the_same_seed_gives_the_same_prompts():
    assert torch.equal(colored_objects(MODEL, 8, 5).prompts.clean, colored_objects(MODEL, 8, 5).prompts.clean)


def test_more_shots_than_there_are_colors_are_refused():
    with pytest.raises(TaskError, match="There are: 0, 1"):
        colored_objects(MODEL, shots=2)
