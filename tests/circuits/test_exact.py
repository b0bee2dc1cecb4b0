"""Exact edge patching against the plain loop that it replaces: a whole forward for each edge."""

from importlib import import_module

import numpy as np
import pytest
import torch

from circuits.ablation import ABLATIONS, replacement_for
from circuits.discovery.exact import exact
from circuits.discovery.nodes import patching
from circuits.running import measure_circuits
from circuits.wiring import Wiring
from circuits.writes import Writes
from mechinterp.errors import TaskError
from mechinterp.sites import Site


def plain_loop(model, task, ablation: str) -> np.ndarray:
    """What cutting each edge costs, by the definition: patch the reader's own input, run everything; a reader at a time."""
    wiring, prompts = Wiring.of(model.config), task.prompts
    clean = task.metric(model.run(prompts.clean, logits_at=prompts.end)[0], prompts)
    delta = (ABLATIONS[ablation](model, prompts) - Writes.during(model, prompts.clean)).first(len(wiring.writers))
    falls = []
    for reader, n_writers in zip(wiring.readers, wiring.writers_before.tolist(), strict=True):
        rows = prompts[torch.arange(len(prompts)).repeat(n_writers)]
        patch = cut_one(model, reader, delta[:n_writers].flatten(0, 1))
        patched = task.metric(model.run(rows.clean, patch=patch, logits_at=rows.end)[0], rows)
        falls.append((clean - patched.unflatten(0, (n_writers, -1))).mean(1))
    return torch.cat(falls).numpy()


def cut_one(model, reader, change):
    if reader.port:

        def into_port(streams, _):
            streams = streams.clone()
            streams[:, :, reader.index] += change
            return streams

        return {Site(f"{reader.port}_input", reader.layer): into_port}
    site = Site("mlp_in", reader.layer) if reader.kind == "mlp" else Site("resid_post", model.config.n_layers - 1)
    return {site: lambda stream, _: stream + change}


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_every_edge_costs_what_a_plain_loop_measures(model, make_task, ablation):
    task = make_task(model)
    np.testing.assert_allclose(exact(model, task, ablation=ablation).values, plain_loop(model, task, ablation), atol=1e-12)


def test_every_edge_costs_what_the_circuit_without_it_loses(model, make_task):
    task, wiring = make_task(model), Wiring.of(model.config)
    replaced = replacement_for(model, task, "resample").writes
    without = np.concatenate([np.ones((1, wiring.n_edges), bool), ~np.eye(wiring.n_edges, dtype=bool)])
    (found,) = measure_circuits(model, task.prompts, without, replaced, [task.metric])
    scores = exact(model, task, keep_prompts=True).per_prompt
    np.testing.assert_allclose(scores, (found[0] - found[1:]).T, atol=1e-12)


@pytest.mark.parametrize("variant", ["plain", "attention_only", "parallel", "mpt"])
def test_models_of_one_head_are_no_exception(make_model, make_task, variant):
    model = make_model(variant, n_heads=1)
    task = make_task(model, "prob_diff")
    np.testing.assert_allclose(exact(model, task).values, plain_loop(model, task, "resample"), atol=1e-12)


@pytest.mark.parametrize("variant", ["plain", "llama", "olmo2"])
def test_neither_batches_nor_stacking_change_a_score(make_model, make_task, monkeypatch, variant):
    model = make_model(variant, n_layers=2)
    task = make_task(model)
    whole = exact(model, task, keep_prompts=True)
    for module in ("suffix", "exact"):
        monkeypatch.setattr(import_module(f"circuits.discovery.{module}"), "TOKENS_AT_ONCE", 1)
    pieces = exact(model, task, keep_prompts=True, batch_size=2)
    np.testing.assert_allclose(pieces.per_prompt, whole.per_prompt, atol=1e-12)
    np.testing.assert_allclose(whole.per_prompt.mean(0), whole.values, atol=1e-12)


def test_an_edge_that_changes_nothing_scores_nothing(plain, make_task):
    """Before the first token that differs, nothing can: prompts that differ at the last position alone move no key."""
    task = make_task(plain, changed=(6,), n_prompts=1)
    scores = exact(plain, task)
    keys = np.array([reader.port == "k" and reader.layer == 0 for _, reader in scores.wiring.edges])
    assert np.abs(scores.values[~keys]).max() > 1e-3


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_patching_a_node_replaces_what_it_writes_everywhere(model, make_task, ablation):
    task = make_task(model)
    prompts, config = task.prompts, model.config
    replaced = ABLATIONS[ablation](model, prompts)
    clean = task.metric(model.run(prompts.clean, logits_at=prompts.end)[0], prompts)

    def fall(patch):
        return (clean - task.metric(model.run(prompts.clean, patch=patch, logits_at=prompts.end)[0], prompts)).mean().item()

    nowhere = {"pos_embed": lambda x, _: torch.zeros_like(x)} if config.learned_positions else {}
    expected = [fall({"embed": lambda _, __: replaced.input} | nowhere)]
    for layer in range(config.n_layers):
        for head in range(config.n_heads):

            def one_head(z, _, layer=layer, head=head):
                z = z.clone()
                z[:, :, head] = replaced.z[layer][:, :, head]
                return z

            expected.append(fall({Site(config.write_site, layer): one_head}))
        if config.has_mlp:
            expected.append(fall({Site("mlp_out", layer): lambda _, __, layer=layer: replaced.mlp_out[layer]}))
    np.testing.assert_allclose(patching(model, task, ablation=ablation).values, expected, atol=1e-12)


def test_prompts_without_corruption_are_refused(plain, make_task):
    with pytest.raises(TaskError, match=r"equals its clean one.*another corruption"):
        exact(plain, make_task(plain, changed=()))
