"""Divergence: what moves when tokens are blanked, against a plain loop and on heads whose news is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from circuits.discovery.divergence import FRACTIONS, divergence
from circuits.scores import Scores
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError
from mechinterp.models.compiled import indirect_object, induction


def by_name(scores: Scores) -> dict[str, float]:
    return dict(zip(scores.names, scores.values.tolist(), strict=True))


def named(task, **positions: int):
    """The task with these positions named, the same in every prompt."""
    there = {name: torch.full((len(task),), at) for name, at in positions.items()}
    return replace(task, prompts=replace(task.prompts, positions=there))


def loud(model, layer: int, head: int, factor: float):
    """The same model with one head's output times a factor."""
    blocks = list(model.weights.blocks)
    W_O = model.weights.W_O(layer).clone()
    W_O[head] *= factor
    blocks[layer] = replace(blocks[layer], W_O=W_O.flatten(0, 1))
    return replace(model, weights=replace(model.weights, blocks=tuple(blocks)))


@pytest.mark.parametrize("relative_to", FRACTIONS)
@pytest.mark.parametrize("blank", ["corrupted", "mean", 3])
def test_divergence_is_what_a_plain_loop_finds(model, make_task, relative_to, blank):
    task = make_task(model)
    prompts, wiring = task.prompts, Wiring.of(model.config)
    differs = prompts.clean != prompts.corrupted
    mean = model.run(prompts.clean, record=["embed"])[1]["embed"][differs].mean(0)
    rows: dict[str, list[list[torch.Tensor]]] = {str(writer): [] for writer in wiring.writers[1:]}
    stream = []
    for i, end in enumerate(prompts.end.tolist()):
        tokens, patch = prompts.clean[i : i + 1], {}
        if blank == "mean":
            blanked, patch = tokens, {"embed": lambda embed, _, i=i: torch.where(differs[i, :, None], mean, embed)}
        else:
            blanked = torch.where(differs[i], prompts.corrupted[i] if blank == "corrupted" else blank, tokens)
        sites = [model.config.write_site, "resid_post", *(["mlp_out"] if model.config.has_mlp else [])]
        (_, clean), (_, other) = model.run(tokens, record=sites), model.run(blanked, record=sites, patch=patch)
        for name, found in rows.items():
            found.append([cache.output(name)[0, end] for cache in (clean, other)])
        stream.append(clean["resid_post", model.config.n_layers - 1][0, end].norm())
    scores = by_name(divergence(model, task, blank=blank, relative_to=relative_to, batch_size=2))
    for name, found in rows.items():
        m = torch.stack([o for pair in found for o in pair]).mean(0)
        spread = torch.stack([(o - m).square().sum() + (b - m).square().sum() for o, b in found]).mean()
        wanted = {
            "size": [(o - b).norm() / (o.norm() + b.norm()) for o, b in found],
            "spread": [(o - b).square().sum() / spread for o, b in found],
            "stream": [(o - b).norm() / r for (o, b), r in zip(found, stream, strict=True)],
        }[relative_to]
        assert scores[name] == pytest.approx(torch.stack(wanted).mean().item(), rel=1e-9)


@pytest.mark.parametrize("relative_to", FRACTIONS)
def test_what_the_blanked_tokens_do_not_reach_does_not_move(make_model, make_task, relative_to):
    model = make_model("parallel")
    task = named(make_task(model, changed=(4,)), EARLY=3, LATE=5)
    assert not divergence(model, task, positions="EARLY", relative_to=relative_to).values.any()
    late = by_name(divergence(model, task, positions="LATE", relative_to=relative_to))
    # In a parallel block the first MLP reads its own token alone.
    assert [name for name, value in late.items() if value == 0] == ["input", "m0"]


@pytest.mark.parametrize("relative_to", ["size", "spread"])
def test_a_louder_part_has_the_same_divergence(plain, make_task, relative_to):
    task = make_task(plain)
    before, after = (by_name(divergence(m, task, relative_to=relative_to)) for m in (plain, loud(plain, 2, 1, -7.0)))
    assert after["a2.h1"] == pytest.approx(before["a2.h1"], rel=1e-9)


def test_beside_the_stream_a_louder_part_moves_more(plain, make_task):
    task = make_task(plain)
    before, after = (by_name(divergence(m, task, relative_to="stream")) for m in (plain, loud(plain, 2, 1, 3.0)))
    assert after["a2.h1"] > 1.5 * before["a2.h1"]


@pytest.mark.parametrize(("relative_to", "most"), [("size", 1.0), ("spread", 2.0)])
def test_fractions_are_bounded_also_where_everything_is_turned_round(plain, make_task, relative_to, most):
    scores = divergence(plain, make_task(plain, changed=tuple(range(7))), relative_to=relative_to)
    assert (scores.values >= 0).all()
    assert (scores.values <= most).all()


def test_each_prompt_has_its_own_divergence_and_a_part_counts_where_it_moves_most(plain, make_task):
    task = named(make_task(plain, changed=(2,)), A=2, B=6)
    at_a, at_b, both = (divergence(plain, task, positions=places) for places in ("A", "B", ["A", "B"]))
    assert np.allclose(both.values, np.maximum(at_a.values, at_b.values))
    assert np.allclose(both.per_prompt.mean(0), both.values)
    assert both.settings["positions"] == ["A", "B"]


def test_named_tokens_are_blanked_instead_of_those_that_differ(plain, make_task):
    task = named(make_task(plain, changed=(2, 4)), A=2)
    alone = make_task(plain, changed=(2, 4))
    corrupted = task.prompts.clean.clone()
    corrupted[:, 2] = task.prompts.corrupted[:, 2]
    alone = replace(task, prompts=replace(task.prompts, corrupted=corrupted))
    assert np.allclose(divergence(plain, task, tokens=["A"]).values, divergence(plain, alone).values)


def test_planted_heads_that_hear_of_the_names_move_more_than_any_distractor():
    planted = indirect_object()
    moved, role = by_name(divergence(planted.model, planted.task)), dict(planted.roles)
    duplicate = role.pop("duplicate")
    distractors = set(moved) - set(planted.roles.values())
    assert min(moved[head] for head in role.values()) > 0.7 > 0.5 > max(moved[name] for name in distractors)
    # At END it rests on the first word, whatever the names: what it does it does at S2.
    assert moved[duplicate] == 0
    assert by_name(divergence(planted.model, planted.task, positions=["END", "S2"]))[duplicate] > 0.8


def test_the_planted_copier_of_a_blanked_token_writes_something_else_at_right_angles():
    planted = induction()
    moved = by_name(divergence(planted.model, planted.task, tokens=["B"]))
    induction_head = planted.roles["induction"]
    assert moved[induction_head] == pytest.approx(0.5**0.5, abs=0.01)
    assert moved[induction_head] > 1.8 * max(value for name, value in moved.items() if name != induction_head)


def test_where_every_token_is_drawn_anew_all_of_every_parts_variance_is_due_to_them(plain, make_task):
    """The total sensitivity index of everything is 1 (END, too, is blanked)."""
    task = make_task(plain, n_prompts=3000, changed=())
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randint(plain.config.d_vocab, task.prompts.clean.shape, generator=generator)
    task = replace(task, prompts=replace(task.prompts, corrupted=drawn, end=torch.full((3000,), 6)))
    found = divergence(plain, task, relative_to="spread", batch_size=500)
    assert found.values[1:] == pytest.approx(np.ones(len(found) - 1), abs=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"relative_to": "sise"}, r"'sise' is none of 'size', 'spread', 'stream'\. Did you mean 'size'"),
        ({"blank": "man"}, r"blank='man' is neither 'corrupted' nor 'mean' nor a token, 0 to 22"),
        ({"blank": 23}, r"blank=23 is neither"),
        ({"tokens": ["S3"]}, r"no position 'S3'; it names END"),
        ({"tokens": []}, r"no token of 'nonsense' is blanked"),
        ({"positions": "EMD"}, r"no position 'EMD'.*Did you mean 'END'"),
    ],
)
def test_what_cannot_be_is_said(plain, make_task, settings, message):
    with pytest.raises(CircuitError, match=message):
        divergence(plain, make_task(plain), **settings)


def test_in_half_precision_parts_move_as_far_as_they_do_in_full(plain, make_task):
    task = make_task(plain)
    full, half = (divergence(model, task).values for model in (plain, plain.to(dtype=torch.bfloat16)))
    assert (half[1:] > 0).all()
    assert np.allclose(half, full, atol=0.02)


def test_no_position_is_refused_and_one_token_may_be_named_alone(plain, make_task):
    task = make_task(plain)
    with pytest.raises(CircuitError, match="no position is named.* END"):
        divergence(plain, task, positions=())
    assert divergence(plain, task, tokens="END") == divergence(plain, task, tokens=["END"])
