"""Reconstruction and sparsity: what must hold of perfect and of useless autoencoders, and of any division into windows."""

import numpy as np
import pytest
import torch

from mechinterp.errors import SAEError
from saes.base import SparseAutoencoder
from saes.metrics import cosines, mean_activation, reconstruction
from saes.places import Place

PLACES = (Place.parse("z.0.h0"), Place.parse("z.1.h2"))


def identity(places, d_in):
    """Every input as itself: latents for each coordinate and its negative."""
    both = torch.cat([torch.eye(d_in), -torch.eye(d_in)], 1).double().repeat(len(places), 1, 1)
    zeros = torch.zeros(len(places), d_in, dtype=torch.float64)
    return SparseAutoencoder("relu", tuple(places), both, zeros.repeat(1, 2), both.mT.contiguous(), zeros)


@pytest.fixture
def rows():
    return torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3


@pytest.fixture
def autoencoder():
    return SparseAutoencoder.random(PLACES, d_in=6, d_sae=16, kind="relu").to(dtype=torch.float64)


def test_a_perfect_autoencoder_explains_everything(rows):
    found = reconstruction(identity(PLACES, 6), [rows])
    for ones in (found.explained_variance, found.explained_variance_legacy, found.cosine, found.l2_ratio, found.relative_bias):
        assert ones == pytest.approx([1, 1])
    assert found.mse == pytest.approx([0, 0])
    assert found.l0 == pytest.approx([6, 6])
    assert found.l1 == pytest.approx(rows.abs().sum(-1).mean(-1).numpy())
    assert found.n_rows == 50


def test_an_autoencoder_that_answers_with_the_mean_explains_nothing(rows):
    perfect, mean = identity(PLACES, 6), rows.mean(1)
    silent = SparseAutoencoder("relu", PLACES, 0 * perfect.W_enc, perfect.b_enc, perfect.W_dec, mean)
    found = reconstruction(silent, [rows])
    assert found.explained_variance == pytest.approx([0, 0])
    assert found.explained_variance_legacy == pytest.approx([0, 0])
    assert found.mse == pytest.approx((rows - mean.unsqueeze(1)).square().sum(-1).mean(-1).numpy())
    assert found.dead_share == pytest.approx([1, 1])
    assert found.l0 == pytest.approx([0, 0])


@pytest.mark.parametrize("sizes", [[50], [1, 49], [7] * 7 + [1], [20, 0, 30]])
def test_windows_change_nothing(rows, autoencoder, sizes):
    whole, parts = (reconstruction(autoencoder, windows) for windows in ([rows], rows.split(sizes, 1)))
    for name in ("mse", "explained_variance", "explained_variance_legacy", "cosine", "l2_ratio", "relative_bias", "l0", "l1"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-12)
    np.testing.assert_array_equal(parts.density, whole.density)


def test_few_latents_at_a_time_change_nothing(rows, autoencoder, monkeypatch):
    whole = reconstruction(autoencoder, [rows])
    monkeypatch.setattr("saes.metrics._NUMBERS", 3 * autoencoder.d_sae)
    parts = reconstruction(autoencoder, [rows])
    np.testing.assert_allclose(parts.explained_variance, whole.explained_variance, rtol=1e-12)
    np.testing.assert_array_equal(parts.density, whole.density)


def test_each_group_is_measured_as_if_alone(rows, autoencoder):
    together = reconstruction(autoencoder, [rows])
    for group in range(2):
        alone = reconstruction(autoencoder.group(group), [rows[group : group + 1]])
        assert alone.explained_variance[0] == pytest.approx(together.explained_variance[group])
        np.testing.assert_array_equal(alone.density[0], together.density[group])


def test_correct_and_legacy_explained_variance_by_hand():
    """Rows 0, 2, 10 of mean 4, rebuilt as 1, 2, 7: errors 1, 0, 9; variances 16, 4, 36."""
    place = PLACES[:1]
    # One latent that is half of max(x - 0, 0), with b_dec 1: 1, 2, 6; a second, active from 6 on, adds (x - 6) / 4: 1, 2, 7.
    W_enc = torch.tensor([[[0.5, 0.25]]], dtype=torch.float64)
    b_enc = torch.tensor([[0.5, 0.25 - 1.5]], dtype=torch.float64)  # x - b_dec = x - 1 is encoded
    W_dec, b_dec = torch.ones(1, 2, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    autoencoder = SparseAutoencoder("relu", place, W_enc, b_enc, W_dec, b_dec)
    found = reconstruction(autoencoder, [torch.tensor([[[0.0], [2.0], [10.0]]], dtype=torch.float64)])
    assert found.mse[0] == pytest.approx(10 / 3)
    assert found.explained_variance[0] == pytest.approx(1 - 10 / 56)
    assert found.explained_variance_legacy[0] == pytest.approx(1 - (1 / 16 + 0 + 9 / 36) / 3)
    assert found.l2_ratio[0] == pytest.approx((2 / 2 + 7 / 10) / 2)  # the row that is 0 has no ratio
    assert found.relative_bias[0] == pytest.approx((1 + 4 + 49) / (0 + 4 + 70))
    assert found.cosine[0] == pytest.approx(2 / 3)
    assert found.density[0] == pytest.approx([2 / 3, 1 / 3])
    assert found.l0[0] == pytest.approx(1)
    assert found.l1[0] == pytest.approx((0 + 1 + 6) / 3)
    assert (found.dead_share[0], found.denser_than(0.5)[0], found.denser_than(0.1)[0]) == (0, 0.5, 1)


def test_reconstructions_at_half_their_size_show_as_bias(rows):
    half = identity(PLACES, 6)
    half = SparseAutoencoder("relu", PLACES, half.W_enc, half.b_enc, half.W_dec / 2, half.b_dec)
    found = reconstruction(half, [rows])
    assert found.relative_bias == pytest.approx([0.5, 0.5])
    assert found.l2_ratio == pytest.approx([0.5, 0.5])
    assert found.cosine == pytest.approx([1, 1])


def test_a_large_mean_in_float32_costs_no_precision():
    rows = torch.randn(1, 4000, 3, generator=torch.Generator().manual_seed(0)) + 4000
    perfect = identity(PLACES[:1], 3).to(dtype=torch.float32)
    noisy = SparseAutoencoder("relu", PLACES[:1], perfect.W_enc, perfect.b_enc, perfect.W_dec, torch.ones(1, 3))
    found = reconstruction(noisy, rows.split(100, 1))
    x, y = rows[0].double(), noisy.reconstruct(rows)[0].double()
    assert found.explained_variance[0] == pytest.approx(1 - float((x - y).square().sum() / (x - x.mean(0)).square().sum()))


def test_signed_latents_count_as_active():
    autoencoder = SparseAutoencoder.random(PLACES[:1], d_in=4, d_sae=8, kind="abstopk", k=3)
    found = reconstruction(autoencoder, [torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(0))])
    assert found.l0[0] == pytest.approx(3)


def test_activations_that_do_not_vary_have_no_explained_variance(autoencoder):
    found = reconstruction(autoencoder, [torch.ones(2, 5, 6, dtype=torch.float64)])
    assert np.isnan(found.explained_variance).all()
    assert np.isnan(found.explained_variance_legacy).all()


def test_cosines_of_a_fresh_and_of_a_doubled_dictionary():
    fresh = SparseAutoencoder.random(PLACES, d_in=6, d_sae=16)
    found = cosines(fresh)
    assert found.encoder_decoder == pytest.approx([1, 1])
    both = fresh.W_dec @ fresh.W_dec.mT - 2 * torch.eye(16)
    assert found.nearest_decoder == pytest.approx(both.amax(-1).mean(-1).numpy(), abs=1e-6)
    assert found.nearest_encoder == pytest.approx(found.nearest_decoder, abs=1e-6)
    assert cosines(identity(PLACES, 6)).nearest_decoder == pytest.approx([0, 0])
    assert np.isnan(cosines(SparseAutoencoder.random(PLACES, d_in=6, d_sae=1)).nearest_decoder).all()


def test_the_nearest_is_found_a_few_rows_at_a_time(monkeypatch):
    fresh = SparseAutoencoder.random(PLACES, d_in=6, d_sae=16)
    whole = cosines(fresh)
    monkeypatch.setattr("saes.metrics._NUMBERS", 5 * 16)
    assert cosines(fresh).nearest_decoder == pytest.approx(whole.nearest_decoder)


def test_what_cannot_be_measured_is_said(rows, autoencoder):
    bad = rows.clone()
    bad[1, 30, 2] = torch.inf
    with pytest.raises(SAEError, match=r"row 30 at 'z.1.h2' is not finite"):
        reconstruction(autoencoder, bad.split(20, 1))
    with pytest.raises(SAEError, match=r"shape \[1, 50, 6\]; with 2 places it is \[2, row, d_in\]"):
        mean_activation(PLACES, [rows[:1]])
    with pytest.raises(SAEError, match="passed over once"):
        reconstruction(autoencoder, iter([rows]))
    with pytest.raises(SAEError, match="no rows"):
        reconstruction(autoencoder, [])
    with pytest.raises(SAEError, match="no rows"):
        reconstruction(autoencoder, [], mean=torch.zeros(2, 6))
    anew = reconstruction(autoencoder, lambda: iter([rows]))
    assert anew.mse == pytest.approx(reconstruction(autoencoder, [rows]).mse)
    once = reconstruction(autoencoder, iter([rows]), mean=rows.mean(1))
    assert once.mse == pytest.approx(reconstruction(autoencoder, [rows]).mse)
