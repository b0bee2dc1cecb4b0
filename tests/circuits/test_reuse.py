"""Tasks compared on one model: a task with itself is the same in every table, and the union graph keeps whose what is."""

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from circuits import Circuit, Wiring, evaluate
from circuits.reuse.comparing import by_name, circuits_at, compare_tasks, score_tasks
from circuits.reuse.picture import draw_reuse
from circuits.reuse.report import RANDOM, Reuse
from circuits.reuse.union import shared_by, tasks_of, union_graph
from mechinterp.errors import CircuitError
from mechinterp.models.compiled import induction
from mechinterp.nodes import Node

QUICK: dict[str, Any] = {"n_draws": 10, "n_random": 2, "allow_unsolved": True, "sizes": (0.05, 0.2)}


@pytest.fixture(scope="module")
def tasks(plain, make_task):
    """Of seeds whose corruption moves the metric for sure."""
    return {"one": make_task(plain, seed=17), "same": make_task(plain, seed=17), "other": make_task(plain, seed=34)}


@pytest.fixture(scope="module", params=["eap", "patching"])
def found(request, plain, tasks) -> Reuse:
    return compare_tasks(plain, tasks, request.param, **QUICK)


@pytest.fixture(scope="module", params=["plain", "llama"])
def circuits(request, make_model, tasks) -> dict[str, Circuit]:
    return circuits_at(score_tasks(make_model(request.param), tasks, "eap", allow_unsolved=True), 0.1)


@pytest.fixture(scope="module")
def union(circuits) -> Circuit:
    return union_graph(circuits)


def test_a_task_shares_all_with_itself_and_its_circuit_does_the_same(found):
    twins = [one for one in found.overlaps if one.names == ("one", "same")]
    assert len(twins) >= 3  # two levels, two cuts
    assert {(one.jaccard, one.coefficient) for one in twins} == {(1, 1)}
    assert {(rank.magnitude, rank.signed) for rank in found.ranks if rank.names == ("one", "same")} == {(1, 1)}
    at = {(one.circuit, one.task, one.cut): one.faithfulness for one in found.transfers}
    for cut in found.cuts:
        assert at["one", "other", cut] == at["same", "other", cut]
        assert at["other", "one", cut] == at["other", "same", cut]
        assert (RANDOM, "one", cut) in at


def test_faithfulness_across_tasks_is_what_evaluate_says(plain, tasks, found):
    scores = score_tasks(plain, tasks, found.method, allow_unsolved=True)
    circuit = circuits_at(scores, 0.2)["one"]
    report = evaluate(plain, tasks["other"], circuit, allow_unsolved=True, n_random=0)
    (transfer,) = [one for one in found.transfers if (one.circuit, one.task, one.cut) == ("one", "other", 0.2)]
    assert transfer.n_edges == circuit.n_edges_kept
    assert transfer.faithfulness == pytest.approx(report.faithfulness)
    assert (transfer.low, transfer.high) == pytest.approx(report.interval)


def test_edges_and_nodes_are_compared_at_their_levels(found):
    levels = list(dict.fromkeys(one.level for one in found.overlaps))
    assert levels == (["edge", "node"] if found.method == "eap" else ["node", "head"])
    assert all((one.same_degrees is not None) == (one.level == "edge") for one in found.overlaps)
    nodes = {(parts.task, parts.cut): set(parts.names) for parts in found.parts}
    for one in found.overlaps:
        if one.level == "node" and len(one.names) == 2:
            assert set(one.shared) == nodes[one.names[0], one.cut] & nodes[one.names[1], one.cut]


def test_what_is_saved_is_read_back_equal(found, tmp_path):
    found.save(tmp_path / "reuse.json")
    assert Reuse.load(tmp_path / "reuse.json") == found
    document = json.loads((tmp_path / "reuse.json").read_text())
    del document["overlaps"]
    (tmp_path / "broken.json").write_text(json.dumps(document))
    with pytest.raises(CircuitError, match=r"broken.json' does not hold usable findings"):
        Reuse.load(tmp_path / "broken.json")


def test_the_tables_say_it_all(found):
    text = str(found)
    for part in ("one, same, other on plain by", "Jaccard", "by chance", "Spearman", "circuit of", "random circuits", "20 %"):
        assert part in text
    assert "-0.00" not in text
    for title, head, rows in found.tables():
        assert title
        assert {len(row) for row in rows} == {len(head)}


def test_the_picture_is_written(found, tmp_path):
    figure = draw_reuse(found, tmp_path / "reuse.png", cut=0.2)
    assert (tmp_path / "reuse.png").read_bytes().startswith(b"\x89PNG")
    assert len(figure.axes) == 4  # the map, two levels, and faithfulness
    titles = " ".join(axes.get_title(loc="left") for axes in figure.axes)
    assert "20 % of the nodes" in titles
    for settings, complaint in (({"cut": 0.3}, "nothing was cut at 0.3"), ({"path": "reuse.txt"}, "written as .png")):
        with pytest.raises(CircuitError, match=complaint):
            draw_reuse(found, **settings)


def test_other_prompts_of_the_same_task_are_the_ceiling(plain, tasks):
    named = {name: tasks[name] for name in ("one", "other")}
    found = compare_tasks(plain, named, "patching", again=named, on=named, **QUICK)
    assert [one.names for one in found.ceilings] == [("one", "one again")] * 2 + [("other", "other again")] * 2
    assert {one.jaccard for one in found.ceilings} == {1}
    assert "The same task on other prompts" in str(found)


def test_scores_of_planted_circuits_are_found_again_in_the_union():
    """The planted circuit of five edges is all that the task needs, whoever asks."""
    planted = induction(n_prompts=8)
    scores = score_tasks(planted.model, {"first": planted.task, "second": planted.task}, "eap")
    circuits = circuits_at(scores, 5 / len(scores["first"]))
    union = union_graph(circuits)
    assert {f"{writer}->{reader}" for writer, reader in union.edges_kept} == set(planted.circuit_edges)
    assert {facts["tasks"] for _, _, facts in union.edges(data=True)} == {"first,second"}


@pytest.mark.parametrize("suffix", [".json", ".graphml", ".gexf", ".node-link.json"])
def test_the_union_graph_survives_every_format(union, tmp_path, suffix):
    union.save(tmp_path / f"union{suffix}")
    back = Circuit.load(tmp_path / f"union{suffix}")
    assert dict(back.nodes(data=True)) == dict(union.nodes(data=True))
    assert {edge: union.edges[edge] for edge in union.edges} == {edge: back.edges[edge] for edge in back.edges}
    assert back.graph == union.graph
    assert Wiring.of(back).mask(back).sum() == union.n_edges_kept


def test_every_node_and_edge_of_the_union_says_whose_it_is(circuits, union):
    assert set(union.edges) == set().union(*(circuit.edges for circuit in circuits.values()))
    for name, circuit in circuits.items():
        assert {node for node in union if name in tasks_of(union.nodes[node])} == set(circuit.nodes)
        for edge in circuit.edges_kept:
            assert union.edges[edge][f"weight.{name}"] == circuit.edges[edge]["weight"]
    assert max(abs(union.edges[edge]["weight"]) for edge in union.edges_kept) == 1
    plain_graph = union.to_networkx()
    assert all(isinstance(facts["tasks"], str) for _, facts in plain_graph.nodes(data=True))


def test_what_all_share_is_the_intersection(circuits, union):
    masks = [Wiring.of(union).mask(circuit) for circuit in circuits.values()]
    shared = shared_by(union)
    assert np.array_equal(Wiring.of(union).mask(shared), np.logical_and.reduce(masks))
    assert np.array_equal(Wiring.of(union).mask(shared_by(union, "one", "same")), masks[0])
    with pytest.raises(CircuitError, match="'two' is no task of this graph, which joins one, same, other"):
        shared_by(union, "two")


def test_a_shared_key_that_tasks_use_for_different_edges_of_a_head_is_tied_to_that_head_alone():
    sizes: dict[str, Any] = {"n_layers": 2, "n_heads": 4, "n_key_value_heads": 2}
    by_task = {name: Circuit(**sizes) for name in ("one", "other", "third")}
    for name, edge in (("one", ("a1.h0", "logits")), ("other", ("input", "a1.h0.q")), ("third", ("a1.h1", "logits"))):
        by_task[name].keep(*edge)
    for name in ("one", "other"):
        by_task[name].keep("input", "a1.g0.k")
    shared = shared_by(union_graph(by_task), "one", "other")
    assert [(str(start), str(end)) for start, end in shared.edges] == [("input", "a1.g0.k"), ("a1.g0.k", "a1.h0")]
    assert all("one" in tasks_of(shared.nodes[node]) for node in shared)


def test_the_union_of_node_circuits_has_no_weights(plain, tasks):
    union = union_graph(circuits_at(score_tasks(plain, tasks, "patching", allow_unsolved=True), 0.3))
    assert not [edge for edge in union.edges if "weight" in union.edges[edge]]
    assert tasks_of(union.nodes[Node.input()]) == ("one", "same", "other")


@pytest.mark.parametrize(
    ("circuits", "complaint"),
    [
        ({}, "no circuit to join"),
        ({"a,b": Circuit()}, "commas stand between names"),
        ({"a": Circuit(n_layers=3), "b": Circuit(n_layers=4)}, "n_layers=3 and 'b' n_layers=4"),
        ({"a": Circuit(n_heads=4), "b": Circuit(n_heads=4, n_key_value_heads=2)}, "'a' has n_key_value_heads=4 and 'b'"),
        ({"a": Circuit(model="x"), "b": Circuit(model="y")}, "model='x'"),
    ],
)
def test_unions_that_make_no_sense_are_refused(circuits, complaint):
    with pytest.raises(CircuitError, match=complaint):
        union_graph(circuits)


def test_comparisons_that_make_no_sense_are_refused(plain, tasks):
    with pytest.raises(CircuitError, match="two of the tasks are called 'nonsense'"):
        by_name([tasks["one"], tasks["other"]])
    with pytest.raises(CircuitError, match="it takes two tasks"):
        compare_tasks(plain, {"one": tasks["one"]}, "patching", **QUICK)
    with pytest.raises(CircuitError, match="count neurons.*such as 'eap-ig' or 'patching'"):
        compare_tasks(plain, tasks, "neurons", **QUICK)
    with pytest.raises(CircuitError, match="on is of one; give the tasks one, same, other"):
        compare_tasks(plain, tasks, "patching", on={"one": tasks["one"]}, **QUICK)
    with pytest.raises(CircuitError, match="n_random=-1: give 0 or more"):
        compare_tasks(plain, tasks, "eap", n_random=-1)
    with pytest.raises(CircuitError, match="1.5 is no share"):
        compare_tasks(plain, tasks, "patching", **QUICK | {"sizes": (1.5,)})


def test_where_the_ablation_moves_nothing_faithfulness_is_undefined(plain, tasks, make_task):
    """Overlap still has a meaning there, and the other task's columns as well."""
    found = compare_tasks(plain, {"moved": tasks["one"], "still": make_task(plain, seed=0)}, "patching", **QUICK)
    undefined = {one.task for one in found.transfers if one.faithfulness is None}
    assert undefined == {"still"}
    assert "| undefined |" in str(found)
    draw_reuse(found)


def test_scores_of_one_method_are_asked_for(plain, tasks):
    nodes, edges = (
        score_tasks(plain, {"one": tasks["one"]}, method, allow_unsolved=True)["one"] for method in ("patching", "eap")
    )
    with pytest.raises(CircuitError, match="count edge and nodes"):
        compare_tasks(plain, {"one": tasks["one"], "other": tasks["other"]}, scores={"one": nodes, "other": edges}, **QUICK)


def test_larger_cuts_hold_smaller_ones(found):
    by_cut = {(parts.task, parts.cut): set(parts.names) for parts in found.parts}
    cuts = sorted({cut for _, cut in by_cut})
    for task in found.tasks:
        assert all(by_cut[task, small] <= by_cut[task, large] for small, large in pairwise(cuts))
