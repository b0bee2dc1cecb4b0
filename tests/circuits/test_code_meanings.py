"""What codes mean: on a model whose heads were set by hand, so that what each code stands for is known."""

from dataclasses import replace

import pytest
import torch

from circuits.code_meanings import SHARES, explain_codes, is_explainable
from circuits.code_statistics import columns_of, information
from circuits.coding import coded, examples_of
from circuits.discovery import patching
from circuits.discovery.codes import codes
from circuits.meanings import CodeMeanings
from mechinterp.errors import CircuitError
from mechinterp.models.compiled import indirect_object
from mechinterp.nodes import Node
from mechinterp.sites import Site
from saes.codes import CodeSettings
from saes.logits import logit_effects

SETTINGS = {"n_train": 20, "n_permutations": 200, "steps": 100}


@pytest.fixture(scope="module")
def planted():
    return indirect_object(seed=0, n_prompts=60)


@pytest.fixture(scope="module")
def scores(planted):
    return codes(planted.model, planted.task, score="answer", **SETTINGS)


@pytest.fixture(scope="module")
def made(planted):
    examples = examples_of(planted.model, planted.task, "END", 20)
    return coded(examples, CodeSettings(n_train=20, steps=100))


@pytest.fixture(scope="module")
def mover(planted, scores, made):
    return explain_codes(planted.model, planted.task, scores, planted.roles["mover"], made=made, n_codes=99, n_tokens=99)


def test_the_codes_of_a_name_mover_are_the_names_it_reads_and_writes(mover):
    for one in mover.meanings[:3]:
        assert one.attends[0][0] == "IO"
        assert one.tokens[0][0] == one.towards[0]
        named = sum(one.tokens[0][0] in text for side, text in one.examples if side == "clean")
        assert named == sum(side == "clean" for side, _ in one.examples)


def test_all_codes_of_a_part_share_out_the_examples_and_what_it_tells(mover, made):
    n = len(made.examples.counted)
    assert sum(one.n_clean for one in mover.meanings) == sum(one.n_corrupted for one in mover.meanings) == n == mover.n_pairs
    assert sum(one.share for one in mover.meanings) == pytest.approx(1, abs=1e-4)
    assert [one.share for one in mover.meanings] == sorted((one.share for one in mover.meanings), reverse=True)


def test_attention_is_the_mean_of_recorded_patterns_and_adds_up_to_one(planted, mover, made):
    one, head, prompts, rows = mover.meanings[0], Node.parse(planted.roles["mover"]), planted.task.prompts, made.examples.rows
    latents = made.by_place[0][0].latents[rows.numpy(), made.examples.parts.index(head), 0]
    rows = rows[torch.as_tensor(latents == one.latents[0])]
    _, cache = planted.model.run(torch.cat([prompts.clean, prompts.corrupted])[rows], record=[Site("pattern", head.layer)])
    ends, names = (at.repeat(2)[rows] for at in (prompts.end, prompts.positions["IO"]))
    looked = cache[Site("pattern", head.layer)][torch.arange(len(rows)), head.index, ends, names]
    assert dict(one.attends)["IO"] == pytest.approx(looked.mean().item(), abs=1e-4)
    assert sum(weight for _, weight in one.attends) == pytest.approx(1, abs=1e-3)
    assert sum(weight for _, weight in one.tokens) == pytest.approx(1, abs=1e-3)


def test_what_a_code_of_one_latent_writes_towards_is_what_its_decoder_row_raises(planted, mover, made):
    head, autoencoder = Node.parse(planted.roles["mover"]), made.by_place[0][0].autoencoder
    for one in mover.meanings:
        effects = logit_effects(planted.model, autoencoder, one.latents, place=f"z.{head.layer}.h{head.index}")[0]
        raised = [effects[planted.task.tokenizer.single(token)].item() for token in one.towards]
        assert raised == pytest.approx(sorted(effects.tolist(), reverse=True), abs=1e-5)  # names apart: many tokens tie


def test_what_codes_add_to_the_information_is_the_information(made):
    values, n = made.values[0], len(made.examples.counted)
    answers = made.examples.prompts.answer.numpy()
    observed = {
        "information": information(values, made.examples.labels[None])[0],
        "answer": information(values[:n], answers[None])[0],
    }
    for score, of_parts in observed.items():
        for part in range(0, values.shape[1], 5):
            added = SHARES[score](columns_of(values[:, [part]])[0].double(), made.examples)
            assert added.sum().item() == pytest.approx(of_parts[part], abs=1e-5)


def test_codes_are_made_again_as_they_were_scored(planted, scores, made, mover):
    again = explain_codes(planted.model, planted.task, scores, [planted.roles["mover"]], n_codes=99, n_tokens=99)
    assert again == mover


def test_unless_parts_are_named_those_that_stand_out_are_explained(planted, scores, made):
    explained = explain_codes(planted.model, planted.task, scores, made=made, n_codes=1).meanings
    assert {one.part for one in explained} == set(scores.settings["selected"])
    assert {planted.roles["mover"], planted.roles["late_mover"]} <= {one.part for one in explained}
    silent = replace(scores, settings=dict(scores.settings) | {"selected": []})
    with pytest.raises(CircuitError, match="no part stands out"):
        explain_codes(planted.model, planted.task, silent, made=made)


@pytest.mark.parametrize("score", SHARES)
def test_k_hot_codes_of_several_positions_and_mlps_are_explained_by_every_score(planted, score):
    found = codes(planted.model, planted.task, score=score, positions=("S2", "mean"), k=2, **SETTINGS)
    explained = explain_codes(planted.model, planted.task, found, ["m1", "a1.h3"], n_codes=3, n_examples=2)
    assert {one.place for one in explained.meanings} <= {"S2", "mean"}
    assert all(len(one.latents) <= 2 and len(one.examples) <= 2 for one in explained.meanings)
    assert all(not one.attends and not one.tokens for one in explained.meanings if one.part == "m1")


def test_it_is_saved_and_read_equal_and_printed_with_its_parts(mover, tmp_path):
    mover.save(tmp_path / "codes.json")
    assert CodeMeanings.load(tmp_path / "codes.json") == mover
    said = mover.text(n_codes=1)
    assert said.count("latent ") == 1
    for part in (mover.meanings[0].part, "read at END", "attends to      IO 0.", "writes towards", "clean  "):
        assert part in said
    (tmp_path / "codes.json").write_text((tmp_path / "codes.json").read_text().replace('"share"', '"shares"'))
    with pytest.raises(CircuitError, match="does not hold usable meanings"):
        CodeMeanings.load(tmp_path / "codes.json")


def test_what_cannot_be_explained_is_refused(planted, scores):
    with pytest.raises(CircuitError, match=r"'a9.h1' has no code. There are a0.h0 to m3"):
        explain_codes(planted.model, planted.task, scores, ["a9.h1"])
    other = indirect_object(seed=0, n_prompts=40)
    with pytest.raises(CircuitError, match="60 prompts of .* and 40 prompts of"):
        explain_codes(other.model, other.task, scores)
    with pytest.raises(CircuitError, match="must be at least 1"):
        explain_codes(planted.model, planted.task, scores, n_codes=0)
    untrained = coded(examples_of(planted.model, planted.task, "S2", 20), CodeSettings(n_train=20, steps=100, trained=False))
    with pytest.raises(CircuitError, match=r"trained=False for True, positions=\['S2'\] for \['END'\]\. Leave it out"):
        explain_codes(planted.model, planted.task, scores, made=untrained)
    watched = patching(planted.model, planted.task)
    assert not is_explainable(watched)
    with pytest.raises(CircuitError, match="do not say how codes are made"):
        explain_codes(planted.model, planted.task, watched)
