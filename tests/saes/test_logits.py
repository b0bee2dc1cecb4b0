"""What latents add to the logits directly."""

import pytest
import torch

from mechinterp.errors import SAEError
from mechinterp.models.load import load
from saes import logits as direct
from saes.base import SparseAutoencoder
from saes.linear import written
from saes.logits import logit_effects, top_tokens
from saes.places import Place


def at_z(place, d_in=15, d_sae=24, dtype=torch.float64):
    return SparseAutoencoder.random([Place.parse(place)], d_in=d_in, d_sae=d_sae).to(dtype=dtype)


@pytest.mark.parametrize("place", ["z.1", "z.2.h2"])
def test_adding_what_a_latent_writes_changes_the_logits_so(model, tokens, place):
    """The logits as they are before a soft cap, where a model has one."""
    autoencoder = at_z(place, Place.parse(place).width(model.config))
    has_norm = model.weights.ln_final is not None
    logits, cache = model.run(tokens, record=["ln_final_scale"] if has_norm else [])
    scale = cache["ln_final_scale"] if has_norm else torch.ones(4, 7, 1, dtype=torch.float64)
    effects = logit_effects(model, autoencoder, [5, 11])
    for row, latent in enumerate((5, 11)):
        vector = written(model, autoencoder, [latent])[0]
        patch = {"resid_post.2": lambda value, _, vector=vector: value + 2 * vector}
        patch |= {"ln_final_scale": lambda *_: scale} if has_norm else {}
        changed, _ = model.run(tokens, patch=patch)
        gained = uncapped(model, changed) - uncapped(model, logits)
        assert torch.allclose(gained, (2 * effects[row] / scale).expand_as(logits), atol=1e-10)


def uncapped(model, logits):
    cap = model.config.logit_soft_cap
    return logits if cap is None else cap * torch.atanh(logits / cap)


def test_top_and_bottom_tokens_are_those_of_the_effects(plain, monkeypatch):
    autoencoder = at_z("z.1")
    monkeypatch.setattr(direct, "_CHUNK", 23 * 5)  # five latents at a time
    found = top_tokens(plain, autoencoder, n=4)
    effects = logit_effects(plain, autoencoder)
    effects = effects - effects.mean(1, keepdim=True)
    assert found.latents == tuple(range(24))
    order = effects.argsort(1, descending=True)
    assert torch.equal(found.top, order[:, :4])
    assert torch.equal(found.bottom, order.flip(1)[:, :4])
    assert torch.allclose(found.top_effects, effects.gather(1, found.top), atol=1e-12)
    assert torch.allclose(found.bottom_effects, effects.gather(1, found.bottom), atol=1e-12)


def test_words_are_the_tokens_written_out():
    model = load("builtin")
    found = top_tokens(model, at_z("z.3.h1", 16, dtype=torch.float32), [7, 2], n=3)
    top, bottom = found.words(2, model.tokenizer)
    assert top == model.tokenizer.strings(found.top[1].tolist())
    assert len(bottom) == 3
    with pytest.raises(SAEError, match="latent 3 is not among"):
        found.words(3, model.tokenizer)


def test_what_cannot_be_is_said(plain):
    with pytest.raises(SAEError, match="n=24 tokens cannot be shown of 23"):
        top_tokens(plain, at_z("z.1"), n=24)
    with pytest.raises(SAEError, match="reads 16 numbers"):
        logit_effects(plain, at_z("z.1", 16))
