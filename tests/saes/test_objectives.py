"""What each architecture minimises: the papers' formulas by hand, and dictionaries that are known, found again."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from saes.activations import of_rows
from saes.objectives import OBJECTIVES, Loss
from saes.settings import TrainSettings
from saes.trainer import train

G = torch.Generator().manual_seed(0)
X = torch.randn(2, 11, 5, dtype=torch.float64, generator=G)


def parameters(architecture: str, d_sae: int = 8, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random, with unit decoder rows and gradients asked for."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (2, 5, d_sae), "b_enc": (2, d_sae), "W_dec": (2, d_sae, 5), "b_dec": (2, 5)}
    shapes |= dict.fromkeys({"gated": ("b_gate", "r_mag"), "jumprelu": ("log_threshold",)}.get(architecture, ()), (2, d_sae))
    p = {name: 0.5 * torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}
    p["W_dec"] = p["W_dec"] / p["W_dec"].norm(dim=-1, keepdim=True)
    return {name: tensor.requires_grad_() for name, tensor in p.items()}


def slopes(loss: torch.Tensor, p: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(p, torch.autograd.grad(loss.sum(), list(p.values())), strict=True))


def loss_of(architecture: str, p: dict[str, torch.Tensor], weight: float = 0.7, x: torch.Tensor = X, **facts) -> Loss:
    return OBJECTIVES[architecture](p, x, TrainSettings(architecture, **({"d_sae": 8, "k": 3} | facts)), weight)


def pre(p: dict[str, torch.Tensor], group: int, row: int) -> torch.Tensor:
    return (X[group, row] - p["b_dec"][group]) @ p["W_enc"][group] + p["b_enc"][group]


@pytest.mark.parametrize("architecture", OBJECTIVES)
def test_the_error_is_that_of_the_latents_decoded_and_groups_share_nothing(architecture):
    p = parameters(architecture)
    loss = loss_of(architecture, p)
    residual = X - torch.einsum("grm, gmd -> grd", loss.latents, p["W_dec"]) - p["b_dec"].unsqueeze(1)
    assert_close(loss.residual, residual)
    if architecture != "matryoshka":
        assert_close(loss.error, residual.square().sum(-1).mean(-1))
    for group in range(2):
        alone = loss_of(architecture, {name: tensor[group : group + 1] for name, tensor in p.items()}, x=X[group : group + 1])
        assert_close(alone.total, loss.total[group : group + 1])
    of_first = slopes(loss.total[0], p)
    assert all(bool((slope[1] == 0).all()) for slope in of_first.values())


@pytest.mark.parametrize("decoder", ["unit", "free"])
def test_relu_and_gated_pay_for_the_size_of_latents_in_the_input(decoder):
    p = {name: tensor.detach() for name, tensor in parameters("gated").items()}
    p["W_dec"] = p["W_dec"] * 3
    norms = 3.0 if decoder == "free" else 1.0
    for architecture in ("relu", "gated"):
        paid, nothing = (loss_of(architecture, p, weight, decoder=decoder).penalty for weight in (0.7, 0.0))
        expected = [
            sum(
                (pre(p, group, row) + (p["b_gate"] - p["b_enc"])[group] * (architecture == "gated")).clamp(min=0).sum()
                for row in range(11)
            )
            / 11
            for group in range(2)
        ]
        assert_close(paid - nothing, 0.7 * norms * torch.stack(expected))


@pytest.mark.parametrize("architecture", ["relu", "gated", "jumprelu"])
def test_with_a_free_decoder_only_the_product_of_latent_and_row_counts(architecture):
    p = {name: tensor.detach() for name, tensor in parameters(architecture).items()}
    factor = torch.rand(2, 8, dtype=torch.float64, generator=G) + 0.5
    scaled = p | {"W_enc": p["W_enc"] * factor.unsqueeze(1), "W_dec": p["W_dec"] / factor.unsqueeze(2)}
    scaled |= {name: p[name] * factor for name in ("b_enc", "b_gate") if name in p}
    if architecture == "jumprelu":
        scaled["log_threshold"] = p["log_threshold"] + factor.log()
    ours, theirs = (loss_of(architecture, some, decoder="free") for some in (p, scaled))
    assert_close(ours.error, theirs.error)
    assert_close(ours.penalty, theirs.penalty)
    if architecture != "jumprelu":  # counted, not weighed
        assert not torch.allclose(loss_of(architecture, scaled).penalty, ours.penalty), "rows of other norms would be cheaper"


def test_topk_keeps_the_largest_of_each_row_and_batchtopk_of_the_batch():
    p = parameters("topk")
    rows, batch = loss_of("topk", p).latents, loss_of("batchtopk", p).latents
    for group in range(2):
        all_of = torch.stack([pre(p, group, row) for row in range(11)]).clamp(min=0)
        assert_close(rows[group], torch.where(all_of >= all_of.sort(descending=True).values[:, 2:3], all_of, 0.0))
        assert_close(batch[group], torch.where(all_of >= all_of.flatten().sort(descending=True).values[32], all_of, 0.0))
    assert (rows > 0).sum(-1).max() <= 3
    assert (batch > 0).sum(-1).max() > 3


def test_k_of_all_latents_is_an_unpenalised_relu():
    p = parameters("topk")
    plain = slopes(loss_of("relu", p, weight=0.0).total, p)
    for architecture in ("topk", "batchtopk"):
        assert_close(slopes(loss_of(architecture, p, k=8).total, p), plain)


def test_matryoshka_with_all_latents_as_its_only_prefix_is_batchtopk():
    p = parameters("matryoshka")
    nested, plain = loss_of("matryoshka", p, prefixes=(8,)), loss_of("batchtopk", p)
    assert_close(slopes(nested.total, p), slopes(plain.total, p))
    assert_close((nested.total, nested.residual), (plain.total, plain.residual))


def test_matryoshka_is_the_mean_of_each_prefix_alone():
    p = parameters("matryoshka")
    loss = loss_of("matryoshka", p, prefixes=(2, 5, 8))
    alone = [
        (X - loss.latents[..., :end] @ p["W_dec"][:, :end] - p["b_dec"].unsqueeze(1)).square().sum(-1).mean(-1)
        for end in (2, 5, 8)
    ]
    assert_close(loss.error, torch.stack(alone).mean(0))
    by_hand = torch.autograd.grad(torch.stack(alone).mean(0).sum(), list(p.values()), retain_graph=True)
    assert_close(list(slopes(loss.total, p).values()), list(by_hand))
    halves = loss_of("matryoshka", p, prefixes=(1, 2, 4, 8))
    assert_close(loss_of("matryoshka", p).error, halves.error)


def test_jumprelu_has_the_straight_through_slopes_of_its_paper():
    """Rajamanoharan et al. 2024: d/d threshold of the jump is -(threshold / bandwidth) K, of the step -(1 / bandwidth) K."""
    p, bandwidth, weight = parameters("jumprelu"), 0.6, 0.7
    loss = loss_of("jumprelu", p, weight, bandwidth=bandwidth)
    found, threshold = slopes(loss.total, p), p["log_threshold"].exp()
    of_thresholds, of_b_enc = torch.zeros(2, 8, dtype=torch.float64), torch.zeros(2, 8, dtype=torch.float64)
    n_near = 0
    for group in range(2):
        for row in range(11):
            z = pre(p, group, row).clamp(min=0)
            of_latents = -2 / 11 * loss.residual[group, row] @ p["W_dec"][group].T
            for i in range(8):
                t = threshold[group, i]
                kernel = float(abs((z[i] - t) / bandwidth) < 0.5)
                n_near += int(kernel)
                of_thresholds[group, i] += of_latents[i] * -(t / bandwidth) * kernel
                of_thresholds[group, i] += weight / 11 * -(1 / bandwidth) * kernel
                of_b_enc[group, i] += of_latents[i] * (z[i] > t)
    assert 10 < n_near < 150
    assert_close(found["log_threshold"], of_thresholds * threshold)
    assert_close(found["b_enc"], of_b_enc)
    counted = (loss.latents > 0).sum(-1).double().mean(-1)
    assert_close(loss.penalty, weight * counted)


def test_the_gates_auxiliary_teaches_the_encoder_and_never_the_decoder():
    p = parameters("gated")
    loss = loss_of("gated", p)
    main, whole = _slopes_of_main(p), slopes(loss.total, p)
    assert_close(whole["W_dec"], main["W_dec"])
    assert_close(whole["b_enc"], main["b_enc"])
    assert_close(whole["r_mag"], main["r_mag"])
    assert bool((main["b_gate"] == 0).all()), "a gate is a step: only the auxiliary reaches it"
    shared = torch.einsum("grd, gdm -> grm", X - p["b_dec"].unsqueeze(1), p["W_enc"])
    opened = (shared + p["b_gate"].unsqueeze(1)).clamp(min=0)
    missed = X - torch.einsum("grm, gmd -> grd", opened, p["W_dec"]) - p["b_dec"].unsqueeze(1)
    assert_close(loss.penalty, 0.7 * opened.sum(-1).mean(-1) + missed.square().sum(-1).mean(-1))
    down = torch.einsum("grd, gmd -> grm", -2 / 11 * missed, p["W_dec"]) + 0.7 / 11
    assert_close(whole["b_gate"], (down * (opened > 0)).sum(1))


def _slopes_of_main(p: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss_of("gated", p).error.sum(), list(p.values()), allow_unused=True)
    return {name: torch.zeros_like(p[name]) if slope is None else slope for name, slope in zip(p, found, strict=True)}


def test_a_gated_penalty_cannot_be_dodged_by_shrinking_free_rows():
    """The magnitudes would grow by ``r_mag`` to make up for it, and the gates without end."""
    p = parameters("gated")
    assert_close(slopes(loss_of("gated", p, decoder="free").total, p)["W_dec"], _slopes_of_main(p)["W_dec"])


def planted(n_rows: int = 4096, d_in: int = 16, n_directions: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Two groups of unit directions, and rows that are sums of two of them of lengths .5 to 1.5."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(2, n_directions, d_in, generator=generator), dim=-1)
    which = torch.rand(2, n_rows, n_directions, generator=generator).topk(2).indices
    sizes = torch.zeros(2, n_rows, n_directions).scatter(-1, which, 0.5 + torch.rand(2, n_rows, 2, generator=generator))
    return directions, torch.einsum("grm, gmd -> rgd", sizes, directions)


PLANTED = {
    "relu": {"sparsity": 0.5},
    "gated": {"sparsity": 2.0},
    "jumprelu": {"sparsity": 0.5},
    "topk": {},
    "batchtopk": {},
    "matryoshka": {"prefixes": (24, 32)},
}


@pytest.mark.parametrize(
    ("architecture", "decoder"),
    [*((name, "unit") for name in OBJECTIVES), ("relu", "free"), ("gated", "free"), ("jumprelu", "free")],
)
def test_a_planted_dictionary_is_found(architecture, decoder):
    settings = TrainSettings(architecture, d_sae=32, k=2, n_rows=600 * 128, batch_size=128, lr=8e-3, decoder=decoder)
    directions, x = planted()
    told = []
    found = train(of_rows(x, ["z.0.h0", "z.0.h1"]), replace(settings, **PLANTED[architecture]), callbacks=[told.append])
    errors = torch.tensor([record["error"] for record in told])
    assert (errors[-1] < 0.2 * errors[0]).all()
    cosines = (directions @ found.W_dec.mT).amax(-1)
    assert ((cosines > 0.95).float().mean(-1) > 0.5).all()
    if architecture in ("topk", "batchtopk"):
        assert ((cosines > 0.95).float().mean(-1) > 0.9).all()
    explained = 1 - (x.transpose(0, 1) - found.reconstruct(x.transpose(0, 1))).square().sum() / (x - x.mean(0)).square().sum()
    assert explained > 0.85
    n_active = (found.encode(x.transpose(0, 1)) > 0).sum(-1).float().mean(-1)
    assert (n_active < 6).all()
    if settings.counts:
        assert_close(n_active, torch.full((2,), 2.0), atol=0.1, rtol=0)
