"""Direct feature attribution sums to pre-activations, by head and by source position."""

from dataclasses import replace

import pytest
import torch

from mechinterp.errors import SAEError
from mechinterp.models.load import load
from saes.attribution import dfa, dfa_from_cache, dfa_sites
from saes.base import NORMALIZATIONS, SparseAutoencoder
from saes.places import Place

EXACT = {"atol": 1e-12, "rtol": 0}


def at_z(place, d_in=15, dtype=torch.float64, **settings):
    """A random autoencoder whose biases are not zero."""
    plain = SparseAutoencoder.random([Place.parse(place)], d_in=d_in, d_sae=24, **settings).to(dtype=dtype)
    draw = torch.Generator().manual_seed(5)
    biases = {name: torch.randn(getattr(plain, name).shape, generator=draw).to(dtype) for name in ("b_enc", "b_dec")}
    return replace(plain, **biases)


@pytest.mark.parametrize("place", ["z.1", "z.2.h1"])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_it_sums_to_the_pre_activation(model, tokens, place, normalize):
    autoencoder = at_z(place, Place.parse(place).width(model.config), normalize=normalize)
    _, cache = model.run(tokens, record=dfa_sites(autoencoder))
    found = dfa_from_cache(autoencoder, cache, None)
    pre = autoencoder.pre_activations(autoencoder.read(cache))[0]
    assert torch.allclose(found.pre_activations, torch.einsum("bqi->biq", pre), **EXACT)


def test_heads_are_their_outputs_read_by_the_encoder(model, tokens):
    autoencoder = at_z("z.1", 5 * model.config.n_heads)
    _, cache = model.run(tokens, record=dfa_sites(autoencoder))
    found = dfa_from_cache(autoencoder, cache, [3, 20])
    W = autoencoder.W_pre[0][:, [3, 20]].unflatten(0, (-1, 5))
    assert torch.allclose(found.by_head, torch.einsum("bqhd,hdi->bihq", cache["z", 1], W), **EXACT)


def test_it_is_the_naive_outer_product(plain, tokens):
    autoencoder = at_z("z.2", kind="gated")
    autoencoder = replace(autoencoder, r_mag=0.3 * torch.ones_like(autoencoder.b_enc))
    _, cache = plain.run(tokens, record=["v.2", "pattern.2", "z.2"])
    moved = torch.einsum("bhqs,bshd->bqshd", cache["pattern", 2], cache["v", 2]).flatten(3)
    naive = torch.einsum("bqsz,zi->biqs", moved, autoencoder.W_pre[0])
    assert torch.allclose(dfa_from_cache(autoencoder, cache, None).by_source, naive, **EXACT)


def test_queries_and_latents_are_rows_of_the_whole(plain, tokens):
    autoencoder = at_z("z.1", kind="jumprelu")
    whole = dfa(plain, autoencoder, tokens, None)
    same = dfa(plain, autoencoder, tokens, [7, 2], queries=[6, 1])
    assert torch.allclose(same.by_head_and_source, whole.by_head_and_source[:, [7, 2]][:, :, :, [6, 1]], **EXACT)
    own = torch.tensor([[0], [3], [5], [6]])
    each = dfa(plain, autoencoder, tokens, [7], queries=own)
    assert each.latents == (7,)
    for prompt, (query,) in enumerate(own.tolist()):
        assert torch.allclose(each.by_source[prompt, 0, 0], whole.by_source[prompt, 7, query], **EXACT)


def test_a_group_of_many_is_chosen_by_place(plain, tokens):
    many = SparseAutoencoder.random([Place.parse(f"z.{layer}.h1") for layer in range(3)], d_in=5, d_sae=8)
    many = many.to(dtype=torch.float64)
    found = dfa(plain, many, tokens, [1], place="z.2.h1")
    assert (str(found.place), found.heads) == ("z.2.h1", (1,))
    assert torch.equal(found.by_source, dfa(plain, many.group(2), tokens, [1]).by_source)


def test_offsets_and_tokens_rearrange_the_sources(plain, tokens):
    found = dfa(plain, at_z("z.1"), tokens, [4, 9], queries=[2, 6])
    offsets = found.by_offset()
    assert torch.allclose(offsets.sum(-1), found.by_source.sum(-1), **EXACT)
    assert offsets[1, 0, 1, 2] == found.by_source[1, 0, 1, 4]
    assert offsets[0, 1, 0, 3:].eq(0).all()
    by_token = found.by_token(tokens, 23)
    assert torch.allclose(by_token.sum(1), found.by_source.sum((0, 2, 3)), **EXACT)
    token = int(tokens[2, 1])
    here = torch.einsum("biqs,bs->i", found.by_source, (tokens == token).double())
    assert torch.allclose(by_token[:, token], here, **EXACT)
    where = torch.zeros(4, 2, 2, dtype=torch.bool)
    where[3, 1, 0] = True
    assert found.by_token(tokens, 23, where)[0].eq(0).all()
    assert torch.allclose(found.by_token(tokens, 23, where)[1].sum(), found.by_source[3, 1, 0].sum(), **EXACT)


def test_top_sources_are_the_largest(plain, tokens):
    found = dfa(plain, at_z("z.1"), tokens, [4], queries=[6])
    values, positions = found.top_sources(2)
    best = found.by_source[0, 0, 0].sort(descending=True)
    assert positions[0, 0, 0].tolist() == best.indices[:2].tolist()
    assert torch.equal(values[0, 0, 0], best.values[:2])
    assert found.top_sources(50)[0].shape[-1] == 7


def test_single_precision_is_exact_to_1e_5():
    model = load("builtin")
    tokens = torch.randint(900, (2, 40), generator=torch.Generator().manual_seed(0))
    autoencoder = at_z("z.2", 128, torch.float32)
    _, cache = model.run(tokens, record=["v.2", "pattern.2", "z.2"])
    pre = autoencoder.pre_activations(autoencoder.read(cache))[0]
    found = dfa_from_cache(autoencoder, cache, None).pre_activations
    assert torch.allclose(found, torch.einsum("bqi->biq", pre), atol=1e-5, rtol=0)


def test_what_cannot_be_is_said(plain, tokens):
    many = SparseAutoencoder.random([Place.parse("z.0"), Place.parse("z.1")], d_in=15, d_sae=8)
    with pytest.raises(SAEError, match=r"2 autoencoders stand here, at z.0, z.1.*place=.z.0"):
        dfa(plain, many, tokens, [0])
    with pytest.raises(SAEError, match="stands at 'resid_pre.1'"):
        dfa(plain, SparseAutoencoder.random([Place.parse("resid_pre.1")], d_in=12, d_sae=8), tokens, [0])
    with pytest.raises(SAEError, match="latents 9 to 9 .*0 to 7"):
        dfa(plain, many, tokens, [9], place="z.0")
    with pytest.raises(SAEError, match="queries stand at 7 to 7.*0 to 6"):
        dfa(plain, many, tokens, [1], place="z.0", queries=[7])
    with pytest.raises(SAEError, match="fit no 4 prompts"):
        dfa(plain, many, tokens, [1], place="z.0", queries=torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(SAEError, match="a matching pursuit has no encoder"):
        dfa(plain, at_z("z.1", kind="matching_pursuit"), tokens, [1])
