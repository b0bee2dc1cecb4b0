"""Counting, order and conversion of every edge that there could be."""

from types import SimpleNamespace

import numpy as np
import pytest

from circuits import Wiring
from mechinterp.errors import CircuitError, UnknownNode
from mechinterp.nodes import Node

SHAPES = [Wiring(1, 1), Wiring(2, 3), Wiring(2, 3, has_mlp=False), Wiring(3, 2, parallel=True)]


def test_gpt2_small_has_157_writers_445_readers_and_32491_edges():
    wiring = Wiring(12, 12)
    assert (len(wiring.writers), len(wiring.readers), wiring.n_edges) == (157, 445, 32_491)
    assert wiring.allowed.sum() == len(wiring.edge_names) == len(set(wiring.edge_names)) == 32_491


def test_attn_only_4l_has_1281_edges():
    assert Wiring(4, 8, has_mlp=False).n_edges == 1_281


def test_the_smallest_wiring_can_be_written_down():
    wiring = Wiring(1, 1)
    assert [str(node) for node in wiring.writers] == ["input", "a0.h0", "m0"]
    assert [str(node) for node in wiring.readers] == ["a0.h0.q", "a0.h0.k", "a0.h0.v", "m0", "logits"]
    attention = ("input->a0.h0.q", "input->a0.h0.k", "input->a0.h0.v")
    into_mlp = ("input->m0", "a0.h0->m0")
    assert wiring.edge_names == (*attention, *into_mlp, "input->logits", "a0.h0->logits", "m0->logits")


def test_readers_of_a_layer_come_port_by_port():
    readers = [str(node) for node in Wiring(1, 2).readers]
    assert readers == ["a0.h0.q", "a0.h1.q", "a0.h0.k", "a0.h1.k", "a0.h0.v", "a0.h1.v", "m0", "logits"]


@pytest.mark.parametrize("wiring", SHAPES, ids=repr)
def test_an_edge_is_allowed_exactly_when_the_writer_is_computed_before_the_reader(wiring):
    for w, writer in enumerate(wiring.writers):
        for r, reader in enumerate(wiring.readers):
            in_parallel = wiring.parallel and reader.kind == "mlp" and writer.layer == reader.layer
            assert wiring.allowed[w, r] == (writer < reader and not in_parallel), (writer, reader)


@pytest.mark.parametrize("wiring", SHAPES, ids=repr)
def test_vector_and_grid_are_inverse(wiring):
    values = np.random.default_rng(0).normal(size=(2, wiring.n_edges))
    assert np.array_equal(wiring.vector(wiring.grid(values)), values)
    assert not wiring.grid(values)[:, ~wiring.allowed].any()


@pytest.mark.parametrize("wiring", SHAPES, ids=repr)
def test_index_finds_every_edge_by_name_and_by_nodes(wiring):
    assert [wiring.index_of(name) for name in wiring.edge_names] == list(range(wiring.n_edges))
    assert [wiring.index(*edge) for edge in wiring.edges] == list(range(wiring.n_edges))


@pytest.mark.parametrize("wiring", SHAPES, ids=repr)
def test_mask_and_circuit_are_inverse(wiring):
    for mask in np.random.default_rng(0).random((5, wiring.n_edges)) < [[0.0], [0.1], [0.5], [0.9], [1.0]]:
        circuit = wiring.circuit(mask)
        assert np.array_equal(wiring.mask(circuit), mask)
        assert circuit.n_edges_kept == mask.sum()
        assert Wiring.of(circuit) == wiring
        assert circuit.edges_kept == [edge for edge, kept in zip(wiring.edges, mask, strict=True) if kept]


def test_a_config_without_mlp_has_a_wiring_without_mlps():
    config = SimpleNamespace(n_layers=2, n_heads=3, d_mlp=None, parallel=False)
    assert Wiring.of(config) == Wiring(2, 3, has_mlp=False)


def test_an_unknown_part_is_met_with_the_nearest_known_one():
    with pytest.raises(UnknownNode, match=r"'a12\.h3' is not a writer here.*0\.\.11.*Did you mean 'a11\.h3'"):
        Wiring(12, 12).index("a12.h3", "logits")


def test_a_whole_head_is_not_a_reader_and_a_port_is_the_hint():
    with pytest.raises(UnknownNode, match=r"'a9\.h6' is not a reader here.*Did you mean 'a9\.h6\.q'"):
        Wiring(12, 12).index("m4", "a9.h6")


def test_an_edge_against_the_flow_says_which_part_is_computed_first():
    with pytest.raises(CircuitError, match=r"no edge 'm4->a2\.h1\.q': 'm4' is computed after 'a2\.h1\.q' has read"):
        Wiring(12, 12).index("m4", "a2.h1.q")


def test_heads_do_not_feed_the_mlp_of_their_own_layer_in_parallel_blocks():
    with pytest.raises(CircuitError, match="parallel block"):
        Wiring(2, 2, parallel=True).index("a1.h0", "m1")


def test_positions_are_not_part_of_a_wiring():
    with pytest.raises(UnknownNode, match="without '@'"):
        Wiring(2, 2).index(Node.head(0, 1).at(5), Node.logits())


def test_a_circuit_of_another_model_is_refused():
    with pytest.raises(CircuitError, match="n_layers=2, this one has n_layers=3"):
        Wiring(3, 2).mask(Wiring(2, 2).circuit(np.ones(Wiring(2, 2).n_edges, dtype=bool)))


def test_a_mask_of_the_wrong_length_is_refused():
    with pytest.raises(CircuitError, match=r"one entry an edge, 8, but has shape \(7,\)"):
        Wiring(1, 1).circuit(np.ones(7, dtype=bool))


def test_a_wiring_without_heads_is_refused():
    with pytest.raises(CircuitError, match="at least one layer and one head"):
        Wiring(2, 0)
