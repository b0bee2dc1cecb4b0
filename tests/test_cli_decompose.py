"""``mechinterp decompose``, on the real built-in model and one prompt."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mechinterp import RULE_SETS
from mechinterp import decompose as attribute
from mechinterp.cli import main
from mechinterp.cli.decompose import FILES, FOLDER, MEANINGS
from mechinterp.models.load import load, save

TEXT = "Then, Mary and John met at the park. John handed a ring to"


def run(*arguments: object) -> int:
    """The exit code of ``mechinterp decompose arguments``."""
    with pytest.raises(SystemExit) as end:
        main(["decompose", *(str(argument) for argument in arguments)])
    return int(end.value.code or 0)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_prompt_is_explained_in_a_table_a_picture_and_a_file(here, capsys):
    assert run(TEXT) == 0
    said = capsys.readouterr()
    for part in ("Model   builtin: 4 layers", "16 tokens", "Answer  ' Mary' against ' John'", "Rules   tail", MEANINGS["tail"]):
        assert part in said.out
    assert re.search(r"^' Mary' +\+1\d\.\d$", said.out, re.MULTILINE)
    assert said.err == ""
    assert {file.name for file in here.iterdir()} == {FOLDER}
    assert {file.name for file in (here / FOLDER).iterdir()} == set(FILES)
    assert (here / FOLDER / "tokens.png").read_bytes().startswith(b"\x89PNG")


def test_the_file_holds_what_the_library_finds(here):
    assert run(TEXT, "--rules", "held", "--baseline", "zero", "--answer", " John", "--foil", " Mary", "--phrases") == 0
    kept = json.loads((here / FOLDER / "tokens.json").read_text())
    found = attribute(load("builtin"), TEXT, rules="held", baseline="zero", answer=" John", foil=" Mary", phrases=True)
    assert (kept["format"], kept["version"]) == ("mechinterp text attribution", 1)
    assert kept["tokens"] == list(found.tokens)
    assert kept["scores"] == found.scores.tolist()
    assert kept["settings"] == found.settings
    assert [kept[name] for name in ("answer", "foil", "difference", "model")] == [" John", " Mary", found.difference, "builtin"]
    assert [[tuple(phrase.values()) for phrase in phrases] for phrases in kept["rounds"]] == [
        [(phrase.start, phrase.stop, phrase.text, phrase.score) for phrase in phrases] for phrases in found.rounds
    ]


def test_a_model_of_another_family_is_explained_in_its_own_logits(here, make_model):
    """Soft-capped logits, normalised writes, shared keys, windows: with the built-in model's words."""
    tokenizer = load("builtin").tokenizer
    model = replace(make_model("gemma2", d_vocab=load("builtin").config.d_vocab, n_ctx=32), tokenizer=tokenizer)
    save(model.to(dtype=torch.float32), here / "made")
    assert run(TEXT, "--model", here / "made", "--rules", "linear", "--answer", " John", "--foil", " Mary") == 0
    kept = json.loads((here / FOLDER / "tokens.json").read_text())
    tokens = [tokenizer.single(token) for token in kept["tokens"]]
    logits = load(here / "made").run(torch.tensor([tokens]), logits_at="last")[0][0]
    expected = float(logits[tokenizer.single(" John")] - logits[tokenizer.single(" Mary")])
    assert kept["difference"] == pytest.approx(expected, abs=1e-5)


def test_phrases_are_listed_by_round_if_asked(here, capsys):
    assert run(TEXT) == 0
    assert "phrase" not in capsys.readouterr().out
    assert run(TEXT, "--phrases") == 0
    said = capsys.readouterr().out
    assert re.search(r"^    1  ' Mary' +\+1\d\.\d$", said, re.MULTILINE)
    assert re.search(r"^    2  '", said, re.MULTILINE)


def test_an_answer_alone_is_explained_by_its_logit(here, capsys):
    assert run(TEXT, "--answer", " Mary") == 0
    assert re.search(r"^Answer  ' Mary': a logit of \+1\d\.\d$", capsys.readouterr().out, re.MULTILINE)


def test_a_word_without_its_space_is_not_changed_but_remarked_on(here, capsys):
    assert run(TEXT, "--answer", "Mary") == 0
    said = capsys.readouterr()
    assert "Answer  'Mary'" in said.out
    assert "warning: 'Mary' and ' Mary' are two tokens" in said.err
    assert run(TEXT, "--answer", ".") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("picture", ["seen/words.svg", "seen/words.PDF"])
def test_a_picture_alone_goes_to_the_file_that_was_named(here, capsys, picture):
    assert run(TEXT, "--out", picture) == 0
    assert f"Written to seen: {Path(picture).name}" in capsys.readouterr().out
    assert [file.name for file in (here / "seen").iterdir()] == [Path(picture).name]


def test_a_folder_may_have_dots_in_its_name(here):
    assert run(TEXT, "--out", "run-0.5") == 0
    assert {file.name for file in (here / "run-0.5").iterdir()} == set(FILES)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((" ",), "the text is empty"),
        ((TEXT, "--rules", "tial"), "no rule set 'tial'.*Did you mean 'tail'?"),
        ((TEXT, "--baseline", "men"), "no baseline 'men'.*Did you mean 'mean'?"),
        ((TEXT, "--foil", " John"), "--foil ' John' needs another word.*--answer"),
        ((TEXT, "--foil", " John", "--answer", " John"), "--foil ' John' needs another word.*--answer"),
        ((TEXT, "--out", "words.jpg"), "--out words.jpg: pictures are written as .png, .svg, .pdf"),
        ((TEXT, "--out", "taken"), "'.*taken' is a file"),
        ((TEXT, "--out", "taken/words.png"), "'.*taken' is a file"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line_before_a_model_is_loaded(here, capsys, monkeypatch, arguments, complaint):
    monkeypatch.setattr("mechinterp.load", lambda *_, **__: pytest.fail("the work began"))
    assert_refused(here, capsys, arguments, complaint)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((TEXT, "--answer", " Mary John"), "' Mary John' is 2 tokens.*Mind the leading space"),
        ((TEXT, "--answer", " Mary", "--foil", " John Mary"), "' John Mary' is 2 tokens"),
        ((TEXT * 9,), "reads at most 96 positions"),
        ((TEXT, "--model", "./nowhere"), "no directory './nowhere'"),
        ((TEXT, "--device", "abacus"), "--device abacus cannot be used here"),
    ],
)
def test_what_the_model_cannot_do_is_one_line_and_leaves_nothing(here, capsys, arguments, complaint):
    assert_refused(here, capsys, arguments, complaint)


def test_every_rule_set_is_explained():
    assert list(MEANINGS) == list(RULE_SETS)


def assert_refused(here: Path, capsys: pytest.CaptureFixture, arguments: tuple[str, ...], complaint: str) -> None:
    """Exit code 2, one line on stderr, and no file left behind."""
    (here / "taken").write_text("by another")
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert re.match(f"mechinterp: .*{complaint}", said)
    assert {file.name for file in here.iterdir()} == {"taken"}
