"""Checkpoints: whole or absent, of the run that is asked for or refused, and never removed before their successor is there."""

import errno
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import saes.checkpoints
import saes.files
from mechinterp.errors import SAEError
from saes.activations import Activations, of_rows
from saes.checkpoints import checkpoints, read_checkpoint, write_checkpoint
from saes.trainer import LOG, train

PLACES = [f"z.{layer}.h{head}" for layer in range(2) for head in range(2)]
SHORT = {"d_sae": 12, "k": 2, "n_rows": 30 * 16, "batch_size": 16, "lr": 5e-3, "log_every": 5}
FACTS = {"settings": {"lr": 0.1, "prefixes": (2, 4)}, "places": ["z.0"], "about": {}}
TENSORS = {"W_dec": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), "idle": torch.zeros(2, 3)}


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randn(100, 4, 6, generator=torch.Generator().manual_seed(seed))


def activations() -> Activations:
    return of_rows(rows(), PLACES)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(saes.checkpoints, "_to_disk", lambda path: None)


class Stop(Exception):
    """What a callback raises to interrupt."""


def stop(record):
    if record["step"] >= 20:
        raise Stop


def test_what_is_written_is_read_and_replaces_what_was_there(tmp_path):
    assert read_checkpoint(tmp_path, FACTS) is None
    for step in (3, 99_999_999, 100_000_000):
        write_checkpoint(tmp_path, step, TENSORS, FACTS)
        assert len(checkpoints(tmp_path)) == 1
        found = read_checkpoint(tmp_path, FACTS)
        assert found is not None
        assert found[0] == step
        assert {name: tensor.tolist() for name, tensor in found[1].items()} == {
            name: tensor.tolist() for name, tensor in TENSORS.items()
        }


def test_bytes_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    monkeypatch.undo()
    write_checkpoint(tmp_path, 3, TENSORS, FACTS)
    assert read_checkpoint(tmp_path, FACTS) is not None


def test_the_newest_of_two_is_read_and_what_killed_writers_left_goes(tmp_path):
    """Killed after the rename and before the older one was removed, or while writing."""
    write_checkpoint(tmp_path, 5, TENSORS, FACTS)
    shutil.copytree(tmp_path / "checkpoint-00000005", tmp_path / "kept")
    write_checkpoint(tmp_path, 9, {name: tensor + 1 for name, tensor in TENSORS.items()}, FACTS)
    (tmp_path / "kept").rename(tmp_path / "checkpoint-00000005")
    (tmp_path / ".checkpoint-00000011.partial").mkdir()
    (tmp_path / ".checkpoint-00000011.partial" / "state.safetensors").write_bytes(b"half")
    found = read_checkpoint(tmp_path, FACTS)
    assert found is not None
    assert found[0] == 9
    write_checkpoint(tmp_path, 12, TENSORS, FACTS)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000012"]


def test_the_same_step_is_not_written_twice(tmp_path):
    """Removing the old one first would leave a moment without any."""
    write_checkpoint(tmp_path, 5, TENSORS, FACTS)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    write_checkpoint(tmp_path, 5, TENSORS, FACTS)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("state.safetensors", _truncate, "its tensors are not those that were written"),
        ("state.safetensors", _flip, "its tensors are not those that were written"),
        ("state.safetensors", Path.unlink, "No such file"),
        ("state.json", Path.unlink, "No such file"),
        ("state.json", _truncate, "is not JSON or is truncated"),
        ("state.json", lambda path: path.write_text('{"lr": 1}'), 'it lacks the entry "format"'),
        ("state.json", lambda path: path.write_text('{"format": "mechinterp sae checkpoint", "version": 1}'), "crc32"),
        ("state.json", lambda path: path.write_text(path.read_text().replace('"version": 1', '"version": 2')), "of version 2"),
    ],
)
def test_a_damaged_checkpoint_is_named_kept_and_never_read(tmp_path, file, damage, message):
    with pytest.raises(Stop):
        train(activations(), directory=tmp_path, checkpoint_seconds=0.0, callbacks=[stop], **SHORT)
    damage(checkpoints(tmp_path)[-1] / file)
    before = contents(tmp_path)
    with pytest.raises(
        SAEError, match=f"checkpoint-00000019' cannot be used .*{message}.*Move it away to go on from the beginn"
    ):
        train(activations(), directory=tmp_path, **SHORT)
    assert contents(tmp_path) == before
    checkpoints(tmp_path)[-1].rename(tmp_path / "checkpoint-00000019.bad")
    train(activations(), directory=tmp_path, **SHORT)
    assert checkpoints(tmp_path)[-1].name == "checkpoint-00000030"


def test_a_truncated_autoencoder_of_a_finished_run_is_named(tmp_path):
    train(activations(), directory=tmp_path, **SHORT)
    _truncate(tmp_path / "autoencoder" / "z.1.h0" / "sae_weights.safetensors")
    before = contents(tmp_path)
    with pytest.raises(SAEError, match="sae_weights.safetensors' cannot be read as safetensors"):
        train(activations(), directory=tmp_path, **SHORT)
    assert contents(tmp_path) == before


def test_a_checkpoint_holds_tensors_and_json_alone(tmp_path):
    train(activations(), directory=tmp_path, **SHORT)
    files = sorted(path.name for path in checkpoints(tmp_path)[-1].iterdir())
    assert files == ["state.json", "state.safetensors"]
    names = set(load_file(checkpoints(tmp_path)[-1] / "state.safetensors"))
    assert {"W_enc", "adam0.W_enc", "adam1.W_enc", "idle", "scale", "running_threshold"} < names


@pytest.mark.parametrize("state", ["interrupted", "finished", "finished, its checkpoint deleted"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 1e-3}, "is of another run: its settings.lr is 0.005, and 0.001 is asked for"),
        ({"seed": 1}, "its settings.seed is 0, and 1 is asked for"),
        ({"data": rows(seed=1)}, "is of another run: its about.fingerprint is"),
        ({"places": [*PLACES[:3], "z.2.h1"]}, "is of another run: its places is"),
    ],
)
def test_another_runs_directory_is_refused_and_left_alone(tmp_path, state, change, message):
    run = tmp_path / "run"
    if state == "interrupted":
        with pytest.raises(Stop):
            train(activations(), directory=run, checkpoint_seconds=0.0, callbacks=[stop], **SHORT)
    else:
        train(activations(), directory=run, **SHORT)
        for path in checkpoints(run) if "deleted" in state else ():
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    before = contents(run)
    data = of_rows(change.get("data", rows()), change.get("places", PLACES))
    with pytest.raises(SAEError, match=message):
        train(data, directory=run, **{**SHORT, **{name: value for name, value in change.items() if name in ("lr", "seed")}})
    assert contents(run) == before


def test_a_file_and_a_foreign_log_are_no_directories_to_train_in(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SAEError, match="is a file; a training needs a folder"):
        train(activations(), directory=tmp_path / "file", **SHORT)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / LOG).write_text('{"epoch": 1}\n')
    with pytest.raises(SAEError, match="is no log of a training.*Move it away"):
        train(activations(), directory=tmp_path / "other", **SHORT)
    assert contents(tmp_path / "other") == {LOG: b'{"epoch": 1}\n'}


def test_a_full_disk_keeps_the_last_checkpoint_and_room_lets_it_go_on(tmp_path, monkeypatch):
    given, whole = {**SHORT, "checkpoint_seconds": 0.0}, train(activations(), directory=tmp_path / "whole", **SHORT)
    for module, where, kept in ((saes.checkpoints, 20, 19), (saes.files, 1, 30)):
        calls = []

        def full(tensors, path, calls=calls, where=where):
            calls.append(1)
            if len(calls) >= where:
                Path(path).write_bytes(b"half of it")
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            save_file(tensors, path)

        with monkeypatch.context() as patch:
            patch.setattr(module, "save_file", full)
            with pytest.raises(SAEError, match="cannot be written.*No space left.*is whole"):
                train(activations(), directory=tmp_path / "run", **given)
        assert [path.name for path in checkpoints(tmp_path / "run")] == [f"checkpoint-{kept:08d}"]
        assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    assert torch.equal(train(activations(), directory=tmp_path / "run", **given).W_enc, whole.W_enc)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
