"""Relevance patching against a plain autograd forward with the rules written in, and the laws that relevance obeys."""

from itertools import product

import numpy as np
import pytest
import torch

from circuits.agreement import ranking
from circuits.discovery.eap import eap
from circuits.discovery.relp import SLOPE_AT_ZERO, chord, half, mlp_rule, relp
from circuits.wiring import Wiring
from circuits.writes import Writes
from mechinterp.cache import ActivationCache
from mechinterp.models.attention import Heads, soft_cap
from mechinterp.models.compiled import COMPILED
from mechinterp.models.transformer import ACTIVATIONS, Transformer
from mechinterp.models.weights import Weights
from mechinterp.nodes import Node
from mechinterp.sites import Site

RULES = ("ln_rule", "activation_rule", "attention_rule")  # and the half rule with every other choice of these
OFF = dict.fromkeys(("ln_rule", "activation_rule", "half_rule", "attention_rule"), False)
ALL = dict.fromkeys(OFF, True)


def without_biases(model: Transformer) -> Transformer:
    named = model.weights.named()
    return Transformer(
        Weights.from_named(
            model.config,
            {name: tensor * (not name.split(".")[-1].lstrip("_").startswith("b")) for name, tensor in named.items()},
        )
    )


def plain_logits(model, tokens, bumps, *, ln_rule=False, activation_rule=False, half_rule=False, attention_rule=False):
    """Every reader takes a stream of its own, the residual stream plus its bump; rules are detaches."""
    config, weights, bumps = model.config, model.weights, iter(bumps)

    def normalized(x, norm, centred=config.centred):
        if norm is None:
            return x
        centred = x - x.mean(-1, keepdim=True) if centred else x
        sigma = (centred.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
        y = centred / (sigma.detach() if ln_rule else sigma)
        return y * (1 if norm.w is None else norm.w) + (0 if norm.b is None else norm.b)

    def of_heads(x, norm):
        whole = config.qk_norm == "all"
        return normalized(x.flatten(2) if whole else x, norm, centred=False).view_as(x)

    def bent(f, x):
        return x * (f(x) / x).detach() if activation_rule else f(x)

    x = model.embed(tokens)
    for layer, block in enumerate(weights.blocks):
        heads = Heads(config, layer, torch.arange(tokens.shape[1])[None])
        matrices = zip(weights.ports(layer), weights.port_biases(layer), strict=True)
        ports = torch.stack([normalized(x + next(bumps), block.ln1) @ W + b for W, b in matrices], dim=2)
        q, k, v = ports.split([config.n_heads, config.n_groups, config.n_groups], dim=2)
        q, k = heads.turn_q(of_heads(q, block.q_norm)), heads.turn_k(of_heads(k, block.k_norm))
        pattern = heads.scores(q, k).softmax(-1)
        pattern = pattern.detach() if attention_rule else pattern
        z = torch.einsum("bhqk,bkhd->bqhd", pattern, heads.for_every_head(v))
        after = x + normalized(z.flatten(2) @ block.W_O + block.b_O, block.ln1_post)
        if config.has_mlp:
            read = normalized((x if config.parallel else after) + next(bumps), block.ln2)
            linear = read @ block.W_in + block.b_in
            post = bent(ACTIVATIONS[config.activation], read @ block.W_gate + block.b_gate if config.gated else linear)
            if config.gated:
                post = post * linear
                post = half(post) if half_rule else post
            after = after + normalized(post @ block.W_out + block.b_out, block.ln2_post)
        x = after
    logits = normalized(x + next(bumps), weights.ln_final) @ weights.W_U + weights.b_U
    cap = config.logit_soft_cap
    return logits if cap is None else bent(lambda x: soft_cap(x, cap), logits)


def plain_relp(model: Transformer, task, **rules) -> np.ndarray:
    prompts, wiring = task.prompts, Wiring.of(model.config)
    shape = (len(wiring.readers), *prompts.clean.shape, model.config.d_model)
    bumps = torch.zeros(shape, dtype=model.dtype, requires_grad=True)
    logits = plain_logits(model, prompts.clean, bumps, **rules)[torch.arange(len(task)), prompts.end]
    (gradient,) = torch.autograd.grad(task.metric(logits, prompts).sum(), bumps)
    delta = Writes.during(model, prompts.corrupted) - Writes.during(model, prompts.clean)
    grid = -torch.einsum("wbpm,rbpm->wr", delta.first(len(wiring.writers)), gradient) / len(task)
    return wiring.vector(grid.numpy())


@pytest.mark.parametrize("chosen", list(product([False, True], repeat=len(RULES))))
def test_each_rule_is_what_autograd_makes_of_the_detach(model, make_task, chosen):
    task, rules = make_task(model), dict(zip(RULES, chosen, strict=True), half_rule=sum(chosen) % 2 == 0)
    expected = plain_relp(model, task, **rules)
    np.testing.assert_allclose(relp(model, task, **rules).values, expected, atol=1e-11 * np.abs(expected).max())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_rule_is_the_chord_of_every_activation(make_model, make_task, activation):
    model = make_model(activation=activation)
    expected = plain_relp(model, make_task(model), activation_rule=True, ln_rule=True)
    np.testing.assert_allclose(relp(model, make_task(model)).values, expected, atol=1e-11 * np.abs(expected).max())


def test_without_rules_it_is_attribution_patching(model, make_task):
    task = make_task(model)
    np.testing.assert_array_equal(relp(model, task, **OFF).values, eap(model, task).values)


def test_a_model_that_is_linear_between_its_bends_needs_no_rule(make_model, make_task):
    """relu(x) / x is relu's derivative, and there is no LayerNorm."""
    model = make_model("no_norm", activation="relu")
    task = make_task(model)
    expected = eap(model, task).values
    np.testing.assert_allclose(relp(model, task).values, expected, atol=1e-13 * np.abs(expected).max())


def test_a_held_pattern_sends_nothing_to_queries_and_keys(plain, make_task):
    scores = relp(plain, make_task(plain), attention_rule=True)
    ports = np.array([reader.port for _, reader in scores.wiring.edges])
    assert not scores.values[(ports == "q") | (ports == "k")].any()
    assert scores.values[ports == "v"].all()


def test_relevance_is_conserved(model, make_task):
    """All rules, no biases, zero ablation: what flows into a part flows out of it, and the input sends the whole metric."""
    model = without_biases(model)
    task = make_task(model)
    metric = task.metric(model.run(task.prompts.clean, logits_at=task.prompts.end)[0], task.prompts).mean().item()
    into, out = flows(relp(model, task, ablation="zero", **ALL))
    np.testing.assert_allclose(out[1:], into[1:], atol=1e-12 * np.abs(out).max())
    assert out[0] == pytest.approx(metric, rel=1e-10)
    if model.config.has_mlp:
        into, out = flows(relp(model, task, ablation="zero", **ALL | {"attention_rule": False}))
        assert np.abs(out[1:] - into[1:]).max() > 1e-3 * np.abs(out).max()


def flows(scores) -> tuple[np.ndarray, np.ndarray]:
    """What the readers of each writer took in, and what it sent; heads that share keys and values taken together."""
    a_group = scores.wiring.n_heads // scores.wiring.n_groups

    def module(node):
        return Node.group(node.layer, node.index // a_group) if node.kind == "head" else node.with_port(None)

    into = dict.fromkeys(map(module, scores.wiring.writers), 0.0)
    out = dict(into)
    for value, (writer, reader) in zip(scores.values, scores.wiring.edges, strict=True):
        out[module(writer)] += value
        if reader.kind != "logits":
            into[module(reader)] += value
    return np.array([*into.values()]), np.array([*out.values()])


def test_every_activation_has_its_slope_at_zero():
    assert set(SLOPE_AT_ZERO) == set(ACTIVATIONS)
    for name, slope in SLOPE_AT_ZERO.items():
        x = torch.zeros((), dtype=torch.float64, requires_grad=True)
        assert torch.autograd.grad(ACTIVATIONS[name](x), x)[0] == slope


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_chord_has_the_activations_value_and_a_slope_between_0_and_1(activation, dtype):
    smallest = torch.finfo(dtype).tiny
    x = torch.tensor([-50.0, -3.0, -smallest, 0.0, smallest, 1e-4, 0.5, 50.0], dtype=dtype, requires_grad=True)
    value = chord(activation, x)
    torch.testing.assert_close(value, ACTIVATIONS[activation](x))
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert slope.min() >= 0
    assert slope.max() <= 1


def test_half_keeps_the_value_and_halves_the_gradient():
    x = torch.tensor([3.0, -1.0], requires_grad=True)
    torch.testing.assert_close(half(x), x)
    assert torch.autograd.grad(half(x).sum(), x)[0].tolist() == [0.5, 0.5]


def test_a_gated_product_shares_its_relevance_between_its_factors(plain):
    """Where a pass records the factor that is gated, the patch counts it."""
    pre, linear = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    post = ACTIVATIONS["silu"](pre) * linear
    cache = ActivationCache({Site("mlp_pre", 0): pre, Site("mlp_pre_linear", 0): linear}, plain.weights)
    found = mlp_rule("silu", 0)(post, cache)
    torch.testing.assert_close(found, post, rtol=0, atol=0)
    for factor, gradient in zip((pre, linear), gradients_of(found, pre, linear), strict=True):
        torch.testing.assert_close(factor * gradient, post / 2)
    halved = gradients_of(mlp_rule("silu", 0, activation_rule=False)(post, cache), pre, linear)
    for ours, whole in zip(halved, gradients_of(post, pre, linear), strict=True):
        torch.testing.assert_close(2 * ours, whole)


def gradients_of(value, *inputs):
    return torch.autograd.grad(value.sum(), inputs, retain_graph=True)


def test_positions_and_batches_only_split_the_sum(plain, make_task):
    task = make_task(plain)
    whole = relp(plain, task, keep_prompts=True)
    pieces = relp(plain, task, keep_prompts=True, batch_size=2, keep_positions=True)
    np.testing.assert_allclose(pieces.per_prompt, whole.per_prompt, atol=1e-12)
    np.testing.assert_allclose(sum(pieces.by_span.values()), whole.values, atol=1e-12)
    assert whole.settings["ln_rule"]
    assert not whole.settings["attention_rule"]


@pytest.mark.parametrize("planted", COMPILED)
def test_planted_circuits_stand_first(planted):
    made = COMPILED[planted]()
    assert ranking(relp(made.model, made.task), made.circuit_edges).auroc == 1
