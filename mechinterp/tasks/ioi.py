"""Indirect object identification (Wang et al. 2022, arXiv:2211.00593): the name said once is the one that follows.

    Then, Mary and John met at the store. John handed a ring to  ->  Mary

IO is the name said once (the answer), S the name said twice (S1, then S2; the foil). Prompts alternate between ABBA
(IO before S1) and BABA. The sentences are ours; names, places and gifts are listed with their sources in `data/`.
"""

from random import Random

from mechinterp.metrics import logit_diff
from mechinterp.tasks.base import Example, Task, assemble, pieces, tokenizer_of, wants_bos
from mechinterp.tasks.words import Split, choose, chosen_templates, split_words, usable

TEMPLATES = (
    "Then, {A} and {B} met at the {PLACE}. {S2} handed a {GIFT} to",
    "Yesterday, {A} and {B} walked to the {PLACE}, and {S2} gave a {GIFT} to",
    "When {A} and {B} came back from the {PLACE}, {S2} passed a {GIFT} to",
    "After {A} and {B} had dinner at the {PLACE}, {S2} offered a {GIFT} to",
    "Later, {A} and {B} went home from the {PLACE}. {S2} sold a {GIFT} to",
    "While {A} and {B} were waiting at the {PLACE}, {S2} threw a {GIFT} to",
    "Last week {A} and {B} visited the {PLACE}. {S2} bought a {GIFT} for",
    "In the morning {A} and {B} cleaned the {PLACE}, then {S2} brought a {GIFT} to",
    "The friends {A} and {B} found a {GIFT} near the {PLACE}. {S2} showed it to",
    "Before {A} and {B} arrived at the {PLACE}, {S2} wanted to give a {GIFT} to",
    "Because {A} and {B} liked the {PLACE}, {S2} sent a {GIFT} to",
    "At the {PLACE}, {A} and {B} talked for an hour before {S2} gave a {GIFT} to",
    "Once {A} and {B} had left the {PLACE}, {S2} decided to lend a {GIFT} to",
    "There was a {GIFT} at the {PLACE} where {A} and {B} worked. {S2} carried it to",
    "On Monday {A} and {B} opened the {PLACE} together, and {S2} mailed a {GIFT} to",
    "When {A} and {B} arrived home from the {PLACE}, {S2} sold a {GIFT} to",
    "Before {A} and {B} opened the {PLACE}, {S2} brought a {GIFT} to",
    "On Monday {A} and {B} were waiting together at the {PLACE}, and {S2} wanted to lend a {GIFT} to",
    "Later, {A} and {B} arrived at the {PLACE} together. {S2} mailed a {GIFT} to",
)

# What the corruption puts in the three name slots, given IO, S and three fresh names. Labels as published.
CORRUPTIONS = {
    "abc": lambda io, s, x, y, z: {"IO": x, "S1": y, "S2": z},
    "s2-io": lambda io, s, x, y, z: {"S2": io},
    "io-s1": lambda io, s, x, y, z: {"IO": s, "S1": io},
    "s2-rand": lambda io, s, x, y, z: {"S2": x},
    "s1-rand": lambda io, s, x, y, z: {"S1": x},
    "io-rand": lambda io, s, x, y, z: {"IO": x},
    "s-rand": lambda io, s, x, y, z: {"S1": x, "S2": x},
}


def ioi(
    model,
    n_prompts: int = 64,
    seed: int = 0,
    *,
    corruption: str = "abc",
    split: Split = "all",
    template: int | None = None,
    bos: bool | None = None,
) -> Task:
    """Prompts whose metric is logit(IO) - logit(S) at END, in logits.

    ``corruption``: ``"abc"`` puts three fresh, distinct names in place of IO, S1 and S2 (Wang's p_ABC, without its
    accidental repeats); ``"s2-io"`` makes the second clause repeat IO, which flips the answer; ``"io-s1"`` swaps the
    names of the first clause, which moves positions and keeps the answer; ``"s2-rand"``, ``"s1-rand"``, ``"io-rand"``
    and ``"s-rand"`` replace one name by a fresh one. ``template`` restricts the prompts to one sentence of
    ``TEMPLATES``, so that all have the same length. ``bos=None``: no BOS, as published, unless the model was trained
    with one. Positions: IO S1 S2 END, IO-1 IO+1 S1-1 S1+1, PLACE GIFT. ``notes["orders"]`` says ABBA or BABA a prompt.

    >>> import mechinterp as mi
    >>> task = ioi(mi.load("builtin"), n_prompts=2)
    >>> task.text(0)
    '<bos>Then, Crystal and Bradley met at the hotel. Bradley handed a key to'
    """
    tokenizer = tokenizer_of(model)
    corrupt = choose(CORRUPTIONS, corruption, "corruption of IOI")
    lists, dropped = usable(tokenizer, split, names=6, places=1, gifts=1)
    templates = chosen_templates(len(TEMPLATES), split, template)
    rng = Random(seed)
    examples, orders = [], []
    for index in range(n_prompts):
        group = templates[index // 2 % len(templates)]
        is_abba = index % 2 == 0
        io, s, *fresh = rng.sample(lists["names"], 5)
        slots = _slots(rng, lists) | {"S2": s} | ({"A": io, "B": s} if is_abba else {"A": s, "B": io})
        labels = {"A": "IO", "B": "S1"} if is_abba else {"A": "S1", "B": "IO"}
        replaced = {label: f" {name}" for label, name in corrupt(io, s, *fresh).items()}
        examples.append(_example(group, slots, labels, replaced, io, s))
        orders.append("ABBA" if is_abba else "BABA")
    return Task(
        name="ioi",
        prompts=assemble(tokenizer, examples, bos=wants_bos(tokenizer, bos, published=False)),
        metric=logit_diff,
        metric_name="logit_diff",
        corruption=corruption,
        group_names=TEMPLATES,
        tokenizer=tokenizer,
        notes={"seed": seed, "split": split, "dropped": dropped, "orders": tuple(orders)},
    )


def ioi_abc(model, n_prompts: int = 64, seed: int = 0, *, split: Split = "all", bos: bool | None = None) -> Task:
    """The control: three different names, so that nobody was said twice and the text prefers neither of the first two.

    The first name is called the answer and the second the foil, so that a model which follows the text prefers the
    "answer" in half of the prompts, and one which goes by position does not. Corrupted: the third name, C, replaced.
    """
    tokenizer = tokenizer_of(model)
    lists, dropped = usable(tokenizer, split, names=6, places=1, gifts=1)
    templates = split_words(range(len(TEMPLATES)), split)
    rng = Random(seed)
    examples = []
    for index in range(n_prompts):
        first, second, third, fresh = rng.sample(lists["names"], 4)
        slots = _slots(rng, lists) | {"A": first, "B": second, "S2": third}
        group = templates[index % len(templates)]
        examples.append(_example(group, slots, {"S2": "C"}, {"C": f" {fresh}"}, first, second))
    return Task(
        name="ioi-abc",
        prompts=assemble(tokenizer, examples, bos=wants_bos(tokenizer, bos, published=False)),
        metric=logit_diff,
        metric_name="logit_diff",
        corruption="c-rand",
        group_names=TEMPLATES,
        tokenizer=tokenizer,
        notes={"seed": seed, "split": split, "dropped": dropped},
    )


def _slots(rng: Random, lists: dict[str, list[str]]) -> dict[str, str]:
    return {"PLACE": rng.choice(lists["places"]), "GIFT": rng.choice(lists["gifts"])}


def _example(group: int, slots, labels, replaced, answer: str, foil: str) -> Example:
    parts = [p if isinstance(p, str) else (labels.get(p[0], p[0]), p[1]) for p in pieces(TEMPLATES[group], slots)]
    names = [label for label in ("IO", "S1") if label in labels.values()]
    beside = {f"{name}{step:+d}": (name, step) for name in names for step in (-1, 1)}
    return Example(parts, replaced, [f" {answer}"], [f" {foil}"], group, beside)
