"""A circuit is a networkx graph and stays one."""

import networkx as nx
import numpy as np
import pytest

from circuits import Circuit, Wiring
from circuits.ends import Ends
from mechinterp.errors import CircuitError
from mechinterp.nodes import Node

EDGES = {"input->a0.h1.v": 0.5, "a0.h1->a1.h0.q": 2.0, "a0.h1->a1.h0.k": -1.5, "a1.h0->logits": 3.0}
DANGLING = {"a0.h0->logits": 0.1, "input->a1.h1.k": 0.2, "a0.h0->m1": 0.3}


def circuit_of(edges, **facts) -> Circuit:
    circuit = Circuit(**({"model": "toy", "task": "greeting", "n_layers": 2, "n_heads": 2} | facts))
    for name, weight in edges.items():
        circuit.keep(*name.split("->"), weight=weight)
    return circuit


def test_paths_run_through_ports():
    path = nx.shortest_path(circuit_of(EDGES), Node.input(), Node.logits())
    assert [str(node) for node in path][:4] == ["input", "a0.h1.v", "a0.h1", "a1.h0.q"]
    assert nx.is_directed_acyclic_graph(circuit_of(EDGES))


def test_port_edges_are_not_counted():
    circuit = circuit_of(EDGES)
    assert (circuit.n_edges_kept, circuit.number_of_edges()) == (4, 7)
    assert len(circuit.edges_kept) == 4


def test_kept_edges_come_in_wiring_order_however_they_were_added():
    names = list(EDGES | DANGLING)
    forwards, backwards = (circuit_of(dict.fromkeys(order, 1.0)) for order in (names, names[::-1]))
    assert forwards.edges_kept == backwards.edges_kept
    indices = [Wiring.of(forwards).index(*edge) for edge in forwards.edges_kept]
    assert indices == sorted(indices)


@pytest.mark.parametrize(
    "same",
    [
        lambda circuit: circuit.copy(),
        lambda circuit: circuit.subgraph(list(circuit)),
        lambda circuit: circuit.edge_subgraph(circuit.edges),
        lambda circuit: circuit.reverse().reverse(),
        lambda circuit: Circuit(circuit),
    ],
)
def test_what_networkx_derives_is_an_equal_circuit(same):
    circuit = circuit_of(EDGES)
    derived = same(circuit)
    assert type(derived) is Circuit
    assert nx.utils.graphs_equal(derived, circuit)
    assert derived.edges_kept == circuit.edges_kept


def test_components_fold_ports_and_add_their_scores():
    folded = circuit_of(EDGES).components()
    assert [str(node) for node in folded] == ["input", "a0.h1", "a1.h0", "logits"]
    pair = folded.edges[Node.head(0, 1), Node.head(1, 0)]
    assert pair == {"ports": "qk", "weight": 0.5, "strength": 3.5}
    assert folded.edges[Node.head(1, 0), Node.logits()]["ports"] == ""


def test_an_edge_into_what_heads_share_is_folded_into_each_and_counted_once():
    circuit = Circuit(n_heads=4, n_key_value_heads=2)
    for edge, weight in {"m0->a1.g1.k": -3.0, "m0->a1.h2.q": 1.0, "a1.h2->logits": 2.0, "a1.h3->logits": 0.5}.items():
        circuit.keep(*edge.split("->"), weight=weight)
    folded = circuit.components()
    assert [str(node) for node in folded] == ["m0", "a1.h2", "a1.h3", "logits"]
    assert folded.edges[Node.mlp(0), Node.head(1, 2)] == {"ports": "qk", "weight": -0.5, "strength": 2.5}
    assert folded.edges[Node.mlp(0), Node.head(1, 3)] == {"ports": "k", "weight": -1.5, "strength": 1.5}
    assert (circuit.n_edges_kept, circuit.heads) == (4, [Node.head(1, 2), Node.head(1, 3)])


@pytest.mark.parametrize("n_groups", [None, 2, 1])
def test_folded_edges_sum_to_the_edges(n_groups):
    wiring, rng = Wiring(2, 4, n_key_value_heads=n_groups), np.random.default_rng(0)
    values, mask = rng.normal(size=wiring.n_edges), rng.random(wiring.n_edges) < 0.3
    folded = wiring.circuit(mask, values).components()
    assert folded.size("weight") == pytest.approx(values[mask].sum())
    assert folded.size("strength") == pytest.approx(np.abs(values[mask]).sum())
    assert not any(node.port or node.kind == "group" for node in folded)


def test_what_heads_share_is_refused_where_nobody_says_which_heads():
    with pytest.raises(CircuitError, match=r"'a0\.g1\.k' is shared by several heads.*Circuit\(n_heads=..., n_key_value_heads"):
        Circuit().keep("input", "a0.g1.k")


def test_at_a_position_heads_share_at_that_position():
    circuit = Circuit(n_heads=4, n_key_value_heads=2)
    circuit.keep("a0.h3@5", "logits@5")
    circuit.keep("input@2", "a0.g1.v@5")
    circuit.keep("input@2", "a0.g1.v@4")
    assert [str(head) for head in circuit.heads] == ["a0.h2@4", "a0.h3@4", "a0.h3@5"]


def test_pruning_drops_exactly_what_is_on_no_path():
    whole, clean = circuit_of(EDGES | DANGLING), circuit_of(EDGES)
    pruned = whole.pruned()
    assert pruned.edges_kept == clean.edges_kept
    assert pruned.graph["n_edges_pruned"] == 3
    assert pruned.pruned().graph["n_edges_pruned"] == 3
    assert whole.n_edges_kept == 7


@pytest.mark.parametrize(("variant", "is_joint"), [("plain", False), ("llama", False), ("gemma2", True), ("olmo2", True)])
def test_pruning_changes_no_number_under_resampling_but_where_heads_share_a_normalisation(
    make_model, make_task, variant, is_joint
):
    model = make_model(variant)
    task, wiring = make_task(model), Wiring.of(model.config)
    kept = np.random.default_rng(3).random((3, wiring.n_edges)) < 0.3
    pruned = np.stack([wiring.mask(wiring.circuit(mask).pruned()) for mask in kept])
    assert (pruned.sum(1) < kept.sum(1)).all()
    whole, less = (Ends.of(model, task, "resample").metric(masks) for masks in (kept, pruned))
    assert np.allclose(whole, less, atol=1e-10) != is_joint
    assert model.config.has_joint_heads == is_joint


def test_pruning_a_circuit_without_paths_leaves_nothing():
    assert circuit_of(DANGLING).pruned().n_edges_kept == 0
    assert len(Circuit().pruned()) == 0


@pytest.mark.parametrize("n_groups", [None, 2])
def test_pruning_agrees_with_a_search_for_paths(n_groups):
    wiring = Wiring(3, 4, n_key_value_heads=n_groups)
    circuit = wiring.circuit(np.random.default_rng(0).random(wiring.n_edges) < 0.15)
    on_a_path = [
        (writer, reader)
        for writer, reader in circuit.edges_kept
        if nx.has_path(circuit, Node.input(), writer) and nx.has_path(circuit, reader, Node.logits())
    ]
    assert circuit.pruned().edges_kept == on_a_path
    assert 0 < len(on_a_path) < circuit.n_edges_kept


def test_heads_and_mlps_are_whole_parts_in_order():
    circuit = circuit_of(EDGES | DANGLING)
    assert [str(node) for node in circuit.heads] == ["a0.h0", "a0.h1", "a1.h0", "a1.h1"]
    assert [str(node) for node in circuit.mlps] == ["m1"]


def test_to_networkx_speaks_strings_and_scalars():
    graph = circuit_of(EDGES).to_networkx()
    assert type(graph) is nx.DiGraph
    assert graph.nodes["a1.h0.q"] == {"kind": "head", "layer": 1, "head": 0, "port": "q"}
    assert graph.edges["a1.h0", "logits"] == {"weight": 3.0}
    assert graph.graph["task"] == "greeting"


def test_a_circuit_says_what_it_is():
    circuit = circuit_of(EDGES, n_edges_in_model=62, method="eap")
    assert repr(circuit) == "Circuit('greeting' on 'toy': 4 of 62 edges, 2 heads, 0 MLPs)"
    assert "a1.h0->logits" in str(circuit).splitlines()[2]
    assert repr(Circuit()) == "Circuit(0 edges, 0 heads, 0 MLPs)"


@pytest.mark.parametrize(
    ("edge", "message"),
    [
        ("a0.h1.q->logits", "its head 'a0.h1' does"),
        ("logits->logits", "does not write"),
        ("input->a0.h1", r"its ports do: 'a0\.h1\.q', 'a0\.h1\.k'"),
        ("input->a0.g1", r"its ports do: 'a0\.g1\.k', 'a0\.g1\.v'"),
        ("a0.g1.k->logits", "the heads that share it do"),
        ("m0->input", "it only writes"),
        ("m1->a0.h1.q", "runs backwards"),
        ("a0.h0->a0.h1.q", "runs backwards"),
    ],
)
def test_an_edge_that_no_model_has_is_refused(edge, message):
    with pytest.raises(CircuitError, match=message):
        Circuit().keep(*edge.split("->"))


def test_a_circuit_that_does_not_know_its_shape_has_no_wiring():
    with pytest.raises(CircuitError, match=r"lacks \['n_heads', 'n_layers'\]"):
        Wiring.of(Circuit())
