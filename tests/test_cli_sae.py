"""``mechinterp sae``, on the real built-in model, a few prompts and autoencoders of 64 latents."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mechinterp.cli import main
from mechinterp.cli.sae import options
from mechinterp.cli.sae.data import Data, corpus_of, drawn, joined, split
from mechinterp.models.load import load
from saes import Place, SAEReport, SparseAutoencoder, TrainSettings, save
from saes import load as load_autoencoder
from saes.frontier import Frontier

TEXT = ("--data", "ioi", "--prompts", 40)
SMALL = (*TEXT, "--d-sae", 64, "--rows", 4096, "--batch-size", 512, "--limit", 6)
RUN = "mechinterp-sae"


def run(*arguments: object) -> int:
    """The exit code of ``mechinterp sae arguments``."""
    with pytest.raises(SystemExit) as end:
        main(["sae", *(str(argument) for argument in arguments)])
    return int(end.value.code or 0)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """What a training left behind, for tests that only read it."""
    folder = tmp_path_factory.mktemp("trained") / RUN
    assert run("train", *SMALL, "--places", "z.1", "--out", folder) == 0
    return folder


def test_train_says_and_writes_autoencoders_that_are_read_back(here, capsys):
    assert run("train", *SMALL) == 0
    said = capsys.readouterr()
    for part in ("Model   builtin: 4 layers", "Text    ioi: 72 rows to train on", "8 held out", "z.0 to z.3, 4 autoencoders"):
        assert part in said.out
    for part in ("batchtopk, k 16: 4,096 positions", "Measured on 6 of the 8 rows", f"mechinterp sae dashboard {RUN}"):
        assert part in said.out
    assert re.search(r"^all +\d+\.\d ", said.out, re.MULTILINE)
    assert said.err == ""
    kept = {file.name for file in (here / RUN).iterdir() if not file.name.startswith("checkpoint-")}
    assert kept == {"autoencoder", "training.jsonl", "report.json", "run.json"}
    found = load_autoencoder(here / RUN / "autoencoder")
    assert [str(place) for place in found.places] == ["z.0", "z.1", "z.2", "z.3"]
    assert (found.d_in, found.d_sae) == (128, 64)
    assert SAEReport.load(here / RUN / "report.json").fidelity.n_prompts == 6


def test_the_same_again_reads_back_and_anything_else_is_another_run(here, capsys):
    asked = ("train", *SMALL, "--places", "z.1.h2", "--places", "z.3.h0")
    assert run(*asked) == 0
    before = (here / RUN / "report.json").read_bytes()
    capsys.readouterr()
    assert run(*asked) == 0
    said = capsys.readouterr().out
    assert "finished: it is read back" in said
    assert "Trained in" not in said
    assert (here / RUN / "report.json").read_bytes() == before
    assert run(*asked, "--k", 8) == 2
    assert re.match(r"mechinterp: .*another run: its settings.k is 4, and 8", capsys.readouterr().err)
    assert run(*asked, "--held-out", 0.2) == 2
    assert "data.held_out is 0.1, and 0.2 is asked for" in capsys.readouterr().err


def test_an_interrupted_training_goes_on(here, capsys, monkeypatch):
    import saes.trainer

    asked = ("train", *SMALL, "--places", "z.1")
    assert run(*asked, "--out", "whole") == 0
    real, told = saes.trainer._step, []

    def interrupted(*arguments):
        told.append(1)
        if len(told) == 5:
            raise OSError("the machine was switched off")
        return real(*arguments)

    monkeypatch.setattr("saes.trainer._step", interrupted)
    monkeypatch.setattr("saes.trainer.time.monotonic", lambda: 1000.0 * len(told))  # a checkpoint every step
    assert run(*asked) == 2
    monkeypatch.undo()
    monkeypatch.chdir(here)
    capsys.readouterr()
    assert run(*asked) == 0
    assert re.search(rf"{RUN} holds this training: it goes on from step \d", capsys.readouterr().out)
    whole, resumed = (load_autoencoder(here / folder / "autoencoder") for folder in ("whole", RUN))
    assert torch.equal(whole.W_dec, resumed.W_dec)


def test_activations_from_a_store_train_the_same_autoencoder_of_each_head(here):
    asked = ("train", *SMALL, "--each-head", "--limit", 2)
    assert run(*asked) == 0
    assert run(*asked, "--store", "activations", "--out", "stored") == 0
    assert any((here / "activations").iterdir())
    streamed, stored = (load_autoencoder(here / folder / "autoencoder") for folder in (RUN, "stored"))
    assert (streamed.n_groups, streamed.d_in) == (32, 16)
    torch.testing.assert_close(streamed.W_dec, stored.W_dec)


def test_evaluate_finds_the_model_and_the_rows_that_were_held_out(trained, here, capsys):
    for folder in (trained, trained / "autoencoder"):
        assert run("evaluate", folder, "--limit", 6, "--out", "kept/mine.json") == 0
        said = capsys.readouterr()
        assert "Text    ioi: 6 of 8 held-out rows" in said.out
        assert "Written to kept/mine.json" in said.out
        assert said.err == ""
        assert (here / "kept" / "mine.json").read_bytes() == (trained / "report.json").read_bytes()


def test_evaluate_on_other_text_takes_all_of_it_and_warns_of_text_that_may_be_known(trained, here, capsys):
    assert run("evaluate", trained, "--data", "greater-than", "--limit", 5) == 0
    said = capsys.readouterr()
    assert re.search(r"greater-than: 5 of \d\d rows,", said.out)
    assert said.err == ""
    assert run("evaluate", trained, "--prompts", 20, "--limit", 5) == 0
    assert "ioi was trained on with other options" in capsys.readouterr().err


def test_an_autoencoder_from_elsewhere_is_measured_too(here, capsys):
    save(SparseAutoencoder.random([Place.parse("z.1")], d_in=128, d_sae=32), here / "theirs")
    assert run("evaluate", "theirs", "--limit", 4, *TEXT) == 2
    assert "does not say which model" in capsys.readouterr().err
    assert run("evaluate", "theirs", "--model", "builtin", "--limit", 4, *TEXT) == 0
    assert SAEReport.load("report.json").d_sae == 32


def test_a_model_of_other_weights_is_warned_of(trained, here, capsys):
    from mechinterp.models.load import save as save_model
    from mechinterp.models.transformer import Transformer
    from mechinterp.models.weights import Weights

    model = load("builtin")
    named = {name: tensor * 1.01 for name, tensor in model.weights.named().items()}
    save_model(Transformer(Weights.from_named(model.config, named), model.tokenizer), here / "other")
    assert run("evaluate", trained, "--model", "other", "--limit", 4) == 0
    assert "trained on a model of other weights than other" in capsys.readouterr().err


def test_a_dashboard_is_one_file_with_the_latents_asked_for(trained, here, capsys):
    assert run("dashboard", trained, "--latents", "1, 5,7", "--limit", 8, "--out", "seen/page.html") == 0
    assert "open it in a browser" in capsys.readouterr().out
    assert [file.name for file in (here / "seen").iterdir()] == ["page.html"]
    page = (here / "seen" / "page.html").read_text()
    assert page.count('id="latent-') == 3
    assert "ioi: 8 of 8 held-out rows" in page
    assert "//" not in re.sub(r"http://www.w3.org/", "", re.sub(r"<script>.*</script>", "", page, flags=re.DOTALL))
    assert run("dashboard", trained, "--place", "z.1", "--n-latents", 4, "--limit", 8) == 0
    assert (here / "sae.html").read_text().count('id="latent-') == 4


def test_a_frontier_is_traced_kept_and_extended(here, capsys):
    asked = ("frontier", *SMALL, "--places", "z.1", "--rows", 1024, "--sweep", "topk=4,8")
    assert run(*asked, "--seeds", 1) == 0
    said = capsys.readouterr()
    assert re.search(r"^topk +4 +4 ", said.out, re.MULTILINE)
    assert said.err == ""
    folder = here / "mechinterp-frontier"
    assert {file.name for file in folder.iterdir()} == {"frontier.json", "frontier.png", "run.json", "runs"}
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")
    one = folder / "runs" / "topk-4-seed0"
    written = (one / "autoencoder" / "sae_weights.safetensors").stat().st_mtime_ns
    assert run(*asked, "--seeds", 2, "--sweep", "relu=0.5") == 0
    assert (one / "autoencoder" / "sae_weights.safetensors").stat().st_mtime_ns == written
    found = Frontier.load(folder / "frontier.json")
    assert (found.architectures, found.seeds) == (("topk", "relu"), (0, 1))
    capsys.readouterr()
    assert run(*asked, "--lr", 0.01) == 2
    assert "settings.lr is 0.001, and 0.01 is asked for" in capsys.readouterr().err
    assert run("evaluate", one, "--limit", 4) == 0
    assert "held-out rows" in capsys.readouterr().out
    assert run("evaluate", folder) == 2
    assert "holds several autoencoders, in runs/" in capsys.readouterr().err


def test_files_of_text_are_packed_and_padded_beside_prompts(here):
    model = load("builtin")
    sentence = "Then, Mary and John met at the park. John handed a ring to Mary."
    (here / "text.jsonl").write_text("".join(json.dumps({"text": sentence}) + "\n" for _ in range(40)))
    data = Data("builtin", ("ioi", "text.jsonl"), prompts=20, context=30)
    training, unseen = split(data, model)
    assert training.tokens.shape[1] == unseen.tokens.shape[1] == 30
    both = joined([corpus_of(source, data, model) for source in data.sources], model)
    assert training.n_kept + unseen.n_kept == both.n_kept
    assert len(drawn(both, 7, seed=0)) == 7


def test_what_is_held_out_is_not_trained_on():
    data = Data("builtin", ("greater-than",), prompts=1000)
    training, unseen = ({tuple(row) for row in part.tokens.tolist()} for part in split(data, load("builtin")))
    assert unseen
    assert not training & unseen


def test_what_is_shown_as_default_is_what_training_does():
    from mechinterp.cli.sae.train import train

    shown = {name: one.default for name, one in inspect.signature(train).parameters.items()}
    settings = TrainSettings()
    for name in ("architecture", "batch_size", "lr", "precision", "seed"):
        assert shown[name] == getattr(settings, name)
    assert (settings.k, settings.sparsity) == (16, 1.0)  # as the help says
    assert shown["held_out"] == options.HELD_OUT == Data("builtin").held_out


def test_help_loads_nothing_heavy():
    code = "import sys; from mechinterp.cli import app; print({'torch', 'numpy', 'transformers', 'datasets'} & {*sys.modules})"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("train", "--data", "iou"), "no task and no file 'iou'.*Did you mean 'ioi'?"),
        (("train", "--data", "missing.jsonl"), "no task and no file 'missing.jsonl'"),
        (("train", "--data", "taken"), "--data taken: such a file is not read. Give .jsonl, .json or .txt"),
        (("train", "--data", "ioi", "--data", "ioi"), "--data ioi is named twice"),
        (("train", "--model", "gpt2"), "on what text is gpt2 to be run.*--data"),
        (("train", "--held-out", 1), "--held-out 1 leaves nothing"),
        (("train", "--prompts", 0), "--prompts 0 asks for nothing"),
        (("train", "--limit", 0), "--limit 0 asks for nothing"),
        (("train", "--architecture", "topkk"), "no architecture 'topkk'.*Did you mean 'topk'?"),
        (("train", "--architecture", "relu", "--k", 4), "--k 4 is for topk, batchtopk, matryoshka.*--sparsity"),
        (("train", "--sparsity", 2), "--sparsity 2 is for .*'batchtopk' counts them: set --k"),
        (("train", "--places", "z.1", "--each-head"), "--each-head means every head"),
        (("train", "--out", "full"), "'full' holds other files \\(notes\\)"),
        (("train", "--out", "taken"), "'taken': .*taken' is a file.*--out"),
        (("train", "--store", "taken/rows"), "'taken/rows': .*taken' is a file.*--store"),
        (("evaluate", "nowhere"), "'nowhere' does not exist"),
        (("evaluate", "full"), "'full' holds no cfg.json"),
        (("evaluate", "theirs", "--out", "full"), "'full': it is a folder"),
        (("evaluate", "begun"), "'begun' holds a training that is not finished.*to go on"),
        (("dashboard", "theirs", "--latents", ","), "names no latents"),
        (("dashboard", "theirs", "--latents", "1,two"), "'1,two' names no latents"),
        (("dashboard", "theirs", "--latents", "32"), "--latents 32: they run from 0 to 31"),
        (("dashboard", "theirs", "--n-latents", 0), "--n-latents 0 asks for nothing"),
        (("dashboard", "theirs", "--place", "z.9"), "z.9"),
        (("dashboard", "theirs", "--out", "page.pdf"), "--out page.pdf: a dashboard is one file"),
        (("frontier",), "what is to be swept"),
        (("frontier", "--sweep", "topk"), "--sweep 'topk' lacks numbers"),
        (("frontier", "--sweep", "topk=8,many"), "--sweep 'topk=8,many' lacks numbers"),
        (("frontier", "--sweep", "topkk=8"), "no architecture 'topkk'"),
        (("frontier", "--sweep", "topk=8", "--sweep", "topk=9"), "names 'topk' twice"),
        (("frontier", "--sweep", "topk=8", "--seeds", 0), "--seeds 0 asks for nothing"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line_before_a_model_is_loaded(here, capsys, monkeypatch, arguments, complaint):
    monkeypatch.setattr("mechinterp.load", lambda *_, **__: pytest.fail("the work began"))
    assert_refused(here, capsys, arguments, complaint)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("train", "--places", "q.x"), "'q.x' names no place for an autoencoder"),
        (("train", "--places", "z.9"), "'z' was asked for at layer 9"),
        (("train", "--places", "z.1.h8"), "'z.1.h8' is not in builtin, whose layers have heads 0..7"),
        (("train", "--places", "z", "--places", "z.1"), "'z.1' is named twice"),
        (("train", "--places", "z.1", "--places", "z.1.h0"), "different widths"),
        (("train", "--d-sae", 8), "k=16 of d_sae=8 latents"),
        (("train", "--rows", 10), "n_rows=10 is less than one batch"),
        (("train", "--lr", -1), "lr=-1"),
        (("train", "--precision", "float8"), "precision cannot be 'float8'"),
        (("train", "--device", "abacus"), "--device abacus cannot be used here"),
        (("train", "--model", "./nowhere", "--data", "ioi"), "no directory './nowhere'"),
        (("train", "--data", "words.txt", "--context", 1), "context=1: builtin reads 2 to 96"),
        (("train", "--data", "words.txt"), "shorter than one row"),
        (("train", "--data", "broken.jsonl"), "'broken.jsonl' is not what its name says"),
        (("train", "--data", "pairs.jsonl"), "a document must be a string or a record with 'text'"),
        (("train", "--data", "nobody/nothing"), "the data set 'nobody/nothing' cannot be read"),
        (("evaluate", "narrow", "--model", "builtin", "--data", "ioi"), "reads 16 numbers a position.*has 128"),
        (("dashboard", "narrow", "--model", "builtin", "--data", "ioi"), "reads 16 numbers a position.*has 128"),
        (("frontier", "--sweep", "topk=0"), "k=0 must be greater than 0"),
        (("frontier", "--sweep", "topk=2.5"), "--sweep topk=2.5: a whole number"),
        (("frontier", "--sweep", "topk=nan"), "--sweep topk=nan"),
        (("frontier", "--sweep", "relu=-1"), "--sweep relu=-1: a weight"),
        (("frontier", "--sweep", "topk=8,100", "--d-sae", 64), "k=100 of d_sae=64 latents"),
    ],
)
def test_what_the_model_or_the_text_cannot_do_is_one_line_and_leaves_nothing(here, capsys, monkeypatch, arguments, complaint):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_refused(here, capsys, arguments, complaint)


def test_a_hub_that_cannot_be_reached_is_told_at_once(here, capsys, monkeypatch):
    def unreachable():
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", unreachable)
    complaint = "roneneldan/TinyStories' cannot be read .*service not known.*without a network give a file"
    assert_refused(here, capsys, ("train", "--data", "roneneldan/TinyStories"), complaint)


def test_a_data_set_is_read_as_it_streams(here, monkeypatch):
    import datasets

    stories = [{"text": "Then, Mary and John met at the park. John handed a ring to Mary."}] * 50
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **how: asked.append((given, how)) or iter(stories))
    found = corpus_of("some/stories:short", Data("builtin", ("some/stories:short",), tokens=400, context=20), load("builtin"))
    assert found.tokens.shape == (20, 20)
    assert asked == [(("some/stories", "short"), {"split": "train", "streaming": True})]


def assert_refused(here: Path, capsys: pytest.CaptureFixture, arguments: tuple, complaint: str) -> None:
    """Exit code 2, one line on stderr, and no file that was not there."""
    (here / "taken").write_text("by another")
    (here / "words.txt").write_text("too few words")
    (here / "broken.jsonl").write_text('{"text": "cut off')
    (here / "pairs.jsonl").write_text('{"clean": "a", "corrupted": "b"}\n')
    for folder, file in (("full", "notes"), ("begun", "run.json")):
        (here / folder).mkdir()
        (here / folder / file).write_text("{}")
    place = Place.parse("z.1")
    save(SparseAutoencoder.random([place], d_in=128, d_sae=32), here / "theirs")
    save(SparseAutoencoder.random([place], d_in=16, d_sae=32), here / "narrow")
    before = sorted(here.rglob("*"))
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert re.match(f"mechinterp: .*{complaint}", said)
    assert sorted(here.rglob("*")) == before
