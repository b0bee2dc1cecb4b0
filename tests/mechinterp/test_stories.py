"""A trained Llama, as it is downloaded: it tells its published story, and a task that it does has a circuit."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import mechinterp as mi
from benchmarks.addressee import FILE, rows
from circuits import Circuit, Scores, discover, evaluate
from mechinterp.cli import main
from mechinterp.models.folding import fold

DIRECTORY = Path(__file__).parents[3] / "shared" / "data" / "stories260K"
pytestmark = pytest.mark.skipif(not DIRECTORY.is_dir(), reason="the trained model stories260K is not beside this checkout")

# karpathy/llama2.c, doc/stories260K.md: sampled at temperature 0.
PUBLISHED = """Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a \
big, red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, "I want to play with your \
ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she said, "I'm sorry, mom. I didn't know what to do." Her mom said, "Don't worry, Lily. \
We can help you."""
NAME_MOVER = "a4.h4"


@pytest.fixture(scope="module")
def storyteller():
    return mi.load(DIRECTORY)


@pytest.fixture(scope="module")
def task(storyteller):
    return mi.from_file(storyteller, FILE)


@pytest.fixture(scope="module")
def few(storyteller):
    return mi.from_file(storyteller, FILE, n_prompts=6, seed=0)


@pytest.fixture(scope="module")
def others(storyteller):
    return mi.from_file(storyteller, FILE, n_prompts=24, seed=1)


def test_it_is_a_llama(storyteller):
    config = storyteller.config
    assert (config.n_heads, config.n_groups, config.gated, config.normalization) == (8, 4, True, "rms_norm")
    assert config.rotary is not None
    assert storyteller.weights.is_tied


@pytest.mark.parametrize("start", ["", PUBLISHED[: PUBLISHED.index(" want to help")]], ids=["all", "the end"])
def test_it_tells_the_published_story(storyteller, start):
    n_new = 257 - len(storyteller.tokenizer.encode(start))
    assert start + mi.generate(storyteller, start, n_new) == PUBLISHED


def test_its_logits_are_hugging_faces(storyteller, task):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(DIRECTORY).eval()
    with torch.no_grad():
        assert_close(storyteller.run(task.prompts.clean)[0], theirs(task.prompts.clean).logits, atol=1e-4, rtol=0)


def test_the_committed_prompts_are_those_of_the_script_and_it_answers_them_all(storyteller, task):
    assert len(task) == len(list(rows())) == 144
    logits, _ = storyteller.run(task.prompts.clean, logits_at=task.prompts.end)
    assert (logits.argmax(-1) == task.prompts.answer).all()
    assert {task.tokenizer.strings([token])[0] for token in task.prompts.answer.tolist()} == {
        row["answers"][0] for row in rows()
    }


@pytest.mark.parametrize(("method", "n_prompts"), [("exact", 2), ("eap", 6), ("eap-ig", 6), ("relp", 6)])
def test_edges_make_a_circuit_that_beats_chance_on_other_prompts(storyteller, others, method, n_prompts):
    scores = discover(storyteller, mi.from_file(storyteller, FILE, n_prompts=n_prompts), method)
    assert scores.strongest(1)[0][0] == f"{NAME_MOVER}->logits"
    report = evaluate(storyteller, others, scores.top(200), n_random=5)
    assert report.faithfulness > 0.75
    assert max(map(abs, report.random)) < 0.1
    assert abs(report.complement) < 0.1


@pytest.mark.parametrize("method", ["cdt", "patching"])
def test_parts_make_one_too(storyteller, few, others, method):
    scores = discover(storyteller, few, method)
    heads = [name for name, _ in scores.strongest(9) if ".h" in name]
    assert heads[0] == NAME_MOVER
    assert evaluate(storyteller, others, scores.top(12), n_random=0).faithfulness > 0.75


def test_folding_changes_neither_the_story_nor_the_circuit(storyteller, few):
    folded = fold(storyteller)
    assert mi.generate(folded, "", 60) == PUBLISHED[: len(mi.generate(storyteller, "", 60))]
    ours, theirs = (discover(model, few, "eap").values for model in (storyteller, folded))
    assert abs(ours - theirs).max() < 1e-3 * abs(ours).max()


def test_the_command_line_finds_and_saves_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["discover", str(FILE), "--model", str(DIRECTORY), "--prompts", "8", "--method", "eap", "--edges", "60"])
    assert end.value.code in (0, None)
    said = capsys.readouterr().out
    assert "in 4 groups" in said
    assert "the best answer beats every foil in 100%" in said
    folder = tmp_path / "mechinterp-addressee"
    circuit, scores = Circuit.load(folder / "circuit.json"), Scores.load(folder / "scores.json")
    assert circuit.n_edges_kept == 60
    assert scores.strongest(1)[0][0] == f"{NAME_MOVER}->logits"
    assert any(node.kind == "group" for node in circuit)
