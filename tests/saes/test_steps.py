"""One training step: gradients along the sphere and clipped, group by group, and what is exported in the end."""

import pytest
import torch
from torch.testing import assert_close

from saes.objectives import OBJECTIVES
from saes.places import Place
from saes.settings import ARCHITECTURES, TrainSettings
from saes.steps import fill_gradients, renormalize, start_parameters, trained

PLACES = tuple(map(Place.parse, ("z.0.h0", "z.0.h1", "z.2.h1")))
X = torch.randn(3, 40, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.5, 2.0, 4.0]).view(3, 1, 1) + 0.3


def started(settings: TrainSettings, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Start parameters with every bias moved, in double precision if asked."""
    generator = torch.Generator().manual_seed(1)
    p = start_parameters(PLACES, X.mean(1), settings)
    for name, tensor in p.items():
        if name != "W_dec":
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
        elif settings.decoder == "free":
            tensor *= 0.5 + torch.rand(*tensor.shape[:2], 1, generator=generator)
    p = {name: tensor.to(dtype) for name, tensor in p.items()}
    if settings.decoder == "unit":
        renormalize(p["W_dec"])
    return p


def gradients_of(settings: TrainSettings, p: dict[str, torch.Tensor], x: torch.Tensor = X) -> dict[str, torch.Tensor]:
    gradients = {name: torch.zeros_like(tensor) for name, tensor in p.items()}
    with torch.no_grad():
        fill_gradients(p, gradients, x.to(p["b_dec"].dtype), settings, 0.5, torch.zeros_like(p["b_enc"]))
    return gradients


def test_training_starts_with_unit_rows_their_transpose_and_the_mean():
    for name in ARCHITECTURES:
        p = start_parameters(PLACES, X.mean(1), TrainSettings(name, d_sae=16, k=2))
        assert_close(p["W_dec"].norm(dim=-1), torch.ones(3, 16))
        smaller = 2 * 6 / 16 if name in ("relu", "gated") else 1.0
        assert_close(p["W_enc"], smaller * p["W_dec"].mT)
        assert torch.equal(p["b_dec"], X.mean(1))
        assert p["W_enc"].data_ptr() != p["W_dec"].data_ptr()


def test_a_place_starts_alike_alone_and_among_others():
    settings = TrainSettings("topk", d_sae=16, k=2)
    together, alone = start_parameters(PLACES, X.mean(1), settings), start_parameters(PLACES[1:2], X[1:2].mean(1), settings)
    assert all(torch.equal(together[name][1:2], alone[name]) for name in alone)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_unit_rows_are_orthogonal_to_them(architecture):
    settings = TrainSettings(architecture, d_sae=16, k=3, clip=None)
    p = started(settings, torch.float64)
    found = gradients_of(settings, p)["W_dec"]
    assert found.abs().max() > 0.01
    assert_close((found * p["W_dec"]).sum(-1), torch.zeros(3, 16, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_group_is_clipped_by_its_own_norm(architecture):
    settings = TrainSettings(architecture, d_sae=16, k=3, clip=None)
    p = started(settings, torch.float64)
    whole = gradients_of(settings, p)
    norms = torch.stack([slopes.flatten(1).square().sum(1) for slopes in whole.values()]).sum(0).sqrt()
    bound = float(norms.median())
    clipped = gradients_of(TrainSettings(architecture, d_sae=16, k=3, clip=bound), p)
    for name, slopes in clipped.items():
        for group in range(3):
            assert_close(slopes[group], whole[name][group] * min(1.0, bound / float(norms[group])))


def test_rows_have_norm_one_again_and_zero_rows_no_nan():
    W_dec = 3 * torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    W_dec[1, 2] = 0.0
    expected = torch.nn.functional.normalize(W_dec, dim=-1)
    renormalize(W_dec)
    assert_close(W_dec, expected)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_gradients_are_near_and_stay_in_single_precision(architecture, precision):
    settings = TrainSettings(architecture, d_sae=16, k=16, clip=None, precision=precision, bandwidth=0.5)
    exact = gradients_of(TrainSettings(architecture, d_sae=16, k=16, clip=None, bandwidth=0.5), started(settings))
    found = gradients_of(settings, started(settings))
    for name, slopes in found.items():
        assert slopes.dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(slopes.flatten(1), exact[name].flatten(1))
        assert (cosine > 0.97).all(), name


@pytest.mark.parametrize(
    ("architecture", "decoder"),
    [*((name, "unit") for name in ARCHITECTURES), ("relu", "free"), ("gated", "free"), ("jumprelu", "free")],
)
def test_what_is_exported_takes_unscaled_inputs(architecture, decoder):
    settings = TrainSettings(architecture, d_sae=16, k=3, decoder=decoder)
    p, scale = started(settings, torch.float64), torch.tensor([4.0, 1.0, 0.3], dtype=torch.float64)
    scaled = X.double() * scale.view(3, 1, 1)
    loss = OBJECTIVES[architecture](p, scaled, settings, 0.0)
    lowest = loss.latents.masked_fill(loss.latents <= 0, torch.inf).amin((1, 2)) * (1 - 1e-9)
    autoencoder = trained(PLACES, p, settings, scale, lowest, {"model": "toy"})
    assert_close(autoencoder.reconstruct(X.double()) * scale.view(3, 1, 1), scaled - loss.residual)
    assert_close(autoencoder.W_dec.norm(dim=-1), torch.ones(3, 16, dtype=torch.float64), atol=1e-6, rtol=0)
    sizes = loss.latents * p["W_dec"].norm(dim=-1).unsqueeze(1) if decoder == "free" else loss.latents
    assert_close(autoencoder.encode(X.double()) * scale.view(3, 1, 1), sizes)
    assert autoencoder.about == {"model": "toy"}
    assert not any(tensor.requires_grad for tensor in autoencoder.tensors.values())


def test_a_free_row_that_has_vanished_is_exported_without_nan():
    settings = TrainSettings("relu", d_sae=16, decoder="free")
    p = started(settings)
    p["W_dec"][1, 3] = 0.0
    autoencoder = trained(PLACES, p, settings, torch.ones(3), torch.ones(3), {})
    assert all(bool(tensor.isfinite().all()) for tensor in autoencoder.tensors.values())
