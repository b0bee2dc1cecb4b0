"""Attention sinks: planted ones are found, and calibration takes from them exactly what it says."""

from dataclasses import replace

import pytest
import torch

import mechinterp as mi
from mechinterp.errors import ModelError, UnknownNode
from mechinterp.generation import generate
from mechinterp.interventions import combine, look_away, scale_heads, steer
from mechinterp.models.compiled import indirect_object
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node
from mechinterp.sinks import calibrate, find_sinks, resting
from mechinterp.tasks import TASKS

ENDS = torch.tensor([6, 5, 6, 4])


@pytest.fixture(scope="module")
def planted():
    return indirect_object()


@pytest.fixture(scope="module")
def builtin():
    return mi.load("builtin")


def by_hand(model, row: torch.Tensor, layer: int, head: int, key: int) -> tuple[float, float, float]:
    """What a position of one unpadded prompt receives, its chance, and its value against the others'."""
    _, cache = model.run(row[None], record=["pattern", "v"])
    window = model.config.window_of(layer) or len(row)
    asked = [query for query in range(len(row)) if key < query < key + window]
    received = sum(float(cache["pattern", layer][0, head, query, key]) for query in asked) / len(asked)
    norms = cache["v", layer][0, :, model.config.group_of(head)].norm(dim=-1).tolist()
    others = [norm for place, norm in enumerate(norms) if place != key]
    return received, sum(1 / min(query + 1, window) for query in asked) / len(asked), norms[key] / (sum(others) / len(others))


def test_what_a_position_receives_is_the_mean_over_the_queries_after_it(model, tokens):
    sinks = find_sinks(model, tokens, ends=ENDS, min_queries=2, batch_size=3)
    for prompt, end in enumerate(ENDS.tolist()):
        for key in range(7):
            if key + 2 > end:
                assert bool(sinks.received[:, :, prompt, key].isnan().all())
                continue
            for layer in (1, 2):
                received, chance, norm = by_hand(model, tokens[prompt, : end + 1], layer, 2, key)
                assert float(sinks.received[layer, 2, prompt, key]) == pytest.approx(received)
                assert float(sinks.chance[layer, prompt, key]) == pytest.approx(chance)
                assert float(sinks.value_norms[layer, 2, prompt, key]) == pytest.approx(norm)


@pytest.mark.parametrize("variant", ["plain", "llama", "gemma2"])
def test_even_attention_is_chance(variant, make_model, tokens):
    model = make_model(variant)
    silent = {"attn_scores": lambda scores, _: torch.where(scores.isinf(), scores, 0.0)}

    class Even(Transformer):
        def run(self, tokens, **settings):
            return Transformer.run(self, tokens, **settings, patch=silent)

    sinks = find_sinks(Even(model.weights), tokens, ends=ENDS, min_queries=2)
    counted = ~sinks.chance.isnan()
    assert bool(counted.any((1, 2)).all())
    for layer in range(3):
        received, chance = sinks.received[layer][:, counted[layer]], sinks.chance[layer][counted[layer]]
        torch.testing.assert_close(received, chance.expand(model.config.n_heads, -1))


def test_a_model_that_sees_both_ways_is_asked_from_both_sides(plain, tokens):
    both = Transformer(replace(plain.weights, config=replace(plain.config, causal=False)))
    sinks = find_sinks(both, tokens, min_queries=6)
    _, cache = both.run(tokens, record=["pattern.0"])
    to_last = cache["pattern", 0][:, :, :6, 6].mean(-1)
    torch.testing.assert_close(sinks.received[0, ..., 6], to_last.T)
    torch.testing.assert_close(sinks.chance, torch.full((3, 4, 7), 1 / 7, dtype=torch.float64))


def test_the_planted_head_rests_on_the_first_word(planted):
    """The duplicate-token head of the hand-set model attends to the first word, whose value is 0, unless a name repeats."""
    sinks = find_sinks(planted.model, planted.task)
    duplicate = Node.parse(planted.roles["duplicate"])
    assert duplicate in sinks.heads(sinks.first)
    assert duplicate not in sinks.heads(sinks.later)
    row = next(row for row in sinks.table() if row.is_first)
    assert (row.token, row.kind, row.n_occurrences) == ("Then", "word", 32)
    assert duplicate in row.heads
    assert row.share > 0.5
    assert row.value_norm < 0.01


def test_the_builtin_model_rests_on_bos_and_on_line_breaks(builtin):
    sinks = find_sinks(builtin, TASKS["colored-objects"](builtin, 40))
    kinds = {(row.kind, row.is_first): row for row in sinks.table()}
    assert kinds["BOS", True].value_norm < 0.5
    assert kinds["newline", False].value_norm < 0.5
    assert kinds["newline", False].times_chance > 10
    assert not (sinks.first & sinks.later).any()
    assert torch.equal(sinks.first | sinks.later, sinks.mask)
    assert 0 < sinks.rate(0) < 0.5
    shown = str(sinks)
    assert "'<bos>'      BOS          first" in shown
    assert r"'\n'" in shown


def test_small_values_tell_a_sink_from_what_is_read(builtin):
    """In short prompts many heads attend to a name all along; they read it, and its value is as large as any."""
    task = TASKS["ioi"](builtin, 40)
    any_value = find_sinks(builtin, task, max_value_norm=torch.inf)
    small = find_sinks(builtin, task)
    assert torch.equal(small.mask, any_value.mask & (any_value.value_norms < 1))
    assert len(small.heads()) < len(any_value.heads())
    assert " and" in {row.token for row in any_value.table()} - {row.token for row in small.table()}


def test_a_lower_threshold_finds_more(plain, tokens):
    few, many = (find_sinks(plain, tokens, threshold=threshold).mask for threshold in (0.4, 0.1))
    assert not (few & ~many).any()
    assert few.sum() < many.sum()


# Calibration


@pytest.fixture(scope="module")
def mask() -> torch.Tensor:
    """Two sinks in most prompts, and one prompt without."""
    mask = torch.zeros(4, 7, dtype=torch.bool)
    mask[torch.tensor([0, 0, 1, 1, 3]), torch.tensor([0, 3, 0, 1, 2])] = True
    return mask


def test_what_is_taken_from_sinks_goes_to_the_others_in_proportion(model, tokens, mask):
    _, clean = model.run(tokens, record=["pattern"])
    _, cache = model.run(tokens, record=["pattern"], patch=calibrate(["a1.h2", "a1.h0"], mask, keep=0.3))
    for prompt in range(4):
        for query in range(7):
            before, after = clean["pattern", 1][prompt, 2, query], cache["pattern", 1][prompt, 2, query]
            torch.testing.assert_close(after.sum(), torch.ones_like(after.sum()))
            rest = ~mask[prompt, : query + 1]
            if not rest.any():
                assert torch.equal(after, before)
                continue
            sinks, others = before[: query + 1][~rest], before[: query + 1][rest]
            torch.testing.assert_close(after[: query + 1][~rest], 0.3 * sinks)
            torch.testing.assert_close(after[: query + 1][rest], others * (1 - 0.3 * sinks.sum()) / others.sum())
    assert torch.equal(cache["pattern", 1][:, 1], clean["pattern", 1][:, 1])
    assert torch.equal(cache["pattern", 0], clean["pattern", 0])


def test_keeping_all_changes_nothing_and_keeping_nothing_is_looking_away(model, tokens, mask):
    heads = ["a1.h2", "a2.h0"]
    clean, _ = model.run(tokens)
    torch.testing.assert_close(model.run(tokens, patch=calibrate(heads, mask, keep=1.0))[0], clean)
    first = torch.zeros_like(mask)
    first[:, 0] = True
    none = calibrate(heads, first, keep=0.0, at=ENDS)
    away = look_away(heads, at=ENDS, from_=torch.zeros(4, 1, dtype=torch.long))
    torch.testing.assert_close(model.run(tokens, patch=none)[0], model.run(tokens, patch=away)[0])
    _, cache = model.run(tokens, record=["pattern.1"], patch=calibrate(heads, first, keep=0.0))
    assert not cache["pattern", 1][:, 2, 1:, 0].any()
    assert bool((cache["pattern", 1][:, 2, 0, 0] == 1).all())  # the first position has nowhere else to look


def test_gradients_stay_finite_where_a_row_has_nothing_elsewhere(plain, tokens, mask):
    first = torch.zeros_like(mask)
    first[:, 0] = True
    direction = torch.zeros(12, dtype=torch.float64, requires_grad=True)
    edits = [calibrate("a1.h2", first, keep=0.0), look_away("a1.h1", at=None, from_=torch.zeros(4, 1, dtype=torch.long))]
    plain.run(tokens, patch=combine(steer("resid_pre.0", direction), *edits))[0].square().sum().backward()
    assert bool(direction.grad.isfinite().all())
    assert bool(direction.grad.abs().sum() > 0)


def test_each_head_may_have_sinks_of_its_own(plain, tokens, mask):
    own = torch.zeros(3, 3, 4, 7, dtype=torch.bool)
    own[1, 0], own[1, 2], own[2, 1] = mask, mask.roll(1, 0), mask
    together, _ = plain.run(tokens, patch=calibrate(["a1.h2", "a1.h0", "a2.h1"], own, keep=0.2))
    one_by_one = combine(
        calibrate("a1.h0", mask, keep=0.2),
        calibrate(Node.head(1, 2), mask.roll(1, 0), keep=0.2),
        calibrate("a2.h1", mask, keep=0.2),
    )
    torch.testing.assert_close(together, plain.run(tokens, patch=one_by_one)[0])
    assert resting(own[:, :, :2]) == (Node.head(1, 0), Node.head(1, 2), Node.head(2, 1))


def test_calibration_goes_on_while_text_grows(make_model, tokens, mask):
    model = make_model(n_ctx=12)
    edit = combine(calibrate(["a0.h0", "a2.h1"], mask, keep=0.0), scale_heads({"a1.h1": 2.0}))
    written = generate(model, tokens, 3, patch=edit)
    longer = calibrate(["a0.h0", "a2.h1"], torch.nn.functional.pad(mask, (0, 2)), keep=0.0)
    text = torch.cat([tokens, written[:, :2]], 1)
    logits, _ = model.run(text, patch=combine(longer, scale_heads({"a1.h1": 2.0})))
    assert torch.equal(logits[:, -1].argmax(-1), written[:, 2])


def test_what_cannot_be_calibrated_is_said(plain, tokens, mask):
    with pytest.raises(ModelError, match="keep=1.5 is no share"):
        calibrate("a0.h0", mask, keep=1.5)
    with pytest.raises(UnknownNode, match="'m1' is not a whole head"):
        calibrate("m1", mask)
    with pytest.raises(ModelError, match="marked in 2 prompts of 7 positions; this pass has 4 of 7"):
        plain.run(tokens, patch=calibrate("a0.h0", mask[:2]))
    with pytest.raises(ModelError, match="marked for 2 layers of 2 heads, not for 'a2.h0'"):
        plain.run(tokens, patch=calibrate("a2.h0", mask.expand(2, 2, -1, -1)))
    with pytest.raises(UnknownNode, match="'a1.h8' is not in this model"):
        plain.run(tokens, patch=calibrate("a1.h8", mask))
    with pytest.raises(ModelError, match="no position has min_queries=9 queries after it: the longest prompt has 7 tokens"):
        find_sinks(plain, tokens, min_queries=9)
