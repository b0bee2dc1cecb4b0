"""The command line, on the real built-in model and a handful of prompts."""

import importlib.metadata
import json
import re
from pathlib import Path

import pytest

from circuits import Circuit, Scores
from mechinterp.cli import main
from mechinterp.cli.discover import FILES
from mechinterp.cli.owners import clashes
from mechinterp.cli.results import folder_written_whole

QUICK = ("--prompts", "8", "--method", "eap")
PAIR = {
    "clean": "Then, Mary and John met at the park. John handed a ring to",
    "corrupted": "Then, Mary and John met at the park. Mary handed a ring to",
    "answers": [" Mary"],
    "foils": [" John"],
}


def run(*arguments: object) -> int:
    """The exit code of ``mechinterp arguments``."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_discover_ioi_prints_and_saves_the_circuit(here, capsys):
    assert run("discover", "ioi", "--edges", 30, *QUICK) == 0
    said = capsys.readouterr().out
    for part in ("Model   builtin", "Task    ioi", "Metric  logit_diff", "30 strongest edges", "faithfulness", "random"):
        assert part in said
    assert {file.name for file in here.iterdir()} == {"mechinterp-ioi"}
    folder = here / "mechinterp-ioi"
    assert {file.name for file in folder.iterdir()} == set(FILES)
    circuit, scores = Circuit.load(folder / "circuit.json"), Scores.load(folder / "scores.json")
    assert circuit.n_edges_kept == 30
    assert scores.top(30).edges_kept == circuit.edges_kept
    assert json.loads((folder / "report.json").read_text())
    assert (folder / "circuit.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_finds_the_same_circuit(here):
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run("discover", "ioi", "--seed", seed, "--out", out, *QUICK) == 0
    same, again, other = ((here / out / "scores.json").read_text() for out in "abc")
    assert same == again != other


def test_a_file_of_ones_own_prompts_is_analysed(here, capsys):
    (here / "mine.jsonl").write_text(json.dumps(PAIR) + "\n" + json.dumps(PAIR | {"answers": [" notaword"]}) + "\n")
    assert run("discover", "mine.jsonl", *QUICK) == 0
    assert "left out: no answer or no foil is a single token: 1" in capsys.readouterr().out
    assert {file.name for file in (here / "mechinterp-mine").iterdir()} == set(FILES)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("ioi", "--edges", 0), "--edges 0 keeps nothing"),
        (("ioi", "--edges", 10**9), "--edges 1,000,000,000 is more than builtin has"),
        (("ioi", "--prompts", 0), "--prompts 0 asks for no prompts"),
        (("ioi", "--method", "eapig"), "no method 'eapig'.*Did you mean 'eap-ig'?"),
        (("ioi", "--corruption", "abd"), "'abd' is no corruption of IOI.*Did you mean 'abc'?"),
        (("ioi", "--device", "abacus"), "--device abacus cannot be used here"),
        (("ioi", "--out", "taken/deeper"), "'.*taken' is a file"),
        (("ioi", "--model", "./nowhere"), "no directory './nowhere'"),
        (("ioi", "--model", "buildin"), "cannot load 'buildin'"),
        (("iou",), "no task and no file 'iou'.*Did you mean 'ioi'?"),
        (("taken",), "cannot be read"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(here, capsys, arguments, complaint):
    (here / "taken").write_text("no prompts")
    assert run("discover", *arguments) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1
    assert re.match(f"mechinterp: .*{complaint}", said.err)
    assert {file.name for file in here.iterdir()} == {"taken"}


def test_a_task_that_the_tokenizer_cannot_express_is_one_line(here, capsys):
    from mechinterp.models.compiled import induction
    from mechinterp.models.load import save

    save(induction().model, here / "letters")
    assert run("discover", "ioi", "--model", "letters") == 2
    said = capsys.readouterr().err
    assert "single token" in said
    assert len(said.splitlines()) == 1
    assert {file.name for file in here.iterdir()} == {"letters"}


def test_a_failure_on_the_way_leaves_an_earlier_result_untouched(here, monkeypatch):
    assert run("discover", "ioi", *QUICK) == 0
    before = {file.name: file.read_bytes() for file in (here / "mechinterp-ioi").iterdir()}

    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(Scores, "save", fail)
    assert run("discover", "ioi", "--seed", 5, *QUICK) == 2
    assert {file.name: file.read_bytes() for file in (here / "mechinterp-ioi").iterdir()} == before


def test_a_method_that_scores_parts_ranks_them_and_leaves_no_circuit_of_an_earlier_run(here, capsys):
    folder = here / "mechinterp-ioi"
    folder.mkdir()
    for name in ("circuit.json", "notes.txt"):
        (folder / name).write_text("from before")
    assert run("discover", "ioi", "--prompts", 8, "--method", "patching") == 0
    assert re.search(r"^m0 +[+-]\d", capsys.readouterr().out, re.MULTILINE)
    assert {file.name for file in folder.iterdir()} == {"scores.json", "notes.txt"}


def test_a_circuit_alone_goes_to_the_file_that_was_named(here, capsys):
    assert run("discover", "ioi", "--out", "found/ioi.graphml", *QUICK) == 0
    assert [file.name for file in (here / "found").iterdir()] == ["ioi.graphml"]
    assert Circuit.load(here / "found" / "ioi.graphml").n_edges_kept == 100
    assert run("discover", "ioi", "--out", "parts.json", "--method", "patching", "--prompts", 4) == 2
    assert "cuts no circuit" in capsys.readouterr().err
    assert {file.name for file in here.iterdir()} == {"found"}


def test_an_unwritable_folder_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(PermissionError, match="Permission denied.*--out"), folder_written_whole(tmp_path / "out"):
        pytest.fail("the work began")


@pytest.mark.parametrize("command", ["tasks", "models", "methods"])
def test_the_lists_name_everything_with_a_line_each(command, capsys):
    from circuits import ALGORITHMS
    from mechinterp.models.load import BUILTIN
    from mechinterp.tasks import TASKS

    assert run(command) == 0
    said = capsys.readouterr().out
    for name in {"tasks": TASKS, "models": BUILTIN, "methods": ALGORITHMS}[command]:
        assert re.search(rf"^{name} +\S", said, re.MULTILINE)


def test_another_owner_of_our_packages_is_named_with_the_remedy(monkeypatch):
    owners = {"mechinterp": ["mechinterp-toolkit"], "circuits": ["circuits", "mechinterp-toolkit"], "numpy": ["numpy"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: owners)
    (warning,) = clashes()
    assert "'circuits' is also installed by circuits" in warning
    assert "pip uninstall circuits" in warning
