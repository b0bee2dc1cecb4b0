"""Edges from codes: every edge of the wiring has its pair's score, and what is planted in codes is found."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from circuits.code_pairs import interaction, judge_pairs, pairs_of
from circuits.code_statistics import information, permuted_labels
from circuits.coding import Coded, coded, examples_of
from circuits.discovery.code_edges import (
    codes_edges,
    codes_of_nodes,
    metric_codes,
    of_parts,
    on_edges,
    rank_correlation,
    readable,
)
from circuits.scores import Scores
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError
from mechinterp.nodes import Node
from mechinterp.prompts import PromptBatch
from saes.codes import CodeSettings

FIELDS = ("clean", "corrupted", "end", "candidates", "roles", "groups")
SHARED = Wiring(2, 4, n_key_value_heads=2)
QUICK = {"n_train": 4, "d_sae": 4, "steps": 20, "n_permutations": 30}


@pytest.fixture(scope="module")
def task(plain, make_task):
    return make_task(plain, n_prompts=40)


@pytest.fixture(scope="module")
def one(plain, task) -> Coded:
    return coded(examples_of(plain, task, "END", 4), CodeSettings(4, 4, steps=20))


@pytest.mark.parametrize("wiring", [Wiring(2, 3), Wiring(3, 2, has_mlp=False), Wiring(2, 2, parallel=True), SHARED])
def test_pairs_are_those_that_the_wiring_joins(wiring):
    """By name: writer and reader of every edge, ports left out; and nothing else."""
    nodes = [*map(str, wiring.writers), "logits"]
    pairs = {(nodes[writer], nodes[reader]) for writer, reader in zip(*pairs_of(readable(wiring)), strict=True)}
    assert pairs == {(str(writer), str(part)) for writer, reader in wiring.edges for part in wiring.owners(reader)}
    assert ("a1.h0", "a0.h0") not in pairs
    assert (("a0.h0", "m0") in pairs) == (wiring.has_mlp and not wiring.parallel)


def test_a_pair_scores_on_all_its_ports():
    wiring = Wiring(2, 2)
    values = np.arange(readable(wiring).sum(), dtype=float)
    by_edge = dict(zip(wiring.edge_names, on_edges(values, wiring).tolist(), strict=True))
    assert by_edge["m0->a1.h1.q"] == by_edge["m0->a1.h1.k"] == by_edge["m0->a1.h1.v"] != by_edge["m0->a1.h0.q"]
    assert set(by_edge.values()) == set(values.tolist())


def test_on_a_key_that_heads_share_stands_the_strongest_pair():
    pairs = zip(*pairs_of(readable(SHARED)), strict=True)
    values = np.random.default_rng(0).normal(size=readable(SHARED).sum())
    by_pair = {(SHARED.writers[w], [*SHARED.writers, Node.logits()][r]): x for (w, r), x in zip(pairs, values, strict=True)}
    for (writer, reader), value in zip(SHARED.edges, on_edges(values, SHARED), strict=True):
        assert value == max((by_pair[writer, part] for part in SHARED.owners(reader)), key=abs)


def test_nodes_are_the_label_the_parts_in_wiring_order_and_the_metric(plain, one):
    wiring, ends = Wiring.of(plain.config), metric_codes(one.examples)
    nodes = codes_of_nodes(one, wiring, ends)
    assert nodes.shape == (1, len(one.examples.rows), len(wiring.writers) + 1)
    np.testing.assert_array_equal(nodes[0, :, 0], one.examples.labels)
    np.testing.assert_array_equal(nodes[0, :, -1], ends)
    for index, writer in enumerate(wiring.writers[1:], 1):
        np.testing.assert_array_equal(nodes[0, :, index], one.values[0, :, one.examples.parts.index(writer)])


def test_half_of_all_examples_are_above_the_median(plain, one):
    found, prompts = metric_codes(one.examples, batch_size=7), one.examples.prompts
    assert found.sum() == len(prompts) == 38
    logits = torch.cat([plain.run(tokens, logits_at=prompts.end)[0] for tokens in (prompts.clean, prompts.corrupted)])
    both = PromptBatch(**{name: torch.cat([getattr(prompts, name)] * 2) for name in FIELDS}, positions={})
    metric = one.examples.task.metric(logits, both).numpy()
    assert metric[found].min() > metric[~found].max()


def test_what_the_input_shares_with_a_part_is_all_that_the_part_knows(plain, one):
    """-I(y; c), adjusted for chance: the same formula as for any other pair."""
    nodes = codes_of_nodes(one, Wiring.of(plain.config), metric_codes(one.examples))[0]
    labels, n_before = one.examples.labels, readable(Wiring.of(plain.config))
    found = interaction(nodes, labels, n_before, 30, 0)[0]
    draws = np.concatenate([labels[None], permuted_labels(labels, 30, 0, paired=True)])
    known = information(nodes, draws)
    chance = known[1:].mean(0)
    adjusted = np.log(2) * (known[0] - chance) / (np.log(2) - chance)
    writers, readers = pairs_of(n_before)
    np.testing.assert_allclose(found[writers == 0], -adjusted[readers[writers == 0]], atol=1e-6)


def test_a_planted_pair_is_found_by_name(plain, one):
    """The exclusive or of two heads is the label; all the other codes are noise."""
    rng, wiring = np.random.default_rng(0), Wiring.of(plain.config)
    values, parts = rng.integers(0, 4, one.values.shape), [*map(str, one.examples.parts)]
    values[0, :, parts.index("a0.h1")] = secret = rng.integers(0, 2, 76)
    values[0, :, parts.index("a2.h2")] = secret ^ one.examples.labels
    planted = replace(one, values=values)
    nodes = codes_of_nodes(planted, wiring, np.tile([True, False], 38))
    judged = judge_pairs(interaction(nodes[0], one.examples.labels, readable(wiring), 100, 0)[None], 0.05, of_parts(wiring))
    values = on_edges(judged.values, wiring)
    assert values[wiring.index_of("a0.h1->a2.h2.k")] == values.max() == pytest.approx(np.log(2), abs=0.1)
    assert judged.selected[np.argmax(judged.values)]
    assert judged.selected.sum() <= 2


@pytest.mark.parametrize("score", ["interaction", "conditional"])
def test_scores_of_every_edge_that_can_be_cut_saved_and_read(plain, task, score, tmp_path):
    found = codes_edges(plain, task, score=score, **QUICK)
    assert (found.items, found.unit) == ("edge", "nats")
    assert found.method == ("codes-edges" if score == "interaction" else "codes-edges-conditional")
    facts = found.settings
    assert facts["n_pairs"] == of_parts(found.wiring).sum() < readable(found.wiring).sum()
    assert not [name for name in facts["selected"] if "input" in name or "logits" in name]
    assert len(facts["selected"]) == min(facts["n_selected"], 100)
    assert "co-occurrence" in facts["edges_are"]
    assert {"n_selected", "selected", "rank_correlation"} <= set(facts["untrained"])
    assert len(found.top(20).edges_kept) == 20
    found.save(tmp_path / "scores.json")
    assert Scores.load(tmp_path / "scores.json") == found


def test_given_the_label_the_input_says_nothing(plain, task):
    found = codes_edges(plain, task, score="conditional", **QUICK)
    assert (found.values[found.wiring.edge_writer == 0] == 0).all()
    assert (found.values != 0).any()


def test_several_positions_give_each_pair_its_best(plain, task):
    each = [codes_edges(plain, task, positions=place, **QUICK).values for place in ("END", "mean")]
    both = codes_edges(plain, task, positions=("END", "mean"), **QUICK).values
    np.testing.assert_allclose(both, np.where(np.abs(each[0]) >= np.abs(each[1]), *each), atol=1e-9)


def test_rank_correlation_is_of_ranks():
    one = np.array([1.0, 2, 3, 4])
    assert rank_correlation(one, one**3) == 1
    assert rank_correlation(one, -one) == -1
    assert rank_correlation(one, np.zeros(4)) is None


def test_a_misspelt_score_is_told_the_nearest(plain, task):
    with pytest.raises(CircuitError, match="Did you mean 'conditional'"):
        codes_edges(plain, task, score="conditonal", **QUICK)
