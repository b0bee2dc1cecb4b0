"""``mechinterp discover`` by methods that watch: what it prints, what it keeps, and what it says where nothing stands out."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

import circuits
import mechinterp
from circuits import Circuit, Scores
from circuits.discovery import WATCHING
from circuits.meanings import CodeMeanings
from mechinterp.cli import main
from mechinterp.cli.watched import SCORES
from mechinterp.errors import TaskError


def run(*arguments: object) -> int:
    """The exit code of ``mechinterp discover arguments``."""
    with pytest.raises(SystemExit) as end:
        main(["discover", *map(str, arguments)])
    return int(end.value.code or 0)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_parts_that_stand_out_are_ranked_beside_their_control_explained_and_kept(here, capsys):
    assert run("greater-than", "--method", "codes", "--prompts", 20, "--positions", "END, YY", "--train-examples", 8) == 0
    said, folder = capsys.readouterr().out, here / "mechinterp-greater-than"
    scores, circuit = Scores.load(folder / "scores.json"), Circuit.load(folder / "circuit.json")
    chosen = scores.settings["selected"]
    assert chosen
    assert set(map(str, circuit.heads)) | set(map(str, circuit.mlps)) == set(chosen)
    assert re.search(r"^part +score +q +untrained +attention", said, re.MULTILINE)
    assert f"{len(chosen)} of 36 parts stand out" in said
    assert "nats of information between the part's code and clean or corrupted" in said
    assert "read at END, YY; 8 examples trained, 32 counted" in said
    assert "if the part is cut" not in said
    meanings = CodeMeanings.load(folder / "codes.json")
    assert {one.part for one in meanings.meanings} == set(chosen)
    assert meanings.text(1, 1).splitlines()[-1] in said


def test_parts_asked_for_win_over_those_that_stand_out(here):
    assert run("greater-than", "--method", "codes-change", "--prompts", 10, "--parts", 3) == 0
    circuit = Circuit.load(here / "mechinterp-greater-than" / "circuit.json")
    assert len(circuit.heads) + len(circuit.mlps) == 3


def test_the_published_method_scores_heads_alone_and_cuts_no_mlp(here, capsys):
    assert run("greater-than", "--method", "codes-paper", "--prompts", 12, "--parts", 5) == 0
    said, folder = capsys.readouterr().out, here / "mechinterp-greater-than"
    assert "this method has no threshold of its own" in said
    assert "and all MLPs, which were not scored" in said
    circuit = Circuit.load(folder / "circuit.json")
    assert (len(circuit.heads), len(circuit.mlps)) == (5, 4)
    assert not (folder / "codes.json").exists()


def test_codes_of_the_published_method_are_read_where_one_says(here):
    assert run("greater-than", "--method", "codes-paper", "--prompts", 12, "--positions", "END") == 0
    assert Scores.load(here / "mechinterp-greater-than" / "scores.json").settings["positions"] == "END"


def test_edges_of_codes_and_options_that_do_nothing_come_with_a_warning(here, capsys):
    assert run("greater-than", "--method", "codes-edges", "--prompts", 8, "--train-examples", 4, "--parts", 3) == 0
    said = capsys.readouterr().err
    assert "Do not take a circuit from these scores alone" in said
    assert "--parts is for methods that score parts" in said


def test_divergence_is_not_said_to_be_what_a_cut_costs(here, capsys):
    assert run("greater-than", "--method", "divergence", "--prompts", 8, "--threshold", 0.1) == 0
    said = capsys.readouterr()
    assert "how far the part's output moves" in said.out
    assert "if the part is cut" not in said.out
    assert "--threshold is for edges" in said.err


def test_a_model_of_few_edges_needs_no_smaller_number_of_them(make_model, here, capsys):
    builtin = mechinterp.load("builtin")
    small = make_model("plain", n_layers=1, n_heads=1, d_vocab=builtin.config.d_vocab, n_ctx=40)
    mechinterp.save(replace(small, tokenizer=builtin.tokenizer), here / "small")
    run("ioi", "--model", "small", "--method", "eap", "--prompts", 8, "--allow-unsolved")
    said = capsys.readouterr()
    assert "The 8 strongest edges" in said.out
    assert "--edges" not in said.err


def test_what_was_found_is_kept_where_the_circuit_cannot_be_measured(here, capsys, monkeypatch):
    def undefined(*_, **__):
        raise TaskError("faithfulness is undefined")

    monkeypatch.setattr(circuits, "evaluate", undefined, raising=False)
    assert run("greater-than", "--method", "codes-change", "--prompts", 16) == 0
    assert "could not be measured: faithfulness is undefined" in capsys.readouterr().err
    assert {"codes.json", "scores.json", "circuit.json"} <= {file.name for file in (here / "mechinterp-greater-than").iterdir()}
    assert run("greater-than", "--method", "eap", "--prompts", 16) != 0


def test_every_method_that_watches_says_what_its_score_is():
    assert set(SCORES) >= WATCHING


def test_where_nothing_stands_out_it_says_so_and_what_to_try(here, capsys):
    folder = here / "mechinterp-ioi"
    folder.mkdir()
    (folder / "codes.json").write_text("from before")
    assert run("ioi", "--method", "codes", "--prompts", 12) == 0
    said = capsys.readouterr()
    assert "0 of 36 parts stand out" in said.out
    assert re.search(r"warning: no part stands out.*--method codes-change.*--prompts.*--positions \(END", said.err)
    assert {file.name for file in folder.iterdir()} == {"circuit.json", "circuit.png", "report.json", "scores.json"}
    circuit = Circuit.load(folder / "circuit.json")
    assert len(circuit.heads) + len(circuit.mlps) == 20


def test_prompts_that_every_part_tells_apart_single_out_none(here, capsys):
    pair = {
        "clean": "Then, Mary and John met at the park. John handed a ring to",
        "corrupted": "Then, Mary and John met at the park. Mary handed a ring to",
        "answers": [" Mary"],
        "foils": [" John"],
    }
    (here / "same.jsonl").write_text((json.dumps(pair) + "\n") * 8)
    assert run("same.jsonl", "--method", "codes", "--train-examples", 4, "--out", "out") == 0
    assert "all parts score alike" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("ioi", "--method", "codes", "--prompts", 6), r"6 positive examples cannot train on 5 .*--prompts.*--train-examples"),
        (("ioi", "--method", "codes", "--positions", "S3"), "no position 'S3'; there are END,.* mean"),
        (("ioi", "--method", "codes", "--positions", ","), "no position is named"),
        (("ioi", "--method", "codes", "--train-examples", 1), "cannot hold a positive and a negative example"),
        (("ioi", "--method", "eap", "--positions", "END"), "'eap' takes no --positions.*codes"),
        (("ioi", "--method", "eap", "--train-examples", 5), "'eap' takes no --train-examples.*codes"),
        (("ioi", "--method", "codes", "--parts", 0), "--parts 0 keeps nothing"),
    ],
)
def test_what_cannot_be_done_is_one_line(here, capsys, arguments, complaint):
    assert run(*arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert re.match(f"mechinterp: .*{complaint}", errors[0])
    assert not list(here.iterdir())
