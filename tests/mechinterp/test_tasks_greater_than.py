"""Greater-than: which years may follow, which may start, and a control without an order."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from mechinterp.errors import TaskError
from mechinterp.metrics import prob_diff
from mechinterp.models import builtin
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.tasks.greater_than import (
    CENTURIES,
    CONTROL_TEMPLATES,
    CORRUPTIONS,
    TEMPLATES,
    cutoff_sharpness,
    greater_than,
    greater_than_control,
    is_held_out,
)

MODEL = SimpleNamespace(tokenizer=Tokenizer.from_directory(Path(builtin.__path__[0]), "builtin"))


def start_years(task):
    rows = torch.arange(len(task))
    years = task.prompts.clean[rows, task.prompts.positions["YY"]]
    centuries = task.prompts.clean[rows, task.prompts.positions["XX1"]]
    decode = task.tokenizer.decode
    return [(int(decode([int(c)])), int(decode([int(y)]))) for c, y in zip(centuries, years, strict=True)]


def test_the_answers_are_exactly_the_later_years():
    task = greater_than(MODEL, 97)
    for index, (_, year) in enumerate(start_years(task)):
        prompts = task.prompts[index : index + 1]
        answers = prompts.candidates[prompts.roles > 0]
        assert [int(task.tokenizer.decode([int(i)])) for i in answers] == list(range(year + 1, 100))
        assert int((prompts.roles < 0).sum()) == year + 1


def test_start_years_are_drawn_evenly_from_02_to_98():
    assert sorted(year for _, year in start_years(greater_than(MODEL, 97))) == list(range(2, 99))


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("make", [greater_than, greater_than_control])
def test_a_corruption_changes_the_start_year_alone(make, corruption):
    prompts = make(MODEL, 100, corruption=corruption).prompts
    expected = torch.zeros_like(prompts.clean, dtype=torch.bool)
    expected[torch.arange(100), prompts.positions["YY"]] = True
    assert torch.equal(prompts.clean != prompts.corrupted, expected)


def test_the_default_corruption_starts_in_01():
    task = greater_than(MODEL, 10)
    rows = torch.arange(10)
    assert set(task.prompts.corrupted[rows, task.prompts.positions["YY"]].tolist()) == {task.tokenizer.single("01")}


def test_end_repeats_the_century():
    task = greater_than(MODEL, 50)
    rows = torch.arange(50)
    tokens, positions = task.prompts.clean, task.prompts.positions
    assert torch.equal(tokens[rows, positions["XX1"]], tokens[rows, positions["END"]])
    assert torch.equal(positions["END"], positions["XX2"])


def test_knowing_every_answer_scores_one_and_knowing_nothing_scores_the_share_of_later_years():
    task = greater_than(MODEL, 97)
    d_vocab = task.tokenizer.backend.get_vocab_size()
    knowing = torch.full((97, d_vocab), -100.0)
    knowing.scatter_(1, task.prompts.candidates, torch.where(task.prompts.roles > 0, 100.0, -100.0))
    assert torch.allclose(prob_diff(knowing, task.prompts), torch.ones(97))
    only_years = torch.full((97, d_vocab), -torch.inf).scatter(1, task.prompts.candidates, 0.0)
    later = (task.prompts.roles > 0).sum(1)
    assert torch.allclose(prob_diff(only_years, task.prompts), (2 * later - 100) / 100)


def test_sharpness_of_a_model_that_says_only_the_next_year_is_one():
    task = greater_than(MODEL, 97)
    next_year = task.prompts.candidates[:, :1]
    logits = torch.zeros(97, task.tokenizer.backend.get_vocab_size()).scatter(1, next_year, 100.0)
    assert torch.allclose(cutoff_sharpness(logits, task.prompts), torch.ones(97))


def test_held_out_years_are_disjoint_from_train_years():
    seen, unseen = (set(start_years(greater_than(MODEL, 200, split=split))) for split in ("train", "held-out"))
    assert not seen & unseen
    share = sum(is_held_out(c, y) for c in CENTURIES for y in range(2, 99)) / (97 * len(CENTURIES))
    assert abs(share - 0.2) < 0.01


def test_control_sentences_are_not_among_the_ordered_ones():
    assert not set(CONTROL_TEMPLATES) & set(TEMPLATES)
    assert greater_than_control(MODEL, 5).group_names == CONTROL_TEMPLATES


def test_a_tokenizer_with_single_digits_is_refused_with_the_reason():
    backend = Backend(models.WordLevel({"<unk>": 0, **{str(d): d + 1 for d in range(10)}}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    model = SimpleNamespace(tokenizer=Tokenizer(backend, "digits"))
    with pytest.raises(TaskError, match="single tokens|two digits"):
        greater_than(model)
