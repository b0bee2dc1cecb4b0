"""Examples of latents against every activation laid out, whatever the batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import saes.examples
from mechinterp.errors import SAEError
from mechinterp.models.compiled import induction
from mechinterp.models.load import load
from saes.base import SparseAutoencoder
from saes.examples import find_examples
from saes.places import Place, each_head

TOKENS = torch.randint(23, (9, 7), generator=torch.Generator().manual_seed(3))
TOKENS[:, 0] = torch.arange(9)  # no two prefixes alike: whichever of equal activations is first would be for rounding to say


def concatenated(model, kind="topk", **given):
    """One on all heads of layer 1, and the activations of its latents everywhere."""
    given = {"k": 3, **given} if "topk" in kind else given
    width = model.config.n_heads * model.config.d_head
    autoencoder = SparseAutoencoder.random([Place.parse("z.1")], d_in=width, d_sae=30, kind=kind, **given)
    return autoencoder.to(dtype=torch.float64)


def everywhere(model, autoencoder, tokens=TOKENS):
    _, cache = model.run(tokens, record=[place.site for place in autoencoder.places])
    return autoencoder.encode(autoencoder.read(cache))


@pytest.mark.parametrize("kind", ["topk", "relu", "abstopk"])
def test_the_tops_are_those_of_all_activations_sorted(plain, kind):
    autoencoder = concatenated(plain, kind)
    dense = everywhere(plain, autoencoder)[0].flatten(0, 1)
    for found in find_examples(plain, autoencoder, TOKENS, n_top=6, batch_size=2):
        own = dense[:, found.latent]
        order = own.abs().argsort(descending=True, stable=True)[: min(6, int((own != 0).sum()))]
        tops = found.interval == 0
        assert (found.prompt[tops] * 7 + found.pos[tops]).tolist() == order.tolist()
        np.testing.assert_allclose(found.activation[tops], own[order].numpy(), atol=1e-12)
        assert found.n_active == int((own != 0).sum())
        assert found.maximum == pytest.approx(float(own.abs().max()), abs=1e-12)


def test_samples_lie_in_their_interval_and_are_as_many_as_there_are(plain):
    autoencoder = concatenated(plain, "relu")
    dense = everywhere(plain, autoencoder)[0]
    for found in find_examples(plain, autoencoder, TOKENS, n_sampled=2, n_intervals=4):
        sizes = dense[..., found.latent].flatten()
        sizes = sizes[sizes != 0]
        for interval in range(1, 5):
            low, high = found.bounds(interval)
            own = found.interval == interval
            inside = int(((sizes > low) & (sizes <= high)).sum())
            assert own.sum() == min(2, inside)
            assert found.share(interval) == pytest.approx(inside / max(1, len(sizes)))
            assert all(low - 1e-9 <= size <= high + 1e-9 for size in found.activation[own])
            where = zip(found.prompt[own], found.pos[own], strict=True)
            assert len(set(where)) == own.sum()
        assert found.histogram.sum() == found.n_active == len(sizes)


def test_an_example_is_where_it_says(plain):
    autoencoder = concatenated(plain, "abstopk")
    dense = everywhere(plain, autoencoder)[0]
    for found in find_examples(plain, autoencoder, TOKENS):
        np.testing.assert_allclose(found.activation, dense[found.prompt, found.pos, found.latent].numpy(), atol=1e-12)


def test_neither_batches_nor_memory_change_what_is_found_but_the_seed_does(plain, monkeypatch):
    autoencoder = concatenated(plain, "relu")

    def found(**given):
        return [(e.prompt.tolist(), e.pos.tolist()) for e in find_examples(plain, autoencoder, TOKENS, n_sampled=1, **given)]

    expected = found()
    assert found(batch_size=1) == found(batch_size=100) == expected
    assert found(seed=1) != expected
    monkeypatch.setattr(saes.examples, "_REMEMBERED", 10)
    monkeypatch.setattr(saes.examples, "_DENSE", 64)
    assert found() == expected


def test_samples_are_uniform(plain):
    """Each of an interval's positions comes up as often as the others, over seeds."""
    autoencoder = concatenated(plain, "relu")
    times: dict[tuple[int, int], int] = {}
    for seed in range(300):
        (found,) = find_examples(plain, autoencoder, TOKENS, latents=[0], n_sampled=3, n_intervals=1, seed=seed)
        for at in zip(found.prompt[found.interval > 0], found.pos[found.interval > 0], strict=True):
            times[at] = times.get(at, 0) + 1
    expected = 900 / found.n_active
    assert len(times) == found.n_active
    assert sum((n - expected) ** 2 / expected for n in times.values()) < 2 * found.n_active


def test_heads_are_read_apart(plain):
    places = each_head(plain.config, layers=[2])
    heads = SparseAutoencoder.random(places, d_in=5, d_sae=8).to(dtype=torch.float64)
    together = find_examples(plain, heads, TOKENS, latents=[5, 2])
    assert [(str(e.place), e.latent) for e in together[:3]] == [("z.2.h0", 5), ("z.2.h0", 2), ("z.2.h1", 5)]
    alone = find_examples(plain, heads.group("z.2.h1"), TOKENS, latents=[5])[0]
    assert alone.prompt.tolist() == together[2].prompt.tolist()
    np.testing.assert_allclose(alone.activation, together[2].activation)


def test_positions_outside_keep_do_not_exist(plain):
    autoencoder, keep = concatenated(plain, "relu"), TOKENS % 2 == 0
    dense = everywhere(plain, autoencoder)[0]
    for found in find_examples(plain, autoencoder, TOKENS, keep=keep):
        assert found.n_tokens == int(keep.sum())
        assert found.n_active == int((dense[..., found.latent][keep] > 0).sum())
        assert keep[found.prompt, found.pos].all()


def test_bos_is_passed_over_where_there_is_one(plain):
    builtin = load("builtin")
    tokens = torch.tensor([builtin.tokenizer.encode("Mary and John", bos=True)])
    autoencoder = SparseAutoencoder.random([Place.parse("z.1")], d_in=builtin.config.d_model, d_sae=4)
    for found in find_examples(builtin, autoencoder, tokens):
        assert found.n_tokens == 3
        assert (found.pos > 0).all()


def test_a_silent_latent_has_no_examples(plain):
    autoencoder = concatenated(plain, "relu")
    autoencoder = replace(autoencoder, b_enc=autoencoder.b_enc - 1e6)
    found = find_examples(plain, autoencoder, TOKENS, latents=[4])[0]
    assert (found.n_active, found.density, found.maximum, len(found.prompt)) == (0, 0.0, 0.0, 0)


def test_refusals_say_what_would_be_right(plain):
    autoencoder = concatenated(plain)
    with pytest.raises(SAEError, match="run from 0 to 29, and 30 is none"):
        find_examples(plain, autoencoder, TOKENS, latents=[30])
    with pytest.raises(SAEError, match="at least 1"):
        find_examples(plain, autoencoder, TOKENS, n_top=0)
    with pytest.raises(SAEError, match="reads 15 numbers"):
        find_examples(induction().model, autoencoder, TOKENS)
