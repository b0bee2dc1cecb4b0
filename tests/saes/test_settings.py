"""What is asked of a training: defaults that follow from others, schedules, and refusals that say what would be right."""

import itertools
import json
import subprocess
import sys
from dataclasses import fields

import pytest

from mechinterp.errors import SAEError
from saes.objectives import OBJECTIVES
from saes.settings import ARCHITECTURES, COUNTING, TrainSettings


def test_every_architecture_has_an_objective_and_the_other_way_round():
    assert set(ARCHITECTURES) == set(OBJECTIVES)


@pytest.mark.parametrize(
    "settings", [TrainSettings(), TrainSettings("matryoshka", d_sae=8, k=2, prefixes=(2, 8), betas=(0.0, 0.9))]
)
def test_settings_survive_json(settings):
    assert TrainSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert set(settings.to_dict()) == {one.name for one in fields(TrainSettings)}


def test_counts_written_as_powers_of_ten_are_whole_numbers_and_others_are_refused():
    """In a process of its own: the test run's annotation checks would refuse a float before the settings see it."""
    code = """
from mechinterp.errors import SAEError
from saes.settings import TrainSettings
settings = TrainSettings(n_rows=2e6, batch_size=1e3, dead_after=1e5)
print(repr((settings.n_rows, settings.n_steps, settings.dead_after)))
for given in ({"d_sae": 10.5}, {"n_rows": float("nan")}, {"batch_size": True}, {"k": "many"}, {"betas": (0.9,)}):
    try:
        TrainSettings(**given)
    except SAEError as problem:
        print(problem)
"""
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == [
        "(2000000, 2000, 100000)",
        "d_sae=10.5 must be a whole number.",
        "n_rows=nan must be a whole number.",
        "batch_size=True must be a whole number.",
        "k='many' must be a whole number.",
        "betas=(0.9,) must be Adam's two, each at least 0 and less than 1.",
    ]


def test_the_learning_rate_rises_rests_and_falls_and_is_never_zero():
    settings = TrainSettings(n_rows=1000, batch_size=10, lr=0.5, warm_up=0.1, decay=0.2)
    rates = [settings.learning_rate(step) for step in range(settings.n_steps)]
    assert rates[0] == pytest.approx(0.5 / 11)
    assert rates[10:80] == [0.5] * 70
    assert rates[9] < 0.5
    assert rates[80] < 0.5
    assert rates[-1] == pytest.approx(0.5 / 21)
    steps = [later - earlier for earlier, later in itertools.pairwise(rates)]
    assert steps[:10] == pytest.approx([0.5 / 11] * 10)
    assert steps[79:] == pytest.approx([-0.5 / 21] * 20)


@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (0.5, 0.5)])
def test_any_shares_give_rates_between_zero_and_lr(shares):
    settings = TrainSettings(n_rows=70, batch_size=10, lr=0.5, warm_up=shares[0], decay=shares[1])
    assert all(0 < settings.learning_rate(step) <= 0.5 for step in range(7))
    assert [settings.weight(step) for step in range(7)] == sorted(settings.weight(step) for step in range(7))


def test_sparsity_warms_up_with_the_learning_rate_and_stays():
    settings = TrainSettings("relu", n_rows=1000, batch_size=10, lr=1.0, sparsity=3.0, warm_up=0.1)
    assert [settings.weight(step) for step in range(10)] == pytest.approx(
        [3 * settings.learning_rate(step) for step in range(10)]
    )
    assert {settings.weight(step) for step in range(10, 100)} == {3.0}


def test_the_last_incomplete_batch_is_not_trained_on():
    assert TrainSettings(n_rows=1099, batch_size=100).n_steps == 10


@pytest.mark.parametrize(("n_rows", "idle_rows"), [(10_000_000, 200_000), (2_000_000, 200_000), (50_000, 5_000), (1024, 102)])
def test_latents_are_dead_after_a_tenth_of_a_short_training(n_rows, idle_rows):
    assert TrainSettings(n_rows=n_rows).idle_rows == idle_rows
    assert TrainSettings(n_rows=n_rows, dead_after=7).idle_rows == 7


def test_revival_follows_the_architecture_unless_it_is_given():
    assert {name: TrainSettings(name).revival for name in ARCHITECTURES} == {
        name: "aux" if name in COUNTING else "resample" for name in ARCHITECTURES
    }
    assert TrainSettings("topk", revive="none").revival == "none"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"architecture": "top_k"}, "architecture cannot be 'top_k'; it is one of relu.* Did you mean 'topk'?"),
        ({"precision": "float16"}, "precision cannot be 'float16'; it is one of float32, bfloat16"),
        ({"revive": "auxk"}, "revive cannot be 'auxk'; it is one of aux, resample, none. Did you mean 'aux'?"),
        ({"architecture": "topk", "decoder": "free"}, "use decoder='unit'"),
        ({"d_sae": 0}, "d_sae=0 must be greater than 0"),
        ({"lr": float("nan")}, "lr=nan must be greater than 0"),
        ({"dead_after": 0}, "dead_after=0 must be greater than 0, or None"),
        ({"clip": 0.0}, "clip=0.0 must be greater than 0, or None"),
        ({"sparsity": -1.0}, "sparsity=-1.0 must not be negative"),
        ({"sparsity": float("nan")}, "sparsity=nan must not be negative"),
        ({"betas": (0.9, 1.0)}, "betas=.* each at least 0 and less than 1"),
        ({"n_rows": 100}, "n_rows=100 is less than one batch of 1024. Train on more, or lower batch_size"),
        ({"warm_up": 0.8, "decay": 0.3}, "together at most 1"),
        ({"k": 2000}, "k=2000 of d_sae=1024 latents cannot be active. Give k <= d_sae"),
        ({"prefixes": (4, 2)}, "must grow and end with d_sae=1024"),
        ({"prefixes": (4, 512)}, "must grow and end with d_sae=1024"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(given, message):
    with pytest.raises(SAEError, match=message):
        TrainSettings(**given)


def test_k_matters_only_where_latents_are_counted():
    assert TrainSettings("relu", d_sae=4, k=16).k == 16


def test_an_unknown_setting_in_a_file_is_named():
    with pytest.raises(SAEError, match="there is no setting 'd_saes'.* Did you mean 'd_sae'?"):
        TrainSettings.from_dict({"d_saes": 4})
