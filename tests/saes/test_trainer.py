"""Training whole: groups that do not notice one another, and runs that end alike however often they are interrupted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import saes.checkpoints
import saes.trainer
from mechinterp.errors import SAEError
from saes.activations import Activations, of_rows
from saes.base import SparseAutoencoder
from saes.checkpoints import checkpoints
from saes.settings import ARCHITECTURES, TrainSettings
from saes.trainer import LOG, train

PLACES = [f"z.{layer}.h{head}" for layer in range(2) for head in range(2)]
SHORT = {
    "d_sae": 24,
    "k": 2,
    "n_rows": 60 * 32,
    "batch_size": 32,
    "lr": 5e-3,
    "sparsity": 8.0,
    "dead_after": 32,
    "log_every": 5,
}


def rows(n: int = 300, groups: int = 4, seed: int = 0) -> torch.Tensor:
    """Random, and in each group of another size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, groups, 6, generator=generator) * torch.linspace(0.3, 3, groups).view(1, groups, 1)


def activations(**given) -> Activations:
    return of_rows(rows(**given), PLACES[: given.get("groups", 4)])


def difference(ours: SparseAutoencoder, theirs: SparseAutoencoder) -> float:
    assert ours.places == theirs.places
    return max(float((ours.tensors[name] - theirs.tensors[name]).abs().max()) for name in theirs.tensors)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(saes.checkpoints, "_to_disk", lambda path: None)


class Stop(Exception):
    """What a callback raises to interrupt."""


def stop_at(step: int):
    def stop(record):
        if record["step"] >= step:
            raise Stop

    return stop


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_autoencoder_comes_out_alike_alone_among_others_and_in_any_order(architecture):
    """To rounding: products of several groups and of one add up in another order."""
    told, given = [], {**SHORT, "architecture": architecture, "clip": 0.5, "threshold": 2.5}
    together = train(activations(), callbacks=[told.append], **given)
    assert max(max(record["dead"]) for record in told) > 0.05, "else nothing was revived"
    alone = train(of_rows(rows()[:, 2:3], PLACES[2:3]), **given)
    assert difference(alone, together.group(2)) < 2e-6
    order = [3, 0, 2, 1]
    turned = train(of_rows(rows()[:, order], [PLACES[at] for at in order]), **given)
    assert difference(turned, together.group(*order)) < 2e-6


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
def test_the_threshold_leaves_k_latents_a_position_even_after_few_steps(architecture):
    x = rows(2000, 2)
    for n_steps in (12, 150):
        found = train(of_rows(x, PLACES[:2]), architecture=architecture, d_sae=24, k=3, n_rows=64 * n_steps, batch_size=64)
        assert found.kind == "jumprelu"
        assert_close(
            (found.encode(x.transpose(0, 1)) > 0).sum(-1).double().mean(-1), torch.tensor([3.0, 3.0]).double(), atol=0.4, rtol=0
        )


def test_the_record_and_the_schedule_are_what_the_settings_say():
    told = []
    found = train(activations(), callbacks=[told.append], architecture="topk", **SHORT)
    settings = TrainSettings("topk", **{name: value for name, value in SHORT.items() if name != "log_every"})
    assert [record["step"] for record in told] == [*range(5, 61, 5)]
    assert [record["rows"] for record in told] == [32 * record["step"] for record in told]
    assert [record["lr"] for record in told] == [settings.learning_rate(record["step"] - 1) for record in told]
    assert all(len(record[name]) == 4 for record in told for name in ("loss", "error", "explained", "l0", "dead"))
    assert all(0 <= share <= 1 for record in told for share in record["dead"])
    assert told[-1]["l0"] == pytest.approx([2.0] * 4, abs=0.1)
    assert found.about["training"] == settings.to_dict()
    assert_close(found.W_dec.norm(dim=-1), torch.ones(4, 24))


def test_one_loss_fits_groups_of_any_scale():
    told = []
    train(of_rows(rows() * 1e-3, PLACES), architecture="relu", callbacks=[told.append], **SHORT)
    small = told[-1]["loss"]
    train(activations(), architecture="relu", callbacks=[told.append], **SHORT)
    assert small == pytest.approx(told[-1]["loss"], rel=1e-4)


def test_fewer_rows_than_a_batch_are_taken_again_and_again():
    found = train(activations(n=5), architecture="topk", **SHORT)
    assert all(bool(tensor.isfinite().all()) for tensor in found.tensors.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_trains_to_a_like_loss_in_single_precision_parameters(architecture):
    told = []
    for precision in ("float32", "bfloat16"):
        found = train(activations(), architecture=architecture, callbacks=[told.append], precision=precision, **SHORT)
        assert found.W_enc.dtype == torch.float32
    exact, near = (torch.tensor(told[at]["loss"]) for at in (len(told) // 2 - 1, -1))
    assert_close(near, exact, atol=0, rtol=0.25)


def test_a_training_interrupted_in_mid_step_loses_what_came_after_the_checkpoint(tmp_path, monkeypatch):
    """An interrupt may come between two tensors' updates; nothing of that state is kept."""
    given = {**SHORT, "architecture": "relu", "checkpoint_seconds": 0.0}
    whole, renormalize, calls = train(activations(), directory=tmp_path / "whole", **given), saes.trainer.renormalize, []

    def interrupted(W_dec):
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt
        renormalize(W_dec)

    monkeypatch.setattr(saes.trainer, "renormalize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(activations(), directory=tmp_path / "cut", **given)
    assert checkpoints(tmp_path / "cut")[-1].name == "checkpoint-00000029"
    assert difference(train(activations(), directory=tmp_path / "cut", **given), whole) == 0.0
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


IN_ANOTHER_PROCESS = """
import os, resource, signal, sys
from pathlib import Path
import torch
import saes.checkpoints
from mechinterp.errors import SAEError
from saes.activations import of_rows
from saes.trainer import train

saes.checkpoints._to_disk = lambda path: None
x = torch.randn(300, 4, 6, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.3, 3, 4).view(1, 4, 1)
activations, given = of_rows(x, ["z.0.h0", "z.0.h1", "z.1.h0", "z.1.h1"]), eval(sys.argv[2])

def kill(record):
    if record["step"] == 35:
        os.kill(os.getpid(), signal.SIGKILL)

def limit(size):
    return lambda record: record["step"] == 35 and resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

train(activations, **{**given, "n_rows": 32})  # what is imported late is imported once
callbacks = {name: kill for name in sys.argv[3:]} | {"full for checkpoints": limit(4096), "full for the log": limit(100)}
for name, callback in callbacks.items():
    if not (child := os.fork()):
        architecture = {"architecture": name} if callback is kill else {}
        try:
            directory = Path(sys.argv[1]) / name
            train(activations, directory=directory, callbacks=[callback], checkpoint_seconds=0.0, **given, **architecture)
        except SAEError as problem:
            print(problem, flush=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (-signal.SIGKILL if callback is kill else 0)
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Directories of trainings that were killed at step 35, one an architecture, or met a limit, and what they printed."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    directory = tmp_path_factory.mktemp("elsewhere")
    arguments = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(directory), repr(SHORT), *ARCHITECTURES]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return directory, done.stdout.splitlines()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_interrupted_or_killed_training_goes_on_to_the_same_bits(tmp_path, elsewhere, architecture):
    given = {**SHORT, "architecture": architecture, "checkpoint_seconds": 20.0}
    whole = train(activations(), directory=tmp_path / "whole", **given)
    for step in (20, 50):
        with pytest.raises(Stop):
            train(activations(), directory=tmp_path / "cut", callbacks=[stop_at(step)], **(given | {"checkpoint_seconds": 0.0}))
        assert [path.name for path in checkpoints(tmp_path / "cut")] == [f"checkpoint-{step - 1:08d}"]
    killed = elsewhere[0] / architecture
    assert [path.name for path in checkpoints(killed)] == ["checkpoint-00000034"]
    for directory in (tmp_path / "cut", killed):
        assert difference(train(activations(), directory=directory, **given), whole) == 0.0
        assert contents(directory) == contents(tmp_path / "whole")
    assert difference(train(activations(), **SHORT, architecture=architecture), whole) == 0.0, "a directory changes nothing"


def test_a_real_limit_on_file_size_is_a_plain_error_and_room_lets_it_go_on(tmp_path, elsewhere):
    directory, printed = elsewhere
    assert len(printed) == 2
    whole = train(activations(), directory=tmp_path / "whole", **SHORT)
    for name, line in zip(("full for checkpoints", "full for the log"), printed, strict=True):
        assert "cannot be written" in line
        assert "File too large" in line
        assert "the same again" in line
        assert [path.name for path in checkpoints(directory / name)] == ["checkpoint-00000034"]
        assert difference(train(activations(), directory=directory / name, **SHORT), whole) == 0.0
        assert contents(directory / name) == contents(tmp_path / "whole")


def test_a_kill_between_the_last_checkpoint_and_the_autoencoder_costs_nothing(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(saes.trainer, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(activations(), directory=tmp_path / "run", **SHORT)
    log = (tmp_path / "run" / LOG).read_bytes()
    monkeypatch.setattr(saes.trainer, "_step", killed)
    found = train(activations(), directory=tmp_path / "run", **SHORT)
    assert (tmp_path / "run" / LOG).read_bytes() == log
    assert difference(train(activations(), directory=tmp_path / "run", **SHORT), found) == 0.0


def test_a_finished_directory_is_read_back_without_training(tmp_path, monkeypatch):
    found = train(activations(), directory=tmp_path / "run", **SHORT)
    before = contents(tmp_path / "run")
    monkeypatch.setattr(saes.trainer, "_run", None)
    again = train(activations(), directory=str(tmp_path / "run"), **SHORT)
    assert difference(again, found) == 0.0
    assert contents(tmp_path / "run") == before
    assert (again.about["training"], again.kind) == (found.about["training"], "jumprelu")


def test_a_loss_that_is_no_longer_finite_is_named_and_never_kept(tmp_path):
    x = rows()
    x[:, 2] *= 1e25
    with pytest.raises(SAEError, match=r"the loss at 'z.1.h0' is (inf|nan) at step \d+. Lower lr, or set clip"):
        train(of_rows(x, PLACES), scale_inputs=False, architecture="relu", directory=tmp_path, checkpoint_seconds=0.0, **SHORT)
    assert checkpoints(tmp_path) == []
    assert not (tmp_path / LOG).exists()


def test_unknown_settings_and_no_activations_are_refused():
    with pytest.raises(SAEError, match="there is no setting 'd_saes'.* Did you mean 'd_sae'?"):
        train(activations(), d_saes=4)
    with pytest.raises(SAEError, match="there are no activations to train on"):
        train(of_rows(rows(n=0), PLACES), **SHORT)
    with pytest.raises(SAEError, match="lr=-1.0 must be greater than 0"):
        train(activations(), TrainSettings("relu"), lr=-1.0)
