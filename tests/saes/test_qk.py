"""Attention scores are sums over pairs of components."""

import pytest
import torch

from mechinterp.errors import SAEError
from mechinterp.models.load import load
from saes.base import SparseAutoencoder
from saes.components import Component
from saes.places import Place
from saes.qk import latent_pair_scores, qk_attribution, qk_sites


def at_z(*places, d_in=15, dtype=torch.float64):
    return SparseAutoencoder.random([Place.parse(place) for place in places], d_in=d_in, d_sae=24).to(dtype=dtype)


@pytest.mark.parametrize("places", [(), ("z.1",), ("z.0.h0", "z.1.h2")], ids=["heads", "layer", "some"])
def test_pairs_sum_to_the_score(model, tokens, places):
    upstream = [at_z(place, d_in=Place.parse(place).width(model.config)) for place in places]
    _, cache = model.run(tokens, record=[*qk_sites(model.config, 2), "attn_scores.2"])
    for prompt, head, query, key in ((0, 0, 6, 4), (2, 1, 5, 5), (3, 2, 4, 2)):
        found = qk_attribution(model, cache, 2, head, query, key, prompt=prompt, upstream=upstream)
        score = float(cache["attn_scores", 2][prompt, head, query, key])
        assert found.attn_score == pytest.approx(score, abs=1e-10)
        assert sum(found.by_query.values()) == pytest.approx(found.score, abs=1e-10)
        assert sum(found.by_key.values()) == pytest.approx(found.score, abs=1e-10)
        if found.cap is None and not model.config.alibi:
            assert found.score == pytest.approx(score, abs=1e-10)
        query_side, key_side, largest = found.largest(1)[0]
        pair = found.pairs[found.queries.index(query_side), found.keys.index(key_side)]
        assert largest == float(pair)
        assert abs(largest) == float(found.pairs.abs().max())


def test_the_first_layer_reads_embeddings(model, tokens):
    _, cache = model.run(tokens, record=[*qk_sites(model.config, 0), "attn_scores.0"])
    found = qk_attribution(model, cache, 0, 1, 3, 2)
    positions = [Component("pos_embed")] * model.config.learned_positions
    assert found.keys == (Component("embed"), *positions, Component("bias"))
    assert found.attn_score == pytest.approx(float(cache["attn_scores", 0][0, 1, 3, 2]), abs=1e-10)


def scale_between(model, cache, port, pos, written_at):
    """All that divides what a latent of the first prompt has written on its way into a query or key of head 1."""
    scale, q_or_k = 1.0, cache[port, 2][0, pos]
    if f"ln1_post_scale.{written_at}" in cache:
        scale *= float(cache["ln1_post_scale", written_at][0, pos])
    if "ln1_scale.2" in cache:
        scale *= float(cache["ln1_scale", 2][0, pos])
    if model.config.qk_norm != "none":
        index = 1 if port == "q" else model.config.group_of(1)
        normed = q_or_k if model.config.qk_norm == "all" else q_or_k[index]
        scale *= float((normed.square().mean() + model.config.norm_eps).sqrt())
    return scale


def test_pairs_of_latents_are_their_weights_times_their_activations(model, tokens):
    at_query, at_key = at_z("z.1", d_in=5 * model.config.n_heads), at_z("z.0.h1", d_in=5)
    norm = ["ln1_scale.2"] if model.config.has_norms_before else []
    _, cache = model.run(tokens, record=[*qk_sites(model.config, 2), *norm, "q.2", "k.2"])
    found = qk_attribution(model, cache, 2, 1, 6, 4, upstream=[at_query, at_key])
    scores = latent_pair_scores(model, 2, 1, at_query, at_key, back=2)
    scale = scale_between(model, cache, "q", 6, 1) * scale_between(model, cache, "k", 4, 0)
    f, g = (one.encode(one.read(cache))[0, 0, at] for one, at in ((at_query, 6), (at_key, 4)))
    checked = 0
    for i, query in enumerate(found.queries):
        for j, key in enumerate(found.keys):
            if (query.kind, query.layer, key.kind, key.layer) == ("latent", 1, "latent", 0):
                latents = query.latent, key.latent - 24  # numbered on from head 0's
                expected = f[latents[0]] * g[latents[1]] * scores[latents] / scale
                # Turned by how far apart they stand, and not by where each stands: angles are in single precision.
                assert float(found.pairs[i, j]) == pytest.approx(float(expected), rel=1e-5, abs=1e-8)
                checked += 1
    assert checked == int((f > 0).sum() * (g > 0).sum())


def test_chosen_latents_are_rows_and_columns(plain):
    many = at_z("z.0", "z.1")
    whole = latent_pair_scores(plain, 2, 0, many, places=("z.1", "z.0"))
    some = latent_pair_scores(plain, 2, 0, many, query_latents=[3, 1], key_latents=[5], places=("z.1", "z.0"))
    assert torch.allclose(some, whole[[3, 1]][:, [5]])


def test_single_precision_is_exact_to_1e_5():
    model = load("builtin")
    tokens = torch.randint(900, (1, 30), generator=torch.Generator().manual_seed(0))
    _, cache = model.run(tokens, record=[*qk_sites(model.config, 3), "attn_scores.3"])
    found = qk_attribution(model, cache, 3, 2, 20, 11, upstream=[at_z("z.2", d_in=128, dtype=torch.float32)])
    assert found.score == pytest.approx(float(cache["attn_scores", 3][0, 2, 20, 11]), rel=1e-5, abs=1e-5)


def test_keys_out_of_the_window_and_positions_that_turn_are_said(make_model, tokens):
    model = make_model("gemma2")
    _, cache = model.run(tokens, record=qk_sites(model.config, 2))
    with pytest.raises(SAEError, match=r"sees 3 positions back: position 6 does not see position 3. Choose a key from 4 on"):
        qk_attribution(model, cache, 2, 0, 6, 3)
    with pytest.raises(SAEError, match="how many positions before the query the key stands: back=1"):
        latent_pair_scores(model, 2, 0, at_z("z.1", d_in=20))


def test_what_cannot_be_is_said(plain, tokens):
    _, cache = plain.run(tokens, record=qk_sites(plain.config, 2))
    with pytest.raises(SAEError, match="position 2 does not see position 5"):
        qk_attribution(plain, cache, 2, 0, 2, 5)
    with pytest.raises(SAEError, match=r"head 3 of layer 2 is not in plain"):
        qk_attribution(plain, cache, 2, 3, 5, 2)
    with pytest.raises(SAEError, match="positions 9 and 2 of prompt 0"):
        qk_attribution(plain, cache, 2, 0, 9, 2)
    with pytest.raises(SAEError, match=r"layer 1 reads earlier layers; the autoencoder stands at 'z.1'"):
        latent_pair_scores(plain, 1, 0, at_z("z.1"))
