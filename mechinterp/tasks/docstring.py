"""Docstring (Heimersheim and Janiak 2023): the next argument of a half-documented Python function.

    def old(self, first, files, page, names, size, read):
        \"\"\"Compute sector gap population

        :param page: message tree
        :param names: detail mine
        :param  ->  size

The documented arguments A, B, C (page, names, size) stand between others that the docstring skips. The published shape
is two arguments before A, one after C, three nouns in the summary and two for each argument; the others are ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from mechinterp.metrics import logit_diff_max
from mechinterp.tasks.base import Example, Piece, Task, assemble, tokenizer_of, wants_bos
from mechinterp.tasks.words import Split, choose, chosen_templates, usable


@dataclass(frozen=True)
class Shape:
    """How a prompt is laid out: what marks an argument, arguments before A and after C, nouns of text."""

    marker: str
    n_before: int
    n_after: int
    n_summary: int
    n_described: int

    def __str__(self) -> str:
        return f"{self.marker} {self.n_before}+3+{self.n_after} args, {self.n_summary} and {self.n_described} nouns"


SHAPES = (
    Shape(":param", 1, 2, 2, 2),
    Shape("@param", 2, 1, 3, 2),
    Shape(":arg", 2, 1, 2, 1),
    Shape("-", 1, 1, 3, 2),
    Shape(":param", 2, 1, 3, 2),  # the published one; never seen by the built-in model
    Shape(":arg", 1, 2, 3, 2),
    Shape("@param", 0, 2, 2, 1),
    Shape(":param", 3, 0, 2, 1),
    Shape("-", 2, 2, 2, 2),
    Shape("@param", 1, 1, 2, 2),
)
PUBLISHED = 4
VERBS = ("Compute", "Return", "Update", "Build")
N_NAMES = 15  # sampled for every prompt: the method's and 14 more, some used by corruptions alone (published)

# Which labels each corruption gives a fresh name (published; each is a different name).
CORRUPTIONS = {
    "random_random": ("A_def", "B_def", "C_def", "A_doc", "B_doc"),
    "random_answer": ("C_def",),
    "random_def": ("A_def", "B_def"),
    "random_doc": ("A_doc", "B_doc"),
    "random_def_doc": ("A_def", "B_def", "A_doc", "B_doc"),
    "random_answer_doc": ("C_def", "A_doc", "B_doc"),
}


def docstring(
    model,
    n_prompts: int = 64,
    seed: int = 0,
    *,
    corruption: str = "random_random",
    split: Split = "all",
    template: int | None = PUBLISHED,
    bos: bool | None = None,
) -> Task:
    """Prompts whose metric is logit(C) - the largest logit of the 13 other sampled names, in logits.

    ``corruption`` decides which heads can be seen: ``"random_random"`` and ``"random_answer"`` show those that move the
    answer, ``"random_def"`` and ``"random_doc"`` (the answer stays in the prompt) those that find it; also
    ``"random_def_doc"`` and ``"random_answer_doc"``. ``template=None`` mixes all ``SHAPES`` of the split; the default is
    the published one. ``bos=None``: BOS in front, as published, where the tokenizer has one. Positions: A_def B_def C_def
    B_def+1 C_def+1 A_doc B_doc A_doc-1 B_doc-1 END. Nouns never repeat a name of the same prompt (59 of the 111 published
    names are also among the published nouns).
    """
    tokenizer = tokenizer_of(model)
    labels = choose(CORRUPTIONS, corruption, "corruption of docstring")
    lists, dropped = usable(tokenizer, split, variables=N_NAMES)
    nouns, noun_drops = usable(tokenizer, "all", description_nouns=2 * N_NAMES)
    templates = chosen_templates(len(SHAPES), split, template)
    rng = Random(seed)
    examples = []
    for index in range(n_prompts):
        group = templates[index % len(templates)]
        names = rng.sample(lists["variables"], N_NAMES)
        free = [noun for noun in nouns["description_nouns"] if noun not in names]
        parts, used = _layout(rng, SHAPES[group], names, free)
        c = used["C"]
        fresh = [name for name in names[1:] if name not in used.values()]
        replaced = {label: f" {name}" for label, name in zip(labels, fresh, strict=False)}
        foils = [f" {name}" for name in names[1:] if name != c]
        beside = {"B_def+1": ("B_def", 1), "C_def+1": ("C_def", 1), "A_doc-1": ("A_doc", -1), "B_doc-1": ("B_doc", -1)}
        examples.append(Example(parts, replaced, [f" {c}"], foils, group, beside))
    return Task(
        name="docstring",
        prompts=assemble(tokenizer, examples, bos=wants_bos(tokenizer, bos, published=True)),
        metric=logit_diff_max,
        metric_name="logit_diff_max",
        corruption=corruption,
        group_names=tuple(map(str, SHAPES)),
        tokenizer=tokenizer,
        notes={"seed": seed, "split": split, "dropped": dropped | noun_drops},
    )


def _layout(rng: Random, shape: Shape, names: list[str], nouns: list[str]) -> tuple[list[Piece], dict[str, str]]:
    """The prompt's pieces, and which name plays which part: method, before0.., A B C, after0.."""
    parts_played = ["method", *(f"before{i}" for i in range(shape.n_before)), "A", "B", "C"]
    parts_played += [f"after{i}" for i in range(shape.n_after)]
    used = dict(zip(parts_played, names, strict=False))
    text = iter(rng.sample(nouns, shape.n_summary + 2 * shape.n_described))
    parts: list[Piece] = [f"def {used['method']}(self"]
    for role in parts_played[1:]:
        parts += [",", (f"{role}_def", f" {used[role]}")]
    parts.append(f'):\n    """{rng.choice(VERBS)}{_some(text, shape.n_summary)}\n')
    for role in ("A", "B"):
        parts += [f"\n    {shape.marker}", (f"{role}_doc", f" {used[role]}"), f":{_some(text, shape.n_described)}"]
    return [*parts, f"\n    {shape.marker}"], used


def _some(nouns: Iterator[str], n: int) -> str:
    return "".join(f" {next(nouns)}" for _ in range(n))
