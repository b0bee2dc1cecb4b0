"""A circuit is the model with some edges cut: the two ends of that range are known exactly."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from circuits.ablation import ABLATIONS, replacement_for
from circuits.running import measure_circuits, run_circuit, run_circuits
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_a_circuit_with_all_edges_is_the_clean_run(model, make_task, ablation):
    prompts = make_task(model).prompts
    kept = np.ones((1, Wiring.of(model.config).n_edges), dtype=bool)
    logits = run_circuits(model, prompts, kept, ABLATIONS[ablation](model, prompts))[0]
    torch.testing.assert_close(logits, model.run(prompts.clean, logits_at=prompts.end)[0])


def test_a_circuit_with_no_edge_is_the_corrupted_run(model, make_task):
    prompts = make_task(model).prompts
    kept = np.zeros((1, Wiring.of(model.config).n_edges), dtype=bool)
    logits = run_circuits(model, prompts, kept, ABLATIONS["resample"](model, prompts))[0]
    torch.testing.assert_close(logits, model.run(prompts.corrupted, logits_at=prompts.end)[0])


def test_cutting_only_what_reads_a_dead_part_changes_nothing(model, make_task):
    """A writer all of whose outgoing edges are cut may lose its incoming ones too."""
    prompts, wiring = make_task(model).prompts, Wiring.of(model.config)
    dead = 2
    out = wiring.edge_writer != dead
    readers = np.array([reader.with_port(None) == wiring.writers[dead] for reader in wiring.readers])
    kept = np.stack([out, out & ~readers[wiring.edge_reader]])
    logits = run_circuits(model, prompts, kept, ABLATIONS["resample"](model, prompts))
    torch.testing.assert_close(logits[0], logits[1])


def test_circuits_run_together_as_they_run_alone(plain, make_task, monkeypatch):
    prompts = make_task(plain).prompts
    replacement = ABLATIONS["resample"](plain, prompts)
    kept = np.random.default_rng(0).random((5, Wiring.of(plain.config).n_edges)) < 0.5
    together = run_circuits(plain, prompts, kept, replacement)
    monkeypatch.setattr("circuits.running._MEMORY", 1)  # one circuit and one prompt at a time
    torch.testing.assert_close(run_circuits(plain, prompts, kept, replacement), together)


def test_a_circuit_graph_runs_as_its_mask_does(plain, make_task):
    task, wiring = make_task(plain), Wiring.of(plain.config)
    kept = np.random.default_rng(1).random(wiring.n_edges) < 0.3
    by_graph = run_circuit(plain, task, wiring.circuit(kept), "mean")
    by_mask = run_circuits(plain, task.prompts, kept[None], ABLATIONS["mean"](plain, task.prompts))[0]
    torch.testing.assert_close(by_graph, by_mask)


def test_metrics_of_circuits_are_the_metrics_of_their_logits(plain, make_task):
    task = make_task(plain, "prob_diff")
    replacement = ABLATIONS["resample"](plain, task.prompts)
    kept = np.random.default_rng(2).random((3, Wiring.of(plain.config).n_edges)) < 0.5
    (measured,) = measure_circuits(plain, task.prompts, kept, replacement, [task.metric])
    logits = run_circuits(plain, task.prompts, kept, replacement)
    torch.testing.assert_close(measured, torch.stack([task.metric(one, task.prompts) for one in logits]))


def test_mean_ablation_replaces_by_the_mean_of_the_template(plain, make_task):
    prompts = make_task(plain).prompts
    corrupted = ABLATIONS["resample"](plain, prompts)
    mean = ABLATIONS["mean"](plain, prompts)
    even = prompts.groups == 0
    torch.testing.assert_close(
        mean.mlp_out[1][even], corrupted.mlp_out[1][even].mean(0, keepdim=True).expand(int(even.sum()), -1, -1)
    )


def test_zero_ablation_of_everything_leaves_biases_alone(plain, make_task):
    """Without any writer, the final stream is what no writer owns: the attention biases, which are never cut."""
    prompts = make_task(plain).prompts
    kept = np.zeros((1, Wiring.of(plain.config).n_edges), dtype=bool)
    logits = run_circuits(plain, prompts, kept, ABLATIONS["zero"](plain, prompts))[0]
    torch.testing.assert_close(logits, logits[:1].expand_as(logits))


def test_mean_ablation_does_not_mix_prompts_that_end_at_different_places(plain, make_task):
    """make_task gives every second prompt another END and another group; with one group, END alone must part them."""
    prompts = make_task(plain, n_prompts=6).prompts
    one_group = replace(prompts, groups=prompts.groups * 0)
    apart, together = (ABLATIONS["mean"](plain, batch) for batch in (prompts, one_group))
    torch.testing.assert_close(together.input, apart.input)


def test_an_ablation_of_ones_own_is_not_taken_for_ours_by_its_name(plain, make_task):
    def resample(model, prompts):
        return ABLATIONS["zero"](model, prompts)

    task = make_task(plain)
    assert replacement_for(plain, task, resample).name == "custom:resample"
    assert not replacement_for(plain, task, resample).keeps_prefix
    assert replacement_for(plain, task, ABLATIONS["resample"]).keeps_prefix


def test_an_unknown_ablation_names_the_known_ones(plain, make_task):
    with pytest.raises(CircuitError, match=r"no ablation 'resampel'; there are resample.*mean.*Did you mean 'resample'"):
        replacement_for(plain, make_task(plain), "resampel")
