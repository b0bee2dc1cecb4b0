"""Text that a model writes on: the plain loop, with padding, draws and interventions."""

import pytest
import torch

import mechinterp as mi
from mechinterp.errors import ModelError, TaskError
from mechinterp.generation import generate
from mechinterp.interventions import attend_to, combine, patch_from, scale_heads, steer

ENDS = torch.tensor([6, 3, 5, 2])


@pytest.fixture(scope="module")
def builtin():
    return mi.load("builtin")


@pytest.fixture(scope="module")
def long(make_model):
    return make_model(n_ctx=16)


def by_hand(model, text: list[int], n_new: int, patch=None) -> list[int]:
    """One prompt, no padding, the likeliest token of the last row again and again."""
    for _ in range(n_new):
        logits, _ = model.run(torch.tensor([text]), patch=patch)
        text = [*text, int(logits[0, -1].argmax())]
    return text[-n_new:]


def test_the_likeliest_token_again_and_again(long, tokens):
    assert generate(long, tokens, 5).tolist() == [by_hand(long, row, 5) for row in tokens.tolist()]


def test_a_padded_prompt_goes_on_as_if_it_were_alone(model, tokens):
    alone = [by_hand(model, row[: end + 1], 2) for row, end in zip(tokens.tolist(), ENDS.tolist(), strict=True)]
    assert generate(model, tokens, 2, ends=ENDS).tolist() == alone


def test_an_intervention_is_in_force_at_every_step(long, tokens):
    """Heads are silenced where the text grows, too; rows are rewritten where they were."""
    silenced = scale_heads({"a1.h0": 0.0, "a2.h1": -3.0})
    assert generate(long, tokens, 5, patch=silenced).tolist() == [by_hand(long, row, 5, silenced) for row in tokens.tolist()]
    assert generate(long, tokens, 5, patch=silenced).tolist() != generate(long, tokens, 5).tolist()

    def edit(rows: slice) -> dict:
        here = {"at": ENDS[rows], "to": torch.zeros(4, 1, dtype=torch.long)[rows]}
        direction = 4 * torch.randn(12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        return combine(attend_to(["a0.h0", "a2.h2"], **here), steer("resid_post.1", direction, at=ENDS[rows]))

    alone = [by_hand(long, tokens[i, : int(ENDS[i]) + 1].tolist(), 4, edit(slice(i, i + 1))) for i in range(len(tokens))]
    assert generate(long, tokens, 4, ends=ENDS, patch=edit(slice(None))).tolist() == alone
    assert generate(long, tokens, 4, ends=ENDS).tolist() != alone


def test_what_another_pass_recorded_stands_in_while_the_text_grows(long, tokens):
    _, cache = long.run(tokens.flip(0), record=["resid_post.2"])
    last = torch.full((4,), 6)
    grown = generate(long, tokens, 3, patch=patch_from(cache, "resid_post.2", at=last))
    assert torch.equal(grown[:, 0], generate(long, tokens.flip(0), 1)[:, 0])


def test_tokens_are_drawn_by_their_probabilities(plain, tokens):
    n, temperature = 4000, 2.0
    drawn = generate(plain, tokens[:1].expand(n, -1), 1, temperature=temperature, seed=1)[:, 0]
    wanted = (plain.run(tokens[:1])[0][0, -1] / temperature).softmax(-1)
    seen = torch.bincount(drawn, minlength=23) / n
    assert bool(((seen - wanted).abs() < 5 * (wanted * (1 - wanted) / n).sqrt() + 1e-3).all())


def test_a_seed_draws_the_same_text_again(plain, tokens):
    one, again, other = (generate(plain, tokens, 2, temperature=3.0, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(generate(plain, tokens, 2, temperature=1e-6), generate(plain, tokens, 2))


def test_text_goes_in_and_text_comes_out(builtin):
    text = "Then, Mary and John met at the park. John handed a ring to"
    ids = builtin.tokenizer.encode(text)
    assert generate(builtin, text, 4) == builtin.tokenizer.decode(by_hand(builtin, ids, 4))
    assert generate(builtin, text, 1) == " Mary"
    john = torch.tensor([[ids.index(builtin.tokenizer.single(" John"))]])
    heads = [f"a{layer}.h{head}" for layer in (2, 3) for head in range(8)]
    at = torch.tensor([len(ids) - 1])
    assert generate(builtin, text, 1, patch=attend_to(heads, at=at, to=john)) == " John"


def test_no_new_tokens_are_no_tokens(plain, tokens):
    assert generate(plain, tokens, 0).shape == (4, 0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"n_new": 3}, "3 tokens after 7 make 10, and plain reads 9. Ask for at most 2"),
        ({"n_new": -1}, "n_new=-1"),
        ({"n_new": 1, "temperature": -1.0}, "temperature=-1.0"),
        ({"n_new": 1, "temperature": float("nan")}, "temperature=nan"),
        ({"n_new": 1, "ends": torch.tensor([6, 7, 1, 1])}, r"cannot end at \[6, 7, 1, 1\]"),
        ({"n_new": 1, "ends": torch.tensor([6, -1, 1, 1])}, r"cannot end at \[6, -1, 1, 1\]"),
    ],
)
def test_what_cannot_be_written_is_said(plain, tokens, settings, says):
    with pytest.raises(ModelError, match=says):
        generate(plain, tokens, **settings)


@pytest.mark.parametrize(("prompts", "says"), [(["Then"], "given as list"), (torch.tensor([1, 2]), r"shape \(2,\)")])
def test_prompts_are_one_text_or_rows_of_tokens(plain, prompts, says):
    with pytest.raises(ModelError, match=says):
        generate(plain, prompts, 1)


def test_padding_is_refused_where_it_would_be_read(make_model, tokens):
    model = make_model(causal=False)
    assert generate(model, tokens, 1).shape == (4, 1)
    with pytest.raises(ModelError, match="not causal.*prompts of one length"):
        generate(model, tokens, 1, ends=ENDS)


def test_a_text_needs_a_tokenizer_and_a_word(plain, builtin):
    with pytest.raises(TaskError, match="has no tokenizer"):
        generate(plain, "Then", 1)
    with pytest.raises(ModelError, match="Give prompts of at least one token"):
        generate(builtin, torch.zeros(2, 0, dtype=torch.long), 1)
