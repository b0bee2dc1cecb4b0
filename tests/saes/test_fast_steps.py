"""Gradients written by hand against autograd through the objectives, whatever the blocks, in double precision."""

import pytest
import torch
from torch.testing import assert_close

import saes.fast_steps
import saes.sparse
import saes.steps
from saes.fast_steps import FAST_STEPS, Outcome
from saes.settings import TrainSettings
from saes.steps import autograd_step, fill_gradients

SIZES = {"group": 5, "row": 150, "d_in": 6, "d_sae": 12}


def batch(kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random parameters with unit rows, and a batch that is ordinary, partly zero, or opens no latent."""
    generator = torch.Generator().manual_seed(0)
    group, row, d_in, d_sae = SIZES.values()
    shapes = {"W_enc": (group, d_in, d_sae), "b_enc": (group, d_sae), "W_dec": (group, d_sae, d_in), "b_dec": (group, d_in)}
    p = {name: 0.5 * torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}
    p["W_dec"] = p["W_dec"] / p["W_dec"].norm(dim=-1, keepdim=True)
    x = torch.randn(group, row, d_in, dtype=torch.float64, generator=generator)
    if kind == "some rows are zero":
        x[:, ::3] = 0.0
    if kind == "few latents are positive":
        p["b_enc"] -= 1.5
    if kind == "nothing fires":
        p["b_enc"] -= 100.0
    if kind == "nothing fires in one group":
        p["b_enc"][2] -= 100.0
    return p, x


def both(architecture: str, kind: str, k: int) -> list[tuple[Outcome, dict[str, torch.Tensor]]]:
    """By hand and by autograd, each into gradients that hold garbage."""
    p, x = batch(kind)
    settings, found = TrainSettings(architecture, d_sae=SIZES["d_sae"], k=k), []
    for step in (FAST_STEPS[architecture], autograd_step):
        gradients = {name: torch.full_like(tensor, torch.nan) for name, tensor in p.items()}
        with torch.no_grad():
            found.append((step(p, gradients, x, settings, 0.3), gradients))
    return found


KINDS = ("ordinary", "some rows are zero", "few latents are positive", "nothing fires", "nothing fires in one group")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3, 12])
@pytest.mark.parametrize("architecture", FAST_STEPS)
@pytest.mark.parametrize("hidden_bytes", [saes.sparse.HIDDEN_BYTES, 1])
def test_by_hand_equals_autograd(monkeypatch, architecture, kind, k, hidden_bytes):
    monkeypatch.setattr(saes.sparse, "HIDDEN_BYTES", hidden_bytes)  # 64 rows at a time, the last 22
    (by_hand, gradients), (by_autograd, expected) = both(architecture, kind, k)
    assert_close(gradients, expected, atol=1e-12, rtol=1e-12)
    for name in ("error", "penalty", "fired", "residual"):
        assert_close(getattr(by_hand, name), getattr(by_autograd, name), atol=1e-12, rtol=1e-12)
    if architecture == "batchtopk":
        assert by_hand.lowest is not None
        assert by_autograd.lowest is not None
        assert_close(by_hand.lowest, by_autograd.lowest, atol=1e-12, rtol=1e-12)
    if kind == "nothing fires":
        assert bool((by_hand.fired == 0).all())
        assert bool((gradients["W_dec"] == 0).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("few", [-1.0, 1.0])
def test_relu_is_the_same_by_dense_and_by_sparse_products(monkeypatch, kind, few):
    monkeypatch.setattr(saes.fast_steps, "_FEW", few)
    (by_hand, gradients), (by_autograd, expected) = both("relu", kind, 1)
    assert_close(gradients, expected, atol=1e-12, rtol=1e-12)
    for name in ("error", "penalty", "fired", "residual"):
        assert_close(getattr(by_hand, name), getattr(by_autograd, name), atol=1e-12, rtol=1e-12)


def test_the_largest_are_found_among_equals_and_in_long_rows():
    pre = torch.randint(5, (2, 7, 40), generator=torch.Generator().manual_seed(0)).double()
    for rows in (pre, torch.rand_like(pre), torch.rand(1, 3, saes.sparse._SHORT + 1)):
        values, places = saes.sparse._largest(rows, 6)
        assert torch.equal(values, rows.gather(-1, places))
        assert torch.equal(values.sort(-1).values, rows.topk(6).values.sort(-1).values)


@pytest.mark.parametrize("architecture", [*FAST_STEPS, "matryoshka", "jumprelu", "gated"])
def test_chunks_of_groups_are_the_groups(monkeypatch, architecture):
    p, x = batch("ordinary")
    settings = TrainSettings(architecture, d_sae=12, k=3, clip=0.01, revive="aux", dead_after=5)
    own = {"gated": ("b_gate", "r_mag"), "jumprelu": ("log_threshold",)}.get(architecture, ())
    p |= {name: torch.randn_like(p["b_enc"]) for name in own}
    idle = torch.randint(10, p["b_enc"].shape).double()
    found = []
    for hidden_bytes in (1 << 30, 2 * 150 * 12 * 8, 1):  # all five at once, two at a time, one at a time
        monkeypatch.setattr(saes.steps, "HIDDEN_BYTES", hidden_bytes)
        monkeypatch.setattr(saes.sparse, "HIDDEN_BYTES", hidden_bytes)
        gradients = {name: torch.full_like(tensor, torch.nan) for name, tensor in p.items()}
        with torch.no_grad():
            outcome = fill_gradients(p, gradients, x, settings, 0.3, idle)
        found.append((gradients, vars(outcome) if outcome.lowest is not None else vars(outcome) | {"lowest": x.new_zeros(1)}))
    for others in found[1:]:
        assert_close(others, found[0], atol=1e-13, rtol=1e-12)


def test_single_precision_is_as_exact_as_it_can_be():
    p, x = ({name: tensor.float() for name, tensor in batch("ordinary")[0].items()}, batch("ordinary")[1].float())
    for architecture, step in FAST_STEPS.items():
        settings, found = TrainSettings(architecture, d_sae=12, k=3), []
        for some, data in ((p, x), ({name: tensor.double() for name, tensor in p.items()}, x.double())):
            gradients = {name: torch.empty_like(tensor) for name, tensor in some.items()}
            with torch.no_grad():
                step(some, gradients, data, settings, 0.3)
            found.append({name: tensor.double() for name, tensor in gradients.items()})
        assert_close(found[0], found[1], atol=2e-6, rtol=1e-5)
