"""Neurons add up to their MLP, and each one's attribution is the derivative of replacing it."""

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch

from circuits.ablation import resample
from circuits.discovery.attribution import attribution
from circuits.discovery.neurons import exact_neurons, neurons
from mechinterp.errors import CircuitError, UnknownNode
from mechinterp.models.compiled import induction
from mechinterp.nodes import Node
from mechinterp.sites import Site


@pytest.fixture
def with_mlps(model):
    return model if model.config.has_mlp else pytest.skip("no neurons here")


def of_mlps(scores):
    """The columns of node scores that are MLPs."""
    return scores.per_prompt[:, [writer.kind == "mlp" for writer in scores.wiring.writers]]


def without_bias(model):
    """``b_out`` belongs to no neuron; an MLP at zero lacks it, and under a normalisation its share is never the same."""
    blocks = tuple(replace(block, b_out=torch.zeros_like(block.b_out)) for block in model.weights.blocks)
    return replace(model, weights=replace(model.weights, blocks=blocks))


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
@pytest.mark.parametrize("steps", [None, 3])
def test_neurons_sum_to_their_mlp(with_mlps, make_task, ablation, steps):
    task = make_task(with_mlps)
    model = without_bias(with_mlps) if ablation == "zero" or with_mlps.config.has_norms_after else with_mlps
    scores = neurons(model, task, ablation=ablation, steps=steps, keep_prompts=True)
    per_mlp = scores.per_prompt.reshape(len(task), model.config.n_layers, model.config.d_mlp).sum(-1)
    mlps = attribution(model, task, ablation=ablation, steps=steps, keep_prompts=True)
    np.testing.assert_allclose(per_mlp, of_mlps(mlps), atol=1e-12)


def fall_of_one(model, task, node, share: float, ablation: str = "resample") -> float:
    """What moving one neuron ``share`` of the way to its replacement costs, by the definition."""
    prompts, layer = task.prompts, node.layer
    record = ["mlp_post", *["ln2_post_scale"] * model.config.has_norms_after]

    def written(tokens):
        """Of a normalised sum every neuron has its share."""
        _, cache = model.run(tokens, record=record)
        return cache["mlp_post", layer] / (cache["ln2_post_scale", layer] if model.config.has_norms_after else 1)

    clean = written(prompts.clean)
    target = written(prompts.corrupted) if ablation == "resample" else torch.zeros_like(clean)
    moved = share * (target - clean)[:, :, node.index, None] * model.weights.blocks[layer].W_out[node.index]
    site = Site("ln2_post_normalized" if model.config.has_norms_after else "mlp_out", layer)
    patches = ({}, {site: lambda out, _: out + moved})
    clean, patched = (model.run(prompts.clean, patch=patch, logits_at=prompts.end)[0] for patch in patches)
    return float((task.metric(clean, prompts) - task.metric(patched, prompts)).mean())


def test_a_neuron_scores_the_derivative_of_replacing_it(with_mlps, make_task):
    task, little = make_task(with_mlps, "prob_diff"), 1e-4
    scores = neurons(with_mlps, task)
    some = [7 * i for i in range(8)]
    nodes = [Node.parse(scores.names[i]) for i in some]
    expected = [
        (fall_of_one(with_mlps, task, n, little) - fall_of_one(with_mlps, task, n, -little)) / (2 * little) for n in nodes
    ]
    np.testing.assert_allclose(scores.values[some], expected, atol=2e-4 * np.abs(expected).max())


def test_neurons_are_named_layer_by_layer(plain, make_task):
    scores = neurons(plain, make_task(plain))
    layers, width = plain.config.n_layers, plain.config.d_mlp
    assert scores.items == "neuron"
    assert scores.names == tuple(str(Node.neuron(layer, i)) for layer in range(layers) for i in range(width))


@pytest.mark.parametrize("ablation", ["resample", "zero"])
def test_chosen_neurons_cost_what_a_plain_loop_measures(with_mlps, make_task, ablation):
    task = make_task(with_mlps)
    chosen = ["m2.n19", "m0.n3", "m1.n0", "m0.n3"]
    measured = exact_neurons(with_mlps, task, chosen, ablation=ablation)
    assert [str(node) for node in measured] == ["m0.n3", "m1.n0", "m2.n19"]
    for node, fall in measured.items():
        assert fall == pytest.approx(fall_of_one(with_mlps, task, node, 1.0, ablation), abs=1e-12)


def test_neurons_that_write_only_noise_score_nothing():
    planted = induction(n_prompts=4)
    scores = attribution(planted.model, planted.task)
    loudest = np.abs(scores.values).max()
    of_neurons = neurons(planted.model, planted.task)
    assert np.abs(of_neurons.values).max() < 1e-5 * loudest


@pytest.mark.parametrize(("ablation", "steps"), [("resample", 3), ("mean", None)])
def test_neither_batches_nor_parts_change_a_score(plain, make_task, monkeypatch, ablation, steps):
    task, chosen = make_task(plain), ["m1.n4", "m2.n0"]
    whole = neurons(plain, task, ablation=ablation, steps=steps, keep_prompts=True)
    measured = exact_neurons(plain, task, chosen, ablation=ablation)
    for module in ("backward", "neurons"):
        monkeypatch.setattr(import_module(f"circuits.discovery.{module}"), "_TOKENS_AT_ONCE", 14)
    pieces = neurons(plain, task, ablation=ablation, steps=steps, keep_prompts=True, batch_size=3)
    np.testing.assert_allclose(pieces.per_prompt, whole.per_prompt, atol=1e-12)
    assert exact_neurons(plain, task, chosen, ablation=ablation) == pytest.approx(measured, abs=1e-12)


def test_spans_sum_to_the_scores(plain, make_task):
    task = make_task(plain)
    named = replace(task.prompts, positions={"END": task.prompts.end, "third": torch.full_like(task.prompts.end, 2)})
    scores = neurons(plain, replace(task, prompts=named), keep_positions=True)
    assert list(scores.by_span) == ["END", "third", "elsewhere"]
    np.testing.assert_allclose(sum(scores.by_span.values()), neurons(plain, task).values, atol=1e-12)
    # Behind the first token that differs alone do neurons differ, and of the last layer's only END's are read.
    last = scores.values.size - plain.config.d_mlp
    assert np.abs(scores.by_span["third"][last:]).max() == 0
    assert np.abs(scores.by_span["END"][last:]).max() > 1e-3


def test_what_has_no_neurons_is_refused(make_model, plain, make_task):
    task, heads = make_task(plain), make_model("attention_only")
    with pytest.raises(CircuitError, match="attention only"):
        neurons(heads, task)
    with pytest.raises(CircuitError, match="at least one step"):
        neurons(plain, task, steps=0)
    for name in ("m3.n0", "m0.n20", "m1", "m0.n1@2"):
        with pytest.raises(UnknownNode, match=r"They run from 'm0.n0' to 'm2.n19'"):
            exact_neurons(plain, task, [name])


def test_an_ablation_of_writes_alone_is_refused(plain, make_task):
    def half(model, prompts):
        return resample(model, prompts).map(lambda x: x / 2)

    task, message = make_task(plain), "'custom:half'.*Use 'resample', 'mean' or 'zero'"
    with pytest.raises(CircuitError, match=message):
        neurons(plain, task, ablation=half)
    with pytest.raises(CircuitError, match=message):
        exact_neurons(plain, task, ["m0.n0"], ablation=half)
