"""Selection against what it says, done the slow way."""

import networkx as nx
import numpy as np
import pytest

from circuits import Scores, Wiring
from circuits.selection import among, greedy
from mechinterp.nodes import Node

WIRINGS = [Wiring(2, 2), Wiring(3, 1, parallel=True), Wiring(2, 3, has_mlp=False), Wiring(2, 4, n_key_value_heads=2)]


@pytest.mark.parametrize("wiring", WIRINGS)
def test_greedy_takes_the_best_edge_whose_reader_is_in(wiring):
    key = np.random.default_rng(0).normal(size=wiring.n_edges)
    kept: list[int] = []
    reached = {Node.logits()}
    for n in range(1, wiring.n_edges + 1):
        open_now = [i for i, (_, reader) in enumerate(wiring.edges) if reached & {*wiring.owners(reader)} and i not in kept]
        kept.append(max(open_now, key=lambda i: key[i]))
        reached.add(wiring.edges[kept[-1]][0])
        assert set(np.flatnonzero(greedy(wiring, key, n))) == set(kept)


@pytest.mark.parametrize("n_groups", [None, 2])
def test_every_greedy_edge_leads_to_the_logits(n_groups):
    wiring = Wiring(3, 4, n_key_value_heads=n_groups)
    values = np.random.default_rng(1).normal(size=wiring.n_edges)
    scores = Scores(wiring, values, method="m", unit="u", model="x", task="t")
    circuit = scores.greedy(7)
    assert circuit.n_edges_kept == 7
    reaching = nx.ancestors(circuit, Node.logits())
    assert all(writer in reaching for writer, _ in circuit.edges_kept)
    assert (scores.masks([7], greedy=True)[0] == wiring.mask(circuit)).all()


@pytest.mark.parametrize("wiring", WIRINGS)
def test_among_keeps_the_edges_between_kept_parts(wiring):
    nodes = np.random.default_rng(2).random(len(wiring.writers)) < 0.5
    inside = {node for node, kept in zip(wiring.writers, nodes, strict=True) if kept} | {Node.input(), Node.logits()}
    expected = [writer in inside and bool(inside & {*wiring.owners(reader)}) for writer, reader in wiring.edges]
    assert among(wiring, nodes).tolist() == expected
