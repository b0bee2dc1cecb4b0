"""Where heads look: on models whose heads were set by hand, so that the answer is known."""

from dataclasses import replace

import pytest
import torch

from circuits.roles import attention_roles
from mechinterp.errors import UnknownNode
from mechinterp.models.compiled import indirect_object
from mechinterp.nodes import Node
from mechinterp.sites import Site


@pytest.fixture(scope="module")
def planted():
    return indirect_object(seed=0, n_prompts=12)


@pytest.fixture(scope="module")
def every_gaze(planted):
    return attention_roles(planted.model, planted.task, map(Node.parse, planted.roles.values()), n=99, batch_size=5)


@pytest.mark.parametrize(
    ("role", "query", "key"),
    [
        ("duplicate", "S2", "S1"),
        ("inhibit_name", "END", "S2"),
        ("inhibit_place", "END", "S2"),
        ("mover", "END", "IO"),
        ("late_mover", "END", "IO"),
    ],
)
def test_planted_heads_look_where_they_were_set_to_look(planted, every_gaze, role, query, key):
    strongest = every_gaze[Node.parse(planted.roles[role])][0]
    assert (strongest.query, strongest.key) == (query, key)
    assert 0.8 < strongest.share <= 1


def test_a_share_is_the_mean_of_the_recorded_pattern(planted, every_gaze):
    head, prompts = Node.parse(planted.roles["mover"]), planted.task.prompts
    _, cache = planted.model.run(prompts.clean, record=[Site("pattern", head.layer)])
    pattern = cache["pattern", head.layer][:, head.index]
    rows = torch.arange(len(prompts))
    wanted = pattern[rows, prompts.end, prompts.positions["IO"]].mean().item()
    (gaze,) = (gaze for gaze in every_gaze[head] if (gaze.query, gaze.key) == ("END", "IO"))
    assert gaze.share == pytest.approx(wanted, abs=1e-6)
    assert str(gaze) == f"END -> IO {wanted:.2f}"


def test_resting_on_the_first_token_comes_last(every_gaze):
    for gazes in every_gaze.values():
        resting = [gaze.key == "the first token" for gaze in gazes]
        assert resting == sorted(resting)


def test_two_names_of_one_token_count_once(planted):
    positions = {**planted.task.prompts.positions, "IO+0": planted.task.prompts.positions["IO"]}
    task = replace(planted.task, prompts=replace(planted.task.prompts, positions=positions))
    head = Node.parse(planted.roles["mover"])
    found = attention_roles(planted.model, task, str(head), n=99)[head]
    assert not [gaze for gaze in found if "IO+0" in (gaze.query, gaze.key)]


def test_only_whole_heads_have_attention(planted):
    with pytest.raises(UnknownNode, match=r"'m1' is not a whole head.*circuit\.heads"):
        attention_roles(planted.model, planted.task, [Node.mlp(1)])


def test_a_gaze_where_nothing_changes_between_clean_and_corrupted_is_no_role(planted, every_gaze):
    first_change = planted.task.prompts.shared_prefix
    before = [name for name, index in planted.task.prompts.positions.items() if int(index.max()) < first_change]
    for gazes in every_gaze.values():
        assert all(gaze.change == 0 for gaze in gazes if gaze.query in before)
        assert max(gaze.change for gaze in gazes) == 1
