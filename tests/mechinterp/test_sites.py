"""Sites: their names, TransformerLens' names, their order, and which of them a model has."""

import pytest

from mechinterp.errors import UnknownSite
from mechinterp.sites import GLOBAL_SITES, LAYER_SITES, Site, all_sites, resolve


def test_every_site_is_read_back_from_its_name_and_from_its_hook_name(model):
    for site in all_sites(model.config):
        assert Site.parse(str(site)) == site
        assert site.hook_name is None or Site.parse(site.hook_name) == site


EVERYTHING = set(LAYER_SITES) | set(GLOBAL_SITES)
MLP = {"mlp_in", "ln2_scale", "ln2_normalized", "mlp_pre", "mlp_post", "mlp_out"}
BEFORE = {"ln1_scale", "ln1_normalized", "ln2_scale", "ln2_normalized"}
AFTER = {"ln1_post_scale", "ln1_post_normalized", "ln2_post_scale", "ln2_post_normalized", "z_written"}
TURNED, GATED, POSITIONS = {"rot_q", "rot_k"}, {"mlp_pre_linear"}, {"pos_embed"}
LACKING = {
    "plain": AFTER | TURNED | GATED,
    "folded": AFTER | TURNED | GATED,
    "parallel": AFTER | TURNED | GATED | {"resid_mid"},
    "no_norm": AFTER | TURNED | GATED | BEFORE | {"ln_final_scale", "ln_final_normalized"},
    "attention_only": AFTER | TURNED | GATED | MLP | {"resid_mid"},
    "llama": AFTER | POSITIONS,
    "qwen3": AFTER | POSITIONS,
    "olmo2": BEFORE | POSITIONS,
    "gemma2": POSITIONS,
    "gptj": AFTER | GATED | POSITIONS | {"resid_mid"},
    "mpt": AFTER | TURNED | GATED | POSITIONS,
}


def test_an_architecture_has_the_sites_that_it_computes_and_no_others(model):
    assert EVERYTHING - {site.name for site in all_sites(model.config)} == LACKING[model.config.name]


def test_sites_are_listed_from_the_embedding_through_the_layers_to_the_logits(plain):
    listed = all_sites(plain.config)
    assert list(listed) == sorted(listed, key=lambda site: site.order)
    assert [str(site) for site in (*listed[:3], listed[-1])] == ["embed", "pos_embed", "resid_pre.0", "logits"]
    a_layer = len(set(LAYER_SITES) - LACKING["plain"])
    assert [site.layer for site in listed if site.layer is not None] == [0] * a_layer + [1] * a_layer + [2] * a_layer


def test_what_is_wanted_can_be_said_in_four_ways(plain):
    z1 = Site("z", 1)
    assert resolve(plain.config, [z1, "z.1", "blocks.1.attn.hook_z"]) == [z1] * 3
    assert resolve(plain.config, ["z"]) == [Site("z", layer) for layer in range(3)]
    assert resolve(plain.config, ["embed", "hook_embed"]) == [Site("embed")] * 2


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("paterns.0", r"Sites look like 'z.9'.*Did you mean 'pattern.0'"),
        ("blocks.0.attn.hook_zed", "names no site"),
        ("z.x", "names no site"),
        ("z.3", r"asked for at layer 3; the layers of plain run 0\.\.2"),
        (Site("z"), r"asked for at layer None; the layers of plain run 0\.\.2"),
        (Site("logits", 0), r"belongs to no layer.*Use Site\('logits'\)"),
        (Site("patern", 0), r"no site 'patern'. It has: .*Did you mean 'pattern'"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(plain, wanted, message):
    with pytest.raises(UnknownSite, match=message):
        resolve(plain.config, [wanted])


def test_axes_say_the_shape(model, tokens):
    sizes = {"batch": 4, "pos": 7, "query_pos": 7, "key_pos": 7, "1": 1}
    sizes |= {"head_index": model.config.n_heads, "group": model.config.n_groups}
    sizes |= {"d_model": 12, "d_head": 5, "d_mlp": 20, "d_vocab": 23}
    _, cache = model.run(tokens, record=all_sites(model.config))
    for site, value in cache.items():
        assert value.shape == tuple(sizes[axis] for axis in site.axes.split())


@pytest.mark.parametrize(
    ("variant", "name", "others"),
    [("llama", "pos_embed", "rot_q"), ("plain", "z_written", "z"), ("olmo2", "ln1_scale", "ln1_post_scale")],
)
def test_what_another_family_has_is_refused_and_the_sites_that_are_there_are_named(make_model, variant, name, others):
    with pytest.raises(UnknownSite, match=f"{variant} has no site '{name}'. It has: .*{others}"):
        resolve(make_model(variant).config, [name])
