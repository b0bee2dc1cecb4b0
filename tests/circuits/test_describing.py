"""A circuit in words: every number comes from the graph, its facts or its report, and changes with them."""

import re
from itertools import pairwise

import networkx as nx
import numpy as np
import pytest

from circuits import Circuit, Scores, Wiring
from mechinterp.errors import CircuitError
from mechinterp.nodes import Node

FACTS = {
    "faithfulness": 0.8125,
    "faithfulness_low": 0.6875,
    "faithfulness_high": 0.9375,
    "ablation": "resample",
    "corruption": "abc",
    "metric": "logit_diff",
    "n_prompts": 48,
    "complement": 0.03125,
    "metric_model": 5.25,
    "metric_circuit": 4.125,
    "metric_no_edges": -0.625,
    "n_random": 20,
    "beats_random": 0.95,
    "best_random": 0.21875,
}


@pytest.fixture
def circuit():
    """Two layers of two heads: a chain through m0 and a1.h1, and an edge that leads nowhere."""
    made = Circuit(model="toy", task="greeting", method="eap", unit="logit_diff", n_edges_in_model=46)
    made.keep("input", "m0", weight=3.5)
    made.keep("m0", "a1.h1.v", weight=2.25)
    made.keep("a1.h1", "logits", weight=-1.75)
    made.keep("input", "a1.h1.q", weight=0.5)
    made.keep("input", "a0.h0.k", weight=-0.25)
    return made


def numbers(text: str) -> set[float]:
    """All numbers but those in the names of parts and of the method of ranking."""
    bare = re.sub(r"\b[am]\d+(\.[hg]\d+)?(\.[qkv])?\b|[\w.]+->[\w.]+", "", text.replace(",", ""))
    return {float(number) for number in re.findall(r"(?<![\w.])[-+]?\d+(?:\.\d+)?", bare)}


def test_every_number_is_a_number_of_the_circuit_or_its_facts(circuit):
    circuit.graph.update(FACTS)
    weights = np.array([weight for *_, weight in circuit.edges(data="weight") if weight is not None])
    counts = {5, 46, 2, 1, 3}  # edges, of the model, heads, MLPs, above zero
    shares = {100, 8.25, 95}  # all five strongest edges, their sum, the per cent of the interval and beaten circuits
    written = {2.25, 1.75}  # by m0 and a1.h1
    facts = {value for value in FACTS.values() if isinstance(value, int | float)}
    rounded = {float(f"{value:.3g}") for value in facts | set(weights) | written}
    assert numbers(circuit.describe()) <= rounded | {abs(w) for w in rounded} | counts | shares


@pytest.mark.parametrize("fact", [name for name, value in FACTS.items()])
def test_another_fact_makes_another_text(circuit, fact):
    circuit.graph.update(FACTS)
    before, value = circuit.describe(), FACTS[fact]
    circuit.graph[fact] = f"{value}-else" if isinstance(value, str) else value * 2
    after = circuit.describe()
    assert after != before
    assert (circuit.graph[fact] if isinstance(value, str) else "Not known") in after


def test_another_score_makes_another_text(circuit):
    assert "input->m0 (+3.5), m0->a1.h1.v (+2.25), a1.h1->logits (-1.75)" in circuit.describe()
    circuit.keep("a1.h1", "logits", weight=7.5)
    assert "Strongest edges: a1.h1->logits (+7.5), input->m0 (+3.5)" in circuit.describe()
    assert "a1.h1 (7.5) and m0 (2.25)" in circuit.describe()


def test_paths_and_dead_ends_are_told(circuit):
    text = circuit.describe()
    assert "runs input -> m0 -> a1.h1 -> logits; that edge has |score| 1.75" in text
    assert "1 edge lies on no path from the input to the logits" in text
    assert "Every edge lies on a path" in circuit.pruned().describe()


def test_the_path_told_is_the_widest():
    """Against every simple path of random circuits."""
    wiring = Wiring(2, 2)
    for seed in range(5):
        values = np.random.default_rng(seed).normal(size=wiring.n_edges)
        circuit = Scores(wiring, values, method="eap", unit="logits", model="toy", task="t").top(30)
        widths = [
            min(abs(circuit.edges[edge]["weight"]) for edge in pairwise(path) if edge[0].port is None)
            for path in nx.all_simple_paths(circuit, Node.input(), Node.logits())
        ]
        assert f"that edge has |score| {max(widths):.3g}." in circuit.describe()


def test_an_unscored_edge_on_the_path_has_no_score_made_up():
    mixed = Circuit()
    mixed.keep("input", "m0", weight=0.5)
    mixed.keep("m0", "logits")
    assert "runs input -> m0 -> logits; that edge has no score." in mixed.describe()


def test_neurons_are_counted():
    neurons = Circuit()
    neurons.keep("input", "m0.n5", weight=0.5)
    assert "1 neuron." in neurons.describe()
    assert "1 by a neuron" in neurons.describe()


def test_long_lists_are_cut_and_say_so():
    wiring = Wiring(2, 2)
    circuit = Scores(wiring, np.arange(46.0) + 1, method="eap", unit="logits", model="toy", task="t").top(46)
    assert "and 41 more of 46 edges" in circuit.describe()
    assert "and 1 more of 6 writing parts" in circuit.describe()


def test_what_was_not_measured_is_said(circuit):
    assert "was not measured" in circuit.describe()
    assert "random circuits" not in circuit.describe()
    circuit.graph["faithfulness"] = 0.5
    text = circuit.describe()
    assert "under which ablation its faithfulness was measured" in text
    assert "whether random circuits of this size are as faithful" in text
    circuit.graph.update(FACTS)
    assert "under which ablation its" not in circuit.describe()


def test_a_circuit_without_scores_or_edges_is_described_too():
    bare = Circuit()
    assert "keeps no edge" in bare.describe()
    bare.keep("input", "a0.h0.q")
    assert "None has a score" in bare.describe()
    assert "No path leads from the input to the logits" in bare.describe()
    bare.keep("a0.h0", "logits")
    assert "The parts that write: a0.h0." in bare.describe()
    assert "how many edges the model has" in bare.describe()


def test_how_the_edges_were_selected_is_told(circuit):
    wiring = Wiring(2, 2)
    facts = {"method": "eap", "unit": "logits", "model": "toy", "task": "t"}
    scores = Scores(wiring, np.arange(46.0) - 20, **facts)
    parts = Scores(wiring, np.arange(7.0), items="node", **facts)
    assert "scores in logits, ranked by magnitude." in scores.top(5).describe()
    assert ", ranked by value." in scores.top(5, signed=True).describe()
    assert ", kept from a magnitude of 4.5 on." in scores.above(4.5).describe()
    assert ", taken by magnitude from the logits upstream." in scores.greedy(5).describe()
    assert ", among parts that were named." in parts.among(["m0", "a1.h0"]).describe()
    assert "from the method eap, scores in logit_diff." in circuit.describe()


def test_shared_keys_name_the_heads_that_share_them():
    circuit = Circuit(n_heads=4, n_key_value_heads=2)
    circuit.keep("input", "a0.g1.k", weight=2.0)
    circuit.keep("a0.h2", "logits", weight=1.0)
    circuit.keep("a0.h3", "logits", weight=1.0)
    assert "input->a0.g1.k (+2, shared by a0.h2 a0.h3)" in circuit.describe()
    assert "runs input -> a0.h2 -> logits" in circuit.describe()


def test_a_report_of_another_circuit_is_refused(circuit, report):
    with pytest.raises(CircuitError, match="this report is of another circuit .*edges: 5 here, 40 in the report"):
        circuit.describe(report)
