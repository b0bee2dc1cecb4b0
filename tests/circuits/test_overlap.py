"""Overlap of what is equal, disjoint and random; two nulls held against enumeration and against scipy."""

from collections import Counter
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest

from circuits import PUBLISHED, Scores, Wiring, path_patching, staged
from circuits.reuse.chance import Chance, shared_by_chance, with_same_degrees
from circuits.reuse.chosen import Chosen
from circuits.reuse.overlaps import overlap, overlap_sweep, rank_correlations, stage_overlaps
from circuits.reuse.report import overlap_table
from circuits.statistics import random_circuits
from mechinterp.errors import CircuitError
from mechinterp.models.compiled import indirect_object
from mechinterp.nodes import Node

SMALL = Wiring(n_layers=3, n_heads=3)


def random_mask(n_items: int, n: int, rng: np.random.Generator) -> np.ndarray:
    return np.isin(np.arange(n_items), rng.choice(n_items, n, replace=False))


def edge_scores(values: np.ndarray, wiring: Wiring = SMALL, **facts) -> Scores:
    about: dict[str, Any] = {"method": "eap", "unit": "logit_diff", "model": "toy", "task": "t"}
    return Scores(wiring, values, **about | facts)


def node_scores(values: np.ndarray, wiring: Wiring = SMALL, **facts) -> Scores:
    return edge_scores(values, wiring, **({"items": "node", "method": "patching"} | facts))


def test_identical_circuits_give_one_and_disjoint_ones_zero():
    rng = np.random.default_rng(0)
    mask = random_mask(SMALL.n_edges, 40, rng)
    circuit, rest = SMALL.circuit(mask), SMALL.circuit(~mask)
    (same,) = overlap({"one": circuit, "other": circuit.copy()}, n_draws=20)
    (apart,) = overlap({"one": circuit, "other": rest}, n_draws=20)
    assert (same.jaccard, same.coefficient, same.n_shared, same.n_items) == (1, 1, 40, SMALL.n_edges)
    assert (apart.jaccard, apart.coefficient, apart.n_shared, apart.chance.p_value) == (0, 0, 0, 1)
    assert same.chance.p_value < 1e-30


def test_a_circuit_inside_another_has_coefficient_one_and_a_smaller_jaccard_index():
    mask = random_mask(SMALL.n_edges, 40, np.random.default_rng(0))
    half = mask & (np.cumsum(mask) <= 20)
    (found,) = overlap({"half": SMALL.circuit(half), "whole": SMALL.circuit(mask)}, n_draws=0)
    assert (found.coefficient, found.jaccard, found.same_degrees) == (1, 0.5, None)


def test_random_circuits_share_what_chance_says_within_its_interval():
    rng, inside, shared, p_values = np.random.default_rng(1), 0, [], []
    for _ in range(200):
        one, other = (edge_scores(rng.normal(size=SMALL.n_edges)) for _ in range(2))
        (found,) = overlap({"one": one, "other": other}, n=60, n_draws=0)
        inside += found.chance.low <= found.n_shared <= found.chance.high
        shared.append(found.n_shared)
        p_values.append(found.chance.p_value)
    assert found.chance.mean == pytest.approx(60 * 60 / SMALL.n_edges)
    assert np.mean(shared) == pytest.approx(found.chance.mean, abs=4 * np.std(shared) / 200**0.5)
    assert inside >= 180
    assert np.mean(np.array(p_values) <= 0.05) <= 0.09


@pytest.mark.parametrize(
    ("n_items", "a", "b"), [(384, 8, 8), (384, 32, 32), (30, 20, 25), (9, 0, 4), (9, 9, 9), (32491, 650, 3249)]
)
def test_two_even_draws_are_hypergeometric(n_items, a, b):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.hypergeom(n_items, a, b)
    chances = shared_by_chance(n_items, [a, b])
    k = np.arange(len(chances))
    np.testing.assert_allclose(chances, expected.pmf(k), rtol=1e-8, atol=1e-300)
    for found in {0, min(a, b) // 2, min(a, b)}:
        chance = Chance.exact(chances, found)
        assert chance.p_value == pytest.approx(expected.sf(found - 1), rel=1e-7)
        assert (chance.low, chance.high) == (expected.ppf(0.025), expected.ppf(0.975))


def test_the_numbers_derived_in_the_reference():
    """8 and 8 of 384 heads share 0.17 by chance, 32 and 32 share 2.7."""
    means = [Chance.exact(shared_by_chance(384, [k, k]), 0).mean for k in (8, 32)]
    assert means == [pytest.approx(8 * 8 / 384), pytest.approx(32 * 32 / 384)]


def test_three_even_draws_by_enumeration():
    sets = [list(combinations(range(5), size)) for size in (2, 3, 4)]
    counts = Counter(len(set(a) & set(b) & set(c)) for a, b, c in product(*sets))
    expected = np.array([counts[k] for k in range(3)]) / sum(counts.values())
    np.testing.assert_allclose(shared_by_chance(5, [3, 4, 2]), expected)
    assert shared_by_chance(5, [0, 3]).tolist() == [1.0]
    with pytest.raises(CircuitError, match="cannot be drawn from 5 items"):
        shared_by_chance(5, [6, 2])


@pytest.mark.parametrize("wiring", [SMALL, Wiring(n_layers=3, n_heads=4, n_key_value_heads=2)], ids=repr)
def test_same_degrees_are_the_same_degrees(wiring):
    kept = random_circuits(wiring, 60, 1, seed=3)[0]
    drawn = with_same_degrees(wiring, kept, 50, seed=1)
    grid, expected = wiring.grid(drawn), wiring.grid(kept)
    assert (grid.sum(1) == expected.sum(0)).all()  # of every reader: each port by itself
    assert (grid.sum(2) == expected.sum(1)).all()
    assert len(np.unique(drawn, axis=0)) > 40
    assert np.array_equal(drawn, with_same_degrees(wiring, kept, 50, seed=1))
    assert not np.array_equal(drawn, with_same_degrees(wiring, kept, 50, seed=2))


def test_every_circuit_of_the_same_degrees_is_equally_likely():
    """All 4,096 circuits of a tiny model are looked at; chi-square at 4 standard deviations."""
    wiring = Wiring(n_layers=2, n_heads=1, has_mlp=False)
    masks = np.array(list(product([False, True], repeat=wiring.n_edges)))
    kept = np.zeros(wiring.n_edges, dtype=bool)
    names = ("input->a1.h0.q", "a0.h0->a1.h0.k", "input->a1.h0.v", "a0.h0->logits", "a1.h0->logits")
    kept[[wiring.index_of(name) for name in names]] = True
    grids, mine = wiring.grid(masks), wiring.grid(kept)
    alike = masks[(grids.sum(1) == mine.sum(0)).all(1) & (grids.sum(2) == mine.sum(1)).all(1)]
    assert len(alike) == 6  # the logits read a0.h0 or the input beside a1.h0, and one port or two read the input
    n = 2000 * len(alike)
    drawn = with_same_degrees(wiring, kept, n, seed=0, swaps_per_edge=30)
    counts = Counter(row.tobytes() for row in drawn)
    assert set(counts) == {row.tobytes() for row in alike}
    observed, expected = np.array(list(counts.values())), n / len(alike)
    chi_square, freedom = ((observed - expected) ** 2 / expected).sum(), len(alike) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_twenty_tried_swaps_an_edge_are_enough_to_forget_the_start():
    wiring = Wiring(n_layers=6, n_heads=6)
    kept = random_circuits(wiring, 100, 1, seed=0)[0]
    left = [(with_same_degrees(wiring, kept, 200, swaps_per_edge=tries) & kept).sum(1).mean() for tries in (1, 20, 40)]
    assert left[0] > 1.5 * left[1]
    assert left[1] == pytest.approx(left[2], rel=0.05)


def test_circuits_with_the_same_hub_share_edges_for_that_reason_alone():
    """Both read one head everywhere: no accident among even draws, and nothing beyond it given the degrees."""
    wiring, rng = Wiring(n_layers=4, n_heads=4), np.random.default_rng(0)
    hub = np.flatnonzero(wiring.edge_writer == 1)
    masks = []
    for _ in range(2):
        mask = random_mask(wiring.n_edges, 20, rng)
        mask[rng.choice(hub, len(hub) * 4 // 5, replace=False)] = True
        masks.append(mask)
    (found,) = overlap({str(at): wiring.circuit(mask) for at, mask in enumerate(masks)}, n_draws=200)
    assert found.chance.p_value < 1e-6
    assert found.same_degrees.p_value > 0.05
    assert found.same_degrees.mean > 2 * found.chance.mean


def test_more_than_two_are_compared_in_pairs_and_together():
    masks = [random_mask(SMALL.n_edges, 50, np.random.default_rng(seed)) for seed in range(3)]
    found = overlap({name: SMALL.circuit(mask) for name, mask in zip("abc", masks, strict=True)}, n_draws=10)
    assert [one.names for one in found] == [("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")]
    assert found[-1].n_shared == np.logical_and.reduce(masks).sum()
    assert found[-1].n_union == np.logical_or.reduce(masks).sum()
    assert found[-1].same_degrees.n_draws == 10


def test_only_what_all_judged_counts():
    """Wang et al. name no MLP, so none counts; a method that scored heads alone does the same to node scores."""
    rng = np.random.default_rng(0)
    wiring = PUBLISHED["ioi"].wiring
    scores = node_scores(rng.normal(size=len(wiring.writers)), wiring)
    (found,) = overlap({"ioi": PUBLISHED["ioi"], "scores": scores}, level="node", n=157)
    assert (found.n_items, found.sizes, found.coefficient) == (144, (26, 144), 1)
    (found,) = overlap({"ioi": PUBLISHED["ioi"], "greater-than": PUBLISHED["greater-than"]}, level="node")
    assert found.n_items == 144
    assert found.shared == ("a0.h1", "a5.h5", "a6.h9")
    (found,) = overlap({"ioi": PUBLISHED["ioi"], "greater-than": PUBLISHED["greater-than"]}, n_draws=5)
    heads = Wiring(12, 12, has_mlp=False)
    assert found.n_items == heads.n_edges - 1  # the edge from input to logits is nobody's finding either
    judged = node_scores(rng.normal(size=len(SMALL.writers)), settings={"judged": ["head"]})
    assert Chosen.of(judged, "node", 3).judged.sum() == SMALL.n_layers * SMALL.n_heads
    from_circuit = Chosen.of(judged.top(3), "node")
    assert from_circuit.judged.sum() == SMALL.n_layers * SMALL.n_heads


def test_path_patching_judges_senders_alone():
    planted = indirect_object(n_prompts=8)
    heads = path_patching(planted.model, planted.task, senders="heads")
    named = path_patching(planted.model, planted.task, senders=[planted.roles["mover"], planted.roles["late_mover"]])
    assert Chosen.of(heads, "node", 2).judged.sum() == planted.model.config.n_layers * planted.model.config.n_heads
    assert Chosen.of(named, "node", 9).judged.sum() == 2
    early = path_patching(planted.model, planted.task, receivers=planted.roles["mover"])
    layer = Node.parse(planted.roles["mover"]).layer
    assert Chosen.of(early, "node", 1).judged.sum() <= layer * (planted.model.config.n_heads + 1)


def test_what_scores_zero_is_never_kept():
    values = np.zeros(SMALL.n_edges)
    values[:3] = 1, -2, 3
    (found,) = overlap({"one": edge_scores(values), "other": edge_scores(values[::-1].copy())}, n=10, n_draws=0)
    assert (found.sizes, found.n_shared) == ((3, 3), 0)


def test_a_sweep_goes_through_all_sizes_and_gives_equal_ones_once():
    scores = {name: node_scores(np.random.default_rng(at).normal(size=len(SMALL.writers))) for at, name in enumerate("ab")}
    found = overlap_sweep(scores, level="node", sizes=(0.01, 0.02, 0.25, 0.5, 1.0))  # of twelve nodes
    assert [(one.cut, one.sizes) for one in found] == [(0.01, (1, 1)), (0.25, (3, 3)), (0.5, (6, 6)), (1.0, (12, 12))]
    assert found[-1].jaccard == 1
    assert found[-1].chance.p_value == 1  # with everything kept, all is shared whatever was scored


def test_stages_are_compared_one_by_one_and_as_slots():
    planted = indirect_object(n_prompts=8)
    traces = [staged(planted.model, planted.task, stages=("q@END", "kv"), n_per_stage=n) for n in (2, 1)]
    same = stage_overlaps({"one": traces[0], "other": traces[0]})
    assert [one.stage for one in same] == ["1: logits", "2: q@END", "3: kv", "all"]
    assert {(one.jaccard, one.coefficient) for one in same} == {(1, 1)}
    *stages, slots = stage_overlaps({"two": traces[0], "one": traces[1]})
    assert slots.n_shared == sum(stage.n_shared for stage in stages)
    assert slots.sizes == tuple(map(sum, zip(*(stage.sizes for stage in stages), strict=True)))
    assert slots.coefficient > slots.jaccard  # the two readings of the paper's 78 %
    assert slots.chance.mean == pytest.approx(sum(stage.chance.mean for stage in stages))
    _, head, rows = overlap_table("stages", same)
    assert head[0] == "stage"
    assert [row[0] for row in rows] == [one.stage for one in same]
    with pytest.raises(CircuitError, match="'empty' has no stage"):
        stage_overlaps({"one": traces[0], "empty": []})


def test_rank_correlation_needs_no_cut():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    values, other = rng.normal(size=(2, SMALL.n_edges))
    (same,) = rank_correlations({"one": edge_scores(values), "cubed": edge_scores(values**3)})
    (flipped,) = rank_correlations({"one": edge_scores(values), "flipped": edge_scores(-values)})
    (apart,) = rank_correlations({"one": edge_scores(values), "other": edge_scores(other)})
    assert (same.magnitude, same.signed, flipped.magnitude, flipped.signed) == (1, 1, 1, -1)
    assert apart.signed == pytest.approx(stats.spearmanr(values, other)[0], abs=1e-4)
    assert apart.n_items == SMALL.n_edges


@pytest.mark.parametrize(
    ("sources", "settings", "complaint"),
    [
        ({"one": SMALL.circuit(np.ones(SMALL.n_edges, bool))}, {}, "takes two circuits"),
        ({"a": edge_scores(np.ones(SMALL.n_edges)), "b": edge_scores(np.ones(SMALL.n_edges))}, {}, "until they are cut"),
        (dict.fromkeys("ab", node_scores(np.ones(len(SMALL.writers)))), {"n": 2}, 'node scores by .* give level="node"'),
        ({"a": edge_scores(np.ones(SMALL.n_edges)), "b": PUBLISHED["ioi"]}, {"n": 2}, "models of different shapes"),
    ],
)
def test_messages_say_what_to_do(sources, settings, complaint):
    with pytest.raises(CircuitError, match=complaint):
        overlap(sources, **settings)
