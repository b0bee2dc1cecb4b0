"""Discrete codes: known clusters get codes of their own, and scale, place and order change nothing."""

import numpy as np
import pytest
import torch

from mechinterp.errors import SAEError
from saes.codes import CodeSettings, assign_codes, stratified
from saes.places import Place

PLACES = tuple(map(Place.parse, ("z.0.h0", "z.0.h1", "z.1.h0")))
TRAINING = torch.arange(0, 60, 4)


def clusters(n: int = 60, d_in: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of three parts: each example belongs to one of three well-separated clusters, the same in every part."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.arange(n) % 3
    centres = torch.eye(d_in)[:3] - 1 / 3
    rows = centres[which].unsqueeze(1) + 0.05 * torch.randn(n, 3, d_in, generator=generator)
    return rows, which


def are_told_apart(codes: np.ndarray, which: torch.Tensor) -> bool:
    """No code stands for two clusters (a cluster may have several codes)."""
    pairs = set(zip(codes.tolist(), which.tolist(), strict=True))
    return len(pairs) == len(set(codes.tolist())) >= 3


def test_clusters_are_told_apart():
    rows, which = clusters()
    found = assign_codes(rows, PLACES, TRAINING)
    assert all(are_told_apart(found.values[:, part], which) for part in range(3))
    assert found.silent.max() == 0
    np.testing.assert_allclose(found.l0, 1)


def test_codes_depend_neither_on_scale_nor_on_where_the_mean_lies():
    rows, _ = clusters()
    scale, shift = torch.tensor([1.0, 100.0, 1e-3])[:, None], torch.tensor([0.0, 50.0, 1e-3])[:, None]
    plain, changed = assign_codes(rows, PLACES, TRAINING), assign_codes(rows * scale + shift, PLACES, TRAINING)
    assert np.array_equal(plain.values, changed.values)


@pytest.mark.parametrize(
    "settings", [CodeSettings(), CodeSettings(architecture="relu", sparsity=0.1), CodeSettings(trained=False)]
)
def test_the_autoencoder_reads_rows_as_they_are(settings):
    rows, _ = clusters()
    rows = rows * torch.tensor([1.0, 100.0, 1e-3])[:, None]
    found = assign_codes(rows, PLACES, TRAINING, settings)
    strongest = found.autoencoder.encode(rows.transpose(0, 1)).argmax(-1).T.numpy()
    loud = found.latents[..., 0] < found.autoencoder.d_sae
    assert np.array_equal(strongest[loud], found.latents[..., 0][loud])
    assert [str(place) for place in found.autoencoder.places] == ["z.0.h0", "z.0.h1", "z.1.h0"]


def test_the_autoencoder_rebuilds_what_it_was_trained_on():
    rows, _ = clusters()
    rows = 10 * rows + 3
    rebuilt = assign_codes(rows, PLACES, TRAINING).autoencoder.reconstruct(rows.transpose(0, 1)).transpose(0, 1)
    explained = 1 - (rows - rebuilt).square().sum((0, 2)) / (rows - rows.mean(0)).square().sum((0, 2))
    assert explained.min() > 0.8


def test_a_part_that_never_changes_has_one_code():
    rows, which = clusters()
    rows[:, 1] = 7.0
    rows[:, 1] += 1e-6 * torch.randn(60, 6, generator=torch.Generator().manual_seed(1))  # rounding is no signal
    found = assign_codes(rows, PLACES, TRAINING)
    assert len(np.unique(found.values[:, 1])) == 1
    assert found.silent.tolist() == [0, 1, 0]
    assert are_told_apart(found.values[:, 2], which)


def test_sets_of_latents_are_codes_whatever_their_order():
    rows, _ = clusters()
    found = assign_codes(rows, PLACES, TRAINING, CodeSettings(k=2))
    assert found.latents.shape == (60, 3, 2)
    assert (np.diff(found.latents, axis=-1) >= 0).all()
    for part in range(3):
        sets = {tuple(row): value for row, value in zip(found.latents[:, part].tolist(), found.values[:, part], strict=True)}
        assert len(sets) == len(set(sets.values())) == found.values[:, part].max() + 1


def test_the_seed_decides():
    rows = torch.randn(60, 3, 6, generator=torch.Generator().manual_seed(2))
    one, same, other = (assign_codes(rows, PLACES, TRAINING, CodeSettings(seed=seed)).latents for seed in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_half_of_the_training_examples_are_positive():
    positive, negative = stratified(5, 20, 20, seed=0)
    assert (len(positive), len(negative)) == (3, 2)
    assert set(negative) < set(positive)  # of the same pairs, so that more pairs are left to count
    assert stratified(5, 20, 20, seed=0) == (positive, negative)


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ((4, 0), r"no negative examples.*give examples of both"),
        ((0, 4), r"no positive examples"),
        ((6, 6), r"6 positive examples cannot train on 5 \(n_train=10\).*Give 7 or more"),
        ((1, 1), r"1 positive examples cannot train"),
    ],
)
def test_too_few_examples_are_refused(sides, message):
    with pytest.raises(SAEError, match=message):
        stratified(10, *sides, seed=0)


def test_wrong_input_is_told():
    rows, _ = clusters()
    with pytest.raises(SAEError, match="no part writes anything different"):
        assign_codes(torch.ones(60, 3, 6), PLACES, TRAINING)
    with pytest.raises(SAEError, match="not finite"):
        assign_codes(rows.index_fill(0, torch.tensor([3]), float("nan")), PLACES, TRAINING)
    for settings, message in (
        ({"n_train": 1}, "at least 2"),
        ({"k": 0}, "1 <= k <= d_sae"),
        ({"k": 17}, "1 <= k <= d_sae"),
        ({"steps": 0}, "trained=False"),
    ):
        with pytest.raises(SAEError, match=message):
            CodeSettings(**settings)
