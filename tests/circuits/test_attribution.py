"""Attribution of nodes against edges, against brute force, and on circuits where a plain gradient fails."""

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch

from circuits.ablation import resample
from circuits.discovery.attribution import atp_star, attribution
from circuits.discovery.eap import eap, eap_ig
from circuits.discovery.nodes import patching
from circuits.discovery.qk_fix import Rows
from circuits.wiring import Wiring
from circuits.writes import Writes
from mechinterp.errors import CircuitError, TaskError
from mechinterp.models.attention import Heads
from mechinterp.models.compiled import indirect_object, induction
from mechinterp.models.config import ModelConfig, Rotary
from mechinterp.models.transformer import Transformer
from mechinterp.models.weights import Norm, Weights
from mechinterp.sites import Site

KINDS = [{}, {"steps": 3}, {"qk_fix": True}, {"grad_drop": True}, {"qk_fix": True, "grad_drop": True}]


def mixed(share: float):
    """An ablation that goes ``share`` of the way from the clean run to the corrupted one."""

    def ablation(model, prompts):
        clean, corrupted = (Writes.during(model, tokens) for tokens in (prompts.clean, prompts.corrupted))
        way = (corrupted - clean).map(lambda x: -share * x)
        return clean - way

    return ablation


def one_prompt(task):
    return replace(task, prompts=task.prompts[:1])


# Attribution patching


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_a_node_scores_what_the_edges_out_of_it_add_up_to(model, make_task, ablation):
    task = make_task(model)
    edges = eap(model, task, ablation=ablation)
    scores = attribution(model, task, ablation=ablation)
    assert scores.names == tuple(map(str, Wiring.of(model.config).writers))
    np.testing.assert_allclose(scores.values, edges.nodes, atol=1e-12)


def test_with_steps_it_is_the_sum_of_integrated_edges(model, make_task):
    task = make_task(model)
    np.testing.assert_allclose(attribution(model, task, steps=3).values, eap_ig(model, task, steps=3).nodes, atol=1e-12)


def test_spans_split_a_score_as_they_split_its_edges():
    planted = induction(n_prompts=6)
    model, task = planted.model.to(dtype=torch.float64), planted.task
    scores, edges = attribution(model, task, keep_positions=True), eap(model, task, keep_positions=True)
    assert list(scores.by_span) == list(edges.by_span)
    for name, values in edges.by_span.items():
        out_of = np.bincount(edges.wiring.edge_writer, weights=values, minlength=len(scores))
        np.testing.assert_allclose(scores.by_span[name], out_of, atol=1e-12)
    fixed = attribution(model, task, ports=True, qk_fix=True, keep_positions=True)
    np.testing.assert_allclose(sum(fixed.by_span.values()), fixed.values, atol=1e-12)
    key = fixed.names.index(f"{planted.roles['induction']}.k")
    assert fixed.by_span["B"][key] > 0.9 * fixed.values[key]  # where the key is that "the letter before" is written to


def test_a_port_scores_the_derivative_of_replacing_it(model, make_task):
    task, little = make_task(model), 1e-4
    prompts = task.prompts
    _, corrupted = model.run(prompts.corrupted, record=["q", "k", "v"])

    def metric(port, layer, head, share):
        def patch(value, _):
            value = value.clone()
            value[:, :, head] += share * (corrupted[port, layer] - value)[:, :, head]
            return value

        return task.metric(model.run(prompts.clean, patch={Site(port, layer): patch}, logits_at=prompts.end)[0], prompts).mean()

    scores = attribution(model, task, ports=True)
    ports = [reader for reader in scores.wiring.readers if reader.port]
    assert scores.names == tuple(map(str, ports))
    values, some = scores.values[::2], [(port.port, port.layer, port.index) for port in ports[::2]]
    expected = [float(metric(*port, -little) - metric(*port, little)) / (2 * little) for port in some]
    np.testing.assert_allclose(values, expected, atol=2e-4 * np.abs(expected).max())


# QK fix


def rows_of(sharpness: float, dtype: torch.dtype, **facts):
    """Random queries and keys with changed ones, and every single change's effect by plain recomputation in float64."""
    config = ModelConfig("rows", 1, 2, 8, 4, None, 5, 6, attention_scale=1.0, normalization="rms_norm", **facts)
    heads = Heads(
        config, 0, torch.arange(6)[None], *[Norm(torch.linspace(0.5, 2, 4).double(), None)] * (2 * ("qk_norm" in facts))
    )
    generator = torch.Generator().manual_seed(0)
    q, k, v, dz, new_q, new_k = torch.randn(6, 3, 6, 2, 4, generator=generator, dtype=torch.float64)
    k, v, new_k = (x[:, :, : config.n_groups] for x in (k, v, new_k))
    q, new_q = sharpness * q, sharpness * new_q

    def pattern(q, k):
        return heads.scores(heads.turn_q(q), heads.turn_k(k)).softmax(-1)

    def effects(of, changed, pattern_with):
        d, found = torch.einsum("bqhd,bkhd->bhqk", dz, heads.for_every_head(v)), []
        for position in range(6):
            one = of.clone()
            one[:, position] = changed[:, position]
            found.append((d * (pattern_with(one) - pattern(q, k))).sum((-1, -2)))
        return torch.stack(found, 1)

    by_queries = effects(q, new_q, lambda one: pattern(one, k))
    by_keys = effects(k, new_k, lambda one: pattern(q, one))
    q, k, v, dz, new_q, new_k = (x.to(dtype) for x in (q, k, v, dz, new_q, new_k))
    rows = Rows.of(q, k, v, heads, dz[None])
    return (rows.of_queries(new_q[None])[0, 0], by_queries), (rows.of_keys(new_k[None])[0, 0], by_keys)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-5)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 20.0, 100.0])
def test_a_changed_query_or_key_does_what_recomputed_rows_say(sharpness, causal, dtype, tolerance):
    for found, expected in rows_of(sharpness, dtype, causal=causal):
        np.testing.assert_allclose(found.double(), expected, atol=tolerance * (1 + expected.abs().max()))


@pytest.mark.parametrize(
    "facts",
    [
        {"attention_soft_cap": 2.0},
        {"n_key_value_heads": 1, "rotary": Rotary((1.0, 0.1))},
        {"alibi": True, "local_layers": (0,), "window": 3},
        {"qk_norm": "head", "attention_soft_cap": 2.0},
    ],
    ids=str,
)
def test_so_it_does_however_queries_and_keys_meet(facts):
    for sharpness in (0.1, 20.0):
        for found, expected in rows_of(sharpness, torch.float64, **facts):
            np.testing.assert_allclose(found, expected, atol=1e-13 * (1 + expected.abs().max()))


@pytest.mark.parametrize("ports", [False, True])
def test_for_small_changes_the_fix_changes_nothing(model, make_task, ports):
    task, ablation = make_task(model), mixed(1e-5)
    plainly = attribution(model, task, ports=ports, ablation=ablation).values
    fixed = attribution(model, task, ports=ports, qk_fix=True, ablation=ablation).values
    np.testing.assert_allclose(fixed, plainly, atol=1e-3 * np.abs(plainly).max())
    assert not np.array_equal(fixed, plainly)


def test_models_that_are_not_causal_are_fixed_too(make_model, make_task):
    model = make_model(causal=False)
    task, ablation = one_prompt(make_task(model)), mixed(1e-5)
    plainly = attribution(model, task, ablation=ablation).values
    fixed = attribution(model, task, qk_fix=True, ablation=ablation).values
    np.testing.assert_allclose(fixed, plainly, atol=1e-3 * np.abs(plainly).max())


@pytest.mark.parametrize(
    ("variant", "facts"),
    [("plain", {}), ("parallel", {}), ("llama", {"n_key_value_heads": 1}), ("gemma2", {"local_layers": (0,)}), ("mpt", {})],
)
def test_the_fix_of_a_writer_is_the_sum_over_the_rows_that_it_changes(make_model, make_task, variant, facts):
    """Edges into queries and keys by plain recomputation of the pattern, all other edges by attribution."""
    model = make_model(variant, n_layers=2, n_heads=2, **facts)
    task = one_prompt(make_task(model))
    prompts, wiring, edges = task.prompts, Wiring.of(model.config), eap(model, task)
    delta = (resample(model, prompts) - Writes.during(model, prompts.clean)).first(len(wiring.writers))
    patterns = [Site("pattern", layer) for layer in range(2)]
    with torch.enable_grad():
        free = {Site("resid_pre", 0): lambda x, _: x.detach().requires_grad_()}
        logits, cache = model.run(prompts.clean, record=patterns, patch=free, logits_at=prompts.end)
        d = torch.autograd.grad(task.metric(logits, prompts).sum(), [cache[site] for site in patterns])

    def fall(writer, reader, positions):
        def into_port(streams, _):
            streams = streams.clone()
            streams[:, positions, reader.index] += delta[writer][:, positions]
            return streams

        site = patterns[reader.layer]
        _, patched = model.run(prompts.clean, patch={Site(f"{reader.port}_input", reader.layer): into_port}, record=[site])
        return float(((cache[site].detach() - patched[site]) * d[reader.layer]).sum())

    expected = np.zeros(len(wiring.writers))
    for writer, (_, reader), linear in zip(edges.wiring.edge_writer, edges.wiring.edges, edges.values, strict=True):
        if reader.port == "q":
            expected[writer] += fall(writer, reader, slice(None))
        elif reader.port == "k":
            expected[writer] += sum(fall(writer, reader, [position]) for position in range(prompts.clean.shape[1]))
        else:
            expected[writer] += linear
    np.testing.assert_allclose(attribution(model, task, qk_fix=True).values, expected, atol=1e-12)


def test_the_fix_sees_what_saturated_attention_hides():
    """At sharpness 20 the gradient of the scores is gone; cutting what feeds them costs as much as ever."""
    planted = induction(sharpness=20.0, n_prompts=8)
    measured = patching(planted.model, planted.task)
    plainly, fixed = (attribution(planted.model, planted.task, qk_fix=fix) for fix in (False, True))
    previous = fixed.names.index(planted.roles["previous"])
    assert measured.values[previous] > 3
    assert abs(plainly.values[previous]) < 1e-3
    np.testing.assert_allclose(fixed.values[1:], measured.values[1:], atol=1e-3)
    ports = attribution(planted.model, planted.task, ports=True, qk_fix=True)
    by_name = dict(zip(ports.names, ports.values, strict=True))
    for port in "qk":
        assert by_name[f"{planted.roles['induction']}.{port}"] == pytest.approx(measured.values[previous], abs=1e-3)


# GradDrop


@pytest.mark.parametrize("ports", [False, True])
def test_dropping_a_layer_is_to_detach_what_it_writes(model, make_task, ports):
    task = make_task(model)
    prompts, config = task.prompts, model.config
    sites = ["q", "k", "v"] if ports else [config.write_site, *["mlp_out"] * config.has_mlp]
    wanted = [Site(name, layer) for layer in range(config.n_layers) for name in sites]
    _, corrupted = model.run(prompts.corrupted, record=["resid_pre", *sites])

    def falls(dropped: int):
        def detached(value, cache):
            before = cache["resid_pre", dropped]
            return before + (value - before).detach()

        free = {Site("resid_pre", 0): lambda x, _: x.detach().requires_grad_(), Site("resid_post", dropped): detached}
        sources = [Site("resid_pre", 0), *wanted]
        record = [*sources, Site("resid_pre", dropped)]
        logits, cache = model.run(prompts.clean, record=record, patch=free, logits_at=prompts.end)
        values = [cache[site] for site in sources]
        gradients = torch.autograd.grad(task.metric(logits, prompts).sum(), values, materialize_grads=True)
        of = {
            site: -(corrupted[site] - value) * gradient
            for site, value, gradient in zip(sources, values, gradients, strict=True)
        }
        heads = [of[site].sum((1, 3)) if of[site].dim() == 4 else of[site].sum((1, 2))[:, None] for site in wanted]
        return torch.cat(heads if ports else [of[sources[0]].sum((1, 2))[:, None], *heads], 1).detach()

    expected = sum(falls(layer).abs() for layer in range(config.n_layers)) / (config.n_layers - 1)
    found = attribution(model, task, ports=ports, grad_drop=True, keep_prompts=True)
    np.testing.assert_allclose(found.per_prompt, expected, atol=1e-12)


def test_two_ways_that_cancel_are_seen_one_at_a_time():
    """The head copies its token to the output, and the MLP after it takes that away again."""
    config = ModelConfig("cancel", 3, 1, 2, 1, 1, 2, 1, activation="relu", normalization="none")
    zeros = {
        f"blocks.{layer}.{name}": torch.zeros(shape)
        for layer in range(3)
        for name, shape in {
            **{f"attn.W_{W}": (1, 2, 1) for W in "QKV"}, "attn.W_O": (1, 1, 2), "mlp.W_in": (2, 1), "mlp.W_out": (1, 2)
        }.items()
    }  # fmt: skip
    token, out = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0, 1.0]])
    copies = {"blocks.0.attn.W_V": token[None], "blocks.0.attn.W_O": out[None]}
    cancels = {"blocks.1.mlp.W_in": out.T, "blocks.1.mlp.b_in": torch.ones(1), "blocks.1.mlp.W_out": -out}
    around = {"embed.W_E": torch.tensor([[1.0, 0.0], [3.0, 0.0]]), "pos_embed.W_pos": torch.zeros(1, 2)}
    around["unembed.W_U"] = out.T @ torch.tensor([[1.0, 0.0]])
    model = Transformer(Weights.from_named(config, zeros | copies | cancels | around))
    task = induction(n_prompts=1).task
    prompts = replace(
        task.prompts,
        clean=torch.tensor([[1]]), corrupted=torch.tensor([[0]]), end=torch.tensor([0]),
        candidates=torch.tensor([[0, 1]]), positions={},
    )  # fmt: skip
    task = replace(task, prompts=prompts)
    head = list(map(str, Wiring.of(config).writers)).index("a0.h0")
    assert attribution(model, task).values[head] == 0
    assert attribution(model, task, grad_drop=True).values[head] == 2 / 2  # of three layers, without layer 1 alone


def test_both_corrections_find_the_writers_of_a_circuit_set_by_hand():
    planted = indirect_object(n_prompts=8)
    truth = {edge.split("->")[0] for edge in planted.circuit_edges}
    assert {name for name, _ in atp_star(planted.model, planted.task).strongest(len(truth))} == truth


# Frame


@pytest.mark.parametrize("ports", [False, True])
@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_neither_batches_nor_parts_change_a_score(plain, make_task, monkeypatch, settings, ports):
    task = make_task(plain)
    whole = attribution(plain, task, ports=ports, keep_prompts=True, **settings)
    for module in ("backward", "attribution"):
        monkeypatch.setattr(import_module(f"circuits.discovery.{module}"), "_TOKENS_AT_ONCE", 14)
    pieces = attribution(plain, task, ports=ports, keep_prompts=True, batch_size=3, **settings)
    np.testing.assert_allclose(pieces.per_prompt, whole.per_prompt, atol=1e-12)
    np.testing.assert_allclose(whole.per_prompt.mean(0), whole.values, atol=1e-12)


def test_scores_say_how_they_were_made(plain, make_task):
    task = make_task(plain)
    scores = atp_star(plain, task, ablation="mean")
    assert (scores.method, scores.items, scores.unit) == ("atp-star", "node", "logit_diff")
    assert (scores.settings["qk_fix"], scores.settings["grad_drop"], scores.settings["ablation"]) == (True, True, "mean")
    assert attribution(plain, task, steps=2, ports=True).method == "atp-ig"
    assert attribution(plain, task, steps=2, ports=True).items == "port"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "at least one step"),
        ({"steps": 2, "qk_fix": True}, "Choose one or the other"),
        ({"grad_drop": True, "keep_positions": True}, "keep_positions"),
    ],
)
def test_settings_that_mean_nothing_are_refused(plain, make_task, settings, message):
    with pytest.raises(CircuitError, match=message):
        attribution(plain, make_task(plain), **settings)


def test_grad_drop_needs_a_layer_between_first_and_last(make_model, make_task):
    model = make_model(n_layers=2)
    with pytest.raises(CircuitError, match="needs three layers"):
        attribution(model, make_task(model), grad_drop=True)


def test_a_metric_without_a_gradient_is_refused(plain, make_task):
    with pytest.raises(TaskError, match="no gradient"):
        attribution(plain, make_task(plain, "is_preferred"))
