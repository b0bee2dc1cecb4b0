"""Attribution is a derivative, and derivatives have identities: these hold on any model, to rounding."""

from dataclasses import replace
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch

from circuits.discovery.eap import clean_corrupted, eap, eap_ig
from circuits.discovery.exact import exact
from circuits.discovery.nodes import patching
from circuits.wiring import Wiring
from circuits.writes import Writes
from mechinterp.errors import CircuitError


def mixed(share: float):
    """An ablation that goes ``share`` of the way from the clean run to the corrupted one."""

    def ablation(model, prompts):
        clean, corrupted = (Writes.during(model, tokens) for tokens in (prompts.clean, prompts.corrupted))
        return Writes(
            model.weights,
            clean.input + share * (corrupted.input - clean.input),
            tuple(c + share * (k - c) for c, k in zip(clean.z, corrupted.z, strict=True)),
            tuple(c + share * (k - c) for c, k in zip(clean.mlp_out, corrupted.mlp_out, strict=True)),
        )

    return ablation


@pytest.mark.parametrize("metric", ["logit_diff", "prob_diff"])
def test_eap_is_the_derivative_of_cutting_each_edge(model, make_task, metric):
    """Cut every edge a little in both directions: the central difference is EAP up to third order."""
    task, share = make_task(model, metric), 1e-4
    little = (exact(model, task, ablation=mixed(share)).values - exact(model, task, ablation=mixed(-share)).values) / (
        2 * share
    )
    scores = eap(model, task).values
    np.testing.assert_allclose(scores, little, atol=2e-4 * np.abs(scores).max())


def test_edges_out_of_a_node_add_up_to_its_attribution(plain, make_task):
    """AtP of a node is the derivative of replacing its output everywhere."""
    task, share = make_task(plain), 1e-4
    both = [patching(plain, task, ablation=mixed(s)).values for s in (share, -share)]
    nodes = eap(plain, task).nodes
    np.testing.assert_allclose(nodes, (both[0] - both[1]) / (2 * share), atol=2e-4 * np.abs(nodes).max())


def test_integrated_gradients_out_of_the_input_sum_to_the_whole_effect(model, make_task):
    task = make_task(model)
    prompts = task.prompts
    gap = [
        task.metric(model.run(x, logits_at=prompts.end)[0], prompts).mean().item() for x in (prompts.clean, prompts.corrupted)
    ]
    scores = eap_ig(model, task, steps=3000)
    out_of_input = scores.values[scores.wiring.edge_writer == 0].sum()
    assert out_of_input == pytest.approx(gap[0] - gap[1], rel=2e-3, abs=2e-3 * np.abs(scores.values).max())


@pytest.mark.parametrize("variant", ["no_norm", "llama", "mpt"])
def test_on_a_linear_model_all_methods_agree(make_model, make_task, variant):
    """No normalisation, no MLP, one-token prompts: the softmax of one score is 1, so the model is linear."""
    model = make_model(variant, d_mlp=None, normalization="none")
    task = make_task(model, changed=(0,))
    one = task.prompts[:]
    prompts = type(one)(one.clean[:, :1], one.corrupted[:, :1], one.end * 0, one.candidates, one.roles, one.groups, {})
    task = type(task)("one token", prompts, task.metric, task.metric_name, task.corruption, task.group_names, task.tokenizer)
    measured = exact(model, task)
    for method in (eap(model, task), eap_ig(model, task, steps=1), eap_ig(model, task, steps=2, path="activations")):
        np.testing.assert_allclose(method.values, measured.values, atol=1e-12)
    through_queries = [reader.port in ("q", "k") for _, reader in measured.wiring.edges]
    assert np.abs(measured.values[through_queries]).max() < 1e-14
    assert np.abs(measured.values).max() > 0.01


def test_one_step_at_the_clean_end_is_eap(model, make_task):
    """The right grid of one step takes its only gradient on the clean run, whichever way the path goes."""
    task = make_task(model)
    plainly = eap(model, task).values
    for path in ("inputs", "activations"):
        np.testing.assert_allclose(eap_ig(model, task, steps=1, grid="right", path=path).values, plainly, atol=1e-12)


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_neither_batches_nor_stacked_steps_change_a_score(plain, make_task, monkeypatch, ablation):
    task = make_task(plain)
    for path in ("inputs", "activations"):
        whole = eap_ig(plain, task, path=path, ablation=ablation, keep_prompts=True)
        with monkeypatch.context() as patch:
            patch.setattr(import_module("circuits.discovery.eap"), "_ROWS_AT_ONCE", 80)
            pieces = eap_ig(plain, task, path=path, ablation=ablation, batch_size=2, keep_prompts=True)
        np.testing.assert_allclose(pieces.per_prompt, whole.per_prompt, atol=1e-12)


def test_clean_corrupted_is_the_mean_of_the_two_ends(model, make_task):
    task = make_task(model)
    ends = [eap_ig(model, task, steps=1, grid=grid).values for grid in ("left", "right")]
    np.testing.assert_allclose(clean_corrupted(model, task).values, (ends[0] + ends[1]) / 2, atol=1e-12)


@pytest.mark.parametrize("method", [eap, eap_ig, partial(eap_ig, path="activations"), clean_corrupted])
def test_positions_add_up_and_a_span_is_what_its_tokens_carry(plain, make_task, method):
    task = make_task(plain, changed=(2, 4))
    named = replace(task.prompts, positions={"first": torch.full((5,), 2), "END": task.prompts.end})
    task = replace(task, prompts=named)
    whole, split = method(plain, task), method(plain, task, keep_positions=True, batch_size=2)
    assert list(split.by_span) == ["first", "END", "elsewhere"]
    np.testing.assert_allclose(sum(split.by_span.values()), whole.values, atol=1e-12)
    np.testing.assert_allclose(split.values, whole.values, atol=1e-12)
    from_input = whole.wiring.edge_writer == 0
    assert not split.by_span["END"][from_input].any()  # the embedding differs at positions 2 and 4 alone
    assert split.by_span["first"][from_input].any()


def test_a_method_that_patches_all_positions_refuses_to_split_them(plain, make_task):
    with pytest.raises(CircuitError, match=r"'exact' does not split its scores.*eap-ig"):
        exact(plain, make_task(plain), keep_positions=True)


def test_prompts_without_a_padding_score_as_with_it(plain, make_task):
    task = make_task(plain, n_prompts=4)
    prompts = task.prompts
    pad = torch.zeros(4, 2, dtype=torch.long)
    wide = type(prompts)(
        torch.cat([prompts.clean, pad], 1), torch.cat([prompts.corrupted, pad], 1),
        prompts.end, prompts.candidates, prompts.roles, prompts.groups, {},
    )  # fmt: skip
    padded = type(task)("padded", wide, task.metric, task.metric_name, task.corruption, task.group_names, task.tokenizer)
    for method in (eap, eap_ig, exact):
        np.testing.assert_allclose(method(plain, padded).values, method(plain, task).values, atol=1e-12)


def test_gradients_leave_nothing_behind(plain, make_task):
    eap(plain, make_task(plain))
    assert all(not tensor.requires_grad and tensor.grad is None for tensor in plain.weights.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"steps": 0}, "at least one step"), ({"grid": "midpont"}, "midpoint"), ({"path": "input"}, "'inputs' or 'activations'")],
)
def test_settings_that_mean_nothing_are_refused(plain, make_task, settings, message):
    with pytest.raises(CircuitError, match=message):
        eap_ig(plain, make_task(plain), **settings)


def test_scores_say_how_they_were_made(plain, make_task):
    scores = eap_ig(plain, make_task(plain), steps=2)
    assert (scores.method, scores.unit, scores.task) == ("eap-ig", "logit_diff", "nonsense")
    assert scores.settings["steps"] == 2
    assert scores.settings["ablation"] == "resample"
    assert len(scores) == Wiring.of(plain.config).n_edges
