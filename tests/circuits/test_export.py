"""What is written is read back equal, or refused with the name of the file."""

import json

import networkx as nx
import numpy as np
import pytest

from circuits import Circuit, Scores, Wiring
from circuits.export import FORMATS
from circuits.mermaid import mermaid
from mechinterp.errors import CircuitError
from mechinterp.nodes import Node

READABLE = [name for name, format in FORMATS.items() if format.read]
HOLD_ANY_CIRCUIT = [name for name in READABLE if name != "eap-ig"]  # which lists the edges of a model, and no others


@pytest.fixture(params=[None, 1], ids=["own keys", "shared keys"])
def circuit(request) -> Circuit:
    wiring = Wiring(2, 3, n_key_value_heads=request.param)
    values = np.random.default_rng(0).normal(size=wiring.n_edges) ** 3
    facts = {"method": "eap-ig", "unit": "logit_diff", "model": 'a "quoted" <model> & ü', "task": "ioi"}
    circuit = Scores(wiring, values, **facts, settings={"steps": 5, "points": [0.25]}).top(25)
    circuit.graph["faithfulness"] = 0.1 + 0.2
    return circuit


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_writes_a_file_and_nothing_else(circuit, tmp_path, name):
    path = tmp_path / f"circuit{FORMATS[name].suffix}"
    circuit.save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_size > 500


@pytest.mark.parametrize("name", READABLE)
def test_a_circuit_is_read_back_equal(circuit, tmp_path, name):
    path = tmp_path / f"circuit{FORMATS[name].suffix}"
    circuit.save(path)
    loaded = Circuit.load(path)
    assert type(loaded) is Circuit
    assert nx.utils.graphs_equal(loaded, circuit)
    assert loaded.edges_kept == circuit.edges_kept
    assert {type(loaded.graph[fact]) for fact in ("signed", "parallel")} == {bool}
    assert Wiring.of(loaded) == Wiring.of(circuit)


@pytest.mark.parametrize("name", HOLD_ANY_CIRCUIT)
def test_circuits_without_scores_with_positions_with_latents_or_empty_survive(tmp_path, name):
    path = tmp_path / "any.file"
    sparse = Circuit(task="greeting")
    sparse.keep("input@3", "a0.h1.v@3")
    sparse.keep("f0.1234", "logits", weight=-1e-12)
    for circuit in (sparse, Circuit(), Circuit(note="\u2028 üñ")):
        circuit.save(path, format=name)
        assert nx.utils.graphs_equal(Circuit.load(path, format=name), circuit)


@pytest.mark.parametrize("name", ["json", "graphml", "gexf", "attribution-graph", "eap-ig", "dot", "mermaid", "svg"])
def test_equal_circuits_make_equal_files(circuit, tmp_path, name):
    first, second = tmp_path / f"1{FORMATS[name].suffix}", tmp_path / f"2{FORMATS[name].suffix}"
    circuit.save(first)
    circuit.copy().save(second)
    assert first.read_bytes() == second.read_bytes()


def test_the_format_counts_and_not_the_suffix_when_it_is_given(circuit, tmp_path):
    circuit.save(tmp_path / "circuit.data", format="png")
    assert (tmp_path / "circuit.data").read_bytes().startswith(b"\x89PNG")


def test_our_json_is_one_edge_a_line(circuit, tmp_path):
    circuit.save(tmp_path / "circuit.json")
    writer, reader = circuit.edges_kept[0]
    weight = circuit.edges[writer, reader]["weight"]
    assert f'  "{writer}->{reader}": {{"weight": {weight!r}}},' in (tmp_path / "circuit.json").read_text().splitlines()


def test_dot_folds_ports_and_dashes_what_hurts(tmp_path):
    circuit = Circuit(task='say "hi"')
    circuit.keep("m0", "a1.h0.k", weight=-0.5)
    circuit.save(tmp_path / "circuit.dot")
    text = (tmp_path / "circuit.dot").read_text()
    assert '"m0" -> "a1.h0" [label="k", color="#D55E00", score="-0.5", style="dashed"];' in text
    assert r'"task"="say \"hi\"";' in text


def test_dot_draws_what_heads_share_as_a_part_of_its_own(tmp_path):
    circuit = Circuit(n_heads=4, n_key_value_heads=2)
    circuit.keep("m0", "a1.g1.k", weight=-0.5)
    circuit.save(tmp_path / "circuit.dot")
    text = (tmp_path / "circuit.dot").read_text()
    assert '"m0" -> "a1.g1.k" [label="k", color="#D55E00", score="-0.5", style="dashed"];' in text
    assert [line for line in text.splitlines() if '"a1.g1.k" ->' in line] == [
        f'  "a1.g1.k" -> "a1.h{head}" [color="#D55E00"];' for head in (2, 3)
    ]


def test_mermaid_has_a_box_a_layer_and_one_arrow_a_pair(tmp_path):
    circuit = Circuit(task="it's", model="toy", n_heads=4, n_key_value_heads=2)
    circuit.keep("input", "a0.h1.q", weight=2.0)
    circuit.keep("input", "a0.g0.k", weight=-0.5)
    circuit.keep("a0.h1", "m1@3", weight=-1.0)
    circuit.save(tmp_path / "circuit.mmd")
    assert (tmp_path / "circuit.mmd").read_text().splitlines() == [
        "---",
        "title: 'it''s on toy: 2 arrows'",
        "---",
        "flowchart BT",
        '  input(["input"])',
        '  subgraph layer0 ["layer 0"]',
        '    a0_h1["a0.h1"]',
        "  end",
        '  subgraph layer1 ["layer 1"]',
        '    m1_at_3{{"m1@3"}}',
        "  end",
        '  input -- "qk +1.5" --> a0_h1',
        '  a0_h1 -. "-1" .-> m1_at_3',
    ]


def test_mermaid_shows_no_more_than_pages_draw_and_says_so(circuit):
    lines = mermaid(circuit, most=3).splitlines()
    assert sum("-->" in line or ".->" in line for line in lines) == 3
    assert "the 3 strongest of" in lines[1]


def test_every_format_says_who_opens_it():
    assert all(format.what and format.suffix.startswith(".") for format in FORMATS.values())
    assert len({format.suffix for format in FORMATS.values()}) == len(FORMATS)


@pytest.mark.parametrize("suffix", [".dot", ".mmd", ".png", ".svg", ".pdf"])
def test_formats_for_looking_say_what_to_load_instead(circuit, tmp_path, suffix):
    circuit.save(tmp_path / f"circuit{suffix}")
    with pytest.raises(CircuitError, match=r"for looking, not for loading. Save as \.json"):
        Circuit.load(tmp_path / f"circuit{suffix}")


@pytest.mark.parametrize("name", ["circuit", "circuit.pkl", "circuit.json.gz"])
def test_an_unknown_suffix_lists_the_known_ones(circuit, tmp_path, name):
    with pytest.raises(CircuitError, match=r"no suffix that says.*\.json.*\.graphml.*\.gexf.*\.dot"):
        circuit.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_an_unknown_format_names_the_nearest(circuit, tmp_path):
    with pytest.raises(CircuitError, match=r"'graphxml' is not a format.*Did you mean 'graphml'"):
        circuit.save(tmp_path / "circuit", format="graphxml")


@pytest.mark.parametrize("name", READABLE)
def test_a_truncated_file_is_named(circuit, tmp_path, name):
    path = tmp_path / f"circuit{FORMATS[name].suffix}"
    circuit.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(CircuitError, match=r"circuit\..*truncated"):
        Circuit.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format": "mechinterp circuit", "version": 2, "facts": {}, "nodes": {}, "edges": {}}, "version 2"),
        ({"nodes": [], "edges": []}, 'lacks the entry "format"'),
        ([1, 2], 'lacks the entry "format"'),
        ({"format": "mechinterp circuit", "version": 1, "facts": {}, "nodes": {}}, "lacks 'edges'"),
        (
            {"format": "mechinterp circuit", "version": 1, "facts": {}, "nodes": {"a1.x": {}}, "edges": {}},
            "'a1.x' is not the name of a node",
        ),
        (
            {"format": "mechinterp circuit", "version": 1, "facts": {}, "nodes": {}, "edges": {"m0->logits": {}}},
            "does not list",
        ),
        ({"format": "mechinterp circuit", "version": 1, "facts": 3, "nodes": {}, "edges": {}}, "not a circuit"),
    ],
)
def test_json_that_is_no_circuit_is_named_with_what_is_wrong(tmp_path, content, message):
    (tmp_path / "foreign.json").write_text(json.dumps(content))
    with pytest.raises(CircuitError, match=rf"foreign\.json.*{message}"):
        Circuit.load(tmp_path / "foreign.json")


@pytest.mark.parametrize("name", ["graphml", "gexf", "node-link"])
def test_a_graph_of_something_else_is_named(tmp_path, name):
    path = tmp_path / f"friends{FORMATS[name].suffix}"
    friends = nx.DiGraph([("Ann", "Bob")])
    if name == "node-link":
        path.write_text(json.dumps(nx.node_link_data(friends, edges="edges")))
    else:
        {"graphml": nx.write_graphml_xml, "gexf": nx.write_gexf}[name](friends, path)
    with pytest.raises(CircuitError, match=r"friends.*'Ann' is not the name of a node"):
        Circuit.load(path)


@pytest.mark.parametrize("name", ["graphml", "gexf"])
def test_facts_that_are_not_scalars_are_refused_by_name(circuit, tmp_path, name):
    circuit.graph["sizes"] = [1, 2]
    with pytest.raises(CircuitError, match=r"'sizes' of circuit is \[1, 2\].*Save as \.json"):
        circuit.save(tmp_path / f"circuit.{name}")
    circuit.save(tmp_path / "circuit.json")
    assert Circuit.load(tmp_path / "circuit.json").graph["sizes"] == [1, 2]


def test_a_weight_that_is_not_finite_is_refused_and_the_old_file_stays(circuit, tmp_path):
    circuit.save(tmp_path / "circuit.json")
    before = (tmp_path / "circuit.json").read_bytes()
    circuit.edges[circuit.edges_kept[0]]["weight"] = float("nan")
    with pytest.raises(CircuitError, match="JSON cannot hold"):
        circuit.save(tmp_path / "circuit.json")
    assert (tmp_path / "circuit.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_missing_folder_is_not_created(circuit, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        circuit.save(tmp_path / "nowhere" / "circuit.json")
    assert not (tmp_path / "nowhere").exists()


def test_other_programs_find_their_attributes(circuit, tmp_path):
    circuit.save(tmp_path / "circuit.graphml")
    graph = nx.read_graphml(tmp_path / "circuit.graphml")
    head = next(node for node in circuit.heads)
    assert graph.nodes[str(head)] == {"kind": "head", "layer": head.layer, "head": head.index}
    assert graph.graph["task"] == "ioi"
    assert Node.parse(next(iter(graph))).kind == "input"


def test_a_file_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*nosuch.json'. Name one that `save`"):
        Circuit.load(tmp_path / "nosuch.json")
