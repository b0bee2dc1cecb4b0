"""Places: their names, their widths, and reading and writing them."""

import pytest
import torch

from mechinterp.errors import SAEError, UnknownSite
from mechinterp.sites import Site, all_sites
from saes.places import Place, each_head, each_layer, places_named


def n_heads(site, config):
    """How many heads stand at a site; none where it has no heads, or a grid of them."""
    return {"head_index": config.n_heads, "group": config.n_groups}.get(site.axes.split()[2], 0)


def every_place(config):
    """All that an autoencoder can stand at, and the sites refused."""
    places, refused = [], []
    for site in all_sites(config):
        try:
            places += [Place(site), *(Place(site, head) for head in range(n_heads(site, config)))]
        except SAEError:
            refused.append(site.name)
    return places, set(refused)


def test_names_and_places_are_inverse(model):
    places, _ = every_place(model.config)
    assert all(Place.parse(str(place)) == place for place in places)
    assert all(Place.parse(place.site.hook_name) == place for place in places if place.head is None and place.site.hook_name)
    assert Place.parse("blocks.1.attn.hook_z.h2") == Place(Site("z", 1), 2)


def test_sites_without_one_vector_a_position_are_refused(model):
    _, refused = every_place(model.config)
    assert refused == {site.name for site in all_sites(model.config) if site.name.endswith(("scores", "pattern", "scale"))}


def test_every_place_is_as_wide_as_it_says_and_can_be_read_and_written(model, tokens):
    places, _ = every_place(model.config)
    for place in places:
        _, cache = model.run(tokens, record=[place.site])
        whole, part = cache[place.site], place.read(cache)
        assert part.shape == (*tokens.shape, place.width(model.config))
        assert torch.equal(place.write(whole, part), whole)
        new = torch.randn_like(part)
        written = place.write(whole, new)
        assert torch.equal(place.part(written), new)
        if place.head is not None:
            others = [head for head in range(n_heads(place.site, model.config)) if head != place.head]
            assert torch.equal(written[:, :, others], whole[:, :, others])


def test_writing_leaves_what_was_given_alone(plain, tokens):
    _, cache = plain.run(tokens, record=["z.1"])
    before = cache["z", 1].clone()
    Place.parse("z.1.h0").write(cache["z", 1], torch.zeros(4, 7, 5, dtype=torch.float64))
    assert torch.equal(cache["z", 1], before)


def test_where_keys_are_shared_their_heads_are_those_that_are_shared(make_model):
    config = make_model("llama").config
    assert [str(place) for place in places_named(config, ["k.1.h*", "v.2.h*"])] == ["k.1.h0", "k.1.h1", "v.2.h0", "v.2.h1"]
    assert len(each_head(config, "q")) == 2 * len(each_head(config, "k_input")) == 12
    assert Place.parse("v.0").width(config) == 10
    with pytest.raises(SAEError, match=r"'v.0.h2' is not in llama, whose layers have heads 0..1"):
        Place.parse("v.0.h2").width(config)


def test_names_stand_for_many_places(plain):
    config = plain.config

    def names(*given):
        return [str(place) for place in places_named(config, given)]

    assert names("z") == names("z.*") == ["z.0", "z.1", "z.2"]
    assert names("z.1.h*") == ["z.1.h0", "z.1.h1", "z.1.h2"]
    assert names("z.*.h*") == [f"z.{layer}.h{head}" for layer in range(3) for head in range(3)]
    assert names("z.2.h1", Place.parse("q.0.h0"), "v.1.h*") == ["z.2.h1", "q.0.h0", "v.1.h0", "v.1.h1", "v.1.h2"]
    assert names("blocks.1.hook_resid_post", "embed") == ["resid_post.1", "embed"]
    assert [str(at) for at in each_layer(config, "mlp_out", iter([2, 0]))] == ["mlp_out.0", "mlp_out.2"]
    assert [str(at) for at in each_head(config, layers=[1])] == names("z.1.h*")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "no place is named"),
        (["z.0", "z"], "'z.0' is named twice"),
        (["z.0", "z.0.h1"], "different widths"),
        (["z.3.h*"], "layers run 0..2"),
        (["z.1.h3"], "heads 0..2"),
        (["x.1.h1"], "names no place.*z.5.h3"),
        (["resid_pre.1.h0"], "has no heads"),
        (["pattern.0"], "one vector a position"),
        (["ln1_scale.0"], "one vector a position"),
    ],
)
def test_names_that_mean_nothing_are_explained(plain, given, says):
    with pytest.raises(SAEError, match=says):
        places_named(plain.config, given)


def test_a_place_that_the_model_lacks_is_named(make_model):
    with pytest.raises(UnknownSite, match="mlp_out"):
        Place.parse("mlp_out.0").width(make_model("attention_only").config)
    with pytest.raises(UnknownSite, match="layers of plain run 0..2"):
        Place.parse("z.3").width(make_model().config)
