"""Published circuits: the numbers their authors print, the lists that others compiled, and what must hold of any list."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from circuits.class_edges import IOI_CLASS_EDGES, between
from circuits.edges import edge_name
from circuits.graph import Circuit
from circuits.ground_truth import heads_of
from circuits.published import IOI, PUBLISHED, minimality_sets
from circuits.statistics import auroc
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError
from mechinterp.models import builtin
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.nodes import Node
from mechinterp.tasks import TASKS

WITH_EDGES = [name for name, circuit in PUBLISHED.items() if circuit.rule]
ONLY_HEADS = [name for name in PUBLISHED if name not in WITH_EDGES]


def names(nodes) -> set[str]:
    return set(map(str, nodes))


def edge_names(circuit: Circuit) -> set[str]:
    return {edge_name(*edge) for edge in circuit.edges_kept}


@pytest.mark.parametrize(
    ("name", "n_edges", "n_without_mlps", "n_as_acdc_counts"),
    [("ioi", 963, 182, 1041), ("greater-than", 235, 69, 262), ("docstring", 24, 24, 37)],
)
def test_acdc_edge_sets_have_the_published_sizes(name, n_edges, n_without_mlps, n_as_acdc_counts):
    published = PUBLISHED[name]
    assert published.circuit().n_edges_kept == n_edges
    assert published.circuit(include_mlps=False).n_edges_kept == n_without_mlps
    assert n_edges + published.n_direct_edges == n_as_acdc_counts


def test_where_the_963_edges_of_ioi_run():
    kinds = [f"{writer.kind}-{reader.kind}" for writer, reader in IOI.circuit().edges_kept]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "head-head": 124,
        "head-mlp": 123,
        "head-logits": 13,
        "input-head": 45,
        "input-mlp": 12,
        "input-logits": 1,
        "mlp-head": 567,
        "mlp-mlp": 66,
        "mlp-logits": 12,
    }


def test_acdc_knows_fifteen_class_edges():
    assert len(set(IOI_CLASS_EDGES)) == 15


# Counted by running the rules of the two repositories on the wiring of GPT-2 small.
@pytest.mark.parametrize(
    ("name", "n_edges", "n_without_mlps"),
    [
        ("ioi-auto-circuit", 771, 182),
        ("ioi-auto-circuit-unplaced", 739, 182),
        ("ioi-auto-circuit-m0", 242, 182),
        ("ioi-eap-ig", 215, 213),
        ("greater-than-eap-ig", 240, 89),
    ],
)
def test_other_edge_sets_have_the_sizes_that_their_code_gives(name, n_edges, n_without_mlps):
    published = PUBLISHED[name]
    assert published.circuit().n_edges_kept == n_edges
    assert published.circuit(include_mlps=False).n_edges_kept == n_without_mlps


def test_between_heads_auto_circuit_is_acdc():
    whole, without_mlps = edge_names(IOI.circuit()), edge_names(IOI.circuit(include_mlps=False))
    for name in ("ioi-auto-circuit", "ioi-auto-circuit-unplaced", "ioi-auto-circuit-m0"):
        assert edge_names(PUBLISHED[name].circuit(include_mlps=False)) == without_mlps
        assert edge_names(PUBLISHED[name].circuit()) < whole


def test_without_positions_auto_circuit_loses_just_the_mlps_into_the_logits():
    lost = edge_names(PUBLISHED["ioi-auto-circuit"].circuit()) - edge_names(PUBLISHED["ioi-auto-circuit-unplaced"].circuit())
    assert {"m9->logits", "m10->logits", "m11->logits", "a9.h9->m9", "m9->m11", "m10->m11"} < lost
    assert all(name.split("->")[1] in ("logits", "m9", "m10", "m11") for name in lost)


def test_ioi_by_hand():
    edges = edge_names(IOI.circuit())
    assert {"a2.h2->a5.h5.k", "a5.h5->a7.h3.v", "a8.h10->a9.h9.q", "input->a9.h9.k", "a11.h10->logits"} <= edges
    assert not {"a2.h2->a5.h5.q", "a3.h0->a5.h5.k", "a9.h9->a10.h0.q", "input->a9.h9.q", "a5.h5->logits"} & edges


def test_ioi_as_eap_ig_has_it_by_hand():
    edges = edge_names(PUBLISHED["ioi-eap-ig"].circuit())
    assert {"a2.h2->a5.h5.q", "a3.h0->a5.h5.k", "a5.h5->a6.h9.q", "a9.h9->a10.h0.q", "a9.h7->m11", "m11->logits"} <= edges
    assert not {"a2.h2->a5.h5.k", "a3.h0->a7.h3.k", "a10.h0->a11.h2.q", "a9.h9->a10.h7.q", "a9.h9->m11"} & edges


def test_greater_than_by_hand():
    edges = edge_names(PUBLISHED["greater-than"].circuit())
    assert {"a0.h1->m0", "a8.h11->m8", "m0->m8", "m5->a6.h1.q", "m4->m5"} <= edges
    assert not {"a0.h3->m0", "a9.h1->m8", "m5->a6.h1.k", "m8->a8.h11.q", "m0->m9"} & edges
    assert not {"m5->a6.h1.q", "m4->m5"} & edge_names(PUBLISHED["greater-than-eap-ig"].circuit())


def test_heads_that_the_lists_disagree_on():
    def heads(name: str) -> set[str]:
        return names(PUBLISHED[name].heads())

    assert heads("ioi-discrete-sae") ^ heads("ioi") == {"a11.h3", "a9.h0"}
    assert heads("ioi") - heads("ioi-naive") == names(IOI.heads("backup name mover")) | {
        *("a10.h7", "a11.h10"),
        *("a5.h8", "a6.h9", "a0.h1"),
    }
    assert heads("greater-than-hanna") - heads("greater-than") == {"a5.h1", "a8.h8"}
    assert heads("greater-than") - heads("greater-than-hanna") == {"a6.h1"}
    assert heads("greater-than-eap-ig") == heads("greater-than") | heads("greater-than-hanna")
    assert heads("greater-than-cd-t") == heads("greater-than-eap-ig") - {"a0.h1", "a0.h3", "a0.h5"}
    assert heads("greater-than-discrete-sae") == heads("greater-than")
    assert heads("greater-than") & heads("ioi") == {"a0.h1", "a5.h5", "a6.h9"}
    assert heads("docstring-discrete-sae") ^ heads("docstring") == {"a1.h0", "a1.h2"}
    assert heads("docstring-post") - heads("docstring") == {"a0.h2", "a0.h4", "a1.h0", "a0.h1", "a2.h3"}
    assert heads("colored-objects") & heads("ioi-medium") == {
        *("a15.h14", "a16.h15", "a17.h4", "a18.h5", "a19.h15"),
        *("a9.h3", "a6.h4"),
    }


def test_how_many_heads_each_list_has():
    counts = {"ioi": 26, "ioi-naive": 13, "ioi-discrete-sae": 26, "greater-than-discrete-sae": 9, "docstring-discrete-sae": 6}
    assert {name: len(PUBLISHED[name].heads()) for name in counts} == counts


def test_minimality_sets():
    sets = minimality_sets()
    assert set(sets) == set(IOI.heads())
    assert all(head in members for head, members in sets.items())
    assert [len(sets[head]) for head in IOI.heads("name mover")] == [1, 2, 3]
    assert names(sets[Node.parse("a10.h6")]) == {"a9.h9", "a10.h0", "a9.h6", "a10.h10", "a10.h6"}
    assert sets[Node.head(9, 0)] == sets[Node.head(11, 9)]
    assert len(sets[Node.head(9, 0)]) == 13
    assert names(sets[Node.head(5, 8)]) == {"a10.h7", "a11.h10", "a5.h8"}
    assert names(sets[Node.head(5, 9)]) == {"a10.h7", "a11.h10", "a5.h9"}
    assert sets[Node.head(6, 9)] == IOI.heads("induction")


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_entry_tells_what_a_reader_needs(name):
    published = PUBLISHED[name]
    assert published.name == name
    assert published.task in TASKS
    assert published.citation.where
    assert published.ablation
    assert published.notes
    assert str(published.citation.year) in str(published.citation)
    assert repr(published).startswith(f"PublishedCircuit({name!r}")


@pytest.mark.parametrize("task", TASKS)
def test_positions_bear_the_names_that_the_tasks_use(task):
    tokenizer = Tokenizer.from_directory(Path(builtin.__path__[0]), "builtin")
    known = set(TASKS[task](SimpleNamespace(tokenizer=tokenizer), n_prompts=4).prompts.positions)
    for published in (circuit for circuit in PUBLISHED.values() if circuit.task == task):
        assert {label for where in published.positions.values() for label in where} <= known


@pytest.mark.parametrize("name", WITH_EDGES)
def test_edges_are_a_circuit_of_the_model(name):
    published = PUBLISHED[name]
    circuit = published.edges
    assert Wiring.of(circuit) == published.wiring
    assert published.edge_truth().sum() == circuit.n_edges_kept
    assert names(circuit.heads) == names(published.heads())
    assert circuit.graph["model"] == published.model


@pytest.mark.parametrize("name", ONLY_HEADS)
def test_where_only_heads_are_published_the_error_says_what_there_is(name):
    assert PUBLISHED[name].edges is None
    with pytest.raises(CircuitError, match=f"Only heads are published for '{name}'. Judge heads by head_truth"):
        PUBLISHED[name].circuit()


@pytest.mark.parametrize("name", ["ioi-naive", "docstring-post"])
def test_node_circuit_cuts_exactly_what_other_heads_write(name):
    published = PUBLISHED[name]
    writers = {writer for writer, _ in published.node_circuit().edges_kept}
    assert {writer for writer in writers if writer.kind == "head"} == set(published.heads())
    assert {writer for writer in published.wiring.writers if writer.kind != "head"} < writers


def test_node_circuit_of_ioi_is_auto_circuits_head_based_circuit():
    """Counted by running their rule; 26 of 144 heads keep what they write."""
    assert IOI.node_circuit().n_edges_kept == 6540


def test_a_ranking_that_knows_the_list_is_perfect_and_one_that_does_not_is_chance():
    scores = heads_of(IOI.wiring, IOI.node_truth().astype(float))
    assert auroc(scores, IOI.head_truth()) == 1
    assert auroc(np.zeros(144), IOI.head_truth()) == 0.5
    edges = IOI.edge_truth()
    assert auroc(edges.astype(float), edges) == 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_truth_counts_what_is_named(name):
    published = PUBLISHED[name]
    assert published.head_truth().sum() == len(published.heads())
    assert published.node_truth().sum() == len(published.heads()) + len(published.mlps())
    assert len(published.head_truth()) == published.wiring.n_layers * published.wiring.n_heads
    assert not published.node_truth()[0]


def test_heads_of_wants_one_value_a_writer():
    with pytest.raises(CircuitError, match="one value a writer, 157, not"):
        heads_of(IOI.wiring, np.zeros(144))


def test_an_unknown_class_suggests_the_nearest():
    with pytest.raises(CircuitError, match="no class 'name movers'.*Did you mean 'name mover'"):
        IOI.heads("name movers")


def test_a_list_that_cannot_be_right_is_refused():
    head = Node.head(12, 0)
    with pytest.raises(CircuitError, match="'a12.h0', which 'gpt2'"):
        replace(IOI, classes={"mover": (head,)}, positions={})
    with pytest.raises(CircuitError, match="'a9.h9' twice"):
        replace(IOI, classes={"mover": (Node.head(9, 9),), "backup": (Node.head(9, 9),)}, positions={})
    with pytest.raises(CircuitError, match="positions for"):
        replace(IOI, classes={"mover": (Node.head(9, 9),)})


def test_between_takes_only_edges_that_exist():
    heads = [Node.head(1, 0), Node.head(1, 1), Node.head(0, 0)]
    assert sorted(edge_name(*edge) for edge in between(heads, [*heads, Node.mlp(0), Node.logits()], "k")) == [
        *("a0.h0->a1.h0.k", "a0.h0->a1.h1.k", "a0.h0->logits", "a0.h0->m0", "a1.h0->logits", "a1.h1->logits"),
    ]


def test_published_circuits_travel_to_other_processes():
    copy = pickle.loads(pickle.dumps(PUBLISHED["ioi"]))
    assert copy == PUBLISHED["ioi"]
    assert edge_names(copy.circuit()) == edge_names(IOI.circuit())


def test_looking_them_up_loads_no_torch():
    code = "import sys; from circuits.published import PUBLISHED; PUBLISHED['ioi'].circuit(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


TRUE_EDGES = Path(__file__).parents[3] / "shared" / "data" / "tasks"


def compiled(file: str) -> dict:
    path = TRUE_EDGES / file
    if not path.is_file():
        pytest.skip(f"the compiled edge lists are not beside this checkout: there is no {path.name}")
    return json.loads(path.read_text())


def ours(theirs: str) -> str:
    """``A9.6.Q`` -> ``a9.h6.q``, ``M4`` -> ``m4``, ``EMBED`` -> ``input``, ``OUT`` -> ``logits``."""
    if theirs in ("EMBED", "OUT"):
        return {"EMBED": "input", "OUT": "logits"}[theirs]
    return theirs.lower() if theirs.startswith("M") else theirs.lower().replace(".", ".h", 1)


def as_names(edges: list[list[str]]) -> set[str]:
    return {f"{ours(writer)}->{ours(reader)}" for writer, reader in edges}


def as_nodes(pairs: list[list[int | None]]) -> tuple[Node, ...]:
    return tuple(Node.mlp(layer) if head is None else Node.head(layer, head) for layer, head in pairs)


def test_ioi_equals_the_compiled_list_edge_by_edge():
    listed = compiled("true_edges_ioi_gpt2small.json")
    assert edge_names(IOI.circuit()) == as_names(listed["edges_acdc_with_mlp"])
    assert edge_names(IOI.circuit(include_mlps=False)) == as_names(listed["edges_no_mlp"])
    for name, heads in listed["heads"].items():
        ours_ = {"s_inhibition": "S-inhibition"}.get(name, name.replace("_", " "))
        assert IOI.classes[ours_] == as_nodes(heads)
        assert IOI.positions[ours_] == (listed["positions"][name],)
        assert PUBLISHED["ioi-naive"].classes.get(ours_, ()) == as_nodes(listed["naive_circuit"].get(name, []))


def test_greater_than_equals_the_compiled_list_edge_by_edge():
    listed, published = compiled("true_edges_greater_than_gpt2small.json"), PUBLISHED["greater-than"]
    assert edge_names(published.circuit()) == as_names(listed["edges"])
    assert list(published.classes.values()) == [as_nodes(group) for group in listed["groups"].values()]


def test_docstring_equals_the_compiled_list_edge_by_edge():
    listed, published = compiled("true_edges_docstring_attnonly4l.json"), PUBLISHED["docstring"]
    assert edge_names(published.circuit()) == as_names(listed["edges"])
    assert names(node for node in published.circuit() if node.port) == set(map(ours, listed["direct_qkv"]))
    assert set(published.heads()) == set(as_nodes(listed["heads"]["in_edge_graph"]))
    extra = PUBLISHED["docstring-post"]
    assert set(extra.heads("extra for performance")) == set(as_nodes(listed["heads"]["extra_for_performance"]))
    assert {*extra.heads("previous token"), *extra.heads("position")} == set(as_nodes(listed["heads"]["named_minor"]))
