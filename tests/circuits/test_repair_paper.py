"""The paper's repair of GPT-2 medium, every step of it, on a random model of its 24 layers of 16 heads."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.repair_gpt2_medium import (
    COLORS,
    HEADS,
    WRONG_COLORS,
    beside_published,
    main,
    our_prompts,
    released_prompts,
    run,
)
from circuits.repairs.runs import Edit, patches, positions
from mechinterp import load, save
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.models.transformer import Transformer
from mechinterp.sites import Site

DATA = Path(__file__).parents[3] / "shared" / "data"
LAYERS, N_HEADS = 24, 16
FOUR = [(12, 3), (13, 4), (13, 13), (19, 1)]


@pytest.fixture(scope="module")
def medium_shaped(make_model):
    """GPT-2 medium's layers and heads, everything else tiny, in float32 as it would be loaded."""

    def make(tokenizer: Tokenizer, d_vocab: int) -> Transformer:
        shape = {"n_layers": LAYERS, "n_heads": N_HEADS, "d_model": 32, "d_head": 2, "d_mlp": 8}
        return Transformer(make_model(**shape, d_vocab=d_vocab, n_ctx=96).weights, tokenizer).to(dtype=torch.float32)

    return make


def gpt2_tokenizer() -> Tokenizer:
    if not (DATA / "gpt2_tokenizer").is_dir():
        pytest.skip("GPT-2's tokenizer is not on this machine")
    return Tokenizer.from_file(DATA / "gpt2_tokenizer" / "tokenizer.json", "gpt2", bos="<|endoftext|>")


@pytest.fixture(scope="module", params=["builtin", "gpt2"])
def medium(request, medium_shaped) -> Transformer:
    if request.param == "gpt2":
        return medium_shaped(gpt2_tokenizer(), 50257)
    known = load("builtin")
    return medium_shaped(known.tokenizer, known.config.d_vocab)


@pytest.fixture(scope="module")
def task(medium):
    return our_prompts(medium, n_prompts=5, seed=3)


def test_the_heads_are_the_papers():
    heads = [(head.layer, head.index) for members in HEADS.values() for head in members]
    assert sorted(heads) == FOUR


def test_the_wrong_colors_stand_where_they_should_in_prompts_of_several_lengths(medium, task):
    assert len(set(task.prompts.end.tolist())) > 1
    assert task.prompts.clean[0, 0] != medium.tokenizer.bos_id
    to = positions(task, WRONG_COLORS, task.prompts.end)
    assert to.shape == (len(task), 2)
    for row in range(len(task)):
        text = task.text(row)
        answer = medium.tokenizer.decode([int(task.prompts.answer[row])]).strip()
        scene = text[text.rindex("Q:") :]
        words = [medium.tokenizer.decode([int(task.prompts.clean[row, at])]).strip() for at in to[row]]
        assert answer.lower() not in words
        assert len(set(words)) == 2
        assert all(f" {word} " in scene for word in words)
        assert f" {answer.lower()} " in scene
        assert all(medium.tokenizer.single(f" {word.title()}") is not None for word in words)


def test_the_edited_rows_are_exactly_as_wanted_and_no_other_row_is_written(medium, task):
    to, end = positions(task, WRONG_COLORS, task.prompts.end), task.prompts.end
    edits = [Edit(members, to) for members in HEADS.values()]
    sites = [Site("pattern", layer) for layer in range(LAYERS)]
    _, plain = medium.run(task.prompts.clean, record=sites)
    _, edited = medium.run(task.prompts.clean, record=sites, patch=patches(edits, torch.arange(len(task)), end, 1.0))
    wanted = torch.zeros(len(task), task.prompts.clean.shape[1]).scatter_(1, to, 0.5)
    rows = torch.arange(len(task))
    for layer in range(LAYERS):
        for head in range(N_HEADS):
            now, before = edited["pattern", layer][:, head], plain["pattern", layer][:, head]
            if (layer, head) in FOUR:
                torch.testing.assert_close(now[rows, end], wanted, rtol=0, atol=0)
            elif layer > 12:
                assert not torch.equal(now[rows, end], before[rows, end])  # it hears of what was edited
            # Rows before END never hear of it. (Those behind are padding: they may see END, and nobody sees them.)
            until = torch.arange(now.shape[1]) < end[:, None]
            assert torch.equal(now[until], before[until])


def by_hand(model: Transformer, task, heads) -> torch.Tensor:
    """One prompt at a time, as the released script does it: the row is set to 0, then 1/2 is written at each place."""
    said = []
    for row in range(len(task)):
        end = int(task.prompts.end[row])
        tokens = task.prompts.clean[row : row + 1, : end + 1]
        answer = int(task.prompts.positions["answer_color"][row])
        wrong = [int(task.prompts.positions[color][row]) for color in COLORS]
        wrong.remove(answer)

        def patch(pattern, _, layer, wrong=wrong):
            pattern = pattern.clone()
            for _, head in (pair for pair in heads if pair[0] == layer):
                pattern[0, head, -1, :] = 0
                pattern[0, head, -1, wrong] = 0.5
            return pattern

        hooks = {f"pattern.{layer}": lambda p, c, layer=layer: patch(p, c, layer) for layer, _ in heads}
        logits, _ = model.run(tokens, patch=hooks)
        said.append(logits[0, -1])
    return torch.stack(said)


def test_the_conditions_give_what_a_plain_loop_gives(medium, task):
    found = run(medium, task, n_random=1, batch_size=2)
    groups = {"unedited": [], "inhibition": FOUR[:3], "negative mover": FOUR[3:], "all": FOUR}
    assert [condition.name for condition in found.conditions] == list(groups)
    for condition in found.conditions:
        logits = by_hand(medium, task, groups[condition.name])
        right = logits.argmax(-1) == task.prompts.answer
        assert condition.accuracy.value == pytest.approx(float(right.float().mean()))
        assert condition.metric.value == pytest.approx(float(task.metric(logits, task.prompts).mean()), abs=1e-4)
        assert set(condition.heads) == {f"a{layer}.h{head}" for layer, head in groups[condition.name]}
    for control in found.controls:
        drawn = [tuple(map(int, head[1:].split(".h"))) for head in control.heads]
        assert len(set(drawn)) == 4
        assert not set(drawn) & set(FOUR)
        assert all(12 <= layer <= 19 for layer, _ in drawn)
        metric = task.metric(by_hand(medium, task, drawn), task.prompts).mean()
        assert control.metric == pytest.approx(float(metric), abs=1e-4)


def test_the_batch_size_changes_nothing(medium, task):
    one, all_at_once = (run(medium, task, n_random=1, batch_size=size) for size in (1, 64))
    for a, b in zip(one.conditions, all_at_once.conditions, strict=True):
        assert (a.accuracy, a.fixed, a.broken, a.said) == (b.accuracy, b.fixed, b.broken, b.said)
        assert a.metric.value == pytest.approx(b.metric.value, abs=1e-4)
    after = {effect.head: effect.after for effect in all_at_once.downstream}
    assert all(after[effect.head] == pytest.approx(effect.after, abs=1e-4) for effect in one.downstream)


def test_the_command_prints_the_published_numbers_beside_ours(medium, tmp_path, capsys):
    directory, out = tmp_path / "medium", tmp_path / "found.json"
    save(medium, directory)
    found = main(f"--model {directory} --prompts 5 --random 1 --device cpu --path-prompts 2 --out {out}".split())
    printed = capsys.readouterr().out
    assert beside_published(found) in printed
    assert "(published .69)" in printed
    for number in ("49.6", "81.5", "78.1", "93.7"):
        assert number in beside_published(found)
    assert json.loads(out.read_text())["facts"]["n_prompts"] == 5


def test_the_released_prompts_have_their_colors_at_41_45_and_50(medium_shaped):
    path = DATA / "tasks" / "merullo_cobjs_data_42.json"
    if not path.is_file():
        pytest.skip("the authors' prompts are not on this machine")
    model = medium_shaped(gpt2_tokenizer(), 50257)
    task = released_prompts(model, 200, 0, path)
    assert [set(task.prompts.positions[color].tolist()) for color in COLORS] == [{41}, {45}, {50}]
    assert set(task.prompts.end.tolist()) == {61}
    to = positions(task, WRONG_COLORS, task.prompts.end)
    words = [[model.tokenizer.decode([t]) for t in task.prompts.clean[row, to[row]].tolist()] for row in range(len(task))]
    answers = [model.tokenizer.decode([t]).lower() for t in task.prompts.answer.tolist()]
    assert all(answer not in of_prompt and len(set(of_prompt)) == 2 for answer, of_prompt in zip(answers, words, strict=True))
    assert len(set(map(tuple, to.tolist()))) == 3
