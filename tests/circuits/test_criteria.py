"""Completeness and minimality of circuits that are known to lack nothing, to lack an edge, or to carry idle ones."""

import json
from dataclasses import replace

import numpy as np
import pytest

from circuits.criteria import Completeness, Minimality, completeness, minimality
from circuits.graph import Circuit
from circuits.ground_truth import Citation, PublishedCircuit
from circuits.knockouts import Runs, parts_of, search
from circuits.published import PUBLISHED, minimality_sets
from circuits.running import run_circuit
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError, TaskError, UnknownNode
from mechinterp.metrics import METRICS
from mechinterp.models.compiled import COMPILED, Planted
from mechinterp.nodes import Node


@pytest.fixture(scope="module", params=COMPILED)
def planted(request) -> Planted:
    return COMPILED[request.param](n_prompts=12)


@pytest.fixture(scope="module")
def movers() -> Planted:
    """Two name movers in a row, each of which carries half."""
    return COMPILED["indirect-object"](n_prompts=12)


def truth(planted: Planted) -> np.ndarray:
    return np.isin(Wiring.of(planted.model.config).edge_names, list(planted.circuit_edges))


def as_circuit(planted: Planted, kept: np.ndarray) -> Circuit:
    return Wiring.of(planted.model.config).circuit(kept)


def whole(model) -> Circuit:
    wiring = Wiring.of(model.config)
    return wiring.circuit(np.ones(wiring.n_edges, bool))


@pytest.mark.parametrize("knockouts", ["random", "greedy"])
@pytest.mark.parametrize("level", ["node", "edge"])
def test_the_whole_model_is_complete_to_the_last_digit(make_model, make_task, knockouts, level):
    model = make_model(n_layers=1, n_heads=2)
    found = completeness(model, make_task(model), whole(model), knockouts=knockouts, level=level, n_random=5)
    assert found.max == found.mean == 0
    assert found.max_interval == found.mean_interval == (0, 0)


@pytest.mark.parametrize("level", ["node", "edge"])
def test_a_planted_circuit_is_complete_and_minimal(planted, level):
    circuit = as_circuit(planted, truth(planted))
    for knockouts in ("random", "greedy"):
        found = completeness(planted.model, planted.task, circuit, knockouts=knockouts, level=level)
        assert found.max == pytest.approx(0, abs=1e-4)
    least = minimality(planted.model, planted.task, circuit, level=level)
    assert least.below == ()
    assert min(effect.score for effect in least.effects) > 0.05


def test_edge_by_edge_the_parts_of_a_planted_circuit_are_its_edges(planted):
    least = minimality(planted.model, planted.task, as_circuit(planted, truth(planted)), level="edge")
    assert {effect.name for effect in least.effects} == planted.circuit_edges


def test_edges_that_were_added_for_nothing_are_named_and_no_others(planted):
    kept = truth(planted)
    added = np.random.default_rng(0).choice(np.flatnonzero(~kept), 20, replace=False)
    kept[added] = True
    least = minimality(planted.model, planted.task, as_circuit(planted, kept), level="edge")
    assert set(least.below) == {Wiring.of(planted.model.config).edge_names[edge] for edge in added}


def test_heads_that_were_added_for_nothing_are_named(movers):
    kept, wiring = truth(movers), Wiring.of(movers.model.config)
    idle = next(head for head in wiring.writers if head.kind == "head" and str(head) not in movers.roles.values())
    kept[wiring.edge_writer == wiring.writers.index(idle)] = True
    assert minimality(movers.model, movers.task, as_circuit(movers, kept)).below == (str(idle),)


def test_an_edge_left_out_is_missed(planted):
    """Every second one, left out alone."""
    for edge in np.flatnonzero(truth(planted))[::2]:
        kept = truth(planted)
        kept[edge] = False
        found = completeness(planted.model, planted.task, as_circuit(planted, kept), n_random=4)
        assert found.max > 0.05 * found.clean
        assert found.max_interval[0] > 0


def test_a_backup_is_missed_only_when_what_it_backs_up_is_gone(movers):
    """A circuit that lacks the late mover, on a metric that one mover saturates: only a knockout tells."""
    task = replace(movers.task, metric=lambda logits, prompts: METRICS["logit_diff"](logits, prompts).clamp(max=1.0))
    kept, wiring = truth(movers), Wiring.of(movers.model.config)
    kept[wiring.index(movers.roles["late_mover"], "logits")] = False
    circuit = wiring.circuit(kept)
    found = completeness(movers.model, task, circuit, knockouts="classes", classes={"mover": [movers.roles["mover"]]})
    nothing, mover = found.knockouts
    assert nothing.gap == pytest.approx(0, abs=1e-4)
    assert mover.gap == pytest.approx(-1, abs=1e-3)
    assert found.worst is mover
    assert completeness(movers.model, task, circuit, knockouts="greedy").max >= abs(mover.gap)


def test_a_k_brings_out_a_part_that_its_backup_hides(movers):
    task = replace(movers.task, metric=lambda logits, prompts: METRICS["logit_diff"](logits, prompts).clamp(max=1.0))
    circuit = as_circuit(movers, truth(movers))
    early, late = (Node.parse(movers.roles[role]) for role in ("mover", "late_mover"))
    assert {str(early), str(late)} <= set(minimality(movers.model, task, circuit).below)
    sets = {early: (early, late), late: (early, late)}  # as published.minimality_sets has them: the part is in its own K
    by_hand = minimality(movers.model, task, circuit, sets=sets)
    assert not {str(early), str(late)} & set(by_hand.below)
    assert {effect.name: effect.given for effect in by_hand.effects}[str(early)] == (str(late),)
    searched = minimality(movers.model, task, circuit, sets="greedy", n_steps=1)
    for effect, other in zip(searched.effects, by_hand.effects, strict=True):
        assert effect.score >= other.score - 1e-4


def test_a_knocked_out_node_loses_every_edge_that_leaves_it(plain, make_task):
    """F(M \\ K) and F(C \\ K) against circuits that are built by hand."""
    task, wiring = make_task(plain), Wiring.of(plain.config)
    kept = np.random.default_rng(3).random(wiring.n_edges) < 0.5
    found = completeness(plain, task, wiring.circuit(kept), ablation="mean", n_random=3)
    for knockout in found.knockouts:
        stays = np.array([str(wiring.writers[writer]) not in knockout.parts for writer in wiring.edge_writer])
        for mask, score in ((stays, knockout.model), (kept & stays, knockout.circuit)):
            logits = run_circuit(plain, task, wiring.circuit(mask), "mean")
            assert float(task.metric(logits, task.prompts).mean()) == pytest.approx(score)


def test_effects_are_positive_where_a_part_helps(plain, make_task):
    """The sign of the house: what the metric loses."""
    task, wiring = make_task(plain), Wiring.of(plain.config)
    task = replace(task, metric=lambda logits, prompts: METRICS["logit_diff"](logits, prompts) + 50)
    least = minimality(plain, task, whole(plain))
    runs = Runs.of(plain, task, "resample")
    parts = parts_of(wiring, np.ones(wiring.n_edges, bool), "node")
    assert [effect.name for effect in least.effects] == list(parts)
    for effect in least.effects:
        without = runs.without(np.ones(wiring.n_edges, bool), parts, [(effect.name,)]).mean()
        assert effect.effect == pytest.approx(least.clean - without)
        assert effect.interval[0] <= effect.effect <= effect.interval[1]


def test_classes_are_those_of_a_published_circuit_as_far_as_they_are_in(movers):
    kept, roles = truth(movers), movers.roles
    published = PublishedCircuit(
        name="planted",
        model="planted-indirect-object",
        wiring=Wiring.of(movers.model.config),
        task="indirect-object",
        citation=Citation("us", 2026, None, "compiled.py"),
        classes={
            "mover": tuple(Node.parse(roles[role]) for role in ("mover", "late_mover")),
            "inhibition": tuple(Node.parse(roles[role]) for role in ("inhibit_name", "inhibit_place")),
            "elsewhere": (Node.mlp(1),),
        },
        ablation="resample",
    )
    found = completeness(movers.model, movers.task, as_circuit(movers, kept), knockouts="classes", classes=published)
    assert [knockout.name for knockout in found.knockouts] == ["nothing", "mover", "inhibition"]
    assert found.max == pytest.approx(0, abs=1e-4)


def test_published_sets_fit_the_published_circuit(make_model, make_task):
    ioi, model = PUBLISHED["ioi"], make_model(n_layers=12, n_heads=12, d_model=8, d_head=2, d_mlp=4)
    task = replace(make_task(model, n_prompts=2), metric=lambda logits, prompts: METRICS["logit_diff"](logits, prompts) + 50)
    least = minimality(model, task, ioi.node_circuit(), sets=minimality_sets())
    given = {effect.name: effect.given for effect in least.effects}
    assert len(given) == 26 + 12  # all MLPs are in
    assert given["a9.h6"] == ("a9.h9", "a10.h0")
    assert given["m0"] == ()


def test_mean_and_max_are_of_the_listed_gaps(plain, make_task):
    wiring = Wiring.of(plain.config)
    circuit = wiring.circuit(np.random.default_rng(4).random(wiring.n_edges) < 0.3)
    found = completeness(plain, make_task(plain), circuit, n_random=6, seed=2)
    gaps = [abs(knockout.gap) for knockout in found.knockouts]
    assert len(gaps) == 7
    assert found.mean == pytest.approx(np.mean(gaps))
    assert found.max == max(gaps) == abs(found.worst.gap)
    again = completeness(plain, make_task(plain), circuit, n_random=6, seed=2)
    assert again == found


def test_results_are_saved_whole_and_read_as_tables(plain, make_task, tmp_path):
    wiring = Wiring.of(plain.config)
    circuit = wiring.circuit(np.random.default_rng(5).random(wiring.n_edges) < 0.3)
    task = replace(make_task(plain), metric=lambda logits, prompts: METRICS["logit_diff"](logits, prompts) + 50)
    found, least = completeness(plain, task, circuit, n_random=3), minimality(plain, task, circuit)
    found.save(tmp_path / "completeness.json")
    least.save(tmp_path / "minimality.json")
    assert Completeness.load(tmp_path / "completeness.json") == found
    assert Minimality.load(tmp_path / "minimality.json") == least
    assert json.loads((tmp_path / "minimality.json").read_text())["facts"]["ablation"] == "resample"
    assert "random knockouts of nodes: 4" in str(found)
    assert "score below 1% of F(M)" in str(least)
    with pytest.raises(CircuitError, match="is not a mechinterp minimality file"):
        Minimality.load(tmp_path / "completeness.json")


def test_nothing_is_run_twice(plain, make_task, monkeypatch):
    runs, wiring, asked = Runs.of(plain, make_task(plain), "resample"), Wiring.of(plain.config), []
    metric = type(runs.ends).metric

    def counted(ends, kept, progress=None):
        asked.append(len(kept))
        return metric(ends, kept, progress)

    monkeypatch.setattr("circuits.ends.Ends.metric", counted)
    masks = np.random.default_rng(6).random((4, wiring.n_edges)) < 0.5
    first = runs(masks[:3])
    np.testing.assert_array_equal(runs(masks[[0, 3, 3]])[0], first[0])
    assert asked == [3, 1]


def test_the_search_takes_the_best_step_and_stops_where_none_is_left():
    worth = {"a": 1.0, "b": 3.0, "c": -1.0}
    sets = search(lambda some: np.array([sum(worth[name] for name in one) for one in some]), worth, 5, least=0.0)
    assert sets == [("b",), ("b", "a")]


def test_what_cannot_be_asked_is_refused_with_a_remedy(plain, make_task):
    task, circuit = make_task(plain), whole(plain)
    with pytest.raises(CircuitError, match="'gready' is none of random, classes, greedy. Did you mean 'greedy'"):
        completeness(plain, task, circuit, knockouts="gready")
    with pytest.raises(CircuitError, match="of 0 classes none has a node in this circuit. Give classes="):
        completeness(plain, task, circuit, knockouts="classes")
    with pytest.raises(UnknownNode, match="'a9.h9' is not a writer here"):
        completeness(plain, task, circuit, knockouts="classes", classes={"mover": ["a9.h9"]})
    with pytest.raises(CircuitError, match="keeps no node that could be knocked out"):
        completeness(plain, task, Wiring.of(plain.config).circuit(np.zeros(Wiring.of(plain.config).n_edges, bool)))
    with pytest.raises(CircuitError, match="level must be 'node' or 'edge'"):
        minimality(plain, task, circuit, level="head")
    constant = replace(task, metric=lambda logits, _: logits[:, 0] * 0)
    with pytest.raises(TaskError, match="cannot tell from zero, and minimality is a share of it"):
        minimality(plain, constant, circuit)
