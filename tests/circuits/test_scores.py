"""Scores: ranking, cutting, what is refused, and files."""

import json
from itertools import pairwise

import numpy as np
import pytest

from circuits import Scores, Wiring
from mechinterp.errors import CircuitError, UnknownNode
from mechinterp.nodes import Node

WIRING = Wiring(2, 2)


def made(values=None, wiring=WIRING, **facts):
    if values is None:
        values = np.random.default_rng(0).normal(size=wiring.n_edges)
    return Scores(wiring, values, **({"method": "eap", "unit": "logit_diff", "model": "toy", "task": "t"} | facts))


def test_top_takes_the_largest_magnitudes():
    values = np.zeros(WIRING.n_edges)
    values[[3, 5, 9]] = [1.0, -3.0, 2.0]
    circuit = made(values).top(2)
    assert np.flatnonzero(WIRING.mask(circuit)).tolist() == [5, 9]
    assert circuit.edges[WIRING.edges[5]]["weight"] == -3.0


def test_signed_top_takes_the_largest_values():
    values = np.zeros(WIRING.n_edges)
    values[[3, 5, 9]] = [1.0, -3.0, 2.0]
    assert np.flatnonzero(WIRING.mask(made(values).top(2, signed=True))).tolist() == [3, 9]


def test_smaller_circuits_are_parts_of_larger_ones():
    scores = made(np.random.default_rng(1).integers(-2, 3, WIRING.n_edges).astype(float))
    masks = [WIRING.mask(scores.top(n)) for n in range(1, WIRING.n_edges + 1)]
    assert all((small <= large).all() for small, large in pairwise(masks))
    assert masks[-1].all()


def test_ties_at_the_cut_follow_wiring_order_and_are_counted():
    values = np.zeros(WIRING.n_edges)
    values[[1, 4, 7, 8]] = [5.0, 2.0, -2.0, 2.0]
    circuit = made(values).top(2)
    assert np.flatnonzero(WIRING.mask(circuit)).tolist() == [1, 4]
    assert circuit.graph["ties_at_cut"] == 2
    assert made(values).top(4).graph["ties_at_cut"] == 0


@pytest.mark.parametrize("n", [-1, 0, WIRING.n_edges + 1])
def test_a_circuit_of_a_size_that_does_not_exist_is_refused(n):
    with pytest.raises(CircuitError, match=f"circuit of {n} edges.*ask for 1 to {WIRING.n_edges}"):
        made().top(n)


def test_above_keeps_what_reaches_the_threshold():
    values = np.zeros(WIRING.n_edges)
    values[:4] = [0.5, -0.5, 0.49, 2.0]
    assert np.flatnonzero(WIRING.mask(made(values).above(0.5))).tolist() == [0, 1, 3]
    assert np.flatnonzero(WIRING.mask(made(values).above(0.5, signed=True))).tolist() == [0, 3]
    assert made(values).above(0.5).graph["threshold"] == 0.5


@pytest.mark.parametrize("threshold", [-1.0, float("nan")])
def test_a_threshold_that_keeps_nothing_out_is_refused(threshold):
    with pytest.raises(CircuitError, match="keeps nothing out"):
        made().above(threshold)


def test_a_circuit_knows_where_it_comes_from():
    facts = made(settings={"steps": 5}).top(3).graph
    wanted = {"model": "toy", "task": "t", "method": "eap", "unit": "logit_diff", "n_layers": 2, "signed": False}
    assert wanted.items() <= facts.items()
    assert json.loads(facts["settings"]) == {"steps": 5}


def test_order_is_best_first_and_strongest_names_it():
    scores = made()
    assert (np.diff(np.abs(scores.values[scores.order()])) <= 0).all()
    assert (np.diff(scores.values[scores.order(signed=True)]) <= 0).all()
    name, value = scores.strongest(1)[0]
    assert value == scores.values[WIRING.index_of(name)] == scores.values[np.argmax(np.abs(scores.values))]


def test_components_add_the_magnitudes_of_what_leaves_a_part():
    values = np.zeros(WIRING.n_edges)
    for name, value in {"a0.h1->m0": 2.0, "a0.h1->logits": -3.0, "m0->logits": 4.0, "input->m1": 9.0}.items():
        values[WIRING.index_of(name)] = value
    components = made(values).components()
    assert list(components.items())[:3] == [(Node.head(0, 1), 5.0), (Node.mlp(0), 4.0), (Node.head(0, 0), 0.0)]
    assert Node.input() not in components


def test_node_values_are_signed_sums_over_the_edges_of_a_writer():
    scores = made()
    assert np.allclose(scores.nodes, WIRING.grid(scores.values).sum(axis=1))


def test_node_scores_cut_the_edges_among_the_best_parts():
    scores = made(np.arange(len(WIRING.writers), dtype=float), items="node")
    assert scores.strongest(1) == [("m1", 6.0)]
    assert np.array_equal(scores.nodes, scores.values)
    circuit = scores.top(2)
    assert {str(node) for node in circuit.components()} == {"input", "a1.h1", "m1", "logits"}
    assert WIRING.mask(circuit).sum() == 8  # from the input: 3 ports, m1, logits; a1.h1 -> m1, logits; m1 -> logits
    assert scores.top(6).n_edges_kept == WIRING.n_edges  # the input is kept anyway and not counted


@pytest.mark.parametrize("wiring", [WIRING, Wiring(2, 4, n_key_value_heads=2)], ids=repr)
def test_a_circuit_of_parts_has_those_parts_whoever_shares_their_keys(wiring):
    values = np.random.default_rng(3).normal(size=len(wiring.writers))
    values[0] = 0.0
    scores = made(values, wiring, items="node")
    for n in range(1, scores.n_selectable + 1):
        best = [name for name, _ in scores.strongest(n)]
        assert {str(node) for node in scores.top(n).components()} == {"input", "logits", *best}


def test_ports_and_neurons_have_names_and_make_no_circuit():
    ports = made(np.arange(12.0), items="port")
    assert ports.strongest(1) == [("a1.h1.v", 11.0)]
    shared = made(np.arange(16.0), Wiring(2, 4, n_key_value_heads=2), items="port")
    assert shared.strongest(2) == [("a1.g1.v", 15.0), ("a1.g0.v", 14.0)]
    neurons = made(np.arange(10.0), items="neuron")
    assert neurons.strongest(2) == [("m1.n4", 9.0), ("m1.n3", 8.0)]
    for scores in (ports, neurons):
        with pytest.raises(CircuitError, match=f"these are {scores.items} scores.*strongest"):
            scores.top(2)
    with pytest.raises(CircuitError, match="one number a neuron"):
        made(np.arange(9.0), items="neuron")


def test_what_prompts_and_spans_scored_is_kept_without_loss(tmp_path):
    generator = np.random.default_rng(2)
    each = generator.normal(size=(3, WIRING.n_edges)).astype(np.float32)
    halves = {"S1": each[0].astype(float), "elsewhere": each[1].astype(float)}
    scores = made(each.mean(0), per_prompt=each, by_span=halves)
    scores.save(tmp_path / "scores.json")
    again = Scores.load(tmp_path / "scores.json")
    assert again == scores
    assert again.per_prompt.dtype == np.float32
    assert again != made(each.mean(0), per_prompt=each)


def test_values_that_cannot_be_ranked_are_refused_with_a_remedy():
    values = np.zeros(WIRING.n_edges)
    values[2] = np.nan
    with pytest.raises(CircuitError, match=r"1 of 46 numbers in values.*not finite.*float32"):
        made(values)


def test_values_of_the_wrong_length_are_refused():
    with pytest.raises(CircuitError, match=r"one number a edge, shape \(46,\)"):
        made(np.zeros(3))


def test_settings_that_cannot_be_saved_are_refused():
    with pytest.raises(CircuitError, match="plain JSON"):
        made(settings={"model": object()})


def test_scores_are_copied_and_cannot_be_written_to():
    values = np.zeros(WIRING.n_edges)
    scores = made(values)
    values[0] = 1.0
    assert scores.values[0] == 0.0
    with pytest.raises(ValueError, match="read-only"):
        scores.values[0] = 1.0


@pytest.mark.parametrize("wiring", [WIRING, Wiring(2, 4, n_key_value_heads=2)], ids=repr)
@pytest.mark.parametrize("items", ["edge", "node"])
def test_what_is_saved_is_loaded_equal(tmp_path, items, wiring):
    n_items = wiring.n_edges if items == "edge" else len(wiring.writers)
    per_prompt = np.random.default_rng(2).normal(size=(3, n_items))
    scores = made(per_prompt.mean(0), wiring, per_prompt=per_prompt, settings={"steps": 5, "grid": [0.5]}, items=items)
    scores.save(tmp_path / "scores.json")
    assert Scores.load(tmp_path / "scores.json") == scores
    assert list(tmp_path.iterdir()) == [tmp_path / "scores.json"]


def test_one_other_number_makes_other_scores():
    values = np.zeros(WIRING.n_edges)
    values[0] = 1e-300
    assert made(values) != made(np.zeros(WIRING.n_edges))


def test_a_truncated_file_is_named(tmp_path):
    made().save(tmp_path / "scores.json")
    text = (tmp_path / "scores.json").read_text()
    (tmp_path / "short.json").write_text(text[: len(text) // 2])
    with pytest.raises(CircuitError, match=r"short\.json' is not a mechinterp scores file.*truncated"):
        Scores.load(tmp_path / "short.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99; this installation reads 1 to 2"),
        ({"format": "recipe"}, "says it is 'recipe'"),
        ({"values": {"input->m0": 1.0}}, "one number a edge"),
        ({"wiring": {"n_layers": 2, "n_heads": 0}}, "at least one layer and one head"),
        ({"settings": None}, "does not hold usable scores"),
        ({"method": 3}, "method must be text"),
    ],
)
def test_a_foreign_file_is_named_with_what_is_wrong(tmp_path, change, message):
    made().save(tmp_path / "scores.json")
    document = json.loads((tmp_path / "scores.json").read_text()) | change
    (tmp_path / "foreign.json").write_text(json.dumps(document))
    with pytest.raises(CircuitError, match=rf"foreign\.json.*{message}"):
        Scores.load(tmp_path / "foreign.json")


def test_values_in_another_order_are_refused(tmp_path):
    made().save(tmp_path / "scores.json")
    document = json.loads((tmp_path / "scores.json").read_text())
    document["values"] = dict(reversed(document["values"].items()))
    (tmp_path / "scores.json").write_text(json.dumps(document))
    with pytest.raises(CircuitError, match="in their order"):
        Scores.load(tmp_path / "scores.json")


def test_a_folder_that_does_not_exist_is_an_error_that_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        made().save(tmp_path / "nowhere" / "scores.json")


def test_methods_that_judge_heads_alone_keep_all_mlps():
    wiring = Wiring(n_layers=2, n_heads=2)
    values = np.array([0.0, 1, 3, 0, 2, 4, 0])
    about = {"method": "m", "unit": "u", "model": "toy", "task": "t", "items": "node"}
    scores = Scores(wiring, values, settings={"judged": ["head"]}, **about)
    assert scores.n_selectable == 4
    circuit = scores.top(2)
    assert list(map(str, circuit.heads)) == ["a0.h1", "a1.h1"]
    assert list(map(str, circuit.mlps)) == ["m0", "m1"]
    assert scores.masks([4])[0].all()
    with pytest.raises(CircuitError, match="ask for 1 to 4"):
        scores.top(5)
    assert scores.among(["a0.h1", "a1.h1"]).edges_kept == circuit.edges_kept
    with pytest.raises(UnknownNode, match="'m0' is not among the parts that were scored"):
        scores.among(["m0"])
    assert not Scores(wiring, values, **about).among(["a0.h1", "a1.h1"]).mlps
    assert scores.among("a0.h1").edges_kept == scores.among(["a0.h1"]).edges_kept
