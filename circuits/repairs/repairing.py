"""Repair a task by editing where a few heads look (Merullo et al. 2024, arXiv:2310.08744, section 5).

GPT-2 medium has the heads that tell wrong names from right ones in indirect object identification, and in colored objects
they look at all colors alike. Told where the wrong colors are, four of them lift accuracy from 49.6 % to 93.7 %. The steps:

1. the positions that edited heads shall look at, in each prompt (``positions``);
2. every condition: unedited, each group of heads alone, all together; and random heads in their place;
3. what was said instead of the answer, before and after (``said``);
4. what the edit does to later heads: where they look, and what they add to the logits (``effects``).

An edit of this kind is told where to look, and the paper tells it by the answer. It shows that what stands after the edited
heads is in order and what the edited heads lacked; it is no better model.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from tqdm.auto import tqdm

from circuits.repairs.effects import Effects
from circuits.repairs.report import UNEDITED, Condition, Control, Mean, Repair
from circuits.repairs.runs import (
    Attention,
    Edit,
    Outcome,
    Run,
    batches,
    fingerprints,
    first_layer,
    joined,
    named,
    one_or_more,
    outcome,
    parse_heads,
    positions,
)
from mechinterp.errors import CircuitError, TaskError
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node, nodes_of
from mechinterp.tasks.base import Task

Heads = Sequence[Node | str]
ALL = "all"


@torch.no_grad()
def repair(
    model: Transformer,
    task: Task,
    heads: Mapping[str, Heads] | Heads,
    attention: Mapping[str, Attention] | Attention,
    *,
    at: str = "END",
    share: float = 1.0,
    n_random: int = 20,
    seed: int = 0,
    seen: Collection[str] = (),
    batch_size: int = 32,
    progress: bool | None = None,
) -> Repair:
    """The task unedited, with each group of ``heads`` edited, with all of them, and with random heads in their place.

    From ``at`` each edited head attends evenly to the positions ``attention``, and to nothing else (with a ``share`` below 1,
    to the rest as before with what is left). ``attention``: names of positions, those after a minus taken out, so that
    ``("color1", "color2", "color3", "-answer_color")`` is the two colors not asked for; a tensor of positions, one row a
    prompt; or a mapping that gives each group its own. Random heads, ``n_random`` draws: as many as in each group, from the
    layers between the first and the last edited (all layers, where those have too few), never an edited one.

    ``seen``: fingerprints of the prompts that the heads were chosen on, as in ``repair(model, fresh, **proposal.edit)``. What
    was chosen on a prompt looks good on it, so those are left out; ``facts["n_seen"]`` counts them. ``CircuitError`` where no
    prompt is left.

    Cost: one forward of each batch, then for each condition and draw only the positions from the first ``at`` to the last END
    of the batch, from the first edited layer on (in a causal model nothing before them changes). Memory: keys and values of a
    batch, ``2 * layers * pos * d_model`` numbers a prompt, and its logits: on a large model take a small ``batch_size``.

    >>> from mechinterp.models.compiled import indirect_object
    >>> planted = indirect_object(n_prompts=8)
    >>> found = repair(planted.model, planted.task, [planted.roles["mover"]], ["S1"], n_random=2)
    >>> found["unedited"].accuracy.value, [condition.name for condition in found.conditions]
    (1.0, ['unedited', 'heads'])
    """
    groups = _groups(model, heads)
    given = attention if isinstance(attention, Mapping) else dict.fromkeys(groups, attention)
    targets = {name: one_or_more(wanted) for name, wanted in given.items()}
    if set(targets) != set(groups):
        raise CircuitError(
            f"attention is given for {list(targets)} and the groups are {list(groups)}. Give each group its own."
        )
    task, targets, n_seen = _unseen(task, targets, frozenset(seen))
    query = named(task.prompts, at)
    to = {name: positions(task, wanted, query) for name, wanted in targets.items()}
    edits = {UNEDITED: (), **{name: (Edit(members, to[name]),) for name, members in groups.items()}}
    if len(groups) > 1:
        edits[ALL] = tuple(edit for of_group in edits.values() for edit in of_group)
    layers, drawn = _random_heads(model, groups, n_random, seed)
    controls = [tuple(Edit(draw[name], to[name]) for name in groups) for draw in drawn]
    effects = Effects.of(model, task, list(edits.values())[-1])
    outcomes = _outcomes(model, task, [*edits.values(), *controls], query, share, batch_size, progress, effects)
    unedited = next(outcomes)
    conditions = [_condition(task, UNEDITED, (), unedited, unedited)]
    conditions += [_condition(task, name, edits[name], unedited, next(outcomes)) for name in edits if name != UNEDITED]
    facts: dict[str, Any] = {"model": model.config.name, "task": task.name, "corruption": task.corruption}
    facts |= {"metric": task.metric_name, "n_prompts": len(task), "n_seen": n_seen, "at": at, "share": share, "seed": seed}
    facts |= {"attention": {name: _plain(targets[name]) for name in targets}, "random_layers": layers}
    return Repair(facts, tuple(conditions), tuple(map(_control, controls, outcomes)), effects.found())


def _unseen(task: Task, targets: dict[str, Attention], seen: frozenset[str]) -> tuple[Task, dict[str, Attention], int]:
    """The prompts that are not among those seen, and the attention of these; how many were left out."""
    fresh = torch.tensor([name not in seen for name in fingerprints(task)])
    if bool(fresh.all()):
        return task, targets, 0
    if not bool(fresh.any()):
        raise CircuitError(
            "all of these prompts are among those that the heads were chosen on. Repair other prompts: make the task again "
            "with another seed, or keep some prompts of a file out of the search."
        )
    kept = {name: wanted[fresh] if isinstance(wanted, torch.Tensor) else wanted for name, wanted in targets.items()}
    return replace(task, prompts=task.prompts[fresh]), kept, int((~fresh).sum())


def _groups(model: Transformer, heads: Mapping[str, Heads] | Heads) -> dict[str, tuple[Node, ...]]:
    by_name = heads if isinstance(heads, Mapping) else {"heads": heads}
    groups = {name: nodes_of(members) for name, members in by_name.items()}
    if not groups or {UNEDITED, ALL} & set(groups):
        raise CircuitError(f"heads has the groups {list(groups)}: name at least one, and none {UNEDITED!r} or {ALL!r}.")
    parse_heads(model, [head for members in groups.values() for head in members])
    return {name: parse_heads(model, members) for name, members in groups.items()}


def _random_heads(
    model: Transformer, groups: Mapping[str, tuple[Node, ...]], n_random: int, seed: int
) -> tuple[list[int], list[dict[str, tuple[Node, ...]]]]:
    """The layers drawn from, and for each draw as many heads for each group, none of them an edited one."""
    if n_random < 1:
        return [], []
    edited = [head for members in groups.values() for head in members]
    layers = sorted(head.layer or 0 for head in edited)
    ranges = (range(layers[0], layers[-1] + 1), range(model.config.n_layers))
    for allowed in ranges:
        pool = [Node.head(layer, index) for layer in allowed for index in range(model.config.n_heads)]
        pool = [head for head in pool if head not in edited]
        if len(pool) >= len(edited):
            break
    else:
        raise CircuitError(f"{len(edited)} heads are edited and {len(pool)} are not: too few for random ones. Pass n_random=0.")
    rng, draws = np.random.default_rng(seed), []
    for _ in range(n_random):
        chosen = iter([pool[i] for i in rng.choice(len(pool), len(edited), replace=False)])
        draws.append({name: tuple(next(chosen) for _ in members) for name, members in groups.items()})
    return list(allowed), draws


def _outcomes(
    model: Transformer,
    task: Task,
    conditions: Sequence[Sequence[Edit]],
    at: Int[torch.Tensor, "prompt"],
    share: float,
    batch_size: int,
    progress: bool | None,
    effects: Effects,
) -> Iterator[Outcome]:
    """One outcome a condition, over all prompts; on the way, what happens in later heads."""
    if not 0 < share <= 1 or batch_size < 1:
        raise TaskError(f"share={share} and batch_size={batch_size}: give a share above 0 and up to 1, and whole batches.")
    layers = [first_layer(edits) for edits in conditions if edits]
    parts: list[list[Outcome]] = [[] for _ in conditions]
    disable = None if progress is None else not progress
    with tqdm(total=len(task) * len(conditions), desc="repair", unit="prompt", delay=2, disable=disable) as bar:
        for rows in batches(at, batch_size):
            run = Run.begin(model, task, rows, at, share, layers)
            for edits, found in zip(conditions, parts, strict=True):
                logits, cache = run.logits(edits, effects.sites(edits))
                effects.watch(edits, run, cache)
                found.append(outcome(task, logits, run.prompts))
                bar.update(len(run.prompts))
    return (joined(of_condition, at) for of_condition in parts)


def _condition(task: Task, name: str, edits: Sequence[Edit], before: Outcome, after: Outcome) -> Condition:
    right, was_right = after.is_right > 0, before.is_right > 0
    return Condition(
        name=name,
        heads=tuple(str(head) for edit in edits for head in edit.heads),
        accuracy=Mean.of(after.is_right),
        preferred=Mean.of(after.is_preferred),
        metric=Mean.of(after.metric),
        fixed=int((right & ~was_right).sum()),
        broken=int((was_right & ~right).sum()),
        said=said(task, after.said),
    )


def _control(edits: Sequence[Edit], found: Outcome) -> Control:
    means = [float(values.mean()) for values in (found.is_right, found.is_preferred, found.metric)]
    return Control(tuple(str(head) for edit in edits for head in edit.heads), *means)


def said(task: Task, tokens: Int[np.ndarray, "prompt"]) -> dict[str, dict[str, int]]:
    """By template group, how often each role was said: ``answer``, ``foil`` or ``word`` with its place, or something else.

    A word is found in the prompt whether capitalised as there or not (``Blue`` for `` blue``), which is said.
    """
    prompts, tokenizer = task.prompts, task.tokenizer
    names = sorted(prompts.positions, key=lambda name: (name[-1:].isdigit(), name))  # foil_color rather than color2
    counts: dict[str, Counter[str]] = {}
    for row, token in enumerate(tokens.tolist()):
        words = {name: int(prompts.clean[row, prompts.positions[name][row]]) for name in names}
        role = prompts.roles[row][(prompts.candidates[row] == token) & (prompts.roles[row] != 0)].tolist()
        group = task.group_names[int(prompts.groups[row])]
        counts.setdefault(group, Counter())[_role(token, role[:1], words, tokenizer)] += 1
    return {group: dict(of_group.most_common()) for group, of_group in counts.items()}


def _role(token: int, role: list[int], words: Mapping[str, int], tokenizer) -> str:
    if role and role[0] > 0:
        return "answer"
    spelled = _spelled(tokenizer, token)
    where = next((name for name, word in words.items() if _spelled(tokenizer, word) == spelled != ""), None)
    if where is None:
        return "foil" if role else "anything else"
    in_other_case = "" if token == words[where] or role else ", in other case"
    return f"{'foil' if role else 'word'} at {where}{in_other_case}"


def _spelled(tokenizer, token: int) -> str:
    return tokenizer.decode([token]).strip().casefold()


def _plain(attention: Attention) -> list[str] | str:
    return f"positions of a tensor {tuple(attention.shape)}" if isinstance(attention, torch.Tensor) else list(attention)
