"""What an autoencoder computes, held against its equations written out row by row."""

from dataclasses import replace

import pytest
import torch

from mechinterp.errors import SAEError
from saes.base import KINDS, NORMALIZATIONS, SparseAutoencoder
from saes.places import Place, each_head
from saes.pursuit import Pursuit

PLACES = (Place.parse("z.0.h0"), Place.parse("z.1.h1"), Place.parse("z.1.h0"))
X = torch.randn(3, 2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def random_of(kind: str, **facts) -> SparseAutoencoder:
    facts |= {"k": 3} if kind in ("topk", "abstopk") else {}
    facts |= {"pursuit": Pursuit(0.2, 4)} if kind == "matching_pursuit" else {}
    autoencoder = SparseAutoencoder.random(PLACES, d_in=6, d_sae=12, kind=kind, **facts).to(dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in autoencoder.tensors.items():
        if name != "W_dec":
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return autoencoder


def by_hand(autoencoder: SparseAutoencoder, group: int, x: torch.Tensor) -> torch.Tensor:
    """The latents of one vector, from the definitions."""
    part = {name: tensor[group] for name, tensor in autoencoder.tensors.items()}
    shared = (x - part["b_dec"]) @ part["W_enc"]
    pre = shared + part["b_enc"]
    if autoencoder.kind == "relu":
        return pre.clamp(min=0)
    if autoencoder.kind == "jumprelu":
        return torch.where(pre > part["threshold"], pre, 0.0).clamp(min=0)
    if autoencoder.kind == "gated":
        return torch.where(shared + part["b_gate"] > 0, shared * part["r_mag"].exp() + part["b_enc"], 0.0).clamp(min=0)
    if autoencoder.kind in ("topk", "abstopk"):
        size = pre if autoencoder.kind == "topk" else pre.abs()
        kept = torch.where(size >= size.sort(descending=True).values[2], pre, 0.0)
        return kept.clamp(min=0) if autoencoder.kind == "topk" else kept
    residual, latents = x - part["b_dec"], torch.zeros(12, dtype=x.dtype)
    for _ in range(4):
        best = int((part["W_dec"] @ residual).argmax())
        size, was_open = (part["W_dec"][best] @ residual).clamp(min=0), bool(latents[best] != 0)
        latents[best] += size
        residual = residual - size * part["W_dec"][best]
        if was_open or size == 0 or residual.norm() < 0.2:
            break
    return latents


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_their_definition(kind):
    autoencoder = random_of(kind)
    latents = autoencoder.encode(X)
    assert (latents != 0).any(-1).all()
    for group in range(3):
        for row, found in zip(X[group].flatten(0, 1), latents[group].flatten(0, 1), strict=True):
            torch.testing.assert_close(found, by_hand(autoencoder, group, row))
    reconstruction = torch.einsum("gbpi,gid->gbpd", latents, autoencoder.W_dec) + autoencoder.b_dec[:, None, None]
    torch.testing.assert_close(autoencoder.reconstruct(X), reconstruction)
    torch.testing.assert_close(autoencoder.decode(latents), reconstruction)


@pytest.mark.parametrize("kind", ["topk", "abstopk"])
def test_at_most_k_are_active_and_they_are_the_largest(kind):
    autoencoder = random_of(kind)
    latents, pre = autoencoder.encode(X), autoencoder.pre_activations(X)
    size = pre.abs() if kind == "abstopk" else pre
    active = latents != 0
    assert (active.sum(-1) <= 3).all()
    assert torch.equal(latents[active], pre[active])
    weakest_kept = torch.where(active, size, torch.inf).amin(-1)
    strongest_lost = torch.where(active | (size <= 0), -torch.inf, size).amax(-1)
    assert (weakest_kept >= strongest_lost).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "matching_pursuit"])
def test_pre_activations_are_the_size_of_active_latents(kind):
    autoencoder = random_of(kind)
    latents, pre = autoencoder.encode(X), autoencoder.pre_activations(X)
    torch.testing.assert_close(latents[latents != 0], pre[latents != 0])
    affine = torch.einsum("gbpd,gdi->gbpi", X - autoencoder.b_dec[:, None, None], autoencoder.W_pre)
    torch.testing.assert_close(pre, affine + autoencoder.b_enc[:, None, None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_a_group_alone_computes_what_it_computes_among_others(kind, normalize):
    autoencoder = random_of(kind, normalize=normalize)
    for group, place in enumerate(PLACES):
        alone = autoencoder.group(place)
        torch.testing.assert_close(alone.encode(X[group : group + 1]), autoencoder.encode(X)[group : group + 1])
        torch.testing.assert_close(alone.reconstruct(X[group : group + 1]), autoencoder.reconstruct(X)[group : group + 1])
        assert alone.W_enc.data_ptr() == autoencoder.W_enc[group].data_ptr()
    swapped = autoencoder.group("z.1.h0", 0)
    assert swapped.places == (PLACES[2], PLACES[0])
    torch.testing.assert_close(swapped.encode(X[[2, 0]]), autoencoder.encode(X)[[2, 0]])
    assert autoencoder.group(-1).places == PLACES[-1:]


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_reconstructions_scale_as_their_inputs_under_normalization(normalize):
    """An input's norm, and for layer norm its mean, are set aside and come back."""
    autoencoder = random_of("relu", normalize=normalize)
    if normalize == "none":
        torch.testing.assert_close(autoencoder.reconstruct(X), autoencoder.decode(autoencoder.encode(X)))
        return
    torch.testing.assert_close(autoencoder.reconstruct(7 * X), 7 * autoencoder.reconstruct(X), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(autoencoder.encode(7 * X), autoencoder.encode(X), rtol=1e-4, atol=1e-4)
    if normalize == "layer_norm":
        torch.testing.assert_close(autoencoder.reconstruct(X + 3), autoencoder.reconstruct(X) + 3)


def test_rows_of_any_number_of_axes_are_encoded_alike():
    autoencoder = random_of("jumprelu")
    whole = autoencoder.encode(X)
    torch.testing.assert_close(autoencoder.encode(X.flatten(1, 2)), whole.flatten(1, 2))
    torch.testing.assert_close(autoencoder.encode(X[:, 0, 0]), whole[:, 0, 0])
    torch.testing.assert_close(autoencoder.reconstruct(X[:, 0, 0]), autoencoder.reconstruct(X)[:, 0, 0])
    torch.testing.assert_close(autoencoder.decode(whole[:, 0, 0]), autoencoder.decode(whole)[:, 0, 0])


def test_an_edit_stands_between_encoding_and_decoding():
    autoencoder = random_of("relu")
    edited = autoencoder.reconstruct(X, lambda latents: 2 * latents)
    torch.testing.assert_close(edited, autoencoder.decode(2 * autoencoder.encode(X)))


def test_a_head_starts_alike_alone_and_among_others(plain):
    together = SparseAutoencoder.random(each_head(plain.config), d_in=5, d_sae=10, seed=3)
    alone = SparseAutoencoder.random([Place.parse("z.1.h2")], d_in=5, d_sae=10, seed=3)
    assert torch.equal(together.group("z.1.h2").W_dec, alone.W_dec)
    assert not torch.equal(together.W_dec[0], together.W_dec[1])
    other = SparseAutoencoder.random([Place.parse("z.1.h2")], d_in=5, d_sae=10, seed=4)
    assert not torch.equal(other.W_dec, alone.W_dec)
    torch.testing.assert_close(alone.W_dec.norm(dim=-1), torch.ones(1, 10))
    assert torch.equal(alone.W_enc, alone.W_dec.mT)


def test_a_pursuit_stops_when_it_is_told_to():
    def active(until: Pursuit) -> torch.Tensor:
        autoencoder = SparseAutoencoder.random(PLACES, d_in=6, d_sae=12, kind="matching_pursuit", pursuit=until)
        return (autoencoder.encode(X.float()) != 0).sum(-1)

    assert (active(Pursuit(max_iterations=1)) == 1).all()
    assert (active(Pursuit(residual_threshold=100.0)) == 1).all()
    assert (active(Pursuit()) <= 6).all()
    untold = SparseAutoencoder.random(PLACES, d_in=6, d_sae=12, kind="matching_pursuit")
    assert torch.equal((untold.encode(X.float()) != 0).sum(-1), active(Pursuit()))


def test_a_pursuit_over_orthogonal_rows_takes_an_input_apart():
    axes = torch.cat([torch.eye(6), -torch.eye(6)]).expand(3, -1, -1)
    untold = SparseAutoencoder.random(PLACES, d_in=6, d_sae=12, kind="matching_pursuit", pursuit=Pursuit(0.0, 6))
    exact = replace(untold, W_dec=axes, W_enc=axes.mT)
    x = X.float()
    torch.testing.assert_close(exact.encode(x), torch.cat([x, -x], -1).relu())
    torch.testing.assert_close(exact.reconstruct(x), x)


def test_it_reads_its_places_from_a_cache(plain, tokens):
    places = each_head(plain.config)
    autoencoder = SparseAutoencoder.random(places, d_in=5, d_sae=10).to(dtype=torch.float64)
    _, cache = plain.run(tokens, record=["z"])
    read = autoencoder.read(cache)
    assert read.shape == (9, 4, 7, 5)
    assert torch.equal(read[5], cache["z", 1][:, :, 2])


def test_one_that_does_not_fit_the_model_says_why(plain):
    fits = SparseAutoencoder.random([Place.parse("z.2")], d_in=15, d_sae=4)
    fits.check_fits(plain.config)
    with pytest.raises(SAEError, match=r"reads 14 numbers a position, and 'z.2' of plain has 15. It was made for tiny"):
        SparseAutoencoder.random([Place.parse("z.2")], d_in=14, d_sae=4, about={"model": "tiny"}).check_fits(plain.config)
    with pytest.raises(SAEError, match="z.2.h7.*heads 0..2"):
        SparseAutoencoder.random([Place.parse("z.2.h7")], d_in=5, d_sae=4).check_fits(plain.config)


def test_wrong_parts_are_named():
    good = SparseAutoencoder.random(PLACES, d_in=6, d_sae=12, kind="jumprelu")
    parts = {"places": good.places, **good.tensors}
    with pytest.raises(SAEError, match="no kind of autoencoder 'softplus'.*relu"):
        SparseAutoencoder("softplus", **parts)
    with pytest.raises(SAEError, match="no normalization 'batch'"):
        SparseAutoencoder("relu", **parts, normalize="batch")
    with pytest.raises(SAEError, match="threshold is missing"):
        SparseAutoencoder("jumprelu", **(parts | {"threshold": None}))
    with pytest.raises(SAEError, match="2 places are named for 3 groups"):
        SparseAutoencoder("jumprelu", **(parts | {"places": PLACES[:2]}))
    with pytest.raises(SAEError, match="k=13 latents of 12"):
        SparseAutoencoder("topk", **parts, k=13)
    with pytest.raises(SAEError, match="k=None"):
        SparseAutoencoder("abstopk", **parts)
    with pytest.raises(SAEError, match=r"reads \[3, ..., 6\].*\[3, 2, 5\]"):
        good.encode(torch.zeros(3, 2, 5))
    with pytest.raises(SAEError, match=r"'z.1.h2'; they stand at z.0.h0.*Did you mean"):
        good.index("z.1.h2")
