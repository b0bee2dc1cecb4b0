"""A model with an autoencoder spliced in: identities at both ends, and the same numbers however they are come by."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel

from mechinterp.errors import SAEError
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.models.transformer import Transformer
from mechinterp.store import ActivationStore
from saes import fidelity as fidelity_module
from saes.base import SparseAutoencoder
from saes.fidelity import measure_fidelity, recovered
from saes.metrics import mean_activation
from saes.places import Place, each_head, each_layer
from saes.positions import KeptRows, default_keep, text_positions
from saes.splice import spliced

HEADS = tuple(map(Place.parse, ("z.0.h1", "z.1.h0", "z.2.h2")))


def identity(places, d_in):
    both = torch.cat([torch.eye(d_in), -torch.eye(d_in)], 1).double().repeat(len(places), 1, 1)
    zeros = torch.zeros(len(places), d_in, dtype=torch.float64)
    return SparseAutoencoder("relu", tuple(places), both, zeros.repeat(1, 2), both.mT.contiguous(), zeros)


def constant(places, values):
    """An autoencoder that answers everything with ``values [group d_in]``."""
    perfect = identity(places, values.shape[1])
    return SparseAutoencoder("relu", tuple(places), 0 * perfect.W_enc, perfect.b_enc, perfect.W_dec, values)


def with_keep(tokens):
    return torch.arange(tokens.shape[1]).expand(tokens.shape) > 0


def losses_by_hand(model, tokens, patch):
    """Cross-entropy of the next token and KL(clean || patched): means over prompts and positions."""
    log_p, log_q = (model.run(tokens, patch=p)[0][:, :-1].log_softmax(-1) for p in ({}, patch))
    ce = -log_q.gather(-1, tokens[:, 1:].unsqueeze(-1)).mean()
    return float(ce), float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.fixture
def autoencoder():
    return SparseAutoencoder.random(HEADS, d_in=5, d_sae=12, kind="topk", k=2).to(dtype=torch.float64)


@pytest.fixture
def many():
    return torch.randint(23, (40, 7), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["z", "attn_out", "resid_pre"])
def test_a_perfect_autoencoder_recovers_everything(model, many, name):
    places = each_layer(model.config, name)
    found = measure_fidelity(model, identity(places, places[0].width(model.config)), many, batch_size=32)
    assert found.targets == (*map(str, places), "all")
    assert found.kl["sae"] == pytest.approx(np.zeros(4), abs=1e-12)
    assert found.ce["sae"] == pytest.approx(np.full(4, found.ce_clean))
    for shares in (*found.ce_recovered.values(), *found.kl_recovered.values()):
        known = ~np.isnan(shares.value)
        assert shares.value[known] == pytest.approx(np.ones(known.sum()))
        assert shares.low[known] == pytest.approx(np.ones(known.sum()))
    assert not np.isnan(found.kl_recovered["zero"].value).any()


def test_answering_with_the_mean_is_mean_ablation_and_with_zero_zero_ablation(plain, many):
    keep = with_keep(many)
    mean = mean_activation(HEADS, KeptRows(plain, HEADS, many, keep))
    for baseline, values in (("mean", mean), ("zero", torch.zeros_like(mean))):
        found = measure_fidelity(plain, constant(HEADS, values), many, keep=keep)
        assert found.ce["sae"] == pytest.approx(found.ce[baseline])
        assert found.kl["sae"] == pytest.approx(found.kl[baseline])
        shares = found.kl_recovered[baseline]
        assert shares.value == pytest.approx(np.zeros(4), abs=1e-9)
        assert np.stack([shares.low, shares.high]) == pytest.approx(np.zeros((2, 4)), abs=1e-9)


def test_each_group_and_all_together_are_what_splicing_by_hand_gives(model, tokens, autoencoder):
    keep = with_keep(tokens)
    found = measure_fidelity(model, autoencoder, tokens, keep=keep, batch_size=3)
    by_hand = []
    for place in HEADS:
        head = autoencoder.group(place)

        def replaced(z, _, head=head, at=place.head):
            z = z.clone()
            z[:, 1:, at] = head.reconstruct(z[:, 1:, at].unsqueeze(0))[0]
            return z

        by_hand.append(losses_by_hand(model, tokens, {place.site: replaced}))
    by_hand.append(losses_by_hand(model, tokens, spliced(autoencoder, where=keep)))
    np.testing.assert_allclose(np.stack([found.ce["sae"], found.kl["sae"]], 1), by_hand, rtol=1e-9)
    assert found.ce_clean == pytest.approx(losses_by_hand(model, tokens, {})[0])


def test_ablations_are_what_writing_constants_by_hand_gives(plain, tokens, autoencoder):
    found = measure_fidelity(plain, autoencoder.group(1), tokens, keep=torch.ones_like(tokens, dtype=torch.bool))
    z = plain.run(tokens, record=["z.1"])[1]["z", 1]
    for change, value in (("zero", 0.0), ("mean", z[:, :, 0].mean((0, 1)))):

        def written(z, _, value=value):
            z = z.clone()
            z[:, :, 0] = value
            return z

        ce, kl = losses_by_hand(plain, tokens, {"z.1": written})
        assert found.ce[change] == pytest.approx([ce, ce])  # one group is all there is
        assert found.kl[change] == pytest.approx([kl, kl])
    shares = [1 - (found.ce["sae"] - found.ce_clean) / (found.ce[b] - found.ce_clean) for b in ("zero", "mean")]
    for share, given in zip(shares, (found.ce_recovered["zero"], found.ce_recovered["mean"]), strict=True):
        known = ~np.isnan(given.value)
        assert given.value[known] == pytest.approx(share[known])


@pytest.mark.parametrize("batch_size", [7, 100])
def test_batches_change_nothing(plain, many, autoencoder, batch_size, monkeypatch):
    whole = measure_fidelity(plain, autoencoder, many)
    monkeypatch.setattr(fidelity_module, "_NUMBERS", 5 * 23)
    parts = measure_fidelity(plain, autoencoder, many, batch_size=batch_size)
    for name in ("sae", "zero", "mean"):
        np.testing.assert_allclose(parts.ce[name], whole.ce[name], rtol=1e-12)
        np.testing.assert_allclose(parts.kl[name], whole.kl[name], rtol=1e-9)
    np.testing.assert_allclose(parts.kl_recovered["mean"].value, whole.kl_recovered["mean"].value, rtol=1e-9)
    np.testing.assert_allclose(parts.kl_recovered["mean"].low, whole.kl_recovered["mean"].low, rtol=1e-9)


@dataclass(frozen=True)
class StandIn:
    """A model of another make: ``run`` without ``start``, and nothing else."""

    inner: Any

    def run(self, tokens, *, record=(), patch=None):
        return self.inner.run(tokens, record=record, patch=patch)


def test_a_stand_in_without_start_gives_the_same(plain, tokens, autoencoder):
    """Passes that begin at the first changed layer equal whole ones."""
    keep = with_keep(tokens)
    ours = measure_fidelity(plain, autoencoder, tokens, keep=keep, batch_size=3)
    theirs = measure_fidelity.__wrapped__(StandIn(plain), autoencoder, tokens, keep=keep, batch_size=3)
    for name in ("sae", "zero", "mean"):
        np.testing.assert_allclose(theirs.ce[name], ours.ce[name], rtol=1e-12)
        np.testing.assert_allclose(theirs.kl[name], ours.kl[name], rtol=1e-9)


def test_a_pass_begins_at_the_first_changed_layer(plain, tokens, autoencoder, monkeypatch):
    begun, run = [], Transformer.run

    def noted(self, tokens, *, start=None, **given):
        begun.append(None if start is None else start.site.layer)
        return run(self, tokens, start=start, **given)

    monkeypatch.setattr(Transformer, "run", noted)
    measure_fidelity(plain, autoencoder.group(1, 2), tokens)
    assert begun == [None, None, *[1] * 3, *[2] * 3, *[1] * 3]  # the means, the clean pass, each group, both


def test_places_outside_all_layers_are_spliced_too(plain, tokens):
    embed = (Place.parse("embed"),)
    found = measure_fidelity(plain, identity(embed, 12), tokens)
    assert found.kl["sae"] == pytest.approx([0, 0], abs=1e-12)
    assert (found.kl["zero"] > 1e-3).all()


def test_what_lies_outside_keep_is_left_alone(plain, many, autoencoder):
    nothing_but_last = torch.arange(7).expand(many.shape) == 6
    found = measure_fidelity(plain, autoencoder, many, keep=nothing_but_last)
    assert found.kl["zero"] == pytest.approx(np.zeros(4), abs=1e-12)  # the last position predicts nothing that is counted
    assert np.isnan(found.kl_recovered["zero"].value).all()
    assert found.n_kept == 40
    assert found.n_predictions == 240


def test_an_interval_holds_its_share(plain, many, autoencoder):
    found = measure_fidelity(plain, autoencoder, many)
    for shares in (*found.kl_recovered.values(), *found.ce_recovered.values()):
        known = ~np.isnan(shares.value)
        assert (shares.low[known] < shares.value[known]).all()
        assert (shares.value[known] < shares.high[known]).all()


def test_a_share_of_nothing_is_undefined():
    n = np.full(4, 10)
    cost = np.array([[1.0, 2, 1, 2], [1, 2, 1, 2], [1, 2, 1, 2], [1e-9] * 4])
    ablated = np.array([[4.0, 4, 2, 2], [9, -8, 7, -6], [-4, -4, -4, -5], [4e-9] * 4])  # hurts; noise; helps; rounding
    shares = recovered(cost, ablated, n)
    assert shares.value == pytest.approx([0.5, np.nan, np.nan, np.nan], nan_ok=True)
    assert shares.low[0] < 0.5 < shares.high[0]
    assert np.isnan(shares.high[1:]).all()
    assert np.isnan(recovered(cost[:, :1], ablated[:, :1], n[:1]).value).all()


def tokenizer(pad_id=0):
    return Tokenizer(Backend(WordLevel({"a": 0}, unk_token="a")), "toy", bos_id=1, pad_id=pad_id)


def test_bos_and_final_padding_are_left_out_of_what_is_kept():
    tokens = torch.tensor([[1, 0, 5, 1, 0, 0], [7, 8, 9, 7, 8, 9], [1, 0, 0, 0, 0, 0]])
    text = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6, [1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    assert torch.equal(text_positions(tokens, tokenizer()), text)
    text[0, 0] = text[0, 3] = text[2, 0] = False
    assert torch.equal(default_keep(tokens, tokenizer()), text)
    assert default_keep(tokens, None).all()
    same = default_keep(torch.tensor([[1, 4, 1, 5, 1, 1]]), tokenizer(pad_id=1))
    assert torch.equal(same, torch.tensor([[False, True, False, True, False, False]]))


def test_padding_changes_nothing(plain, many, autoencoder):
    """Prompts that end in padding are measured as the prompts alone are."""
    reader = Transformer(plain.weights, tokenizer(pad_id=22))
    texts = many[:, :5].clamp_max(21)
    padded = torch.cat([texts, torch.full((40, 2), 22)], 1)
    alone, ended = (measure_fidelity(reader, autoencoder, given) for given in (texts, padded))
    assert ended.n_predictions == alone.n_predictions == 160
    assert ended.n_kept == alone.n_kept == 200 - int((texts == 1).sum())
    for name in ("sae", "zero", "mean"):
        np.testing.assert_allclose(ended.ce[name], alone.ce[name], rtol=1e-9)


def test_stored_activations_are_the_models_own(plain, tokens, tmp_path):
    places = each_head(plain.config, layers=[0, 2])
    keep = with_keep(tokens)
    run = list(KeptRows(plain, places, tokens, keep, batch_size=3))
    stored = list(KeptRows(plain, places, tokens, keep, 3, ActivationStore(tmp_path)))
    assert [part.shape for part in run] == [(6, 18, 5), (6, 6, 5)]
    for ours, theirs in zip(run, stored, strict=True):
        torch.testing.assert_close(theirs.double(), ours, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_measured_is_said(plain, tokens, autoencoder):
    keep = with_keep(tokens)
    with pytest.raises(SAEError, match=r"marks 0 positions .* the tokens' shape \[4, 7\]"):
        measure_fidelity(plain, autoencoder, tokens, keep=keep & False)
    with pytest.raises(SAEError, match="no position predicts a token that is text"):
        measure_fidelity(plain, autoencoder, tokens, text=keep & False)
    with pytest.raises(SAEError, match="batch_size=0"):
        measure_fidelity(plain, autoencoder, tokens, batch_size=0)
    wide = SparseAutoencoder.random([Place.parse("z.0")], d_in=5, d_sae=12)
    with pytest.raises(SAEError, match="has 15"):
        measure_fidelity(plain, wide, tokens)
