"""Attention patterns as pictures: what is drawn is what the model computes."""

import sys

import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp.errors import MechinterpError, TaskError, UnknownNode

TEXT = "Then, Mary and John met"


@pytest.fixture(scope="module")
def model():
    return mi.load("builtin")


@pytest.fixture(scope="module")
def pattern(model):
    tokens = torch.tensor([model.tokenizer.encode(TEXT)])
    return model.run(tokens, record=[mi.Site("pattern", 1)])[1]["pattern", 1][0, 3].detach().numpy()


def test_what_is_drawn_is_the_pattern(model, pattern, tmp_path):
    figure = mi.draw_patterns(model, TEXT, ["a1.h3", "a0.h0", "a1.h3"], tmp_path / "patterns.png")
    first, second, bar = figure.axes
    assert [first.get_title(), second.get_title()] == ["a1.h3", "a0.h0"]
    drawn = first.images[0].get_array()
    assert np.allclose(np.tril(np.ma.filled(drawn, 0)), np.tril(pattern), atol=1e-5)
    assert np.isnan(np.ma.filled(drawn, np.nan)[np.triu_indices(len(pattern), 1)]).all()
    assert [label.get_text() for label in first.get_yticklabels()] == ["<bos>", "Then", ",", "Mary", "and", "John", "met"]
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0, 1)
    assert bar.get_ylabel().startswith("share of attention")
    assert (tmp_path / "patterns.png").stat().st_size > 0


def test_token_ids_are_taken_as_they_are(model, pattern):
    ids = model.tokenizer.encode(TEXT)
    for prompt in (ids, torch.tensor(ids)):
        drawn = mi.draw_patterns(model, prompt, "a1.h3").axes[0].images[0].get_array()
        assert np.allclose(np.tril(np.ma.filled(drawn, 0)), np.tril(pattern), atol=1e-5)


def test_long_prompts_name_only_some_tokens(model):
    axes = mi.draw_patterns(model, [5] * 60, "a0.h0").axes[0]
    assert len(axes.get_yticklabels()) == 30


@pytest.mark.parametrize(
    ("heads", "message"),
    [("m0", "'m0' is not a whole head"), ("a0.h0.q", "not a whole head"), ("a9.h0", "layers run 0..3"), ([], "no heads")],
)
def test_what_has_no_attention_is_refused(model, heads, message):
    with pytest.raises(UnknownNode, match=message):
        mi.draw_patterns(model, TEXT, heads)


def test_a_file_that_is_no_picture_is_refused(model, tmp_path):
    with pytest.raises(TaskError, match="pictures are written as"):
        mi.draw_patterns(model, TEXT, "a0.h0", tmp_path / "patterns.txt")
    with pytest.raises(TaskError, match="write_html"):
        mi.draw_patterns(model, TEXT, "a0.h0", tmp_path / "patterns.png", interactive=True)
    with pytest.raises(TaskError, match="no tokens"):
        mi.draw_patterns(model, [], "a0.h0")


def test_an_interactive_figure_holds_the_same_numbers(model, pattern):
    pytest.importorskip("plotly")
    figure = mi.draw_patterns(model, TEXT, ["a1.h3", "a0.h0"], interactive=True)
    shown = np.asarray(figure.data[0].z, dtype=float)
    assert np.allclose(np.nan_to_num(shown), np.tril(pattern), atol=1e-5)
    assert figure.data[0].x[3] == "3 Mary"


def test_without_plotly_the_error_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(MechinterpError, match=r"pip install 'mechinterp-toolkit\[notebook\]'"):
        mi.draw_patterns(model, TEXT, "a0.h0", interactive=True)
