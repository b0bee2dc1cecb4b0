"""A circuit is the model with some edges cut: the two ends of that range are known exactly."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from circuits.ablation import ABLATIONS, replacement_for
from circuits.alive import Alive
from circuits.masked import run_edge_mask
from circuits.running import measure_circuits, run_circuit, run_circuits
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
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
    """A writer all of whose outgoing edges are cut may lose its incoming ones too: those that nobody else reads by. Where
    heads share a normalisation, a head whose write nobody reads still weighs in its siblings': there, a whole layer."""
    prompts, wiring = make_task(model).prompts, Wiring.of(model.config)
    is_dead = np.arange(len(wiring.writers) + 1) == 2
    is_dead[wiring.head_slice(0)] |= model.config.has_joint_heads
    out = ~is_dead[wiring.edge_writer]
    readers = wiring.reads[is_dead].any(0) & ~wiring.reads[~is_dead].any(0)
    kept = np.stack([out, out & ~readers[wiring.edge_reader]])
    assert kept[1].sum() < kept[0].sum()
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


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
@pytest.mark.parametrize("changed", [(2, 4), (0,)])
def test_only_what_is_alive_runs_and_the_logits_are_those_of_the_whole_masked_pass(model, make_task, ablation, changed):
    """Against the plain factorised forward, in which every reader subtracts what its cut edges bring."""
    prompts, wiring = make_task(model, changed=changed).prompts, Wiring.of(model.config)
    replacement, generator = ABLATIONS[ablation](model, prompts), np.random.default_rng(2)
    kept = np.stack([generator.random(wiring.n_edges) < share for share in (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 0.95, 0.995)])
    found = run_circuits(model, prompts, kept, replacement)
    for one, logits in zip(kept, found, strict=True):
        mask = torch.as_tensor(one[None], dtype=model.dtype)
        torch.testing.assert_close(logits, run_edge_mask(model, prompts, mask, replacement))


def test_a_small_circuit_has_few_living_parts():
    wiring = Wiring(3, 4)
    path = [wiring.index("input", "a0.h1.v"), wiring.index("a0.h1", "m2"), wiring.index("m2", "logits")]
    kept = np.zeros((1, wiring.n_edges), dtype=bool)
    kept[0, path] = True
    alive = Alive.of(wiring, kept, dead_carry_nothing=True)
    assert [str(wiring.writers[i]) for i in np.flatnonzero(alive.writes[0])] == ["input", "a0.h1", "m2"]
    assert [str(wiring.readers[i]) for i in np.flatnonzero(alive.reads[0])] == ["a0.h1.v", "m2", "logits"]
    kept[0, path[1]] = False  # now the head is read by nobody, and m2 reads nothing that changes
    alive = Alive.of(wiring, kept, dead_carry_nothing=True)
    assert alive.writes.sum() == 1
    assert alive.reads.sum() == 1


def test_where_heads_share_they_live_and_are_needed_together():
    """By a group's value its head lives that somebody reads; by one normalisation all heads that somebody reads do."""
    wiring = Wiring(2, 4, has_mlp=False, n_key_value_heads=2)
    read = [wiring.index("a0.h1", "a1.h0.q"), wiring.index("a0.h2", "a1.h0.q"), wiring.index("a1.h0", "logits")]
    kept = np.zeros((1, wiring.n_edges), dtype=bool)
    kept[0, [wiring.index("input", "a0.g0.v"), wiring.index("input", "a0.h3.q"), *read]] = True
    for joint, writers, readers in (
        (False, ["input", "a0.h1", "a1.h0"], ["a0.g0.v", "a1.h0.q", "logits"]),
        (True, ["input", "a0.h1", "a0.h2", "a1.h0"], ["a0.h3.q", "a0.g0.v", "a1.h0.q", "logits"]),
    ):
        alive = Alive.of(wiring, kept, dead_carry_nothing=True, joint=joint)
        assert [str(wiring.writers[i]) for i in np.flatnonzero(alive.writes[0])] == writers
        assert [str(wiring.readers[i]) for i in np.flatnonzero(alive.reads[0])] == readers
