"""EAP-IG's and MIB's JSON: every edge by their names in their order, one sign, and read back equal."""

import json

import networkx as nx
import numpy as np
import pytest

from circuits import Circuit, Scores, Wiring, load_eap_ig, save_eap_ig, save_mib_circuits
from circuits.eap_ig import edges_of
from circuits.mib import MIB_PERCENTAGES
from mechinterp.errors import CircuitError


def scored(wiring: Wiring, **facts) -> Scores:
    values = np.random.default_rng(0).normal(size=wiring.n_edges)
    return Scores(wiring, values, **({"method": "eap-ig", "unit": "logit_diff", "model": "toy", "task": "ioi"} | facts))


@pytest.fixture(params=[{}, {"parallel": True}, {"n_key_value_heads": 2}], ids=["plain", "parallel", "shared keys"])
def scores(request) -> Scores:
    return scored(Wiring(2, 4, **request.param), settings={"steps": 5})


def test_the_edges_of_one_layer_of_one_head_are_these():
    """As EAP-IG's ``Graph.from_model`` makes them."""
    plain, parallel = (names(Wiring(1, 1, parallel=parallel)) for parallel in (False, True))
    into_head = ["input->a0.h0<q>", "input->a0.h0<k>", "input->a0.h0<v>"]
    into_logits = ["input->logits", "a0.h0->logits", "m0->logits"]
    assert plain == [*into_head, "input->m0", "a0.h0->m0", *into_logits]
    assert parallel == [*into_head, "input->m0", *into_logits]


def names(wiring: Wiring) -> list[str]:
    return [name for name, _ in edges_of(wiring.facts)]


def test_gpt2_small_has_their_number_of_edges_and_nodes(tmp_path):
    save_eap_ig(scored(Wiring(12, 12)), tmp_path / "s.json", d_model=768)
    document = json.loads((tmp_path / "s.json").read_text())
    assert (len(document["nodes"]), len(document["edges"])) == (158, 32_491)
    assert document["cfg"] == {"n_layers": 12, "n_heads": 12, "parallel_attn_mlp": False, "d_model": 768}


def test_every_edge_has_a_finite_score_and_says_whether_it_is_in(scores, tmp_path):
    scores.top(9).save(tmp_path / "c.eap-ig.json")

    def refuse(text: str):
        raise AssertionError(f"{text} is no JSON")

    document = json.loads((tmp_path / "c.eap-ig.json").read_text(), parse_constant=refuse)
    assert list(document["edges"]) == names(scores.wiring)
    assert all({"score", "in_graph"} <= set(entry) for entry in document["edges"].values())
    assert all(entry["score"] == 0 for entry in document["edges"].values() if not entry["in_graph"])
    assert all(set(node) == {"in_graph"} for node in document["nodes"].values())  # an unscored node would be NaN


def test_scores_are_read_back_equal(scores, tmp_path):
    save_eap_ig(scores, tmp_path / "s.json")
    assert load_eap_ig(tmp_path / "s.json") == scores


def test_a_circuit_is_read_back_equal(scores, tmp_path):
    circuit = scores.top(15)
    circuit.save(tmp_path / "c.eap-ig.json")
    assert nx.utils.graphs_equal(Circuit.load(tmp_path / "c.eap-ig.json"), circuit)


def test_a_circuit_without_scores_stays_without(tmp_path):
    wiring = Wiring(2, 2)
    circuit = wiring.circuit(np.arange(wiring.n_edges) % 3 == 0)
    circuit.save(tmp_path / "c.eap-ig.json")
    assert nx.utils.graphs_equal(Circuit.load(tmp_path / "c.eap-ig.json"), circuit)


def test_the_sign_can_be_turned_and_is_turned_back(scores, tmp_path):
    save_eap_ig(scores, tmp_path / "s.json", positive="hurts")
    document = json.loads((tmp_path / "s.json").read_text())
    assert document["edges"]["m1->logits"]["score"] == -scores.values[scores.wiring.index("m1", "logits")]
    assert load_eap_ig(tmp_path / "s.json") == scores
    assert np.array_equal(load_eap_ig(tmp_path / "s.json", positive="helps").values, -scores.values)


def test_a_key_that_heads_share_is_written_once_for_each_with_its_part(tmp_path):
    scores = scored(Wiring(1, 4, n_key_value_heads=2))
    save_eap_ig(scores, tmp_path / "s.json")
    edges = json.loads((tmp_path / "s.json").read_text())["edges"]
    whole = scores.values[scores.wiring.index("input", "a0.g1.k")]
    assert [edges[f"input->a0.h{head}<k>"]["score"] for head in (2, 3)] == [whole / 2] * 2


def foreign(scores: Scores, path) -> None:
    """What EAP-IG itself would write of these scores: without our entry."""
    save_eap_ig(scores, path, positive="hurts")
    document = json.loads(path.read_text())
    del document["mechinterp"]
    document["nodes"]["a0.h0"]["score"] = float("nan")  # as its reader leaves them where only some are scored
    document["edges"]["input->m0"]["in_graph"] = True
    path.write_text(json.dumps(document))


def test_a_foreign_file_must_be_told_its_sign(scores, tmp_path):
    path = tmp_path / "theirs.json"
    foreign(scores, path)
    with pytest.raises(CircuitError, match=r"theirs\.json' does not say its sign.*positive='hurts'"):
        load_eap_ig(path)
    with pytest.raises(CircuitError, match="positive='up': say 'helps' or 'hurts'"):
        load_eap_ig(path, positive="up")
    groups = scores.wiring.n_key_value_heads
    loaded = load_eap_ig(path, positive="hurts", n_key_value_heads=groups, method="eap-ig", task="ioi")
    assert loaded.wiring == scores.wiring
    assert np.array_equal(loaded.values, scores.values)
    assert (loaded.method, loaded.task, loaded.model) == ("eap-ig", "ioi", "unknown")


def test_a_foreign_circuit_keeps_its_scores_and_says_that_the_sign_is_not_known(tmp_path):
    scores = scored(Wiring(2, 4))
    foreign(scores, tmp_path / "theirs.json")
    circuit = Circuit.load(tmp_path / "theirs.json", format="eap-ig")
    assert [(str(writer), str(reader)) for writer, reader in circuit.edges_kept] == [("input", "m0")]
    (edge,) = circuit.edges_kept
    assert circuit.edges[edge]["weight"] == -scores.values[scores.wiring.index("input", "m0")]
    assert circuit.graph["positive"] == "not said by the file"
    circuit.save(tmp_path / "again.eap-ig.json")
    with pytest.raises(CircuitError, match="does not say its sign"):
        load_eap_ig(tmp_path / "again.eap-ig.json")
    circuit.save(tmp_path / "c.attribution-graph.json")
    assert "(positive: not said by the file)" in (tmp_path / "c.attribution-graph.json").read_text()
    assert Wiring.of(circuit) == scores.wiring


@pytest.mark.parametrize("groups", [None, 2])
def test_mibs_nine_circuits_hold_at_most_their_share_and_one_more_would_be_too_many(tmp_path, groups):
    scores = scored(Wiring(4, 8, n_key_value_heads=groups))
    paths = save_mib_circuits(scores, tmp_path / "ioi_toy")
    assert tuple(paths) == MIB_PERCENTAGES
    assert len(list((tmp_path / "ioi_toy").iterdir())) == 9
    smaller: set = set()
    for percent, path in paths.items():
        edges = json.loads(path.read_text())["edges"]
        share = 100 * sum(entry["in_graph"] for entry in edges.values()) / len(edges)
        assert percent - 100 * 8 / len(edges) < share <= percent
        assert {entry["score"] for entry in edges.values()} == {0.0, 1.0}
        kept = set(Circuit.load(path, format="eap-ig").edges_kept)
        assert smaller <= kept == set(scores.top(len(kept)).edges_kept)
        smaller = kept


def test_what_the_format_cannot_say_is_refused(tmp_path):
    path = tmp_path / "c.eap-ig.json"
    with pytest.raises(CircuitError, match="models with MLPs"):
        save_eap_ig(scored(Wiring(1, 2, has_mlp=False)), path)
    with pytest.raises(CircuitError, match=r"lacks \['n_heads', 'n_layers'\]"):
        Circuit(task="ioi").save(path)
    latents = Circuit(n_layers=1, n_heads=1)
    latents.keep("f0.7", "logits", weight=1.0)
    with pytest.raises(CircuitError, match=r"'f0.7->logits' is no edge .*1 layers of 1 heads.*\.json"):
        latents.save(path)
    nodes = Scores(Wiring(1, 1), np.ones(3), method="atp", unit="u", model="m", task="t", items="node")
    with pytest.raises(CircuitError, match="scores of edges, and these are node scores"):
        save_eap_ig(nodes, path)
    with pytest.raises(CircuitError, match="need 1,000 edges"):
        save_mib_circuits(scored(Wiring(1, 2)), tmp_path / "folder")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("nodes"), r"lacks \['nodes'\]"),
        (lambda d: d["edges"]["input->m0"].pop("score"), r"'input->m0' lacks \['score'\]"),
        (lambda d: d["edges"].update({"m7->logits": {"score": 1.0, "in_graph": True}}), "'m7->logits' is no edge of a model"),
        (lambda d: d["cfg"].pop("n_heads"), "lacks 'n_heads'"),
    ],
)
def test_a_file_that_is_none_is_named_with_what_is_wrong(tmp_path, change, message):
    foreign(scored(Wiring(1, 2)), tmp_path / "theirs.json")
    document = json.loads((tmp_path / "theirs.json").read_text())
    change(document)
    (tmp_path / "theirs.json").write_text(json.dumps(document))
    with pytest.raises(CircuitError, match=rf"theirs\.json' is not a file of EAP-IG's.*{message}"):
        load_eap_ig(tmp_path / "theirs.json", positive="hurts")


def test_a_score_that_is_not_finite_is_refused(tmp_path):
    foreign(scored(Wiring(1, 2)), tmp_path / "theirs.json")
    text = (tmp_path / "theirs.json").read_text().replace('"input->m0": {"score": ', '"input->m0": {"score": NaN, "was": ')
    (tmp_path / "theirs.json").write_text(text)
    with pytest.raises(CircuitError, match="not finite"):
        load_eap_ig(tmp_path / "theirs.json", positive="hurts")
