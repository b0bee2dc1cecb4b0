"""A latent, through its heads' values, is a sum over everything written before; and so on down."""

from dataclasses import replace

import pytest
import torch

from mechinterp.errors import SAEError
from mechinterp.models.load import load
from mechinterp.models.normalization import centre, scale_of
from mechinterp.nodes import Node
from saes.attribution import dfa_from_cache
from saes.base import KINDS, NORMALIZATIONS, SparseAutoencoder
from saes.components import Component, component_sites, stream_of
from saes.linear import written
from saes.places import Place
from saes.recursive import recursive_dfa, recursive_sites, trace

CLOSE = {"atol": 1e-10, "rtol": 0}


def at_z(*places, d_in=15, dtype=torch.float64, **settings):
    """Random autoencoders whose biases are not zero."""
    plain = SparseAutoencoder.random([Place.parse(place) for place in places], d_in=d_in, d_sae=24, **settings)
    draw = torch.Generator().manual_seed(5)
    biases = {name: 0.3 * torch.randn(getattr(plain, name).shape, generator=draw) for name in ("b_enc", "b_dec")}
    return replace(plain, **biases).to(dtype=dtype)


def on_layer(layer, model, **settings):
    return at_z(f"z.{layer}", d_in=5 * model.config.n_heads, **settings)


UPSTREAM = {
    "heads": lambda model: (),
    "layer": lambda model: (on_layer(1, model, kind="topk", k=4),),
    "some heads": lambda model: (at_z("z.0.h1", "z.1.h0", "z.1.h2", d_in=5), at_z("z.0.h0", d_in=5, kind="jumprelu")),
}


TELLING = ("plain", "llama", "gemma2", "olmo2")


@pytest.fixture(scope="module")
def root():
    return at_z("z.2")


def everything(model, tokens, layer=2):
    return model.run(tokens, record=[*recursive_sites(model.config, layer), f"v.{layer}"])[1]


@pytest.mark.parametrize("upstream", UPSTREAM.values(), ids=UPSTREAM)
def test_components_sum_to_the_stream(model, tokens, upstream):
    upstream = upstream(model)
    _, cache = model.run(tokens, record=component_sites(model.config, 2))
    found = stream_of(model, cache, 2, prompt=1, positions=[4, 2], upstream=upstream)
    summed = torch.zeros(7, 12, dtype=torch.float64).index_add_(0, found.pos, found.vectors)
    assert torch.allclose(summed[[2, 4]], cache["resid_pre", 2][1, [2, 4]], **CLOSE)
    assert summed[[0, 1, 3, 5, 6]].eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("variant", ["plain", "gemma2"])
def test_every_kind_of_autoencoder_takes_heads_apart_exactly(make_model, tokens, kind, normalize, variant):
    settings, model = {"k": 3} if "topk" in kind else {}, make_model(variant)
    _, cache = model.run(tokens, record=component_sites(model.config, 2))
    found = stream_of(model, cache, 2, upstream=[on_layer(1, model, kind=kind, normalize=normalize, **settings)])
    assert any(component.kind == "latent" for component in found.components)
    summed = torch.zeros(7, 12, dtype=torch.float64).index_add_(0, found.pos, found.vectors)
    assert torch.allclose(summed, cache["resid_pre", 2][0], **CLOSE)


@pytest.mark.parametrize("upstream", UPSTREAM.values(), ids=UPSTREAM)
def test_terms_sum_to_dfa_and_to_the_pre_activation(model, tokens, upstream):
    root, upstream, cache = on_layer(2, model), upstream(model), everything(model, tokens)
    direct = dfa_from_cache(root, cache, [6], queries=[5])
    found = recursive_dfa(model, root, cache, 6, 5, prompt=3, upstream=upstream)
    assert torch.allclose(found.by_source.mT, direct.by_head_and_source[3, 0, :, 0, :6], **CLOSE)
    assert found.pre_activation == pytest.approx(float(direct.pre_activations[3, 0, 0]), abs=1e-10)
    assert sum(found.by_component.values()) + float(found.constant) == pytest.approx(found.pre_activation, abs=1e-10)
    assert abs(found.largest(1)[0][2]) == pytest.approx(float(found.values.abs().max()))


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("variant", TELLING)
def test_one_heads_autoencoder_and_normalised_inputs(make_model, tokens, normalize, variant):
    one, model = at_z("z.2.h1", d_in=5, normalize=normalize), make_model(variant)
    cache = everything(model, tokens)
    found = recursive_dfa(model, one, cache, 2, 6, upstream=[on_layer(0, model, normalize=normalize)])
    pre = one.pre_activations(one.read(cache))[0, 0, 6, 2]
    assert found.heads == (1,)
    assert found.pre_activation == pytest.approx(float(pre), abs=1e-10)


@pytest.mark.parametrize("variant", TELLING)
def test_a_term_is_what_the_latent_loses_without_it(make_model, tokens, variant):
    """Take an MLP's output away from the heads' values alone, at its place and with the scale held."""
    model = make_model(variant)
    root, cache, config = on_layer(2, model), everything(model, tokens), model.config
    found = recursive_dfa(model, root, cache, 6, 5)
    term = next(
        t for t in range(len(found.values)) if (found.stream.component(t), int(found.stream.pos[t])) == (Component("mlp", 1), 3)
    )
    norm, out = model.weights.blocks[2].ln1, cache["mlp_out", 1][0, 3]
    if norm is not None:
        out = centre(out, config) / scale_of(cache["resid_pre", 2][0, 3], config) * norm.w
    lost = torch.einsum("m,gmd->gd", out, model.weights.W_V(2)).repeat_interleave(config.n_heads // config.n_groups, 0)
    z = torch.einsum("h,hd->hd", cache["pattern", 2][0, :, 5, 3], lost).flatten()
    assert float(found.values[term]) == pytest.approx(float(z @ root.W_pre[0][:, 6]), abs=1e-10)


@pytest.mark.parametrize("upstream", UPSTREAM.values(), ids=UPSTREAM)
def test_without_biases_all_children_of_a_step_sum_to_it(model, tokens, upstream):
    without, root, upstream = replace_biases(model), on_layer(2, model), upstream(model)
    tree = trace(without, bare(root), everything(without, tokens), 6, 5, depth=2, width=10_000, upstream=map(bare, upstream))
    assert tree.rest == pytest.approx(0, abs=1e-10)
    followed = [step for step in tree.children if step.children]
    assert {step.component.kind for step in followed} >= ({"latent"} if upstream else {"head"})
    for step in followed:
        assert step.rest == pytest.approx(0, abs=1e-10)


def bare(autoencoder):
    return replace(autoencoder, b_enc=0 * autoencoder.b_enc, b_dec=0 * autoencoder.b_dec)


def replace_biases(model):
    """The model whose heads' ports have no biases, of their own or of their normalisation."""
    silent = [
        replace(block, b_QKV=0 * block.b_QKV, ln1=block.ln1 and replace(block.ln1, b=None)) for block in model.weights.blocks
    ]
    return replace(model, weights=replace(model.weights, blocks=tuple(silent)))


def test_the_path_is_named_and_goes_down(plain, tokens, root):
    cache = everything(plain, tokens)
    tree = trace(plain, root, cache, 6, 5, depth=3, width=3, upstream=UPSTREAM["layer"](plain))
    assert tree.node == Node.parse("f2.6@5")
    assert tree.contribution == pytest.approx(recursive_dfa(plain, root, cache, 6, 5).pre_activation, abs=1e-10)
    layers = [step.component.layer for step in tree.path if step.component.layer is not None]
    assert layers == sorted(layers, reverse=True)
    assert all(step.pos <= 5 for step in tree.children)
    assert len(tree.children) == 3
    assert str(tree).splitlines()[1] == f"  {tree.children[0].component}@{tree.children[0].pos} " + (
        f"{tree.children[0].contribution:+.4g}"
    )


def test_latents_of_a_head_have_nodes_of_their_own(plain, tokens):
    cache = everything(plain, tokens)
    tree = trace(plain, at_z("z.2.h1", d_in=5), cache, 3, 4, depth=1, width=10_000, upstream=UPSTREAM["some heads"](plain))
    assert str(tree.component) == "f2.27"  # head 1 of autoencoders with 24 latents
    names = {str(step.component) for step in tree.children}
    assert {"embed", "pos_embed", "a0.bias", "f0.h1.error", "a1.h1", "m0"} <= names
    assert {str(step.node) for step in tree.children} >= {"input@0", "a1.h1@2", "m1@4", "f1.error@3", "None"}
    by_latent = {step.component.latent // 24 for step in tree.children if step.component.kind == "latent"}
    assert by_latent == {0, 1, 2}


@pytest.mark.parametrize("variant", TELLING)
def test_what_a_latent_writes_is_listed(make_model, tokens, variant):
    model = make_model(variant)
    one, cache = on_layer(1, model), everything(model, tokens)
    scale = float(cache["ln1_post_scale", 1][0, 3]) if model.config.has_norms_after else 1
    found = stream_of(model, cache, 2, positions=[3], upstream=[one])
    latents = one.encode(one.read(cache))[0, 0, 3]
    for term, component in enumerate(found.components):
        if component.kind == "latent":
            expected = latents[component.latent] * written(model, one, [component.latent])[0] / scale
            assert torch.allclose(found.vectors[found.which == term][0], expected, **CLOSE)


def test_single_precision_is_exact_to_1e_5():
    model = load("builtin")
    tokens = torch.randint(900, (2, 30), generator=torch.Generator().manual_seed(0))
    root, upstream = at_z("z.3", d_in=128, dtype=torch.float32), at_z("z.1", d_in=128, dtype=torch.float32)
    cache = everything(model, tokens, 3)
    pre = root.pre_activations(root.read(cache))[0]
    for query in (0, 29):
        found = recursive_dfa(model, root, cache, 5, query, prompt=1, upstream=[upstream])
        assert found.pre_activation == pytest.approx(float(pre[1, query, 5]), abs=1e-5)


def test_models_that_see_ahead_are_read_ahead(make_model, tokens):
    model = make_model(causal=False)
    cache, root = everything(model, tokens), at_z("z.2")
    found = recursive_dfa(model, root, cache, 6, 2)
    assert found.bias.shape == (7, 3)
    assert found.pre_activation == pytest.approx(float(root.pre_activations(root.read(cache))[0, 0, 2, 6]), abs=1e-10)


def test_a_matching_pursuit_ends_a_branch(plain, tokens, root):
    cache, pursuit = everything(plain, tokens), at_z("z.1", kind="matching_pursuit")
    tree = trace(plain, root, cache, 6, 5, depth=2, width=10_000, upstream=[pursuit])
    assert not any(step.children for step in tree.children if step.component.kind == "latent")
    with pytest.raises(SAEError, match="has no encoder"):
        trace(plain, pursuit, cache, 6, 5)


def test_what_cannot_be_is_said(plain, tokens, root):
    cache = everything(plain, tokens)
    with pytest.raises(SAEError, match="position 7 of prompt 0"):
        recursive_dfa(plain, root, cache, 6, 7)
    with pytest.raises(SAEError, match="latents 24 to 24"):
        recursive_dfa(plain, root, cache, 24, 5)
    with pytest.raises(SAEError, match=r"two autoencoders take 'z.1.h0' apart"):
        recursive_dfa(plain, root, cache, 6, 5, upstream=[at_z("z.1"), at_z("z.1.h0", d_in=5)])
    with pytest.raises(SAEError, match=r"two autoencoders take 'z.1' apart"):
        recursive_dfa(plain, root, cache, 6, 5, upstream=[at_z("z.1.h0", d_in=5), at_z("z.1")])
    with pytest.raises(SAEError, match="depth=1 and width=0"):
        trace(plain, root, cache, 6, 5, depth=1, width=0)
