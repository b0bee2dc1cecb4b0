"""Attribution graphs: valid, true to the scores, free of what breaks the pages that show them, and read back."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch

import mechinterp as mi
from circuits import AttributionGraph, Circuit, Scores, Wiring, attribution_graph, discover
from circuits.attribution_document import of_circuit
from circuits.attribution_nodes import cantor
from mechinterp.errors import CircuitError, TaskError
from mechinterp.metrics import METRICS
from mechinterp.nodes import Node
from mechinterp.tasks import ioi

SCHEMA = Path(__file__).parent.parent / "data" / "attribution-graph-schema.json"
EVERYTHING = 10**6


@pytest.fixture(scope="module")
def on_ioi():
    """The built-in model, IOI, and the circuit of 60 edges."""
    model = mi.load("builtin")
    task = ioi(model, n_prompts=4, seed=0)
    return model, task, discover(model, task, "eap").top(60)


@pytest.fixture(scope="module")
def shown(on_ioi) -> AttributionGraph:
    return attribution_graph(*on_ioi, prompt=1)


@pytest.fixture(scope="module")
def unplaced() -> Circuit:
    wiring = Wiring(2, 4, n_key_value_heads=1)
    values = np.random.default_rng(0).normal(size=wiring.n_edges)
    return Scores(wiring, values, method="eap", unit="logit_diff", model="a model/of mine", task="t & t").top(30)


@pytest.fixture(params=["on a prompt", "without one"])
def document(request, shown, unplaced) -> dict:
    graph = shown if request.param == "on a prompt" else of_circuit(unplaced)
    return json.loads(json.dumps(graph.document))


# --- what it says


def test_the_links_of_an_edge_sum_to_what_eap_scores_it_on_this_prompt(make_task, model):
    """On every sort of model: positions, ports and heads that share a key are parted, and nothing is lost."""
    task = make_task(model, changed=(4,))  # so late that no part stands in more columns than pages show
    scores = discover(model, task, "eap", keep_prompts=True, allow_unsolved=True)
    full = scores.wiring.circuit(np.ones(len(scores), bool))
    document = attribution_graph(model, task, full, prompt=1, max_links=EVERYTHING).document  # which ends before the padding
    assert document["metadata"]["mechinterp"]["hidden"]["n_edges"] == 0
    assert summed(document, scores.wiring) == pytest.approx(scores.per_prompt[1], rel=1e-6, abs=1e-9)


def test_where_both_sides_are_read_positions_after_the_end_count_too(make_model, make_task):
    model = make_model(causal=False)
    task = make_task(model, changed=(5,))
    task = replace(task, prompts=replace(task.prompts, end=torch.full_like(task.prompts.end, 3)))
    scores = discover(model, task, "eap", keep_prompts=True, allow_unsolved=True)
    full = scores.wiring.circuit(np.ones(len(scores), bool))
    document = attribution_graph(model, task, full, max_links=EVERYTHING).document
    assert len(document["metadata"]["prompt_tokens"]) == 7
    assert max(node["ctx_idx"] for node in document["nodes"]) == 6
    hidden = document["metadata"]["mechinterp"]["hidden"]["strength"]  # where a part stands in too many columns
    assert summed(document, scores.wiring) == pytest.approx(scores.per_prompt[0], abs=hidden + 1e-9)


def test_circuits_of_one_edge_or_none_are_drawn(on_ioi):
    model, task, _ = on_ioi
    empty = Circuit()
    direct = Circuit()
    direct.keep("a3.h2", "logits")
    graphs = [attribution_graph(model, task, circuit).document for circuit in (empty, direct)]
    assert [len(graph["links"]) for graph in graphs] == [0, 1]  # at END alone


def test_what_is_hidden_is_counted_and_weighed(on_ioi):
    model, task, circuit = on_ioi
    whole, part = (attribution_graph(model, task, circuit, max_links=n).document for n in (EVERYTHING, 50))
    hidden, before = (document["metadata"]["mechinterp"]["hidden"] for document in (part, whole))
    assert len(part["links"]) == 50
    assert hidden["n_edges"] > before["n_edges"]
    total = before["strength"] + before["shown_strength"]
    assert hidden["strength"] + hidden["shown_strength"] == pytest.approx(total)
    kept = {(link["source"], link["target"]) for link in part["links"]}
    weakest = min(strength(link) for link in part["links"])
    assert all(strength(link) <= weakest for link in whole["links"] if (link["source"], link["target"]) not in kept)
    assert f"Left out: {hidden['n_edges']:,} weaker parts" in part["metadata"]["info"]["description"]


def test_links_run_forward_in_tokens_and_stay_at_a_token_but_for_keys_and_values(shown):
    columns = {node["node_id"]: node["ctx_idx"] for node in shown.document["nodes"]}
    for link in shown.document["links"]:
        source, target = columns[link["source"]], columns[link["target"]]
        assert source <= target
        if source != target:
            assert {name.rpartition(".")[2] for name in link["edges"]} <= {"k", "v"}


def test_the_answer_stands_with_its_probability(on_ioi, shown):
    model, task, _ = on_ioi
    (logit,) = (node for node in shown.document["nodes"] if node["feature_type"] == "logit")
    answer = int(task.prompts.candidates[1][0])
    probability = float(model.run(task.prompts.clean[1:2], logits_at=task.prompts.end[1:2])[0][0].softmax(-1)[answer])
    (token,) = task.tokenizer.strings([answer])
    assert logit["clerp"] == f'Output "{token}" (p={probability:.3f})'
    assert logit["token_prob"] == pytest.approx(probability)
    assert shown.document["metadata"]["prompt_tokens"] == task.tokenizer.strings(
        task.prompts.clean[1, : logit["ctx_idx"] + 1].tolist()
    )


def test_heads_say_where_they_look(shown):
    labels = [node["clerp"] for node in shown.document["nodes"] if node["feature_type"] == "attention head"]
    assert labels
    assert all("looks at" in label for label in labels)


def test_a_circuit_without_positions_is_not_put_on_tokens(unplaced):
    document = of_circuit(unplaced).document
    assert document["metadata"]["prompt_tokens"] == ["(input)", "(position unknown)", "(logits)"]
    assert {node["ctx_idx"] for node in document["nodes"] if node["feature_type"] in ("attention head", "mlp")} == {1}
    assert "No probability is known" in document["metadata"]["info"]["description"]


def test_positions_that_a_circuit_knows_are_its_columns():
    circuit = Circuit(prompt_tokens=["A", " B", " C"])
    circuit.keep("input@0", "a1.h1.v@0", weight=1.0)
    circuit.keep("a1.h1@0", "m1@2", weight=2.0)
    document = of_circuit(circuit).document
    assert document["metadata"]["prompt_tokens"] == ["A", " B", " C"]
    assert {node["part"]: node["ctx_idx"] for node in document["nodes"]} == {"input@0": 0, "a1.h1@0": 0, "m1@2": 2}


def test_a_part_at_every_position_keeps_the_strongest_two_thirds_of_them():
    circuit = Circuit()
    for position in range(3):
        circuit.keep(f"m0@{position}", f"m1@{position}", weight=1.0 + position)
    document = of_circuit(circuit).document
    assert sorted(node["part"] for node in document["nodes"]) == ["m0@1", "m0@2", "m1@1", "m1@2"]
    assert document["metadata"]["mechinterp"]["hidden"] == {"n_edges": 1, "strength": 1.0, "shown_strength": 5.0}


# --- the format, and the traps of the pages


def test_it_is_valid_by_the_published_schema(document):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(document, json.loads(SCHEMA.read_text()), cls=jsonschema.Draft7Validator)


def test_ids_are_unique_and_links_end_at_nodes(document):
    for name in ("node_id", "jsNodeId"):
        assert max(Counter(node[name] for node in document["nodes"]).values()) == 1
    ids = {node["node_id"] for node in document["nodes"]}
    assert {end for link in document["links"] for end in (link["source"], link["target"])} <= ids
    pairs = [(link["source"], link["target"]) for link in document["links"]]
    assert len(set(pairs)) == len(pairs)  # pages keep one link a pair


def test_the_page_finds_a_probability_and_a_token_in_every_logit(document):
    for node in document["nodes"]:
        if node["feature_type"] == "logit":
            assert 0 <= float(node["clerp"].split("(p=")[1].split(")")[0]) <= 1
            assert node["clerp"].count('"') == 2


def test_nodes_are_not_hidden_by_a_threshold_unless_it_is_set_by_hand(document):
    assert "node_threshold" not in document["metadata"]
    shares = {node["node_id"]: node["influence"] for node in document["nodes"]}
    assert all(0 <= share <= 1 for share in shares.values())
    assert {shares[node["node_id"]] for node in document["nodes"] if node["feature_type"] == "logit"} == {0}
    shown = [link for link in document["links"] if shares[link["source"]] <= 0.8]
    assert 0.5 < sum(map(strength, shown)) / sum(map(strength, document["links"])) <= 0.8 + 1e-9


def test_no_type_makes_a_page_ask_a_server(document):
    assert {node["feature_type"] for node in document["nodes"]} <= {"attention head", "mlp", "embedding", "logit"}
    assert "feature_details" not in document["metadata"]


def test_parts_are_told_apart_by_layer_and_feature(document):
    places = Counter((node["layer"], node["feature"], node["ctx_idx"]) for node in document["nodes"])
    assert max(places.values()) == 1
    of_part = {}
    for node in document["nodes"]:
        if node["feature_type"] in ("attention head", "mlp"):
            assert of_part.setdefault((node["layer"], node["feature"]), node["part"]) == node["part"]


def test_nothing_stands_in_more_than_two_thirds_of_the_columns(document):
    """Or circuit-tracer's page deletes it from all of them."""
    features = Counter((node["layer"], node["feature"]) for node in document["nodes"])
    assert max(features.values()) <= len(document["metadata"]["prompt_tokens"]) * 2 / 3


def test_circuit_tracers_own_reader_has_all_that_it_asks_for(document):
    assert all(isinstance(node["feature"], int) and isinstance(node["layer"], str) for node in document["nodes"])
    assert document["metadata"]["transcoder_list"] == []
    assert set(document["qParams"]) == {"pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"}
    assert set(document["qParams"]["pinnedIds"]) <= {node["node_id"] for node in document["nodes"]}


def test_slug_and_model_hold_what_neuronpedia_accepts(unplaced):
    document = of_circuit(unplaced).document
    assert (document["metadata"]["slug"], document["metadata"]["scan"]) == ("t-t-a-model-of-mine", "a-model-of-mine")
    assert document["metadata"]["mechinterp"]["facts"]["model"] == "a model/of mine"


def test_embeddings_and_logits_carry_token_ids(on_ioi, shown):
    _, task, _ = on_ioi
    ids = task.prompts.clean[1].tolist()
    for node in shown.document["nodes"]:
        if node["feature_type"] == "embedding":
            assert node["node_id"] == f"E_{ids[node['ctx_idx']]}_{node['ctx_idx']}"
    assert f"5_{int(task.prompts.candidates[1][0])}_" in shown.document["nodes"][-1]["node_id"]


def test_a_model_of_one_layer_is_shown_as_layer_1():
    circuit = Wiring(1, 2).circuit(np.ones(Wiring(1, 2).n_edges, bool))
    document = of_circuit(circuit).document
    assert {node["layer"] for node in document["nodes"]} == {"E", "1", "3"}
    assert "Layer 0 is shown as layer 1" in document["metadata"]["info"]["description"]


def test_a_token_with_quotes_does_not_end_the_label(on_ioi, monkeypatch):
    model, task, circuit = on_ioi
    monkeypatch.setattr(type(task.tokenizer), "strings", lambda self, ids: ['say "hi"'] * len(ids))
    logit = attribution_graph(model, task, circuit).document["nodes"][-1]
    assert logit["clerp"].startswith("Output \"say 'hi'\" (p=")


def test_cantor_numbers_are_distinct():
    assert len({cantor(layer, index) for layer in range(12) for index in range(13)}) == 12 * 13


# --- files


def test_a_circuit_is_read_back_from_its_prompt(on_ioi, shown, tmp_path):
    model, task, circuit = on_ioi
    foreign = circuit.copy()
    foreign.graph["positive"] = "not said by the file"
    assert "positive" not in attribution_graph(model, task, foreign, max_links=5).document["metadata"]["mechinterp"]["facts"]
    shown.save(tmp_path / "ioi.json")
    loaded = Circuit.load(tmp_path / "ioi.json", format="attribution-graph")
    assert set(loaded.edges_kept) <= set(circuit.edges_kept)
    assert len(loaded.edges_kept) >= 0.9 * circuit.n_edges_kept  # some have no effect on this prompt
    wiring = Wiring.of(loaded)
    weights = summed(shown.document, wiring)
    assert {edge: loaded.edges[edge]["weight"] for edge in loaded.edges_kept} == pytest.approx(
        {edge: weights[wiring.index(*edge)] for edge in loaded.edges_kept}
    )
    assert (loaded.graph["method"], loaded.graph["unit"]) == ("eap", "logit_diff")


def test_a_circuit_alone_is_read_back_equal(unplaced, tmp_path):
    unplaced.save(tmp_path / "c.attribution-graph.json")
    assert nx.utils.graphs_equal(Circuit.load(tmp_path / "c.attribution-graph.json"), unplaced)


def test_networkx_reads_it_as_it_is(document):
    graph = nx.node_link_graph(document, directed=True, multigraph=False, edges="links", name="node_id")
    assert nx.is_directed_acyclic_graph(graph)


def test_a_folder_to_serve_lists_its_graphs_once(on_ioi, shown, tmp_path):
    folder = tmp_path / "graphs"
    shown.save_in(folder)
    shown.save_in(folder)
    other = attribution_graph(*on_ioi, prompt=2)
    assert other.save_in(folder) == folder / "ioi-2-builtin.json"
    index = json.loads((folder / "graph-metadata.json").read_text())
    assert [graph["slug"] for graph in index["graphs"]] == ["ioi-1-builtin", "ioi-2-builtin"]
    assert AttributionGraph.load(folder / "ioi-1-builtin.json").document == json.loads(json.dumps(shown.document))


def test_a_foreign_graph_is_checked_but_is_no_circuit(tmp_path):
    node = {"node_id": "0_5_1", "feature": 20, "layer": "0", "ctx_idx": 1, "jsNodeId": "0_5-0", "clerp": ""}
    document = {
        "metadata": {"slug": "s", "scan": "gemma-2-2b", "prompt_tokens": ["a", "b"], "prompt": "ab"},
        "qParams": {},
        "nodes": [node | {"feature_type": "cross layer transcoder"}],
        "links": [],
    }
    (tmp_path / "foreign.json").write_text(json.dumps(document))
    assert AttributionGraph.load(tmp_path / "foreign.json").slug == "s"
    with pytest.raises(
        CircuitError, match=r"foreign\.json.*another program \(nodes: cross layer transcoder\).*node_link_graph"
    ):
        Circuit.load(tmp_path / "foreign.json", format="attribution-graph")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("links"), r"lacks \['links'\]"),
        (lambda d: d["metadata"].pop("scan"), r"metadata lack \['scan'\]"),
        (lambda d: d["nodes"][0].pop("clerp"), r"a node without \['clerp'\]"),
        (lambda d: d["nodes"].append(d["nodes"][0]), "2 nodes are called"),
        (lambda d: d["links"][0].update(source="9_9_9"), "ends at '9_9_9', which is no node"),
        (lambda d: d["links"][0].update(weight=float("nan")), "weighs nan"),
    ],
)
def test_a_broken_document_is_refused(document, change, message):
    change(document)
    with pytest.raises(CircuitError, match=message):
        AttributionGraph(document)


def test_a_large_circuit_is_bounded(unplaced):
    document = of_circuit(unplaced, most=5).document
    assert len(document["links"]) == 5
    assert document["metadata"]["mechinterp"]["hidden"]["n_edges"] > 0


# --- refusals


@pytest.mark.parametrize(("prompt", "links", "message"), [(4, 9, "prompt 4 is not among the 4"), (0, 0, "shows nothing")])
def test_prompts_and_sizes_that_there_are_not_are_refused(on_ioi, prompt, links, message):
    with pytest.raises(CircuitError, match=message):
        attribution_graph(*on_ioi, prompt, max_links=links)


def test_a_circuit_of_another_model_is_refused(on_ioi, unplaced):
    with pytest.raises(CircuitError, match="was made for a model with"):
        attribution_graph(*on_ioi[:2], unplaced)


def test_a_metric_without_a_gradient_is_refused(on_ioi):
    model, task, circuit = on_ioi
    with pytest.raises(TaskError, match="no gradient"):
        attribution_graph(model, replace(task, metric=METRICS["is_preferred"]), circuit)


def strength(link: dict) -> float:
    return sum(abs(weight) for weight in link["edges"].values())


def summed(document: dict, wiring: Wiring) -> np.ndarray:
    """What all links of each edge of the wiring weigh together."""
    part = {node["node_id"]: node["part"] for node in document["nodes"]}
    sums = np.zeros(wiring.n_edges)
    for link in document["links"]:
        for reader, weight in link["edges"].items():
            sums[wiring.index(part[link["source"]], Node.parse(reader))] += weight
    return sums
