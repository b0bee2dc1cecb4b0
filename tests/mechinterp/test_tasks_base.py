"""Alignment, whatever the tokenizer: what `assemble` finds and what it refuses."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models

from mechinterp.errors import TaskError
from mechinterp.models import builtin
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.tasks import TASKS
from mechinterp.tasks.base import Example, assemble, pieces
from mechinterp.tasks.words import split_words, words

BUILTIN = Tokenizer.from_directory(Path(builtin.__path__[0]), "builtin")
GPT2 = Path(__file__).parents[3] / "shared" / "data" / "gpt2_tokenizer" / "tokenizer.json"


def test_pieces_concatenate_to_the_filled_template():
    parts = pieces("Then, {A} and {B}.", {"A": "Mary", "B": "John"})
    assert "".join(p if isinstance(p, str) else p[1] for p in parts) == "Then, Mary and John."


def test_labels_are_found_by_characters_and_neighbours_by_steps():
    example = Example(pieces("Then, {A} and {B}", {"A": "Mary", "B": "John"}), {}, [" Mary"], [" John"], 0, {"A-1": ("A", -1)})
    prompts = assemble(BUILTIN, [example], bos=True)
    assert [int(prompts.positions[label]) for label in ("A-1", "A", "B", "END")] == [2, 3, 5, 5]


def test_prompts_of_unequal_length_end_where_they_end():
    examples = [Example([text], {}, [" Mary"], [" John"]) for text in ("Then, Mary", "Then")]
    prompts = assemble(BUILTIN, examples, bos=False)
    assert prompts.end.tolist() == [2, 0]
    assert prompts.clean[1, 1:].tolist() == [BUILTIN.pad_id] * 2


def test_a_replacement_of_more_tokens_is_refused_with_both_texts():
    example = Example([("A", " Mary"), " and"], {"A": " Mary and John"}, [" Mary"], [" John"])
    with pytest.raises(TaskError, match="have 2 and 4 tokens"):
        assemble(BUILTIN, [example], bos=False)


def test_an_answer_of_several_tokens_is_refused():
    with pytest.raises(TaskError, match=r"' Mary and' is 2 tokens.*one token"):
        assemble(BUILTIN, [Example(["Then"], {}, [" Mary and"], [" John"])], bos=False)


def test_bos_is_refused_where_there_is_none():
    tokenizer = Tokenizer(BUILTIN.backend, "without")
    with pytest.raises(TaskError, match="Pass bos=False"):
        assemble(tokenizer, [Example(["Then"], {}, [" Mary"], [" John"])], bos=True)


def test_no_prompts_is_an_error_that_says_so():
    with pytest.raises(TaskError, match="n_prompts >= 1"):
        TASKS["ioi"](SimpleNamespace(tokenizer=BUILTIN), n_prompts=0)


def test_splits_are_disjoint_and_complete():
    names = words("names")
    assert sorted(split_words(names, "train") + split_words(names, "held-out")) == sorted(names)
    with pytest.raises(TaskError, match="Choose 'all', 'train' or 'held-out'"):
        split_words(names, "test")


def test_no_word_list_repeats_itself():
    for name in ("names", "places", "gifts", "nouns", "objects", "colors", "surfaces", "variables", "description_nouns"):
        assert len(set(words(name))) == len(words(name)), name


@pytest.mark.parametrize("name", TASKS)
def test_a_tokenizer_without_the_words_is_refused_by_name(name):
    backend = Backend(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    with pytest.raises(TaskError, match="'tiny'"):
        TASKS[name](SimpleNamespace(tokenizer=Tokenizer(backend, "tiny")))


@pytest.mark.parametrize("name", TASKS)
def test_padding_never_stands_before_end(name):
    prompts = TASKS[name](SimpleNamespace(tokenizer=BUILTIN), 40).prompts
    is_pad = prompts.clean == BUILTIN.pad_id
    assert torch.equal(is_pad, torch.arange(prompts.clean.shape[1])[None] > prompts.end[:, None])


@pytest.mark.skipif(not GPT2.is_file(), reason="the GPT-2 tokenizer is not on this machine")
@pytest.mark.parametrize("split", ["all", "train", "held-out"])
@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_generated_for_gpt2_too(name, split):
    tokenizer = Tokenizer.from_file(GPT2, "gpt2", bos="<|endoftext|>")
    task = TASKS[name](SimpleNamespace(tokenizer=tokenizer), 40, split=split)
    assert (task.prompts.clean != task.prompts.corrupted).any(1).all()
    assert task.text(0).startswith("<|endoftext|>") == (name == "docstring")
    dropped = {list_name: count for list_name, count in task.notes["dropped"].items() if count}
    assert set(dropped) <= {"years"}


@pytest.mark.skipif(not GPT2.is_file(), reason="the GPT-2 tokenizer is not on this machine")
def test_gpt2_keeps_only_years_of_two_tokens():
    tokenizer = Tokenizer.from_file(GPT2, "gpt2", bos="<|endoftext|>")
    task = TASKS["greater-than"](SimpleNamespace(tokenizer=tokenizer), 300)
    assert task.notes["dropped"]["years"] > 0
    rows = zip(task.prompts.clean.tolist(), task.prompts.positions["YY"].tolist(), strict=True)
    starts = {tokenizer.decode(row[year - 1 : year + 1]) for row, year in rows}
    assert all(len(start) == 5 and start[0] == " " for start in starts)
    assert " 1509" not in starts


@pytest.mark.parametrize("task", TASKS)
def test_a_model_without_a_tokenizer_is_refused_with_the_remedy(task):
    with pytest.raises(TaskError, match=r"no tokenizer.*Load it with one"):
        TASKS[task](SimpleNamespace(tokenizer=None), n_prompts=1)


def test_a_template_that_there_is_not_is_refused():
    with pytest.raises(TaskError, match=r"template=99 is none of the 19 templates"):
        TASKS["ioi"](SimpleNamespace(tokenizer=BUILTIN), n_prompts=1, template=99)
