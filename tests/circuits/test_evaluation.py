"""What a report says about circuits whose faithfulness is known, and when it refuses to speak."""

import json
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch

from circuits.agreement import ranking
from circuits.discovery import ALGORITHMS, WATCHING, discover
from circuits.evaluation import evaluate
from circuits.report import Report
from circuits.scores import Scores
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError, TaskError
from mechinterp.models.compiled import COMPILED

UNSOLVED = {"allow_unsolved": True}  # random models do no task
ANYTHING = {"allow_unsolved": True, "allow_undefined": True}


@pytest.fixture(scope="module", params=COMPILED)
def planted(request):
    return COMPILED[request.param](n_prompts=12)


def whole(model):
    wiring = Wiring.of(model.config)
    return wiring.circuit(np.ones(wiring.n_edges, bool))


def test_the_whole_model_is_faithful_to_itself(plain, make_task):
    report = evaluate(plain, make_task(plain), whole(plain), n_random=0, **ANYTHING)
    assert report.faithfulness == pytest.approx(1)
    assert report.interval == (pytest.approx(1), pytest.approx(1))
    assert report.complement == pytest.approx(0, abs=1e-9)
    assert report.kl == pytest.approx(0, abs=1e-9)
    assert report.circuit == pytest.approx(report.clean)
    assert np.isnan(report.beats_random)


def test_groups_and_quartiles_describe_the_same_prompts(plain, make_task):
    report = evaluate(plain, make_task(plain), whole(plain), n_random=0, **ANYTHING)
    assert set(report.groups) == {"even", "odd"}
    assert report.quartiles == (pytest.approx(1),) * 3


def test_the_curve_ends_at_the_whole_model(plain, make_task):
    task = make_task(plain)
    scores = discover(plain, task, "exact", **UNSOLVED)
    report = evaluate(plain, task, scores.top(20), scores, n_random=3, **ANYTHING)
    assert report.curve.n_edges[-1] == scores.wiring.n_edges
    assert report.curve.faithfulness[-1] == pytest.approx(1)
    assert report.curve.smallest(2.0) is None or report.curve.smallest(2.0) < scores.wiring.n_edges
    assert len(report.random) == 3


SCORES_PARTS = {
    *("patching", "path-patching", "cdt", "cdt-paper", "atp", "atp-qk", "atp-star", "atp-ig"),
    *("subnetwork-probing", "neurons"),
    *WATCHING,  # which say what parts know: see their own tests
}
MISSES_PLANTED = {
    "information-flow": "the distractors are louder than the circuit, and it looks at nothing else",
    "cdt-edges": "a path that ends with an edge is not told from the edge",
}
TRAINED = {"edge-pruning", "ugs", "subnetwork-probing"}  # with tests of their own, of fewer steps


@pytest.mark.parametrize("method", [name for name in ALGORITHMS if name not in {*SCORES_PARTS, *MISSES_PLANTED, *TRAINED}])
def test_every_method_finds_the_circuits_set_by_hand(planted, method):
    # Of two movers that do the same, ACDC spares one's inputs: a divergence hardly sees what the other makes good.
    scores = discover(planted.model, planted.task, method, **({"objective": "metric"} if method == "acdc" else {}))
    assert ranking(scores, planted.circuit_edges).auroc == 1
    assert ranking(scores, planted.circuit_edges).average_precision == 1


def test_a_circuit_set_by_hand_is_faithful_alone(planted):
    scores = discover(planted.model, planted.task, "exact")
    circuit = scores.top(len(planted.circuit_edges))
    report = evaluate(planted.model, planted.task, circuit, scores)
    assert report.faithfulness == pytest.approx(1, abs=1e-3)
    assert report.complement == pytest.approx(0, abs=0.05)
    assert report.accuracy_model == 1
    assert report.beats_random == 1


def test_faithfulness_without_an_effect_is_undefined(plain, make_task):
    task = make_task(plain)
    either_way = replace(task, metric=lambda logits, prompts: task.metric(logits, prompts).abs() * 0 + prompts.end)
    with pytest.raises(TaskError, match=r"faithfulness is undefined.*another corruption"):
        evaluate(plain, either_way, whole(plain), n_random=0, allow_unsolved=True)


def test_a_report_is_saved_whole_and_reads_as_a_table(plain, make_task, tmp_path):
    report = evaluate(plain, make_task(plain), whole(plain), n_random=2, **ANYTHING)
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    assert json.loads((tmp_path / "report.json").read_text())["choices"]["ablation"] == "resample"
    assert "faithfulness     1.000" in str(report)


def test_an_unknown_method_names_the_known_ones(plain, make_task):
    with pytest.raises(CircuitError, match=r"no method 'eap_ig'.*Did you mean 'eap-ig'"):
        discover(plain, make_task(plain), "eap_ig", **UNSOLVED)


def test_a_method_of_ones_own_is_called_as_it_is(plain, make_task):
    def first_edge_only(model, task, *, strength):
        wiring = Wiring.of(model.config)
        values = np.eye(1, wiring.n_edges)[0] * strength
        return Scores(wiring, values, method="mine", unit="none", model=model.config.name, task=task.name)

    assert discover(plain, make_task(plain), first_edge_only, strength=2.0, **UNSOLVED).values[0] == 2


def test_scores_of_another_model_draw_no_curve(plain, make_model, make_task):
    task = make_task(plain)
    foreign = discover(make_model(n_heads=2), task, "eap", **UNSOLVED)
    with pytest.raises(CircuitError, match="scores of the model in hand"):
        evaluate(plain, task, whole(plain), foreign, n_random=0, **ANYTHING)


def test_node_scores_draw_a_curve_over_parts(plain, make_task):
    task = make_task(plain)
    scores = discover(plain, task, "patching", **UNSOLVED)
    report = evaluate(plain, task, scores.top(4), scores, n_random=0, sizes=(0.1, 0.5, 1.0), **ANYTHING)
    assert report.curve.items == "node"
    assert report.curve.n_items == (1, 6, 12)
    assert report.curve.faithfulness[-1] == pytest.approx(1)
    assert report.choices["component"] == "node"


def test_an_interrupted_search_goes_on_where_it_stopped(plain, make_task, tmp_path, monkeypatch):
    task, settings = make_task(plain), {"batch_size": 2, "keep_prompts": True, "resume": tmp_path}
    whole_run = discover(plain, task, "exact", batch_size=2, keep_prompts=True, **UNSOLVED)
    exact_module = import_module("circuits.discovery.exact")
    edges, calls = exact_module._edges, []

    def edges_until_interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return edges(*arguments)

    monkeypatch.setattr(exact_module, "_edges", edges_until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        discover(plain, task, "exact", **settings, **UNSOLVED)
    resumed = discover(plain, task, "exact", **settings, **UNSOLVED)
    assert len(calls) == 4  # of three batches, two were kept
    assert resumed == whole_run
    discover(plain, make_task(plain, seed=5), "exact", **settings, **UNSOLVED)
    assert len(calls) == 7  # other prompts are another search


def test_a_metric_without_a_gradient_is_refused_by_gradient_methods(plain, make_task):
    with pytest.raises(TaskError, match=r"no gradient.*'exact'"):
        discover(plain, make_task(plain, "is_top"), "eap", **UNSOLVED)


def test_scores_that_are_all_zero_are_refused(plain, make_task):
    task = make_task(plain)
    of_the_prompt = replace(task, metric=lambda logits, prompts: logits[:, 0] * 0 + prompts.end)
    with pytest.raises(TaskError, match="scores exactly zero"):
        discover(plain, of_the_prompt, "eap", **UNSOLVED)


def test_half_precision_scores_as_full_precision_does(plain, make_task):
    task = make_task(plain)
    half = plain.to(dtype=torch.bfloat16)
    for method in sorted(ALGORITHMS.keys() - TRAINED - WATCHING):  # a code changes as a whole, or not
        full = discover(plain, task, method, **UNSOLVED).values
        assert np.corrcoef(discover(half, task, method, **UNSOLVED).values, full)[0, 1] > 0.9
