"""Scores of a prompt's tokens, the phrases they merge into, and the picture."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from mechinterp.attribution import Phrase, decompose
from mechinterp.decomposition.rule_sets import RULE_SETS
from mechinterp.errors import ModelError, TaskError
from mechinterp.models.load import load
from mechinterp.plots import draw_text

TEXT = "Then, Mary and John met at the park. John handed a ring to"


@pytest.fixture(scope="module")
def builtin():
    return load("builtin")


def logit_difference(model, tokens, answer, foil, embed=None):
    words = [model.tokenizer.single(word) for word in (answer, foil)]
    patch = {} if embed is None else {"resid_pre.0": lambda value, _: embed(value.clone())}
    logits, _ = model.run(tokens, logits_at="last", patch=patch)
    return float(logits[0, words[0]] - logits[0, words[1]])


@pytest.mark.parametrize("variant", ["builtin", "llama", "gemma2", "olmo2", "mpt"])
def test_exact_rules_are_the_effect_of_taking_a_word_away(builtin, make_model, variant):
    model = builtin
    if variant != "builtin":
        model = replace(make_model(variant, d_vocab=builtin.config.d_vocab, n_ctx=30), tokenizer=builtin.tokenizer)
    tokens = torch.tensor([model.tokenizer.encode(TEXT)])
    found = decompose(model, TEXT, answer=" Mary", foil=" John", rules="exact")
    clean = logit_difference(model, tokens, " Mary", " John")
    assert found.difference == pytest.approx(clean, abs=1e-4)
    weights, scale = model.weights, model.config.embed_scale or 1.0
    for at in (3, 5, 11):

        def without(stream, at=at):
            stream[:, at] = weights.W_E.mean(0) * scale + (0 if weights.W_pos is None else weights.W_pos[at])
            return stream

        fall = clean - logit_difference(model, tokens, " Mary", " John", without)
        assert found.scores[at] == pytest.approx(fall, abs=1e-3)


def test_zero_takes_the_position_away_as_well(builtin):
    mean, zero = (decompose(builtin, TEXT, baseline=baseline) for baseline in ("mean", "zero"))
    assert not np.allclose(mean.scores, zero.scores)
    assert zero.settings == {"rules": "tail", "baseline": "zero"}


def test_nobody_named_is_the_likeliest_against_the_runner_up(builtin):
    found = decompose(builtin, TEXT)
    assert (found.answer, found.foil) == (" Mary", " John")
    assert found.tokens[3] == " Mary"
    assert found.strongest(2)[0][0] == " Mary"
    assert "' Mary' against ' John': +" in str(found)
    alone = decompose(builtin, TEXT, answer=" Mary")
    assert alone.foil is None
    assert "against" not in str(alone)


def test_bos_is_as_asked(builtin):
    with_bos, without = (decompose(builtin, TEXT, bos=bos) for bos in (True, False))
    assert len(with_bos.tokens) == len(without.tokens) + 1


def test_linear_rules_add_up_over_phrases_and_others_do_not(builtin):
    for rules, adds in (("linear", True), ("tail", False)):
        found = decompose(builtin, TEXT, rules=rules, phrases=True)
        sums = [float(found.scores[p.start : p.stop].sum()) - p.score for phrases in found.rounds for p in phrases]
        assert (max(map(abs, sums)) < 1e-3) == adds


def test_phrases_grow_from_the_strongest_tokens_until_all_are_in(builtin):
    found = decompose(builtin, TEXT, phrases=True, percentile=60.0, max_rounds=50)
    strong = np.abs(found.scores) >= np.percentile(np.abs(found.scores), 60)
    inside = [{at for phrase in phrases for at in range(phrase.start, phrase.stop)} for phrases in found.rounds]
    assert inside[0] == set(np.flatnonzero(strong).tolist())
    assert all(before < after for before, after in itertools.pairwise(inside))
    (whole,) = found.rounds[-1]
    assert (whole.start, whole.stop) == (0, len(found.tokens))
    assert whole.text.endswith("a ring to")
    assert len(decompose(builtin, TEXT, phrases=True, max_rounds=2).rounds) == 2


def test_phrases_of_ones_own_are_scored_as_one_source(builtin):
    found = decompose(builtin, TEXT, phrases=["Mary and John", " ring to", "handed"], rules="linear")
    ((names, handed, end),) = found.rounds
    assert (names.text, handed.text, end.text) == (" Mary and John", " handed", " ring to")
    assert names.score == pytest.approx(found.scores[3:6].sum(), abs=1e-3)
    assert end.stop == len(found.tokens)
    with pytest.raises(TaskError, match="'Mary or John' is not in the text"):
        decompose(builtin, TEXT, phrases=["Mary or John"])


@pytest.mark.parametrize("rules", RULE_SETS)
def test_every_rule_set_reads_text(builtin, rules):
    assert np.isfinite(decompose(builtin, TEXT, rules=rules).scores).all()


def test_what_is_saved_is_everything(builtin, tmp_path):
    found = decompose(builtin, TEXT, phrases=True)
    found.save(tmp_path / "tokens.json")
    saved = json.loads((tmp_path / "tokens.json").read_text(encoding="utf-8"))
    assert saved["tokens"] == list(found.tokens)
    assert saved["scores"] == pytest.approx(found.scores.tolist())
    assert Phrase(**saved["rounds"][0][0]) == found.rounds[0][0]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_picture_shows_every_token_and_score(builtin, tmp_path, suffix):
    found = decompose(builtin, TEXT + " the $5_ park, and" * 8, phrases=True)  # several lines, and signs of mathematics
    path = tmp_path / f"tokens.{suffix}"
    figure = found.draw(path)
    assert path.stat().st_size > 2000
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert sum(text == "Mary" for text in shown) == 1 + len(found.rounds)
    assert f"{found.scores[4]:+.2f}" in shown
    boxes = [patch.get_bbox() for patch in figure.axes[0].patches]
    width, height = figure.get_size_inches()
    assert all(0 <= box.x0 < box.x1 <= width and 0 <= box.y0 < box.y1 <= height for box in boxes)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"answer": " Mary and"}, TaskError, "the answer ' Mary and' is 2 tokens in .*Mind the leading space"),
        ({"foil": " John"}, TaskError, "needs another answer to stand against"),
        ({"baseline": "men"}, TaskError, "no baseline 'men'; there are mean, zero.*Did you mean 'mean'"),
        ({"rules": "tial"}, ModelError, "no rule set 'tial'.*Did you mean 'tail'"),
        ({"phrases": True, "percentile": 100.0}, TaskError, "percentile=100.0 keeps no token"),
    ],
)
def test_what_cannot_be_is_said(builtin, settings, error, says):
    with pytest.raises(error, match=says):
        decompose(builtin, TEXT, **settings)


def test_an_empty_text_and_a_model_without_tokenizer_are_refused(builtin, plain):
    with pytest.raises(TaskError, match="no tokens"):
        decompose(builtin, "")
    with pytest.raises(TaskError, match="has no tokenizer"):
        decompose(plain, TEXT)


def test_another_suffix_is_no_picture(builtin, tmp_path):
    with pytest.raises(TaskError, match="written as .png, .svg, .pdf"):
        draw_text(decompose(builtin, TEXT), tmp_path / "tokens.jpg")
    assert not list(tmp_path.iterdir())
