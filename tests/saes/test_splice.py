"""Autoencoders in the model: what they change, and that they change nothing else."""

import pytest
import torch

from saes.base import SparseAutoencoder
from saes.places import Place, each_head, each_layer
from saes.splice import ablated, spliced


def of(config, *places: Place, d_sae: int = 10) -> SparseAutoencoder:
    made = SparseAutoencoder.random(places, d_in=places[0].width(config), d_sae=d_sae, kind="topk", k=3)
    made.b_dec.copy_(0.1 * torch.randn(made.b_dec.shape, generator=torch.Generator().manual_seed(2)))
    return made.to(dtype=torch.float64)


def test_a_head_is_changed_and_no_other(model, tokens):
    one = of(model.config, Place.parse("z.1.h2"))
    _, clean = model.run(tokens, record=["z.1"])
    logits, cache = model.run(tokens, record=["z.1"], patch=spliced(one))
    by_hand = clean["z", 1].clone()
    by_hand[:, :, 2] = one.reconstruct(by_hand[:, :, 2].unsqueeze(0))[0]
    others = [head for head in range(model.config.n_heads) if head != 2]
    assert torch.equal(cache["z", 1][:, :, others], clean["z", 1][:, :, others])
    torch.testing.assert_close(cache["z", 1], by_hand)
    torch.testing.assert_close(logits, model.run(tokens, patch={"z.1": lambda value, _: by_hand})[0])


def test_all_heads_concatenated_are_one_vector(model, tokens):
    layer = of(model.config, Place.parse("z.1"))
    _, clean = model.run(tokens, record=["z.1"])
    _, cache = model.run(tokens, record=["z.1"], patch=spliced(layer))
    wanted = layer.reconstruct(clean["z", 1].flatten(2).unsqueeze(0))[0].unflatten(-1, (-1, 5))
    torch.testing.assert_close(cache["z", 1], wanted)


def test_all_heads_at_once_are_the_heads_one_by_one(model, tokens):
    every = of(model.config, *each_head(model.config))
    together, _ = model.run(tokens, patch=spliced(every))
    patches: dict = {}
    for place in every.places:
        for site, patch in spliced(every.group(place)).items():
            patches.setdefault(site, []).append(patch)

    def in_turn(one_by_one):
        def patch(value, cache):
            for own in one_by_one:
                value = own(value, cache)
            return value

        return patch

    apart, _ = model.run(tokens, patch={site: in_turn(own) for site, own in patches.items()})
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("each", [each_layer, each_head])
def test_with_its_error_an_autoencoder_changes_nothing(each, model, tokens):
    autoencoder = of(model.config, *each(model.config))
    clean, _ = model.run(tokens)
    torch.testing.assert_close(model.run(tokens, patch=spliced(autoencoder, with_error=True))[0], clean)
    assert not torch.allclose(model.run(tokens, patch=spliced(autoencoder))[0], clean)


def test_with_the_error_nothing_but_the_edit_shows(plain, tokens):
    autoencoder = of(plain.config, Place.parse("z.1.h0"), Place.parse("z.1.h1"))
    _, clean = plain.run(tokens, record=["z.1"])
    latents = autoencoder.encode(autoencoder.read(clean))
    latent = int(latents[1].sum((0, 1)).argmax())

    def without(place, own):
        own = own.clone()
        if place == Place.parse("z.1.h1"):
            own[..., latent] = 0
        return own

    _, cache = plain.run(tokens, record=["z.1"], patch=spliced(autoencoder, with_error=True, edit=without))
    change = cache["z", 1] - clean["z", 1]
    torch.testing.assert_close(change[:, :, 1], -latents[1, ..., latent : latent + 1] * autoencoder.W_dec[1, latent])
    torch.testing.assert_close(change[:, :, [0, 2]], torch.zeros_like(change[:, :, [0, 2]]))


@pytest.mark.parametrize("with_error", [False, True])
def test_elsewhere_than_where_values_stay(with_error, plain, tokens):
    autoencoder = of(plain.config, Place.parse("z.1"))
    where = torch.zeros(tokens.shape, dtype=torch.bool)
    where[:, 2:] = True
    _, clean = plain.run(tokens, record=["z.1"])
    patch = spliced(autoencoder, where=where, with_error=with_error, edit=lambda place, own: 2 * own)
    _, cache = plain.run(tokens, record=["z.1"], patch=patch)
    assert torch.equal(cache["z", 1][:, :2], clean["z", 1][:, :2])
    _, everywhere = plain.run(
        tokens, record=["z.1"], patch=spliced(autoencoder, with_error=with_error, edit=lambda _, own: 2 * own)
    )
    assert torch.equal(cache["z", 1][:, 2:], everywhere["z", 1][:, 2:])


def test_the_last_layer_is_spliced_at_every_position(plain, tokens):
    """Also when logits are wanted at one position alone, which spares the others where nobody looks."""
    autoencoder = of(plain.config, *each_layer(plain.config))
    where = torch.ones(tokens.shape, dtype=torch.bool)
    everywhere, _ = plain.run(tokens, patch=spliced(autoencoder))
    last, _ = plain.run(tokens, patch=spliced(autoencoder, where=where), logits_at="last")
    torch.testing.assert_close(last, everywhere[:, -1])


def test_an_ablated_place_is_zero_or_a_mean(plain, tokens):
    places = [Place.parse("z.1.h0"), Place.parse("z.1.h2"), Place.parse("z.0.h1")]
    means = torch.arange(15.0).unflatten(0, (3, 5))
    _, clean = plain.run(tokens, record=["z.0", "z.1"])
    _, zero = plain.run(tokens, record=["z.0", "z.1"], patch=ablated(places))
    _, mean = plain.run(tokens, record=["z.0", "z.1"], patch=ablated(places, means))
    for place, value in zip(places, means, strict=True):
        assert (place.read(zero) == 0).all()
        assert (place.read(mean) == value).all()
    assert torch.equal(zero["z", 0][:, :, [0, 2]], clean["z", 0][:, :, [0, 2]])
    where = tokens > 10
    _, some = plain.run(tokens, record=["z.0"], patch=ablated(places[2:], means[2:], where))
    assert torch.equal(places[2].read(some)[~where], places[2].read(clean)[~where])
    assert (places[2].read(some)[where] == means[2]).all()


def test_gradients_reach_the_latents_and_pass_the_error_by(plain, tokens):
    """The error term is a constant: what flows back into the model flows through the latents."""
    autoencoder = of(plain.config, Place.parse("z.1"))
    decoder = autoencoder.W_dec.requires_grad_(True)
    logits, _ = plain.run(tokens, patch=spliced(autoencoder, with_error=True))
    (grad,) = torch.autograd.grad(logits.square().sum(), decoder)
    assert grad.abs().sum() > 0
