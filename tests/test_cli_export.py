"""``mechinterp export`` and ``formats``, on a circuit by hand and on the real built-in model."""

import json
from pathlib import Path

import networkx as nx
import pytest

from circuits import Circuit, Wiring
from circuits.export import FORMATS
from mechinterp.cli import main


@pytest.fixture
def saved(tmp_path, monkeypatch) -> Circuit:
    """A circuit of the built-in model, in circuit.json of the current folder."""
    monkeypatch.chdir(tmp_path)
    circuit = Circuit(**Wiring(4, 8).facts, model="builtin", task="ioi")
    for writer, reader in (("input", "m0"), ("m0", "a3.h2.v"), ("a3.h2", "logits")):
        circuit.keep(writer, reader, weight=1.5)
    circuit.save("circuit.json")
    return circuit


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if format.read])
def test_a_circuit_goes_into_every_format_and_back(saved, name):
    suffix = FORMATS[name].suffix
    assert run("export", "circuit.json", f"there{suffix}") == 0
    assert run("export", f"there{suffix}", "back.json") == 0
    assert nx.utils.graphs_equal(Circuit.load("back.json"), saved)


def test_the_format_can_be_named_on_both_sides(saved):
    assert run("export", "circuit.json", "graph.txt", "--format", "gexf") == 0
    assert run("export", "graph.txt", "back.json", "--from", "gexf") == 0
    assert nx.utils.graphs_equal(Circuit.load("back.json"), saved)


def test_a_circuit_on_a_prompt_becomes_a_folder_to_serve_or_one_file(saved, capsys):
    assert run("export", "circuit.json", "graphs", "--on", "ioi", "--prompt", 1) == 0
    assert "Written to graphs/ioi-1-builtin.json" in capsys.readouterr().out
    assert json.loads(Path("graphs/graph-metadata.json").read_text())["graphs"][0]["slug"] == "ioi-1-builtin"
    assert run("export", "circuit.json", "one.json", "--on", "ioi", "--prompt", 1) == 0
    assert Path("one.json").read_text() == Path("graphs/ioi-1-builtin.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("circuit.json", "out.xyz"), "no suffix that says how"),
        (("circuit.json", "out.gexf", "--on", "ioi", "--format", "gexf"), "--on draws an attribution graph, and not gexf"),
        (("circuit.json", "out", "--on", "ioi", "--prompt", -1), "--prompt -1 is none"),
        (("nowhere.json", "out.gexf"), "nowhere.json"),
        (("circuit.txt", "out.gexf"), "how to read a circuit. Known: .json, .node-link.json, .graphml, .gexf, .attribution"),
        (("circuit.json", "out.eap-ig.json", "--on", "ioi"), "names eap-ig. Name a folder, or a file that ends in .json."),
        (("circuit.json", "out.graphml", "--on", "ioi"), "'out.graphml' names graphml"),
        (("circuit.json", "no/where/out", "--on", "ioi"), "there is no folder above it"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(saved, capsys, arguments, message):
    assert run("export", *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_formats_lists_them_all(capsys):
    assert run("formats") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(FORMATS)
