"""``mechinterp reuse`` on the real built-in model and a handful of prompts."""

import json
import re
from pathlib import Path

import pytest

from circuits import Circuit
from circuits.reuse.report import Reuse
from circuits.reuse.union import tasks_of
from mechinterp.cli import main
from mechinterp.cli.reuse import FILES

QUICK = ("--prompts", "8", "--method", "eap", "--sizes", "2,10", "--draws", "10")
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


def test_two_tasks_are_compared_printed_and_saved(here, capsys):
    assert run("reuse", "ioi", "colored-objects", *QUICK) == 0
    said = capsys.readouterr().out
    for part in ("Task    ioi", "Task    colored-objects", "Shared edges", "same degrees", "Spearman", "10 % of the edges"):
        assert part in said
    folder = here / "mechinterp-reuse-ioi-colored-objects"
    assert {file.name for file in folder.iterdir()} == {*FILES, "scores"}
    found, union = Reuse.load(folder / "reuse.json"), Circuit.load(folder / "union.graphml")
    assert (found.tasks, found.cuts) == (("ioi", "colored-objects"), (0.02, 0.1))
    shared = [edge for edge in union.edges_kept if len(tasks_of(union.edges[edge])) == 2]
    (at,) = [one for one in found.overlaps if one.level == "edge" and one.cut == 0.1]
    assert (len(shared), union.n_edges_kept) == (at.n_shared, at.n_union)
    assert f"{union.n_edges_kept:,} edges, of which all tasks use {len(shared):,}" in said
    assert Circuit.load(folder / "union.json").edges_kept == union.edges_kept
    assert (folder / "reuse.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_is_compared_with_a_task_by_nodes_and_with_itself(here, capsys):
    (here / "mine.jsonl").write_text("\n".join([json.dumps(PAIR)] * 12))
    quick = ("--prompts", "6", "--method", "patching", "--sizes", "20", "--ceiling", "--out", "there")
    assert run("reuse", "ioi", "mine.jsonl", *quick) == 0
    said = capsys.readouterr().out
    for part in ("ioi, mine", "Shared nodes", "Shared heads", "mine, mine again"):
        assert part in said
    assert {file.name for file in (here / "there").iterdir()} == {*FILES, "scores"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("ioi",), "only 'ioi' is given. Name two tasks or more"),
        (("ioi", "ioi"), "'ioi' is named twice"),
        (("ioi", "iou"), "no task and no file 'iou'.*Did you mean 'ioi'"),
        (("ioi", "docstring", "--method", "eapig"), "no method 'eapig'.*Did you mean 'eap-ig'"),
        (("ioi", "docstring", "--method", "neurons", "--prompts", 2), "count neurons.*such as 'eap-ig' or 'patching'"),
        (("ioi", "docstring", "--sizes", "0,5"), "--sizes '0,5' is no list of percentages"),
        (("ioi", "docstring", "--sizes", "many"), "--sizes 'many' is no list of percentages"),
        (("ioi", "docstring", "--drawn", 7), "--drawn 7 is not among the sizes 1, 2, 5, 10, 20"),
        (("ioi", "docstring", "--draws", -1), "--draws -1 is no number of circuits"),
        (("ioi", "docstring", "--prompts", 0), "--prompts 0 asks for nothing"),
        (("ioi", "docstring", "--out", "taken/deeper"), "'.*taken' is a file"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(here, capsys, arguments, complaint):
    (here / "taken").write_text("nothing")
    assert run("reuse", *arguments) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert re.match(f"mechinterp: .*{complaint}", said)
    assert {file.name for file in here.iterdir()} <= {"taken", "mechinterp-reuse-ioi-docstring"}
