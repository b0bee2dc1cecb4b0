"""Families of latents: the written heads of a planted model come out as what they are."""

from dataclasses import replace

import pytest
import torch

from mechinterp.errors import ModelError, SAEError
from mechinterp.head_scores import repeated_tokens
from mechinterp.models.compiled import induction
from mechinterp.models.load import load
from saes.attribution import dfa_from_cache, dfa_sites
from saes.base import SparseAutoencoder
from saes.families import FAMILIES, KINDS_OF_SOURCE, dfa_at, measure_families
from saes.places import Place

LETTERS = torch.randint(24, (200, 9), generator=torch.Generator().manual_seed(0))


def identity(places, width, threshold=0.5):
    """A latent for each direction of the basis, both ways, active above a threshold."""
    n, both = len(places), torch.cat([torch.eye(width), -torch.eye(width)])
    W = both.expand(n, -1, -1).contiguous()
    bias = torch.full((n, 2 * width), -threshold)
    return SparseAutoencoder("relu", tuple(places), W.mT.contiguous(), bias, W, torch.zeros(n, width))


def families_by_head(signatures, head_of):
    found = {}
    for signature in signatures:
        if signature.family != "silent":
            found.setdefault(head_of(signature), set()).add(signature.family)
    return found


def head_in(role):
    layer, head = role[1:].split(".h")
    return int(layer), int(head)


@pytest.fixture(scope="module")
def planted():
    return induction()


@pytest.mark.parametrize("role", ["previous", "induction"])
def test_latents_of_written_heads_are_what_the_heads_do(planted, role):
    layer, head = head_in(planted.roles[role])
    place = Place.parse(f"z.{layer}")
    twice = repeated_tokens(planted.model, 1000, 8)  # there are few letters a prompt, and a latent waits for one of 24
    concatenated = measure_families(planted.model, identity([place], 96), LETTERS, repeated=twice)
    by_head = families_by_head(concatenated, lambda signature: signature.latent % 96 // 24)
    assert by_head[head] == {{"previous": "previous token", "induction": "induction"}[role]}


def test_heads_apart_say_the_same_as_concatenated(planted):
    roles = {"previous": "previous token", "induction": "induction"}
    places = [Place.parse("z.{}.h{}".format(*head_in(planted.roles[role]))) for role in roles]
    twice = repeated_tokens(planted.model, 1000, 8)
    found = measure_families(planted.model, identity(places, 24), LETTERS, repeated=twice)
    apart = families_by_head(found, lambda s: s.place)
    assert apart == {str(place): {family} for place, family in zip(places, roles.values(), strict=True)}


def test_shares_are_the_weighted_mean_over_active_positions(plain, tokens):
    autoencoder = SparseAutoencoder.random([Place.parse("z.1")], d_in=15, d_sae=20).to(dtype=torch.float64)
    _, cache = plain.run(tokens, record=[*dfa_sites(autoencoder), "z.1"])
    latents = autoencoder.encode(autoencoder.read(cache))[0]
    by_source = dfa_from_cache(autoencoder, cache, None).by_source.clamp(min=0)
    for found in measure_families(plain, autoencoder, tokens, batch_size=3):
        sums = dict.fromkeys(KINDS_OF_SOURCE, 0.0)
        total = 0.0
        for prompt, pos in latents[..., found.latent].nonzero().tolist():
            size = float(latents[prompt, pos, found.latent])
            share = by_source[prompt, found.latent, pos] / by_source[prompt, found.latent, pos].sum()
            said = tokens[prompt].tolist()
            kinds = {
                "present": [pos],
                "previous": [pos - 1] if pos else [],
                "near": range(max(0, pos - 3), pos + 1),
                "first": [0],
                "induction": [s for s in range(1, pos) if said[s - 1] == said[pos]],
            }
            for kind, sources in kinds.items():
                sums[kind] += size * float(share[list(sources)].sum())
            total += size
        for kind in KINDS_OF_SOURCE:
            assert getattr(found, kind) == pytest.approx(sums[kind] / total if total else 0.0, abs=1e-9)


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("place", ["z.1", "z.2.h1"])
@pytest.mark.parametrize("variant", ["plain", "llama"])
def test_attribution_of_pairs_is_that_of_all(make_model, tokens, place, normalize, variant):
    model = make_model(variant)
    width = Place.parse(place).width(model.config)
    autoencoder = SparseAutoencoder.random([Place.parse(place)], d_in=width, d_sae=6, normalize=normalize)
    autoencoder = autoencoder.to(dtype=torch.float64)
    _, cache = model.run(tokens, record=["z", "v", "pattern"])
    everything = dfa_from_cache(autoencoder, cache, None).by_head_and_source
    pos, latent = torch.tensor([0, 3, 6, 6]), torch.tensor([5, 2, 2, 0])
    found = dfa_at(autoencoder, cache, 2, pos, latent)
    torch.testing.assert_close(found, everything[2, latent, :, pos])


def test_a_latent_of_a_position_is_positional(make_model):
    """Attention that looks at nothing but itself would need tokens; a bias at one position does not."""
    model = make_model("no_norm", d_mlp=None)
    W_pos = torch.zeros_like(model.weights.W_pos)
    W_pos[4] = 50.0
    model = replace(model, weights=replace(model.weights, W_pos=W_pos))
    text = torch.randint(23, (60, 9), generator=torch.Generator().manual_seed(0))
    _, cache = model.run(text, record=["z.0"])
    z = cache["z", 0].flatten(2)
    autoencoder = identity([Place.parse("z.0")], 15, threshold=float(z.abs().max()) / 3).to(dtype=torch.float64)
    assert "positional" in {found.family for found in measure_families(model, autoencoder, text)}


def test_repeated_tokens_are_different_and_said_twice(planted):
    found = repeated_tokens(planted.model, 5, 9)
    assert found.shape == (5, 8)
    assert torch.equal(found[:, :4], found[:, 4:])
    assert all(len(set(row[:4].tolist())) == 4 for row in found)
    assert torch.equal(found, repeated_tokens(planted.model, 5, 9))
    builtin = load("builtin")
    twice = repeated_tokens(builtin, 3, 9)
    bos = builtin.tokenizer.bos_id
    assert twice.shape[1] == (9 if builtin.tokenizer.prepends_bos else 8)
    assert not builtin.tokenizer.prepends_bos or (twice == bos).sum() == 3
    with pytest.raises(ModelError, match="too few to say three twice"):
        repeated_tokens(planted.model, 5, 5)


def test_a_silent_latent_has_no_family(plain, tokens):
    autoencoder = identity([Place.parse("z.1")], 15, threshold=1e6).to(dtype=torch.float64)
    found = measure_families(plain, autoencoder, tokens)
    assert {signature.family for signature in found} == {"silent"}
    assert found[0].repeats is None
    assert set(FAMILIES) >= {signature.family for signature in found}


def test_places_without_attention_are_refused(plain, tokens):
    autoencoder = SparseAutoencoder.random([Place.parse("resid_pre.1")], d_in=12, d_sae=6).to(dtype=torch.float64)
    with pytest.raises(SAEError, match="stands at 'resid_pre.1'"):
        measure_families(plain, autoencoder, tokens)
