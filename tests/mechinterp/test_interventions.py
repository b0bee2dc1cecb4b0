"""Interventions: each changes what it says, exactly, and nothing else, on every kind of model."""

from dataclasses import replace

import pytest
import torch

from mechinterp.errors import ModelError, UnknownNode, UnknownSite
from mechinterp.interventions import (
    attend_to,
    combine,
    look_away,
    only_at,
    patch_from,
    rewrite_attention,
    scale_heads,
    steer,
    swap_heads,
)
from mechinterp.models.attention import Prefix
from mechinterp.models.transformer import ResidualStart, Transformer
from mechinterp.positions import refuse_misshapen
from mechinterp.sites import Site

AT = torch.tensor([6, 3, 5, 4])  # prompts of four lengths, padded on the right
KEYS = torch.tensor([[2, 5], [0, 3], [4, 1], [2, 2]])
ROWS = torch.arange(4)
SITES = ["pattern", "z", "resid_pre"]
HEADS = ("a1.h0", "a2.h1")


def at_here(n_pos: int = 7) -> torch.Tensor:
    return torch.arange(n_pos) == AT[:, None]


def bidirectional(model: Transformer) -> Transformer:
    return Transformer(replace(model.weights, config=replace(model.config, causal=False)))


# Attention


def test_attending_to_one_key_gathers_its_value_exactly(model, tokens):
    edit = attend_to(HEADS, at=AT, to=KEYS[:, :1])
    _, cache = model.run(tokens, record=["z", "v"], patch=edit)
    for layer, head in ((1, 0), (2, 1)):
        shared = model.config.group_of(head)
        assert torch.equal(cache["z", layer][ROWS, AT, head], cache["v", layer][ROWS, KEYS[:, 0], shared])


def test_only_the_row_of_the_head_is_rewritten(model, tokens):
    _, clean = model.run(tokens, record=SITES)
    _, cache = model.run(tokens, record=SITES, patch=attend_to("a1.h0", at=AT, to=KEYS))
    wanted = clean["pattern", 1].clone()
    for prompt in range(4):
        wanted[prompt, 0, AT[prompt]] = 0
        for key in KEYS[prompt]:
            wanted[prompt, 0, AT[prompt], key] += 0.5
    assert torch.equal(cache["pattern", 1], wanted)
    assert torch.equal(cache["z", 1][:, :, 1:], clean["z", 1][:, :, 1:])
    assert torch.equal(cache["resid_pre", 2][~at_here()], clean["resid_pre", 2][~at_here()])
    assert not torch.isclose(cache["resid_pre", 2][at_here()], clean["resid_pre", 2][at_here()]).all(-1).any()


def test_a_prompt_is_edited_as_if_it_were_alone(model, tokens):
    together, _ = model.run(tokens, patch=attend_to(HEADS, at=AT, to=KEYS), logits_at=AT)
    for prompt in range(4):
        n_pos = int(AT[prompt]) + 1
        edit = attend_to(HEADS, at=AT[prompt : prompt + 1], to=KEYS[prompt : prompt + 1])
        alone, _ = model.run(tokens[prompt : prompt + 1, :n_pos], patch=edit)
        torch.testing.assert_close(together[prompt], alone[0, -1])


def test_a_share_of_nothing_changes_nothing_and_half_is_halfway(model, tokens):
    clean, cache = model.run(tokens, record=["pattern.1"])
    assert torch.equal(
        model.run(tokens, patch=attend_to("a1.h2", at=AT, to=KEYS, share=0.0))[0],
        model.run(tokens, patch=rewrite_attention("a1.h2", lambda rows: rows))[0],
    )
    torch.testing.assert_close(model.run(tokens, patch=attend_to("a1.h2", at=AT, to=KEYS, share=0.0))[0], clean)
    _, all_of_it = model.run(tokens, record=["pattern.1"], patch=attend_to("a1.h2", at=AT, to=KEYS))
    _, half = model.run(tokens, record=["pattern.1"], patch=attend_to("a1.h2", at=AT, to=KEYS, share=0.5))
    torch.testing.assert_close(half["pattern", 1], (cache["pattern", 1] + all_of_it["pattern", 1]) / 2)


def test_without_a_position_every_row_that_sees_the_keys_attends_to_them(model, tokens):
    _, clean = model.run(tokens, record=["pattern.0"])
    _, cache = model.run(tokens, record=["pattern.0"], patch=attend_to("a0.h1", at=None, to=KEYS))
    for prompt in range(4):
        last = int(KEYS[prompt].max())
        assert torch.equal(cache["pattern", 0][prompt, 1, :last], clean["pattern", 0][prompt, 1, :last])
        seen = cache["pattern", 0][prompt, 1, last:, KEYS[prompt].unique()]
        torch.testing.assert_close(seen.sum(-1), torch.ones_like(seen.sum(-1)))


def test_looking_away_shares_the_attention_out_in_proportion(model, tokens):
    _, clean = model.run(tokens, record=["pattern.1"])
    _, cache = model.run(tokens, record=["pattern.1"], patch=look_away("a1.h1", at=AT, from_=KEYS))
    for prompt in range(4):
        row, before = cache["pattern", 1][prompt, 1, AT[prompt]], clean["pattern", 1][prompt, 1, AT[prompt]]
        kept = [key for key in range(int(AT[prompt]) + 1) if key not in KEYS[prompt].tolist()]
        torch.testing.assert_close(row.sum(), torch.ones_like(row.sum()))
        torch.testing.assert_close(row[kept], before[kept] / before[kept].sum())
        assert not row[KEYS[prompt]].any()
    _, lost = model.run(tokens, record=["pattern.1"], patch=look_away("a1.h1", at=AT, from_=KEYS, renormalize=False))
    kept = lost["pattern", 1][ROWS, 1, AT].sum(-1)
    seen = torch.stack([clean["pattern", 1][i, 1, AT[i], KEYS[i].unique()].sum() for i in range(4)])
    torch.testing.assert_close(kept, 1 - seen)


def test_a_row_that_sees_nothing_else_keeps_no_attention(plain, tokens):
    first = torch.zeros(4, 1, dtype=torch.long)
    _, cache = plain.run(tokens, record=["pattern.0", "z.0"], patch=look_away("a0.h0", at=None, from_=first))
    assert not cache["z", 0][:, 0, 0].any()
    assert bool(cache["pattern", 0].isfinite().all())


def test_a_rewrite_sees_the_heads_of_a_layer_in_their_order_and_each_once(model, tokens):
    seen = []
    edit = rewrite_attention(["a2.h2", "a2.h0", "a2.h2"], lambda rows: seen.append(rows) or rows)
    same, cache = model.run(tokens, record=["pattern.2"], patch=edit)
    torch.testing.assert_close(same, model.run(tokens)[0])
    assert torch.equal(seen[0], cache["pattern", 2][:, [0, 2]])


# Heads


def test_heads_scaled_by_one_are_as_they_were_and_by_zero_are_ablated(model, tokens):
    clean, _ = model.run(tokens)
    torch.testing.assert_close(model.run(tokens, patch=scale_heads({"a0.h2": 1.0, "a2.h0": 1.0}))[0], clean)

    def without(result, _):
        return result * (torch.arange(result.shape[2]) != 1).to(result)[:, None]

    ablated, _ = model.run(tokens, patch={"result.1": without})
    torch.testing.assert_close(model.run(tokens, patch=scale_heads({"a1.h1": 0.0}))[0], ablated)


def test_a_head_is_scaled_at_its_position_alone(model, tokens):
    _, clean = model.run(tokens, record=["z"])
    _, cache = model.run(tokens, record=["z"], patch=scale_heads({"a1.h1": 3.0, "a1.h2": -1.0}, at=AT))
    wanted = clean["z", 1].clone()
    wanted[ROWS, AT, 1] *= 3
    wanted[ROWS, AT, 2] *= -1
    assert torch.equal(cache["z", 1], wanted)
    assert torch.equal(cache["z", 0], clean["z", 0])


@pytest.mark.parametrize("what", ["pattern", "z"])
def test_swapping_twice_is_not_swapping(what, model, tokens):
    swap = swap_heads("a1.h0", "a1.h2", what=what)
    clean, before = model.run(tokens, record=[f"{what}.1"])
    torch.testing.assert_close(model.run(tokens, patch=combine(swap, swap))[0], clean)
    swapped, after = model.run(tokens, record=[f"{what}.1"], patch=swap)
    order = torch.tensor([2, 1, 0, *range(3, model.config.n_heads)])
    torch.testing.assert_close(after[what, 1], before[what, 1].index_select(1 if what == "pattern" else 2, order))
    assert not torch.allclose(swapped, clean)


@pytest.mark.parametrize("what", ["pattern", "z"])
def test_heads_are_swapped_at_their_position_alone(what, plain, tokens):
    sites = ["z.1", "pattern.1"]  # both passes with the pattern made: the fused kernel rounds differently
    _, before = plain.run(tokens, record=sites)
    _, after = plain.run(tokens, record=sites, patch=swap_heads("a1.h0", "a1.h1", what=what, at=AT))
    assert torch.equal(after["z", 1][~at_here()], before["z", 1][~at_here()])
    assert not torch.allclose(after["z", 1][at_here()][:, :2], before["z", 1][at_here()][:, :2])
    torch.testing.assert_close(after["z", 1][:, :, 2], before["z", 1][:, :, 2])


# Streams


@pytest.mark.parametrize("site", ["embed", "resid_pre.1", "attn_out.0", "resid_post.2"])
def test_steering_adds_the_direction_at_its_position_alone(site, model, tokens):
    direction = torch.randn(12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    _, clean = model.run(tokens, record=[site])
    _, cache = model.run(tokens, record=[site], patch=steer(site, direction, at=AT))
    assert torch.equal(cache[site][~at_here()], clean[site][~at_here()])
    torch.testing.assert_close(cache[site][at_here()], clean[site][at_here()] + direction)
    torch.testing.assert_close(model.run(tokens, record=[site], patch=steer(site, direction))[1][site], clean[site] + direction)


def test_the_past_does_not_feel_what_is_steered(model, tokens):
    logits, _ = model.run(tokens, patch=steer("resid_pre.0", torch.arange(12.0), at=AT))  # a constant is normalised away
    earlier = torch.arange(7) < AT[:, None]
    torch.testing.assert_close(logits[earlier], model.run(tokens)[0][earlier])
    assert not torch.isclose(logits[at_here()], model.run(tokens)[0][at_here()]).all(-1).any()


@pytest.mark.parametrize(("variant", "site", "n"), [("plain", "z.1", 3), ("llama", "z.1", 4), ("llama", "v.1", 2)])
def test_heads_together_are_steered_by_a_direction_each(variant, site, n, make_model, tokens):
    direction, model = torch.zeros(n, 5, dtype=torch.float64), make_model(variant)
    direction[1] = 1.0
    _, clean = model.run(tokens, record=[site])
    _, cache = model.run(tokens, record=[site], patch=steer(site, direction, at=AT))
    torch.testing.assert_close(cache[site] - clean[site], at_here()[:, :, None, None] * direction)


def test_what_a_pass_recorded_brings_it_back(model, tokens):
    other = tokens.flip(0)
    wanted, cache = model.run(other, record=["resid_pre.1", "z.1"])
    torch.testing.assert_close(model.run(tokens, patch=patch_from(cache, "resid_pre.1"))[0], wanted)
    _, clean = model.run(tokens, record=["z.1"])
    _, patched = model.run(tokens, record=["z.1"], patch=patch_from(cache, ["a1.h0", "a1.h2"], at=AT))
    by_hand = clean["z", 1].clone()
    for head in (0, 2):
        by_hand[ROWS, AT, head] = cache["z", 1][ROWS, AT, head]
    assert torch.equal(patched["z", 1], by_hand)


def test_any_intervention_is_narrowed_to_a_position(plain, tokens):
    narrowed = only_at(scale_heads({"a1.h1": 3.0}), AT)
    assert torch.equal(plain.run(tokens, patch=narrowed)[0], plain.run(tokens, patch=scale_heads({"a1.h1": 3.0}, at=AT))[0])


# Together


def test_the_second_is_given_what_the_first_has_made(model, tokens):
    direction = torch.ones(12, dtype=torch.float64)
    doubled = {"blocks.1.hook_resid_pre": lambda value, _: 2 * value}
    _, clean = model.run(tokens, record=["resid_pre.1"])
    _, first = model.run(tokens, record=["resid_pre.1"], patch=combine(steer("resid_pre.1", direction), doubled))
    _, second = model.run(tokens, record=["resid_pre.1"], patch=combine(doubled, steer("resid_pre.1", direction)))
    torch.testing.assert_close(first["resid_pre", 1], 2 * (clean["resid_pre", 1] + direction))
    torch.testing.assert_close(second["resid_pre", 1], 2 * clean["resid_pre", 1] + direction)


def test_interventions_at_different_sites_all_happen(model, tokens):
    edits = [attend_to("a0.h0", at=AT, to=KEYS), scale_heads({"a1.h1": 0.0}), steer("resid_post.2", torch.ones(12))]
    together, cache = model.run(tokens, record=["pattern.0", "z.1"], patch=combine(*edits))
    by_hand: dict = {}
    for edit in edits:
        by_hand |= edit
    assert torch.equal(together, model.run(tokens, patch=by_hand)[0])
    assert not cache["z", 1][:, :, 1].any()
    assert combine() == {}


def test_heads_of_a_layer_are_edited_one_by_one_or_at_once(model, tokens):
    at_once = attend_to(["a1.h2", "a1.h0"], at=AT, to=KEYS)
    one_by_one = combine(attend_to("a1.h0", at=AT, to=KEYS), attend_to("a1.h2", at=AT, to=KEYS))
    assert torch.equal(model.run(tokens, patch=at_once)[0], model.run(tokens, patch=one_by_one)[0])


def test_every_layer_and_one_layer_cannot_be_combined():
    with pytest.raises(UnknownSite, match="'z' is patched in every layer, and 'z.1' is one of them.*Write the layers out"):
        combine({"z": lambda value, _: value}, scale_heads({"a1.h0": 2.0}))


# In every kind of pass


def every_edit() -> dict:
    return combine(
        attend_to(["a2.h1", "a0.h1"], at=AT, to=KEYS),
        look_away("a2.h2", at=AT, from_=KEYS),
        scale_heads({"a2.h0": 2.0}, at=AT),
        swap_heads("a1.h0", "a1.h1", at=AT),
        steer("resid_post.2", torch.arange(12.0), at=AT),
    )


def test_the_last_layer_is_edited_where_logits_are_wanted_at_one_position(model, tokens):
    """Such a pass spares the last layer's other positions, unless somebody looks."""
    everywhere, _ = model.run(tokens, patch=every_edit())
    torch.testing.assert_close(model.run(tokens, patch=every_edit(), logits_at=AT)[0], everywhere[ROWS, AT])
    pattern_only = attend_to("a2.h1", at=torch.full((4,), 6), to=KEYS)
    everywhere, _ = model.run(tokens, patch=pattern_only)
    torch.testing.assert_close(model.run(tokens, patch=pattern_only, logits_at="last")[0], everywhere[:, -1])


def test_after_a_prefix_attention_is_edited_where_it_was(model, tokens):
    edit = combine(attend_to(["a1.h1", "a2.h0"], at=AT, to=KEYS), swap_heads("a1.h0", "a1.h2", at=AT))
    whole, _ = model.run(tokens, patch=edit)
    _, cache = model.run(tokens, record=["k", "v", "resid_pre.1"])
    start = ResidualStart(Site("resid_pre", 1), cache["resid_pre", 1][:, 3:], Prefix.of(cache, 3, 3))
    resumed, _ = model.run(None, patch=edit, start=start, logits_at=AT)
    torch.testing.assert_close(resumed, whole[ROWS, AT])


def test_after_a_prefix_streams_are_edited_where_they_were(model, tokens):
    _, written = model.run(tokens.flip(0), record=["z.2", "resid_pre.2"])
    edit = combine(
        steer("resid_pre.2", torch.arange(12.0), at=AT),
        scale_heads({"a1.h1": 3.0}, at=AT),
        patch_from(written, "a2.h0", at=AT),
    )
    whole, _ = model.run(tokens, patch=edit)
    _, cache = model.run(tokens, record=["k", "v", "resid_pre.1"])
    start = ResidualStart(Site("resid_pre", 1), cache["resid_pre", 1][:, 3:], Prefix.of(cache, 3, 3))
    resumed, seen = model.run(None, record=["z.2"], patch=edit, start=start)
    torch.testing.assert_close(resumed[ROWS, AT - 3], whole[ROWS, AT])
    assert seen.first == 3
    again = patch_from(seen, "a2.h0", at=AT)  # what such a pass recorded is found where it was, too
    _, copied = model.run(tokens, record=["z.2"], patch=again)
    torch.testing.assert_close(copied["z", 2][ROWS, AT, 0], seen["z", 2][ROWS, AT - 3, 0])


def test_stacked_variants_take_repeated_positions(plain, tokens):
    edit = combine(attend_to("a1.h1", at=AT.repeat(2), to=KEYS.repeat(2, 1)), scale_heads({"a2.h0": 0.0}, at=AT.repeat(2)))
    alone = combine(attend_to("a1.h1", at=AT, to=KEYS), scale_heads({"a2.h0": 0.0}, at=AT))
    both, _ = plain.run(torch.cat([tokens, tokens.flip(1)]), patch=edit)
    for half, rows in zip(both.split(4), (tokens, tokens.flip(1)), strict=True):
        torch.testing.assert_close(half, plain.run(rows, patch=alone)[0])


def test_a_model_that_sees_both_ways_may_attend_to_what_comes_later(plain, tokens):
    at, later = torch.zeros(4, dtype=torch.long), torch.full((4, 1), 5)
    _, cache = bidirectional(plain).run(tokens, record=["z.1", "v.1"], patch=attend_to("a1.h0", at=at, to=later))
    assert torch.equal(cache["z", 1][:, 0, 0], cache["v", 1][:, 5, 0])


def test_gradients_flow_through_an_edited_pass(plain, tokens):
    direction = torch.zeros(12, dtype=torch.float64, requires_grad=True)
    logits, _ = plain.run(tokens, patch=combine(steer("resid_pre.0", direction), attend_to("a1.h0", at=AT, to=KEYS)))
    logits[..., 3].sum().backward()
    assert bool(direction.grad.abs().sum() > 0)


# What cannot be


@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        (attend_to("a1.h3", at=AT, to=KEYS), UnknownNode, "'a1.h3' is not in this model, whose layers have heads 0..2"),
        (look_away("a1.h9", at=None, from_=KEYS), UnknownNode, "'a1.h9' is not in this model"),
        (scale_heads({"a0.h0": 1.0, "a0.h7": 2.0}), UnknownNode, "'a0.h7' is not in this model"),
        (swap_heads("a0.h0", "a0.h4", what="z"), UnknownNode, "'a0.h4' is not in this model"),
        (attend_to("a7.h0", at=AT, to=KEYS), UnknownSite, "layer 7; the layers of plain run 0..2"),
        (attend_to("a1.h0", at=AT + 1, to=KEYS), ModelError, "positions 4..7 are wanted, and this pass has 0..6"),
        (attend_to("a1.h0", at=AT, to=KEYS + 5), ModelError, "positions 5..10 are wanted"),
        (look_away("a1.h0", at=AT, from_=KEYS - 1), ModelError, "positions -1..4 are wanted"),
        (scale_heads({"a1.h0": 2.0}, at=-AT), ModelError, "positions -6..-3 are wanted"),
        (steer("resid_pre.1", torch.ones(12), at=AT[:2]), ModelError, r"given for 2 prompts, and this pass has 4.*repeat"),
        (attend_to("a1.h0", at=AT[:1], to=KEYS[:1]), ModelError, "given for 1 prompts, and this pass has 4"),
        (
            attend_to("a1.h0", at=AT, to=torch.tensor([[2], [4], [0], [1]])),
            ModelError,
            r"prompt 1 is to attend from position 3 to \[4\], and a causal model sees no further",
        ),
        (steer("resid_pre.1", torch.ones(5)), ModelError, r"shape \(5,\), and a position of 'resid_pre.1' \(12,\)"),
    ],
)
def test_what_the_prompts_or_the_model_lack_is_said_in_the_pass(plain, tokens, edit, error, says):
    with pytest.raises(error, match=says):
        plain.run(tokens, patch=edit)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: attend_to("m1", at=AT, to=KEYS), UnknownNode, "'m1' is not a whole head"),
        (lambda: scale_heads({"a1.h0.q": 2.0}), UnknownNode, "'a1.h0.q' is not a whole head"),
        (lambda: scale_heads({"a1.g0.k": 2.0}), UnknownNode, "'a1.g0.k' is not.*heads of a group share is the site 'k.1'"),
        (lambda: swap_heads("a1.h0", "a2.h0"), UnknownNode, "cannot exchange their pattern: give two heads of one layer"),
        (lambda: swap_heads("a1.h0", "a1.h1", what="k"), UnknownNode, "cannot exchange their k"),
        (lambda: attend_to("a1.h0", at=AT, to=KEYS, share=1.5), ModelError, "share=1.5.*Give a share of 0..1"),
        (lambda: attend_to("a1.h0", at=AT, to=KEYS[:, :0]), ModelError, r"on \(4, 0\) positions"),
        (lambda: steer("pattern.1", torch.ones(7)), UnknownSite, "'pattern.1' holds no vector a position"),
        (lambda: steer("resid_pr.1", torch.ones(12)), UnknownSite, "names no site.*Did you mean 'resid_pre.0'"),
    ],
)
def test_what_means_nothing_is_said_at_once(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(
    ("given", "n_axes", "says"),
    [
        (AT, 2, r"shape \(4,\).*a row a prompt, such as prompts.end\[:, None\]"),
        (KEYS, 1, r"shape \(4, 2\).*a position a prompt, such as prompts.end"),
        (AT.float(), 1, "float32.*whole numbers"),
        ([1, 2], 1, r"given as \[1, 2\]"),
        (5, 1, "given as 5"),
    ],
)
def test_positions_of_another_form_are_refused(given, n_axes, says):
    with pytest.raises(ModelError, match=says):
        refuse_misshapen(given, n_axes)


def test_what_was_not_recorded_or_does_not_fit_cannot_be_patched_in(plain, tokens):
    _, cache = plain.run(tokens[:, :5], record=["z.1"])
    with pytest.raises(UnknownSite, match="did not record 'resid_pre.1'"):
        patch_from(cache, "resid_pre.1")
    with pytest.raises(ModelError, match=r"'z.1' was recorded as \(4, 5, 3, 5\) and is \(4, 7, 3, 5\) in this pass"):
        plain.run(tokens, patch=patch_from(cache, "z.1"))
    with pytest.raises(UnknownNode, match="'a1.h5' is not in this model"):
        plain.run(tokens[:, :5], patch=patch_from(cache, "a1.h5"))
