"""What training tells: one record a line, whatever interrupts, and the same to Weights & Biases."""

import builtins
import sys
from types import SimpleNamespace

import pytest
import torch

from mechinterp.errors import SAEError
from saes.activations import of_rows
from saes.logs import cut_log, means, read_log, to_jsonl, to_wandb
from saes.trainer import LOG, train

RECORDS = [{"step": step, "loss": [1 / 3, 0.1 * step]} for step in (2, 4, 6)]


@pytest.fixture
def log(tmp_path):
    write = to_jsonl(tmp_path / "log.jsonl")
    for record in RECORDS:
        write(record)
    return tmp_path / "log.jsonl"


def test_records_come_back_to_the_last_bit(log):
    assert read_log(log) == RECORDS
    assert len(log.read_text().splitlines()) == 3
    assert read_log(str(log)) == RECORDS


def test_a_line_that_was_cut_short_is_left_out(log):
    log.write_bytes(log.read_bytes()[:-9])
    assert read_log(log) == RECORDS[:2]


@pytest.mark.parametrize(("step", "left"), [(0, 0), (3, 1), (4, 2), (6, 3), (9, 3)])
def test_a_log_is_cut_behind_a_step(log, step, left):
    whole = log.read_bytes()
    cut_log(log, step)
    assert read_log(log) == RECORDS[:left]
    assert whole.startswith(log.read_bytes())
    cut_log(log.with_name("none.jsonl"), step)
    assert not log.with_name("none.jsonl").exists()


@pytest.mark.parametrize("content", ['{"epoch": 1}\n', "[1, 2]\n", '"text"\n', '{"step": "one"}\n'])
def test_another_programs_file_is_refused_and_left(log, content):
    log.write_text(content)
    with pytest.raises(SAEError, match="log.jsonl' is no log of a training: .* has no 'step'. Move it away"):
        cut_log(log, 0)
    assert log.read_text() == content


def test_a_log_that_cannot_be_written_says_so(tmp_path):
    with pytest.raises(SAEError, match="cannot be written.*Make room and run the same again"):
        to_jsonl(tmp_path / "nowhere" / "log.jsonl")(RECORDS[0])


def test_means_are_over_places():
    assert means({"step": 3, "lr": 0.5, "loss": [1.0, 2.0, 6.0]}) == {"step": 3, "lr": 0.5, "loss": 3.0}


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in that keeps what it is told."""
    told = SimpleNamespace(settings=[], logged=[])
    run = SimpleNamespace(log=lambda values, step: told.logged.append((step, values)))
    module = SimpleNamespace(init=lambda **settings: told.settings.append(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def test_wandb_is_told_means_by_step(wandb, tmp_path):
    rows = torch.randn(64, 2, 4, generator=torch.Generator().manual_seed(0))
    callback = to_wandb(project="attention", name="z")
    train(
        of_rows(rows, ["z.0", "z.1"]),
        d_sae=8,
        k=2,
        n_rows=320,
        batch_size=32,
        log_every=4,
        directory=tmp_path,
        callbacks=[callback],
    )
    assert wandb.settings == [{"project": "attention", "name": "z"}]
    assert wandb.logged == [(record["step"], means(record)) for record in read_log(tmp_path / LOG)]
    assert [step for step, _ in wandb.logged] == [4, 8, 10]


def test_without_wandb_the_message_names_two_ways_out(monkeypatch):
    imported = builtins.__import__

    def without(name, *rest):
        if name == "wandb":
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SAEError, match="wandb is not installed. Install it .*or log to a file with to_jsonl"):
        to_wandb()
