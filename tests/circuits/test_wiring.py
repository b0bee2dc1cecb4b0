"""Counting, order and conversion of every edge that there could be."""

from types import SimpleNamespace

import numpy as np
import pytest

from circuits import Circuit, Wiring
from mechinterp.errors import CircuitError, UnknownNode
from mechinterp.nodes import Node

SHARED = Wiring(2, 4, n_key_value_heads=2)
SHAPES = [Wiring(1, 1), Wiring(2, 3), Wiring(2, 3, has_mlp=False), Wiring(3, 2, parallel=True)]
SHAPES += [SHARED, Wiring(2, 3, has_mlp=False, n_key_value_heads=1), Wiring(2, 4, parallel=True, n_key_value_heads=2)]


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


def test_a_key_that_heads_share_is_one_reader():
    readers = [str(node) for node in Wiring(1, 4, has_mlp=False, n_key_value_heads=2).readers]
    assert readers == [*(f"a0.h{head}.q" for head in range(4)), "a0.g0.k", "a0.g1.k", "a0.g0.v", "a0.g1.v", "logits"]
    assert Wiring(2, 4, n_key_value_heads=4) == Wiring(2, 4)


@pytest.mark.parametrize("wiring", SHAPES, ids=repr)
def test_slices_reads_and_owners_tell_the_same_readers(wiring):
    parts = [*wiring.writers, Node.logits()]
    for r, reader in enumerate(wiring.readers):
        assert wiring.owners(reader) == tuple(part for part, reads in zip(parts, wiring.reads[:, r], strict=True) if reads)
        if reader.port:
            assert reader in wiring.readers[wiring.port_slice(reader.layer, reader.port)]
        if reader.kind == "mlp":
            assert wiring.mlp_reader(reader.layer) == r
    assert wiring.reads[1:].sum(1).tolist() == [3 if part.kind == "head" else 1 for part in parts[1:]]
    for edges, reads in zip(wiring.edges_into, wiring.reads, strict=True):
        assert edges.tolist() == [edge for edge, r in enumerate(wiring.edge_reader) if reads[r]]


@pytest.mark.parametrize("wiring", SHAPES, ids=repr)
def test_groups_are_the_wiring_with_the_keys_and_values_of_a_group_made_one(wiring):
    """As many edges as ungrouped, but for what the heads of a group share: those stand there once."""
    own = Wiring(wiring.n_layers, wiring.n_heads, wiring.has_mlp, wiring.parallel)
    shared = {edge: (edge[0], edge[1]) for edge in own.edges}
    for writer, reader in own.edges:
        if wiring.n_groups < wiring.n_heads and reader.port in ("k", "v"):
            group = Node.group(reader.layer, reader.index // wiring.heads_a_group, reader.port)
            shared[writer, reader] = (writer, group)
    assert list(dict.fromkeys(shared.values())) == list(wiring.edges)


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


@pytest.mark.parametrize("wiring", SHAPES, ids=repr)
def test_made_by_hand_in_any_order_a_circuit_is_the_same(wiring):
    rng = np.random.default_rng(1)
    for share in (0.02, 0.1, 0.5, 1.0):
        circuit, by_hand = wiring.circuit(rng.random(wiring.n_edges) < share), Circuit(**wiring.facts)
        for edge in rng.permutation(len(circuit.edges_kept)):
            by_hand.keep(*circuit.edges_kept[edge])
        assert set(by_hand.nodes) == set(circuit.nodes)
        assert set(by_hand.edges) == set(circuit.edges)


@pytest.mark.parametrize("wiring", SHAPES, ids=repr)
def test_pruning_leaves_a_circuit_of_the_wiring(wiring):
    rng = np.random.default_rng(2)
    for share in (0.1, 0.3):
        pruned = wiring.circuit(rng.random(wiring.n_edges) < share).pruned()
        again = wiring.circuit(wiring.mask(pruned))
        assert set(again.nodes) == set(pruned.nodes)
        assert set(again.edges) == set(pruned.edges)
        assert pruned.pruned().n_edges_kept == pruned.n_edges_kept


@pytest.mark.parametrize(
    ("kept", "heads"),
    [
        (["input->a0.g1.k"], ["a0.h2", "a0.h3"]),  # it hangs in the air, as a key of a head's own would
        (["input->a0.g1.k", "a0.h0->logits"], ["a0.h2", "a0.h3"]),
        (["input->a0.g1.k", "a0.h3->logits"], ["a0.h3"]),
        (["input->a0.g1.k", "input->a0.h2.q"], ["a0.h2"]),
        (["input->a0.g1.k", "input->a0.h2.q", "a0.h3->m1"], ["a0.h2", "a0.h3"]),
    ],
)
def test_a_shared_key_leads_to_the_heads_that_the_circuit_uses(kept, heads):
    circuit = SHARED.circuit(np.isin(SHARED.edge_names, kept))
    assert [str(head) for head in sorted(circuit.successors(Node.group(0, 1, "k")))] == heads


def test_a_config_without_mlp_has_a_wiring_without_mlps():
    config = SimpleNamespace(n_layers=2, n_heads=3, d_mlp=None, parallel=False)
    assert Wiring.of(config) == Wiring(2, 3, has_mlp=False)


def test_the_wiring_of_every_model_has_the_ports_of_its_weights(model):
    wiring = Wiring.of(model.config)
    for layer in range(model.config.n_layers):
        here = wiring.port_slice(layer)
        assert here.stop - here.start == len(model.weights.ports(layer))
        for port, weights in zip("qkv", (model.weights.W_Q, model.weights.W_K, model.weights.W_V), strict=True):
            here = wiring.port_slice(layer, port)
            assert here.stop - here.start == len(weights(layer))


def test_an_unknown_part_is_met_with_the_nearest_known_one():
    with pytest.raises(UnknownNode, match=r"'a12\.h3' is not a writer here.*0\.\.11.*Did you mean 'a11\.h3'"):
        Wiring(12, 12).index("a12.h3", "logits")


def test_a_whole_head_is_not_a_reader_and_a_port_is_the_hint():
    with pytest.raises(UnknownNode, match=r"'a9\.h6' is not a reader here.*Did you mean 'a9\.h6\.q'"):
        Wiring(12, 12).index("m4", "a9.h6")


@pytest.mark.parametrize(
    ("wiring", "name", "hint"),
    [
        (SHARED, "a1.h3.k", r"in 2 groups \(0\.\.1\).*Did you mean 'a1\.g1\.k', which its group shares\?"),
        (SHARED, "a7.h9.v", r"Did you mean 'a1\.g1\.v', which its group shares"),
        (SHARED, "a0.g5.k", r"Did you mean 'a0\.g1\.k'\?"),
        (SHARED, "a0.g1", r"name a head, or 'a0\.g1\.k'"),
        (Wiring(2, 4), "a0.g1.k", r"a key and a value of its own. Did you mean 'a0\.h1\.k'"),
    ],
)
def test_who_shares_a_key_is_told(wiring, name, hint):
    with pytest.raises(UnknownNode, match=rf"'{name}' is not a reader here.*{hint}"):
        wiring.index("input", name)


def test_a_group_writes_nothing():
    with pytest.raises(UnknownNode, match=r"'a0\.g1\.k' is not a writer here.*Heads of a group share a k and a v and no more"):
        SHARED.index("a0.g1.k", "logits")


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


@pytest.mark.parametrize(("mine", "theirs"), [(SHARED, Wiring(2, 4)), (Wiring(2, 4), SHARED)], ids=repr)
def test_a_circuit_of_another_grouping_is_refused(mine, theirs):
    told = f"n_key_value_heads={theirs.n_groups}, this one has n_key_value_heads={mine.n_groups}"
    with pytest.raises(CircuitError, match=told):
        mine.mask(theirs.circuit(np.isin(theirs.edge_names, "input->logits")))


def test_heads_that_cannot_share_evenly_are_refused():
    with pytest.raises(CircuitError, match="3 heads cannot share 2 keys"):
        Wiring(2, 3, n_key_value_heads=2)


def test_a_mask_of_the_wrong_length_is_refused():
    with pytest.raises(CircuitError, match=r"one entry an edge, 8, but has shape \(7,\)"):
        Wiring(1, 1).circuit(np.ones(7, dtype=bool))


def test_a_wiring_without_heads_is_refused():
    with pytest.raises(CircuitError, match="at least one layer and one head"):
        Wiring(2, 0)
