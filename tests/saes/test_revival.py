"""Latents that never fire: what they learn from the residual, and where they start anew."""

import pytest
import torch
from torch.testing import assert_close

from saes.places import Place
from saes.revival import add_auxiliary, resample, resamples_at
from saes.settings import TrainSettings

PLACES = tuple(map(Place.parse, ("z.0.h0", "z.0.h1")))
N, D, M = 20, 6, 9


def drawn(*own: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Parameters, inputs, residuals, and which latents are dead: three of the first group, none of the second."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (2, D, M), "b_enc": (2, M), "W_dec": (2, M, D), "b_dec": (2, D), **dict.fromkeys(own, (2, M))}
    p = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    x, residual = (torch.randn(2, N, D, generator=generator, dtype=torch.float64) for _ in range(2))
    dead = torch.zeros(2, M, dtype=torch.bool)
    dead[0, [1, 4, 8]] = True
    return p, x, residual, dead


@pytest.mark.parametrize("n_dead", [3, 7])
def test_the_auxiliary_is_the_residual_explained_by_the_largest_dead_latents(n_dead):
    p, x, residual, dead = drawn()
    dead[0, :7] = n_dead == 7
    gradients = {name: torch.zeros_like(tensor) for name, tensor in p.items()}
    add_auxiliary(p, gradients, x, residual, dead, 0.25)
    leaves = {name: p[name].clone().requires_grad_() for name in ("W_enc", "b_enc", "W_dec")}
    latents = (x - p["b_dec"].unsqueeze(1)) @ leaves["W_enc"] + leaves["b_enc"].unsqueeze(1)
    latents = latents.masked_fill(~dead.unsqueeze(1), -torch.inf)
    largest = latents >= latents.topk(min(3, int(dead[0].sum())), dim=-1).values[..., -1:]  # d_in / 2
    missed = residual - (latents.clamp(min=0) * largest) @ leaves["W_dec"]
    expected = torch.autograd.grad(0.25 * missed[0].square().sum(-1).mean(), list(leaves.values()))
    for name, slopes in zip(leaves, expected, strict=True):
        assert_close(gradients[name], slopes)
        assert bool((gradients[name][1] == 0).all()), "the other group has no dead latents"
    assert bool((gradients["b_dec"] == 0).all())


def test_resampling_happens_as_often_as_asked_within_the_first_half():
    for n_steps, times in ((80, 4), (83, 4), (1000, 1), (7, 3)):
        settings = TrainSettings("relu", n_rows=n_steps, batch_size=1, resamplings=times)
        at = [step for step in range(n_steps) if resamples_at(step, settings)]
        assert len(at) == times
        assert at[-1] < n_steps / 2
    assert [step for step in range(80) if resamples_at(step, TrainSettings("relu", n_rows=80, batch_size=1))] == [9, 19, 29, 39]
    for off in (TrainSettings("relu", resamplings=0), TrainSettings("relu", revive="none"), TrainSettings("topk")):
        assert not any(resamples_at(step, off) for step in range(off.n_steps))


def test_dead_latents_start_at_inputs_and_nothing_else_changes():
    p, x, residual, dead = drawn("b_gate", "r_mag", "log_threshold")
    moments = {name: [torch.ones_like(tensor), torch.ones_like(tensor)] for name, tensor in p.items()}
    before = {name: tensor.clone() for name, tensor in p.items()}
    settings = TrainSettings("gated", threshold=0.2)
    revived = resample(p, moments, x, residual, dead, PLACES, settings, step=3)
    assert torch.equal(revived, dead)
    for name, tensor in p.items():
        columns, old = (value.mT if name == "W_enc" else value for value in (tensor, before[name]))
        assert torch.equal(columns[~dead], old[~dead]) if name != "b_dec" else torch.equal(tensor, old)
        for moment in moments[name]:
            kept = moment.mT if name == "W_enc" else moment
            assert (
                bool((kept == 1).all())
                if name == "b_dec"
                else torch.equal(kept.flatten(2).any(2) if kept.dim() > 2 else kept > 0, ~dead)
            )
    towards = torch.nn.functional.normalize(x[0] - p["b_dec"][0], dim=-1)
    rows = p["W_dec"][0, dead[0]]
    assert_close((rows @ towards.T).amax(-1), torch.ones(3, dtype=torch.float64))
    size = 0.2 * before["W_enc"][0][:, ~dead[0]].norm(dim=0).mean()
    assert_close(p["W_enc"][0][:, dead[0]], size * rows.T)
    assert bool((p["b_enc"][dead] == 0).all())
    assert bool((p["b_gate"][dead] == 0).all())
    assert bool((p["r_mag"][dead] == 0).all())
    assert_close(p["log_threshold"][dead].exp(), torch.full((3,), 0.2, dtype=torch.float64))


def test_rows_that_are_explained_worst_are_drawn_and_none_twice():
    """Twins would have equal gradients and stay twins."""
    p, x, residual, dead = drawn()
    residual[0] *= 1e-3
    residual[0, [2, 5]] *= 1e4
    resample(p, {}, x, residual, dead, PLACES, TrainSettings("relu"), step=3)
    cosines = p["W_dec"][0, dead[0]] @ torch.nn.functional.normalize(x[0] - p["b_dec"][0], dim=-1).T
    chosen = cosines.argmax(-1).tolist()
    assert {2, 5} < set(chosen)
    assert len(set(chosen)) == 3


def test_with_more_dead_latents_than_rows_some_stay_dead():
    p, x, residual, dead = drawn()
    dead[:] = True
    revived = resample(p, {}, x[:, :4], residual[:, :4], dead, PLACES, TrainSettings("relu"), step=3)
    assert revived.sum(1).tolist() == [4, 4]
    assert all(bool(tensor.isfinite().all()) for tensor in p.values())


def test_a_place_draws_the_same_rows_alone_and_among_others():
    (together, x, residual, dead), (alone, *_) = drawn(), drawn()
    dead[1] = dead[0].flip(0)
    alone = {name: tensor[1:] for name, tensor in alone.items()}
    resample(together, {}, x, residual, dead, PLACES, TrainSettings("relu"), step=3)
    resample(alone, {}, x[1:], residual[1:], dead[1:], PLACES[1:], TrainSettings("relu"), step=3)
    assert all(torch.equal(together[name][1:], alone[name]) for name in alone)
    other = {name: tensor[1:].clone() for name, tensor in drawn()[0].items()}
    resample(other, {}, x[1:], residual[1:], dead[1:], PLACES[1:], TrainSettings("relu"), step=4)
    assert not torch.equal(other["W_dec"], alone["W_dec"])
