"""The published autoencoder: gradients by hand against autograd through the formulas; codes; what is refused."""

import pytest
import torch

from mechinterp.errors import SAEError
from saes.paper_codes import PaperAutoencoder, PaperSettings, assign_paper_codes, train_paper


@pytest.fixture
def rows():
    """Ten prompts of four heads; heads differ more than prompts, as in a model."""
    draw = torch.Generator().manual_seed(0)
    return 2 * torch.randn(4, 12, generator=draw).double() + torch.randn(10, 4, 12, generator=draw).double()


def drawn(d_in, d_sae, seed=0):
    return PaperAutoencoder(*(tensor.double() for tensor in PaperAutoencoder.random(d_in, d_sae, seed).parameters))


def by_the_formulas(start, x, settings):
    """One line a formula; rows of both weights are brought to norm 1 before each step, outside of the gradient."""
    W_e, b_e, W_d, b = (tensor.clone().requires_grad_() for tensor in start.parameters)
    optimizer = torch.optim.Adam([W_e, b_e, W_d, b], lr=settings.lr)
    for _ in range(settings.steps):
        for W in (W_e, W_d):
            W.data /= W.data.norm(dim=1, keepdim=True)
        a = torch.relu((x - b) @ W_e.T + b_e)
        y = a @ W_d.T + b
        loss = ((y - x) ** 2).mean() + settings.sparsity * a.abs().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        for W in (W_e, W_d):
            W.grad -= (W.grad * W.data).sum(1, keepdim=True) * W.data
        optimizer.step()
    for W in (W_e, W_d):
        W.data /= W.data.norm(dim=1, keepdim=True)
    return PaperAutoencoder(*(tensor.detach() for tensor in (W_e, b_e, W_d, b)))


@pytest.mark.parametrize("sparsity", [0.0, 0.02, 0.5])
def test_training_is_adam_on_the_formulas(rows, sparsity):
    settings = PaperSettings(steps=120, lr=0.01, sparsity=sparsity)
    start, x = drawn(12, 20), rows.flatten(0, 1)
    kept = [tensor.clone() for tensor in start.parameters]
    ours, plain = train_paper(start, x, settings), by_the_formulas(start, x, settings)
    for one, other in zip(ours.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)
    assert ours.loss(x, sparsity) < 0.7 * start.loss(x, sparsity)
    assert all(map(torch.equal, start.parameters, kept))


def test_training_goes_on_where_no_latent_is_active(rows):
    """Only ``b`` moves then: to the mean of all rows."""
    start = drawn(12, 5)
    start = PaperAutoencoder(start.W_enc, start.b_enc - 100, start.W_dec, start.b)
    settings = PaperSettings(steps=2000, lr=0.01)
    found = train_paper(start, rows.flatten(0, 1), settings)
    torch.testing.assert_close(found.b, rows.mean((0, 1)), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.W_enc, start.W_enc)


def test_the_decoder_has_unit_norm_along_the_wrong_axis(rows):
    found = train_paper(drawn(12, 4), rows.flatten(0, 1), PaperSettings(steps=30))
    for W in (found.W_enc, found.W_dec):
        torch.testing.assert_close(W.norm(dim=1), torch.ones(len(W)).double())
    assert float(found.W_dec.square().sum(0).mean().sqrt()) == pytest.approx((12 / 4) ** 0.5)


def test_a_code_is_the_strongest_latent_and_nothing_is_latent_0(rows):
    rows = rows / 30  # small rows do not pay for a latent
    found = assign_paper_codes(rows, torch.arange(5), PaperSettings(d_sae=7, sparsity=0.1, steps=200))
    latents = found.autoencoder.encode(rows.flatten(0, 1))
    strongest = latents.argmax(1)
    strongest[(latents == 0).all(1)] = 0
    assert found.values.tolist() == strongest.unflatten(0, (10, 4)).tolist()
    assert found.l0 == pytest.approx(float((latents > 0).sum(1).double().mean()))
    assert found.silent == pytest.approx(float((latents == 0).all(1).double().mean()))
    assert 0 < found.silent < 1


def test_training_sees_its_own_examples_alone_and_a_seed_repeats(rows):
    settings = PaperSettings(d_sae=7, steps=20, seed=4)
    changed = rows.clone()
    changed[5:] = 0
    one, other = (assign_paper_codes(given, torch.arange(5), settings).autoencoder for given in (rows, changed))
    assert all(map(torch.equal, one.parameters, other.parameters))
    others = PaperAutoencoder.random(12, 7, seed=5)
    assert not torch.equal(others.W_enc, PaperAutoencoder.random(12, 7, seed=4).W_enc)


def test_an_untrained_autoencoder_is_as_it_was_drawn(rows):
    found = assign_paper_codes(rows, torch.arange(5), PaperSettings(d_sae=7, trained=False)).autoencoder
    drawn_so = PaperAutoencoder.random(12, 7)
    assert all(torch.equal(one, other.double()) for one, other in zip(found.parameters, drawn_so.parameters, strict=True))
    assert float(drawn_so.b_enc.abs().max()) <= 12**-0.5
    assert not bool(drawn_so.b.any())


@pytest.mark.parametrize("given", [{"n_train": 0}, {"d_sae": 0}, {"steps": 0}, {"lr": 0.0}, {"sparsity": float("nan")}])
def test_settings_that_train_nothing_are_refused_by_name(given):
    with pytest.raises(SAEError, match=f"{next(iter(given))}="):
        PaperSettings(**given)


def test_rows_that_cannot_be_coded_are_refused(rows):
    with pytest.raises(SAEError, match="no example is named"):
        assign_paper_codes(rows, torch.arange(0))
    rows[0, 0, 0] = float("inf")
    with pytest.raises(SAEError, match="not finite"):
        assign_paper_codes(rows, torch.arange(5))
