"""Which heads latents belong to, and how many directions a head's latents write."""

import math
from dataclasses import replace

import pytest
import torch

from mechinterp.errors import SAEError
from saes.base import SparseAutoencoder
from saes.heads import effective_heads, head_shares, head_views, participation, summarize_heads, top_latents
from saes.places import Place


def concatenated(rows, layer=0):
    """An autoencoder with these decoder rows, ``[d_sae d_in]``."""
    rows = torch.tensor(rows)
    place = Place.parse(f"z.{layer}")
    return replace(SparseAutoencoder.random([place], d_in=rows.shape[1], d_sae=len(rows)), W_dec=rows[None])


@pytest.fixture
def by_hand():
    return concatenated([[3.0, 4.0, 0.0, 0.0], [0.0, 1.0, 0.0, -3.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]])


def test_shares_are_norms_of_parts(by_hand):
    shares = head_shares(by_hand, 2)
    assert torch.allclose(shares[0], torch.tensor([[1.0, 0.0], [0.25, 0.75], [0.0, 0.0], [0.5, 0.5]]))
    many = SparseAutoencoder.random([Place.parse("z.0"), Place.parse("z.1")], d_in=12, d_sae=30)
    assert torch.allclose(head_shares(many, 3).sum(-1), torch.ones(2, 30))


def test_top_latents_and_spread(by_hand):
    shares = head_shares(by_hand, 2)
    assert top_latents(shares, 0, 2).tolist() == [[0, 3]]
    assert top_latents(shares, 1, 1).tolist() == [[1]]
    spread = effective_heads(shares)[0]
    assert spread[0] == pytest.approx(1)
    assert spread[3] == pytest.approx(2)
    assert spread[1] == pytest.approx(math.exp(-0.25 * math.log(0.25) - 0.75 * math.log(0.75)))


def test_the_summary_counts_what_is_live(by_hand):
    shares = head_shares(by_hand, 2)
    whole = summarize_heads(shares)
    assert whole.n_first.tolist() == [[2, 1]]
    assert whole.share[0].tolist() == pytest.approx([1.75 / 3, 1.25 / 3])
    assert float(whole.most_share) == pytest.approx((1 + 0.75 + 0.5) / 3)
    one = summarize_heads(shares, torch.tensor([[True, False, True, False]]))
    assert one.n_first.tolist() == [[1, 0]]
    assert float(one.effective_heads) == pytest.approx(1)


def test_directions_are_one_if_all_write_the_same_and_all_if_none_does():
    same = torch.tensor([[1.0, 2.0], [-2.0, -4.0], [0.5, 1.0]])
    weights = torch.tensor([0.2, 0.3, 0.5])
    assert participation(weights, same) == pytest.approx(1)
    assert participation(weights, torch.eye(3)) == pytest.approx(1 / (0.04 + 0.09 + 0.25))
    assert participation(torch.zeros(0), torch.zeros(0, 3)) == 0
    cosines = torch.nn.functional.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    double = torch.einsum("i,j,ij->", weights, weights, (cosines @ cosines.mT) ** 2)
    assert participation(weights, cosines) == pytest.approx(float(1 / double))


def test_a_head_of_one_direction_is_told_from_one_of_many():
    one, other = [1.0, 0.0, 0.0], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    nothing = [0.0, 0.0, 0.0]
    rows = [one + nothing] * 3 + [nothing + row for row in other]
    families = ["induction", "induction", None, "local", "induction", "local"]
    first, second = head_views(concatenated(rows, 2), 3, n=3, families=families)
    assert (str(first.place), str(second.place)) == ("z.2.h0", "z.2.h1")
    assert set(first.latents) == {0, 1, 2}
    assert first.shares == (1.0, 1.0, 1.0)
    assert (first.n_directions, second.n_directions) == (pytest.approx(1), pytest.approx(3))
    assert (first.n_latents, second.n_latents) == (pytest.approx(3), pytest.approx(3))
    assert (first.n_families, second.n_families) == (1, 2)


def test_activity_weighs_and_dead_latents_are_no_part_of_a_head():
    rows = [[1.0, 0.0], [0.0, 2.0], [0.0, 1.0]]
    heads = replace(SparseAutoencoder.random([Place.parse("z.0.h1")], d_in=2, d_sae=3), W_dec=torch.tensor([rows]))
    (view,) = head_views(heads, 2, torch.tensor([[3.0, 0.5, 0.0]]))
    assert view.latents == (0, 1)
    assert view.weights == pytest.approx((0.75, 0.25))
    assert view.n_directions == pytest.approx(1 / (0.75**2 + 0.25**2))
    assert view.shares is None
    assert view.n_families is None
    (silent,) = head_views(heads, 2, torch.zeros(1, 3))
    assert (silent.latents, silent.n_latents, silent.n_directions) == ((), 0.0, 0.0)


def test_what_cannot_be_is_said(by_hand):
    single = SparseAutoencoder.random([Place.parse("z.0.h1")], d_in=4, d_sae=8)
    with pytest.raises(SAEError, match=r"on one head, 'z.0.h1'.*no other heads"):
        head_shares(single, 4)
    with pytest.raises(SAEError, match=r"only z is made of heads.*'resid_pre.0'"):
        head_shares(SparseAutoencoder.random([Place.parse("resid_pre.0")], d_in=4, d_sae=8), 2)
    with pytest.raises(SAEError, match="heads of 3 numbers do not fit 4"):
        head_shares(by_hand, 3)
    with pytest.raises(SAEError, match="heads 0..1 and 4 latents"):
        top_latents(head_shares(by_hand, 2), 2)
    with pytest.raises(SAEError, match="is not that of"):
        head_views(by_hand, 2, torch.ones(1, 3))
    with pytest.raises(SAEError, match="n=10 and 1 families.*each of 4 latents"):
        head_views(by_hand, 2, families=["local"])
