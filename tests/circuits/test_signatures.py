"""What heads are told by: on heads set by hand, and by sums that must be 1, signs that turn and roles that are found again."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from circuits.reuse.features import FOIL, ROLES, head_features
from circuits.reuse.matching import same_role
from circuits.reuse.signatures import Features, Signatures, measure_signatures, similarity
from mechinterp import load
from mechinterp.errors import CircuitError, TaskError, UnknownNode
from mechinterp.models.compiled import indirect_object, induction
from mechinterp.nodes import Node
from mechinterp.tasks import colored_objects, ioi

CLASSES = {"duplicate": "duplicate", "inhibit_name": "inhibition", "inhibit_place": "inhibition"}
CLASSES |= {"mover": "mover", "late_mover": "mover"}
TASK = "indirect-object"


@pytest.fixture(scope="module")
def planted():
    return indirect_object(seed=0, n_prompts=12)


@pytest.fixture(scope="module")
def measured(planted):
    return measure_signatures(planted.model, [planted.task], batch_size=5, progress=False)


@pytest.fixture(scope="module")
def elsewhere():
    """Another model by hand, in which other heads play the same roles."""
    other = indirect_object(seed=1, n_prompts=12)
    assert other.roles != indirect_object(seed=0, n_prompts=12).roles
    return other, measure_signatures(other.model, [other.task], progress=False)


@pytest.fixture
def named_task(make_task, plain):  # every variant has its vocabulary
    task = make_task(plain, n_prompts=6)
    at = torch.arange(6)
    positions = {"A": at % 3, "B": 3 + at % 2, "B+1": 4 + at % 2}
    return replace(task, prompts=replace(task.prompts, positions=positions))


def test_shares_of_attention_from_one_query_sum_to_one(model, named_task):
    found = head_features(model, named_task, batch_size=4, progress=False)
    ones = torch.ones(3, model.config.n_heads, dtype=torch.float64)
    for query in ("END", "A", "B", "B+1"):
        shares = [share for name, share in found.items() if name.startswith(f"attention: {query} -> ")]
        assert torch.allclose(sum(shares), ones)
    roles = [found[f"role: END -> {role}"] for role in ROLES]
    assert torch.allclose(sum(roles), ones)


def test_a_share_is_the_mean_of_the_recorded_pattern(plain, named_task):
    found, prompts = head_features(plain, named_task, batch_size=4, progress=False), named_task.prompts
    _, cache = plain.run(prompts.clean, record=["pattern.2"])
    looked = [cache["pattern", 2][i, :, end, prompts.positions["A"][i]] for i, end in enumerate(prompts.end.tolist())]
    assert torch.allclose(found["attention: END -> A"][2], torch.stack(looked).mean(0))


def test_what_a_head_writes_is_the_change_of_the_logits_when_it_falls_silent_and_the_scale_is_held(model, make_task):
    task = make_task(model)
    prompts, rows = task.prompts, torch.arange(len(task))
    found = head_features(model, task, batch_size=2, progress=False)

    def silence(z, _):
        z = z.clone()
        z[:, :, 1] = 0
        return z

    last = model.config.n_layers - 1
    has_norm = model.weights.ln_final is not None
    whole, cache = model.run(prompts.clean, record=["mlp_out", "ln_final_scale"] if has_norm and model.config.has_mlp else
                             ["mlp_out"] if model.config.has_mlp else ["ln_final_scale"], logits_at=prompts.end)  # fmt: skip
    # Only what goes to the logits directly: the MLP of the same layer and the scale stay as they were.
    held = {"ln_final_scale": lambda _, __: cache["ln_final_scale"]} if has_norm else {}
    if model.config.has_mlp:
        held[f"mlp_out.{last}"] = lambda value, _: cache["mlp_out", last]
    silent, _ = model.run(prompts.clean, patch={f"{model.config.write_site}.{last}": silence, **held}, logits_at=prompts.end)
    lifted = uncapped(model, whole) - uncapped(model, silent)
    lifted = lifted - lifted.mean(1, keepdim=True)
    answers, foils = (prompts.roles > 0, prompts.roles < 0)
    by_candidate = lifted.gather(1, prompts.candidates)
    for name, chosen in (("the answer", answers), (FOIL, foils)):
        logits = (by_candidate * chosen).sum(1) / chosen.sum(1)
        assert found[f"logits: {name}"][last, 1].item() == pytest.approx(logits.mean().item(), abs=1e-8)
        in_deviations = (logits / lifted.std(1, correction=0)).mean()
        assert found[f"writes: {name}"][last, 1].item() == pytest.approx(in_deviations.item(), abs=1e-6)
    at_end = lifted[rows, prompts.clean[rows, prompts.end]].mean()
    assert found["logits: END"][last, 1].item() == pytest.approx(at_end.item(), abs=1e-8)


def uncapped(model, logits):
    cap = model.config.logit_soft_cap
    return logits if cap is None else cap * torch.atanh(logits / cap)


def test_a_head_with_its_output_turned_round_suppresses_what_it_copied(planted, measured):
    head = Node.parse(planted.roles["late_mover"])
    blocks = list(planted.model.weights.blocks)
    blocks[3] = replace(blocks[3], W_O=-blocks[3].W_O)
    turned = replace(planted.model, weights=replace(planted.model.weights, blocks=tuple(blocks)))
    before = measured.signature(head, TASK)
    after = measure_signatures(turned, [planted.task], [head], progress=False).signature(head, TASK)
    for name in ("writes: what it attends to", "writes: IO", "writes: the answer", "logits: IO", "weights: copying"):
        assert before[name] > 0.9
        assert after[name] == pytest.approx(-before[name], rel=1e-4)
    assert after["attention: END -> IO"] == pytest.approx(before["attention: END -> IO"])


@pytest.mark.parametrize(
    ("role", "feature", "least"),
    [
        ("duplicate", "attention: S2 -> S1", 0.9),
        ("inhibit_name", "attention: END -> S2", 0.85),
        ("inhibit_place", "role: END -> a foil", 0.85),
        ("mover", "attention: END -> IO", 0.8),
        ("late_mover", "role: END -> the answer", 0.8),
        ("mover", "writes: what it attends to", 3.0),
        ("mover", "weights: copying", 0.99),
    ],
)
def test_planted_heads_do_what_they_were_set_to_do(planted, measured, role, feature, least):
    assert measured.signature(planted.roles[role], TASK)[feature] > least


def test_heads_that_the_logits_do_not_hear_write_nothing(planted, measured):
    for role in ("duplicate", "inhibit_name", "inhibit_place"):
        found = measured.signature(planted.roles[role], TASK)
        assert not any(value for name, value in found.items() if name.startswith("writes"))


def test_repetition_in_the_text_is_seen_from_every_query():
    planted = induction(n_prompts=12)
    found = measure_signatures(planted.model, [planted.task], progress=False)
    assert found.signature(planted.roles["previous"], "induction")["text: -> the one before"] > 0.9
    assert found.signature(planted.roles["induction"], "induction")["text: -> what followed it"] > 0.9
    assert found.signature(planted.roles["induction"], "induction")["writes: the answer"] > 3


def test_answers_are_looked_for_as_words_and_what_comes_after_them_is_near():
    """Colored objects asks for " Red" where the text has " red"."""
    model = load("builtin")
    task = colored_objects(model, n_prompts=8, seed=0)
    assert not (task.prompts.clean == task.prompts.answer[:, None]).any()
    found = head_features(model, task, progress=False)
    assert (found["role: END -> the answer"] >= found["attention: END -> answer_color"] - 1e-6).all()
    assert (found["role: END -> just after the answer"] >= found["attention: END -> answer_object"] - 1e-6).all()
    assert found["role: END -> just after the answer"].max() > 0.5


def test_in_the_trained_model_some_head_moves_the_name_and_some_head_suppresses():
    model = load("builtin")
    found = measure_signatures(model, {"ioi": ioi(model, n_prompts=16, seed=0)}, progress=False)
    table = found.table("ioi")
    movers = (table["role: END -> the answer"] > 0.5) & (table["writes: what it attends to"] > 1.5)
    negative = (table["role: END -> a foil"] > 0.5) & (table["writes: what it attends to"] < -1.5)
    assert movers.any()
    assert negative.any()
    assert (found.table(None)["weights: copying"][negative] < -0.5).all()


def test_relative_features_have_mean_zero_and_deviation_one(measured):
    table = measured.table(TASK).relative
    assert np.allclose(table.values.mean(0), 0)
    assert np.allclose(table.values.std(0), 1)


def test_similarity_is_a_cosine_over_what_both_have():
    one, other = {"role: a": 3.0, "role: b": 4.0, "text: c": 9.0}, {"role: a": 4.0, "role: b": -3.0, "text: d": 1.0}
    assert similarity(one, one) == pytest.approx(1)
    assert similarity(one, other) == pytest.approx(0)
    assert similarity(one, {"role: a": -2.0}) == pytest.approx(-1)
    assert similarity(one, {"role: a": 0.0, "role: b": 0.0}) == 0
    with pytest.raises(CircuitError, match="share no feature of these kinds"):
        similarity(one, other, kinds=("text",))


def test_roles_are_found_again_in_another_model_by_hand(planted, measured, elsewhere):
    other, there = elsewhere
    found = same_role(measured, TASK, TASK, planted.roles.values(), there.heads, other=there)
    role_here, role_there = ({head: role for role, head in one.roles.items()} for one in (planted, other))
    for match in found.matches:
        assert CLASSES[role_there[str(match.like)]] == CLASSES[role_here[str(match.head)]]
        assert match.similarity > 0.85
        assert match.own_rank is None
    assert found.chance_same is None
    assert "weights: copying" in found.features


def test_a_circuit_has_its_own_roles_and_chance_is_less(planted, measured):
    found = same_role(measured, TASK, TASK, planted.roles.values(), planted.roles.values())
    assert found.similarity == pytest.approx(1)
    assert all(match.own_rank == 1 for match in found.matches)
    assert found.chance < 0.8
    assert found.p < 0.1  # five heads of sixteen drawn at random have one of each of the three classes as often
    assert found.chance_same == 1.0
    assert str(found).startswith("Mean similarity 1.00, by chance 0.")


def test_a_random_circuit_is_as_alike_as_chance_says(measured):
    rng = np.random.default_rng(0)
    heads = list(measured.heads)
    pairs = [(rng.permutation(16)[:4], rng.permutation(16)[:4]) for _ in range(60)]
    found = [same_role(measured, TASK, TASK, [heads[i] for i in a], [heads[i] for i in b]) for a, b in pairs]
    assert np.mean([one.similarity for one in found]) == pytest.approx(np.mean([one.chance for one in found]), abs=0.05)
    assert np.mean([one.p <= 0.1 for one in found]) < 0.25
    assert np.mean([one.n_same for one in found]) <= np.mean([len(set(a) & set(b)) for a, b in pairs])


def test_signatures_are_saved_and_read_back(measured, tmp_path):
    measured.save(tmp_path / "signatures.json")
    again = Signatures.load(tmp_path / "signatures.json")
    assert (again.model, again.heads, again.chance, again.settings) == (
        measured.model,
        measured.heads,
        measured.chance,
        measured.settings,
    )
    for name, table in measured.tables.items():
        assert again.tables[name].names == table.names
        assert np.array_equal(again.tables[name].values, table.values)
    (tmp_path / "broken.json").write_text((tmp_path / "signatures.json").read_text().replace('"names"', '"nomes"'))
    with pytest.raises(CircuitError, match=r"broken\.json' does not hold usable signatures"):
        Signatures.load(tmp_path / "broken.json")


def test_the_table_says_what_each_head_does(planted, measured):
    (line,) = (line for line in str(measured).splitlines() if line.startswith(f"| {planted.roles['mover']} "))
    assert "| 1.00 | IO 0.8" in line
    assert "| IO +4." in line


@pytest.mark.parametrize("heads", [["a9.h0"], ["m1"], ["a1.h0.q"]])
def test_only_heads_of_the_model_have_signatures(planted, heads):
    with pytest.raises(UnknownNode, match="is not a whole head of planted-indirect-object"):
        measure_signatures(planted.model, [planted.task], heads, progress=False)


def test_what_was_not_measured_is_said(planted, measured):
    with pytest.raises(UnknownNode, match="'a7.h0' is not among the 16 heads measured"):
        measured.signature("a7.h0")
    with pytest.raises(CircuitError, match="'iou' was not measured; measured: indirect-object"):
        measured.table("iou")
    with pytest.raises(TaskError, match="each needs a name of its own"):
        measure_signatures(planted.model, [planted.task, planted.task], progress=False)
    with pytest.raises(CircuitError, match="a circuit without heads"):
        same_role(measured, TASK, TASK, [], planted.roles.values())
    with pytest.raises(CircuitError, match="n_permutations=0 draws no circuit"):
        same_role(measured, TASK, TASK, "a0.h0", "a0.h0", n_permutations=0)
    with pytest.raises(CircuitError, match="'rolle' is no kind of feature.*Did you mean 'role'"):
        same_role(measured, TASK, TASK, planted.roles.values(), planted.roles.values(), kinds=["rolle"])
    with pytest.raises(CircuitError, match="2 features need so many"):
        Features(("a", "b"), np.zeros((3, 1)))
