"""Rankings against known circuits: by edge, by part, and against what the literature published."""

import numpy as np
import pytest

from circuits import PUBLISHED, Scores, Wiring, ranking
from mechinterp.errors import CircuitError


def scores_of(wiring, values, items="edge"):
    return Scores(wiring, values, method="m", unit="u", model="x", task="t", items=items)


def test_the_truth_itself_is_ranked_perfectly_at_either_level():
    wiring = Wiring(12, 12)
    for name, published in PUBLISHED.items():
        if published.wiring == wiring and published.rule is not None:
            scores = scores_of(wiring, published.edge_truth().astype(float))
            assert ranking(scores, published).auroc == 1, name
            assert ranking(scores, published.circuit()).average_precision == 1
    heads_only = PUBLISHED["ioi"]
    found = ranking(scores_of(wiring, heads_only.node_truth().astype(float), "node"), heads_only)
    assert (found.auroc, found.level) == (1, "node")
    assert found.positives == pytest.approx(26 / 144)  # no MLP is named, so none is a negative


def test_parts_of_named_edges_are_the_positives_of_the_node_level():
    wiring = Wiring(2, 2)
    known = ["input->a0.h1.v", "a0.h1->logits"]
    scores = scores_of(wiring, np.arange(wiring.n_edges, dtype=float))
    by_node = ranking(scores, known, level="node")
    assert by_node.positives == pytest.approx(1 / 6)
    assert by_node.level == "node"
    nodes = np.zeros(len(wiring.writers))
    nodes[2] = -1.0
    assert ranking(scores_of(wiring, nodes, "node"), known).auroc == 1


def test_a_shared_value_makes_those_heads_positives_that_the_known_edges_use():
    wiring = Wiring(2, 4, n_key_value_heads=2)
    scores = scores_of(wiring, np.arange(wiring.n_edges, dtype=float))
    for edges, n_heads in ((["input->a0.g1.v", "a0.h3->logits"], 1), (["input->a0.g1.v"], 2)):
        for known in (edges, wiring.circuit(np.isin(wiring.edge_names, edges))):
            assert ranking(scores, known, level="node").positives == pytest.approx(n_heads / 10)


@pytest.mark.parametrize(
    ("scores", "settings", "message"),
    [
        (scores_of(Wiring(2, 2), np.ones(7), "node"), {"level": "edge"}, "node scores, to be ranked as edges"),
        (scores_of(Wiring(2, 2), np.ones(12), "port"), {}, "port scores, to be ranked as ports"),
        (scores_of(Wiring(2, 2), np.ones(46)), {"level": "nodes"}, "Did you mean 'node'"),
    ],
)
def test_scores_that_cannot_be_ranked_so_are_refused(scores, settings, message):
    with pytest.raises(CircuitError, match=message):
        ranking(scores, ["input->logits"], **settings)


def test_a_published_circuit_of_another_model_is_refused():
    with pytest.raises(CircuitError, match="whose shape is not that of x"):
        ranking(scores_of(Wiring(2, 2), np.ones(7), "node"), PUBLISHED["ioi"])
