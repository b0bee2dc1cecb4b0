"""A sweep over sparsities and seeds: what is trained, what is taken up again, and what the table and picture show."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mechinterp.errors import SAEError
from saes.activations import of_rows
from saes.base import SparseAutoencoder
from saes.frontier import Frontier, Point, trace_frontier
from saes.places import Place
from saes.report import evaluate
from saes.settings import TrainSettings

PLACES = (Place.parse("z.0.h1"), Place.parse("z.2.h0"))
SWEEP = {"topk": [1, 4], "relu": [0.5]}
BASE = TrainSettings(d_sae=8, k=2, n_rows=64, batch_size=32)


@pytest.fixture(scope="module")
def activations():
    return of_rows(torch.randn(40, 2, 5, generator=torch.Generator().manual_seed(0)), PLACES)


@pytest.fixture
def trained():
    return []


@pytest.fixture
def train(trained):
    """A trainer that takes no time, and remembers what it was asked for."""

    def untrained(activations, settings):
        trained.append((settings.architecture, settings.k if settings.counts else settings.sparsity, settings.seed))
        k = {"k": settings.k} if settings.counts else {}
        kind = settings.architecture
        return SparseAutoencoder.random(activations.places, d_in=5, d_sae=settings.d_sae, kind=kind, seed=settings.seed, **k)

    return untrained


def test_every_setting_is_trained_with_every_seed(activations, plain, tokens, train, trained):
    found = trace_frontier(activations, (plain, tokens), SWEEP, base=BASE, seeds=(3, 5), train=train)
    assert trained == [("topk", 1, 3), ("topk", 1, 5), ("topk", 4, 3), ("topk", 4, 5), ("relu", 0.5, 3), ("relu", 0.5, 5)]
    assert found.places == ("z.0.h1", "z.2.h0", "all")
    assert (found.architectures, found.seeds, found.model, found.d_sae) == (("topk", "relu"), (3, 5), "plain", 8)
    assert len(found.points) == 6 * 3
    relu = replace(BASE, architecture="relu")
    by_hand = evaluate(plain, train(activations, relu), tokens)
    assert set(vars(found.points[0])) - {"architecture", "setting", "seed"} <= set(by_hand.rows()[0])


def test_a_function_may_measure(activations, plain, tokens, train):
    ours = trace_frontier(activations, lambda found: evaluate(plain, found, tokens), SWEEP, base=BASE, seeds=(0,), train=train)
    theirs = trace_frontier(activations, (plain, tokens), SWEEP, base=BASE, seeds=(0,), train=train)
    assert str(ours) == str(theirs)


def test_an_interrupted_sweep_goes_on(activations, plain, tokens, train, trained, tmp_path):
    def interrupted(given, settings):
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(given, settings)

    def sweep(how, **changes):
        given = {"base": BASE, "seeds": (0, 1), "directory": tmp_path / "sweep"} | changes
        return trace_frontier(activations, (plain, tokens), SWEEP, train=how, **given)

    with pytest.raises(KeyboardInterrupt):
        sweep(interrupted)
    assert len(list((tmp_path / "sweep").glob("*.json"))) == 3
    whole = sweep(train)
    assert len(trained) == 6
    again = sweep(train)
    assert len(trained) == 6
    assert str(again) == str(whole) == str(sweep(train, directory=None))
    (tmp_path / "sweep" / "topk-1-seed0.json").unlink()
    assert str(sweep(train)) == str(whole)


def test_runs_of_another_sweep_are_not_taken_for_ones_own(activations, plain, tokens, train, tmp_path):
    def sweep(**changes):
        given = {"base": BASE, "measure": (plain, tokens)} | changes
        return trace_frontier(activations, sweep={"topk": [2]}, seeds=(0,), directory=tmp_path, train=train, **given)

    sweep()
    with pytest.raises(SAEError, match="topk-2-seed0.json' is of another sweep: its settings differ"):
        sweep(base=replace(BASE, lr=0.5))
    with pytest.raises(SAEError, match="its measured_on differ"):
        sweep(measure=(plain, tokens.flip(0)))


def point(setting, seed, l0, share):
    return Point("relu", setting, seed, "all", l0, share, share - 0.5, share, share, 0.1, 0.0)


@pytest.fixture
def drawn():
    points = [point(1.0, seed, 20.0 + seed, share) for seed, share in enumerate((0.7, 0.9, 0.8))]
    points += [point(4.0, seed, 5.0, share) for seed, share in enumerate((0.4, math.nan, 0.5))]
    points += [point(9.0, seed, 2.0, math.nan) for seed in range(3)]
    return Frontier("toy", 64, tuple(points))


def test_a_line_is_medians_and_ends_over_seeds_sparsest_first(drawn):
    line = drawn.line("relu")
    assert line.settings == (9.0, 4.0, 1.0)
    np.testing.assert_allclose(line.l0, [2, 5, 21])
    np.testing.assert_allclose(line.middle, [math.nan, 0.45, 0.8])
    np.testing.assert_allclose(line.low, [math.nan, 0.4, 0.7])
    np.testing.assert_allclose(line.high, [math.nan, 0.5, 0.9])


def test_the_table_has_a_line_a_setting(drawn):
    lines = drawn.table().splitlines()
    assert lines[0] == "toy, all places at once, 64 latents; median of 3 seeds [lowest, highest]"
    assert lines[-1].startswith("| relu | 1 | 21 [20, 22] | 0.8 [0.7, 0.9] | 0.3 [0.2, 0.4] |")
    assert "undefined" in lines[-3]


def test_what_is_saved_is_read_back(drawn, tmp_path):
    drawn.save(tmp_path / "frontier.json")
    again = Frontier.load(tmp_path / "frontier.json")
    assert again.points[0] == drawn.points[0]
    assert str(again) == str(drawn)
    (tmp_path / "frontier.json").write_text('{"format": "mechinterp autoencoder frontier", "version": 1}', encoding="utf-8")
    with pytest.raises(SAEError, match="does not hold a usable frontier"):
        Frontier.load(tmp_path / "frontier.json")


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_picture_has_a_panel_a_measure_and_a_line_an_architecture(drawn, tmp_path, suffix):
    path = tmp_path / f"frontier.{suffix}"
    figure = drawn.draw(path)
    assert path.stat().st_size > 2000
    assert [axes.get_ylabel() for axes in figure.axes] == ["CE recovered (mean ablation)", "explained variance"]
    for axes in figure.axes:
        assert axes.get_xscale() == "log"
        (line,) = [line for line in axes.lines if line.get_label() == "relu"]
        np.testing.assert_allclose(line.get_xdata(), [2, 5, 21])
    assert len(drawn.draw(measures=("dead_share",)).axes) == 1


def test_what_cannot_be_swept_or_shown_is_said(activations, plain, tokens, train, drawn, tmp_path):
    for sweep, says in (({"topk": []}, "one setting for each"), ({"topk": [1.5]}, "whole numbers, not 1.5")):
        with pytest.raises(SAEError, match=says):
            trace_frontier(activations, (plain, tokens), sweep, base=BASE, train=train)
    with pytest.raises(SAEError, match="no 'rleu' in this frontier.*Did you mean 'relu'"):
        drawn.line("rleu")
    with pytest.raises(SAEError, match="no 'ce_recovered' in this frontier.*Did you mean"):
        drawn.draw(measures=("ce_recovered",))
    with pytest.raises(SAEError, match="nothing was measured at 'z.0'"):
        drawn.table("z.0")
    with pytest.raises(SAEError, match="written as .png, .svg, .pdf"):
        drawn.draw(tmp_path / "frontier.jpg")
