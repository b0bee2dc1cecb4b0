"""Repair by attention: on models that are wired by hand, then broken, and on the built-in one."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.broken_tasks import FAMILIES
from circuits.discovery.nodes import patching
from circuits.repairs.effects import TARGETS, answer_direction
from circuits.repairs.picture import draw_repair
from circuits.repairs.repairing import repair, said
from circuits.repairs.report import Condition, Mean, Repair
from circuits.repairs.runs import positions
from circuits.repairs.search import Proposal, propose
from mechinterp import load
from mechinterp.errors import CircuitError, MechinterpError, TaskError, UnknownNode
from mechinterp.interventions import attend_to
from mechinterp.metrics import is_top
from mechinterp.models.compiled import Planted, indirect_object
from mechinterp.models.transformer import Transformer
from mechinterp.models.weights import Weights
from mechinterp.tasks.colored_objects import colored_objects

PLACES = {"giver": ["S2"], "end": ["END"]}


@pytest.fixture(scope="module")
def planted() -> Planted:
    return indirect_object(n_prompts=24)


@pytest.fixture(scope="module")
def broken(planted) -> Transformer:
    """The same model, whose inhibition heads ask for nothing and so look everywhere alike."""
    named = planted.model.weights.named()
    query = named["blocks.1.attn.W_Q"].clone()
    for role in ("inhibit_name", "inhibit_place"):
        query[int(planted.roles[role].split(".h")[1])] = 0
    return replace(planted.model, weights=Weights.from_named(planted.model.config, {**named, "blocks.1.attn.W_Q": query}))


def fresh(planted: Planted):
    return indirect_object(n_prompts=40, seed=5).task


def accuracy(model: Transformer, task, patch=None) -> float:
    logits, _ = model.run(task.prompts.clean, logits_at=task.prompts.end, patch=patch)
    return float(is_top(logits, task.prompts).mean())


def test_what_was_broken_is_found_and_repaired_on_other_prompts(planted, broken):
    proposal = propose(broken, planted.task, attention=PLACES, n=2)
    assert set(proposal.groups["giver"]) == {planted.roles["inhibit_name"], planted.roles["inhibit_place"]}
    found = repair(broken, fresh(planted), **proposal.edit, n_random=10)
    assert found["unedited"].accuracy.value < 0.8
    assert found.edited.accuracy.value == 1
    assert found.edited.broken == 0
    n_prompts = len(fresh(planted)) - found.facts["n_seen"]
    assert found.edited.fixed == round(n_prompts * (1 - found["unedited"].accuracy.value))
    assert max(control.accuracy for control in found.controls) < 1
    assert found.as_good_at_random == pytest.approx(1 / 11)


def test_the_movers_look_and_speak_as_they_do_in_the_whole_model(planted, broken):
    heads = [planted.roles["inhibit_name"], planted.roles["inhibit_place"]]
    found = repair(broken, planted.task, heads, ["S2"], n_random=0)
    whole = repair(planted.model, planted.task, heads, ["S2"], n_random=0)  # where they look anyway
    healed = {effect.head: effect for effect in found.downstream}
    for effect in whole.downstream:
        assert healed[effect.head].after == pytest.approx(effect.before, abs=0.5)
        assert healed[effect.head].looks["IO"][1] == pytest.approx(effect.looks["IO"][0], abs=0.05)
    assert {effect.head for effect in found.downstream[:2]} == {planted.roles["mover"], planted.roles["late_mover"]}
    assert all(effect.change.low > 0 for effect in found.downstream[:2])


def test_a_search_finds_nothing_where_nothing_is_wrong(planted):
    proposal = propose(planted.model, planted.task, attention=PLACES, metric="is_top")
    assert proposal.steps == ()
    with pytest.raises(CircuitError, match="no head helps"):
        _ = proposal.edit


def test_one_prompt_is_too_few_to_search_on(planted, broken):
    one = replace(planted.task, prompts=planted.task.prompts[:1])
    with pytest.raises(TaskError, match="one prompt has no interval"):
        propose(broken, one, attention=PLACES)


def test_what_a_head_does_alone_is_what_editing_it_alone_gives(planted, broken):
    proposal = propose(broken, planted.task, attention=PLACES, n=1, batch_size=7)
    prompts = planted.task.prompts
    plain, _ = broken.run(prompts.clean, logits_at=prompts.end)
    for trial in proposal.alone[::5]:
        edit = attend_to([trial.head], at=prompts.end, to=prompts.positions[PLACES[trial.target][0]][:, None])
        logits, _ = broken.run(prompts.clean, logits_at=prompts.end, patch=edit)
        gain = planted.task.metric(logits, prompts) - planted.task.metric(plain, prompts)
        assert trial.gain.value == pytest.approx(float(gain.mean()), abs=1e-4)


def test_candidates_come_from_scores_and_are_compared_with_them(planted, broken):
    scores = patching(planted.model, planted.task)
    proposal = propose(broken, planted.task, attention=PLACES, scores=scores, candidates=5)
    strongest = [str(node) for node in scores.components() if node.kind == "head"][:5]
    assert {trial.head for trial in proposal.alone} == set(strongest)
    assert -1 <= proposal.correlation(scores) <= 1
    assert -1 <= repair(broken, fresh(planted), **proposal.edit, n_random=0).correlation(scores) <= 1
    with pytest.raises(CircuitError, match="Pass scores"):
        propose(broken, planted.task, attention=PLACES, candidates=5)


def test_prompts_that_were_searched_are_left_out(planted, broken):
    proposal = propose(broken, planted.task, attention=PLACES, n=2)
    with pytest.raises(CircuitError, match="another seed"):
        repair(broken, planted.task, **proposal.edit)
    more = indirect_object(n_prompts=30).task  # the same seed: the first 24 are those searched
    found = repair(broken, more, **proposal.edit, n_random=0)
    assert found.facts["n_seen"] >= 24
    assert found.facts["n_prompts"] + found.facts["n_seen"] == 30


def test_random_heads_are_as_many_from_the_same_layers_and_never_the_edited(planted):
    edited = {"one": ["a1.h0", "a1.h3"], "two": ["a2.h2"]}
    found = repair(planted.model, planted.task, edited, {"one": ["S2"], "two": ["IO"]}, n_random=15)
    for control in found.controls:
        assert len(set(control.heads)) == 3
        assert all(head.startswith(("a1", "a2")) for head in control.heads)
        assert not set(control.heads) & {"a1.h0", "a1.h3", "a2.h2"}
    assert [condition.name for condition in found.conditions] == ["unedited", "one", "two", "all"]
    assert len({control.heads for control in found.controls}) > 5


def test_random_heads_come_from_all_layers_where_the_edited_ones_are_full(planted):
    found = repair(planted.model, planted.task, [f"a1.h{head}" for head in range(4)], ["S2"], n_random=5)
    assert found.facts["random_layers"] == [0, 1, 2, 3]
    everything = [f"a{layer}.h{head}" for layer in range(4) for head in range(4)]
    with pytest.raises(CircuitError, match="n_random=0"):
        repair(planted.model, planted.task, everything, ["S2"])
    assert repair(planted.model, planted.task, everything, ["S2"], n_random=0).downstream == ()


@pytest.mark.parametrize("at", ["END", "S2"])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_an_edit_anywhere_is_the_patch_on_whole_prompts(planted, broken, at, share):
    prompts = planted.task.prompts
    found = repair(broken, planted.task, ["a0.h3", "a2.h1"], ["S1"], at=at, share=share, n_random=0, batch_size=5)
    edit = attend_to(["a0.h3", "a2.h1"], at=prompts.positions[at], to=prompts.positions["S1"][:, None], share=share)
    logits, cache = broken.run(prompts.clean, logits_at=prompts.end, patch=edit, record=["pattern.3"])
    assert found.edited.metric.value == pytest.approx(float(planted.task.metric(logits, prompts).mean()), abs=1e-4)
    looks = next(effect for effect in found.downstream if effect.head == "a3.h3").looks
    rows = torch.arange(len(prompts))
    shares = cache["pattern.3"][rows, 3, prompts.end, prompts.positions["IO"]]
    assert looks["IO"][1] == pytest.approx(float(shares.mean()), abs=1e-5)
    assert looks[TARGETS] == looks["S1"]


@pytest.mark.parametrize(
    ("variant", "facts"), [("plain", {"causal": False}), ("llama", {}), ("gemma2", {}), ("olmo2", {}), ("mpt", {})]
)
def test_models_of_every_kind_are_edited_as_whole_prompts_are(make_model, make_task, variant, facts):
    model = make_model(variant, **facts)
    task = make_task(model)
    to = torch.tensor([[1, 3]]).repeat(len(task), 1)
    found = repair(model, task, ["a1.h2"], to, n_random=0)
    logits, _ = model.run(
        task.prompts.clean, logits_at=task.prompts.end, patch=attend_to(["a1.h2"], at=task.prompts.end, to=to)
    )
    assert found.edited.metric.value == pytest.approx(float(task.metric(logits, task.prompts).mean()))


def test_direct_logit_attributions_and_the_rest_of_the_stream_sum_to_the_logit_difference(model, make_task):
    task = make_task(model)
    prompts, weights = task.prompts, model.weights
    last = f"resid_post.{model.config.n_layers - 1}"
    scale = ["ln_final_scale"] if weights.ln_final else []
    logits, cache = model.run(prompts.clean, record=[last, *scale], logits_at=prompts.end)
    stream = cache[last][torch.arange(len(prompts)), prompts.end]
    direct = (stream * answer_direction(model, prompts)).sum(-1)
    direct = direct / cache["ln_final_scale"].reshape(-1) if scale else direct
    nothing = torch.zeros_like(stream) if weights.ln_final is None or weights.ln_final.b is None else weights.ln_final.b
    constant = nothing.expand_as(stream) @ weights.W_U + weights.b_U
    if (cap := model.config.logit_soft_cap) is not None:
        logits = cap * torch.atanh(logits / cap)
    torch.testing.assert_close(direct + task.metric(constant, prompts), task.metric(logits, prompts))


def test_what_later_heads_add_directly_is_lost_with_what_they_write(model, make_task):
    """The attributions that a repair reports, each against a run without that write, the scale held and before a soft cap."""
    task, config = make_task(model), model.config
    prompts, to, last = task.prompts, torch.tensor([[1, 3]]).repeat(5, 1), config.n_layers - 1
    downstream = {effect.head: effect for effect in repair(model, task, ["a1.h2"], to, n_random=0).downstream}
    assert len(downstream) == config.n_heads
    sites = [f"mlp_out.{last}"] * config.has_mlp + ["ln_final_scale"] * (config.normalization != "none")
    whole, cache = model.run(prompts.clean, record=sites, logits_at=prompts.end)
    held = {site: lambda _, __, site=site: cache[site] for site in sites}

    def uncapped(logits):
        cap = config.logit_soft_cap
        return logits if cap is None else cap * torch.atanh(logits / cap)

    for head in range(config.n_heads):
        silence = {f"{config.write_site}.{last}": lambda z, _, h=head: z * (torch.arange(config.n_heads) != h)[:, None]}
        silent, _ = model.run(prompts.clean, patch=silence | held, logits_at=prompts.end)
        lost = task.metric(uncapped(whole), prompts) - task.metric(uncapped(silent), prompts)
        assert downstream[f"a{last}.h{head}"].before == pytest.approx(float(lost.mean()), abs=1e-9)


def test_positions_may_leave_out_what_differs_from_prompt_to_prompt(planted):
    prompts = planted.task.prompts
    io = positions(planted.task, ["IO", "S1", "-S1"], prompts.end)
    assert torch.equal(io[:, 0], prompts.positions["IO"])
    moving = replace(prompts, positions={**prompts.positions, "X": torch.where(torch.arange(len(prompts)) % 2 > 0, 1, 6)})
    uneven = positions(replace(planted.task, prompts=moving), ["IO", "S1", "S2", "-X"], prompts.end)
    assert sorted(uneven[0].tolist()) == [1, 3]
    assert sorted(uneven[1].tolist()) == [3, 6]
    wider = positions(replace(planted.task, prompts=moving), ["X", "S2"], prompts.end)
    assert wider.tolist()[:2] == [[6, 6], [1, 6]]  # one place twice is what two places are, half each


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"attention": ["S3"]}, TaskError, "no position 'S3'"),
        ({"attention": ["IO", "-IO"]}, TaskError, "no position is left"),
        ({"attention": ["END"], "at": "S2"}, TaskError, "not among those up to 6"),
        ({"attention": torch.tensor([[1]])}, TaskError, "one row a prompt"),
        ({"attention": torch.ones(24, dtype=torch.long)}, TaskError, r"shape \(24,\)"),
        ({"heads": []}, CircuitError, "no head is named"),
        ({"heads": {"one": ["a1.h0"], "two": ["a1.h0"]}}, CircuitError, "'a1.h0' is named twice"),
        ({"attention": {"other": ["S2"]}}, CircuitError, "Give each group its own"),
        ({"heads": ["a9.h0"]}, UnknownNode, "a0.h0 to a3.h3"),
        ({"heads": ["m1"]}, MechinterpError, "no head"),
        ({"heads": ["a1.h0", "a1.h0"]}, CircuitError, "each head once"),
        ({"heads": {"all": ["a1.h0"]}}, CircuitError, "none 'unedited' or 'all'"),
        ({"share": 0.0}, TaskError, "share above 0"),
        ({"at": "nowhere"}, TaskError, "no position 'nowhere'"),
    ],
)
def test_refusals_say_what_would_be_right(planted, change, error, match):
    with pytest.raises(error, match=match):
        repair(planted.model, planted.task, **{"heads": ["a1.h0"], "attention": ["S2"], "n_random": 0} | change)


def test_one_head_and_one_place_need_no_list(planted):
    listed, alone = (
        repair(planted.model, planted.task, heads, place, n_random=0) for heads, place in ((["a1.h0"], ["S2"]), ("a1.h0", "S2"))
    )
    assert listed == alone
    (trial,) = propose(planted.model, planted.task, attention={"there": "S2"}, candidates="a1.h0").alone
    assert (trial.head, trial.target) == ("a1.h0", "there")
    with pytest.raises(CircuitError, match="no target to look at"):
        propose(planted.model, planted.task, attention={})


def test_wrong_answers_are_told_apart():
    model = load("builtin")
    task = colored_objects(model, n_prompts=4, seed=1, template=2)
    tokenizer, prompts = model.tokenizer, task.prompts
    third = next(n for n in (1, 2, 3) if f"color{n}" not in _named(task, 3, "answer_color", "foil_color"))
    blue = tokenizer.decode([int(prompts.clean[3, prompts.positions[f"color{third}"][3]])])
    foil = prompts.candidates[1][prompts.roles[1] < 0]
    lower = prompts.clean[2, prompts.positions["answer_color"][2]]
    words = [int(prompts.answer[0]), int(foil), int(lower), tokenizer.single(blue.title())]
    assert said(task, np.array(words)) == {
        task.group_names[2]: {
            "answer": 1,
            "foil at foil_color": 1,
            "word at answer_color": 1,
            f"word at color{third}, in other case": 1,
        }
    }
    nothing = said(task, np.array([tokenizer.single(" garden")] * 4))
    assert nothing == {task.group_names[2]: {"anything else": 4}}


def _named(task, row: int, *names: str) -> set[str]:
    where = {int(task.prompts.positions[name][row]) for name in names}
    return {name for name, at in task.prompts.positions.items() if int(at[row]) in where}


@pytest.mark.parametrize(("fixed", "broken", "p"), [(0, 0, 1), (3, 3, 1), (5, 0, 2 / 32), (0, 5, 2 / 32), (7, 1, 18 / 256)])
def test_fixed_and_broken_prompts_are_weighed_as_coins_are(fixed, broken, p):
    mean = Mean(0.0, 0.0, 0.0)
    assert Condition("x", (), mean, mean, mean, fixed, broken, {}).p_value == pytest.approx(p)


def test_files_hold_everything(planted, broken, tmp_path):
    proposal = propose(broken, planted.task, attention=PLACES)
    proposal.save(tmp_path / "proposal.json")
    assert Proposal.load(tmp_path / "proposal.json") == proposal
    found = repair(broken, fresh(planted), **proposal.edit, n_random=3)
    found.save(tmp_path / "repair.json")
    assert Repair.load(tmp_path / "repair.json") == found
    assert str(found) == str(Repair.load(tmp_path / "repair.json"))
    document = json.loads((tmp_path / "repair.json").read_text())
    (tmp_path / "less.json").write_text(json.dumps({k: v for k, v in document.items() if k != "controls"}))
    with pytest.raises(CircuitError, match="less.json"):
        Repair.load(tmp_path / "less.json")
    with pytest.raises(CircuitError, match="expected 'mechinterp repair'"):
        Repair.load(tmp_path / "proposal.json")


def test_the_report_is_a_table_of_conditions_errors_and_later_heads(planted, broken):
    text = str(repair(broken, planted.task, {"inhibition": ["a1.h3", "a1.h0"]}, ["S2"], n_random=2))
    assert "| inhibition | a1.h3 a1.h0 | 100.0 [100.0, 100.0] |" in text
    assert "random heads, best" in text
    assert "| wrong answers | unedited | inhibition |" in text
    assert "attention from END" in text


def test_a_picture_is_drawn_of_one_or_more(planted, broken, tmp_path):
    found = repair(broken, planted.task, ["a1.h3"], ["S2"], n_random=2)
    draw_repair([found, found], tmp_path / "two.png", titles=["one", "other"])
    assert (tmp_path / "two.png").stat().st_size > 1000
    with pytest.raises(CircuitError, match=r"\.png"):
        draw_repair(found, tmp_path / "two.txt")


def test_a_task_that_breaks_the_builtin_model_is_repaired_by_where_one_head_looks():
    """A last thing, said after the question, draws END away from it; one head of layer 0 that looks back mends all."""
    model, (make, _) = load("builtin"), FAMILIES["colored-objects"]
    search, others = (make("one more thing after the question", model, 48, seed) for seed in (0, 1))
    proposal = propose(model, search, attention=["query"], n=1, batch_size=48)
    found = repair(model, others, **proposal.edit, n_random=8, batch_size=48)
    assert found["unedited"].accuracy.high < 0.3
    assert found.edited.accuracy.low > 0.9
    assert max(control.accuracy for control in found.controls) < found.edited.accuracy.low
    assert accuracy(model, make("four things", model, 48, 1)) > 0.95


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_of_each_family_is_the_task_as_trained_and_all_words_are_known(family):
    model, (make, variants) = load("builtin"), FAMILIES[family]
    assert accuracy(model, make(variants[0], model, 32, 0)) > 0.95
    unknown = model.tokenizer.single("<unk>")
    for variant in variants:
        task = make(variant, model, 8, 0)
        assert not bool((task.prompts.clean == unknown).any())
        assert bool((task.prompts.clean != task.prompts.corrupted).any())
