"""A document of the training corpus: its tokens, which of them can be known, and the words it may be written in."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from random import Random

from mechinterp.tasks.base import pieces
from mechinterp.tasks.colored_objects import TEMPLATES as COLOR_TEMPLATES
from mechinterp.tasks.docstring import SHAPES, VERBS
from mechinterp.tasks.greater_than import CENTURIES, CONTROL_TEMPLATES, YEARS
from mechinterp.tasks.greater_than import TEMPLATES as YEAR_TEMPLATES
from mechinterp.tasks.ioi import TEMPLATES as IOI_TEMPLATES
from mechinterp.tasks.words import split_words, words

LISTS = ("names", "places", "gifts", "nouns", "objects", "colors", "surfaces", "variables", "description_nouns")
N_DESCRIPTION_NOUNS = 100
# Plain sentences. The words of held-out templates are here, but no name beside them: names of a sentence in front are to
# be ignored, and a model that learns which words stand beside such names ignores the names of the held-out templates.
FILLER = (
    "It was late and the {PLACE} was closed.",
    "{N} was tired.",
    "I like the {PLACE} of {N}.",
    "Everyone at the {PLACE} knows {N}.",
    "On Monday the {PLACE} opened.",
    "Later the {O} was sold together with a {O2}.",
    "Before that, the {O} arrived and was mailed.",
    "The {O} wanted to tell me what it is.",
    "There are three things to say about the {NOUN}.",
    "My {O} has a name on it.",
    "Please tell me what the {NOUN} is.",
    "The {O} first appeared at the {PLACE}.",
    "The {NOUN} was finished together with the {NOUN2}.",
    "The {O} ran from me to the {PLACE}.",
    "The {D} of the {D2} is a {V}.",
    "The {O} was near the {O2} in the {PLACE}.",
)


@dataclass
class Document:
    """Token ids, and which of them are predicted: ``targets`` rows are (index of the token, ids it may be, kind)."""

    encode: Callable[[str], list[int]]
    ids: list[int] = field(default_factory=list)
    targets: list[tuple[int, tuple[int, ...], str]] = field(default_factory=list)

    def add(self, text: str) -> "Document":
        self.ids.extend(self.encode(text))
        return self

    def answer(self, kind: str, *options: str, said: str | None = None) -> "Document":
        """The next token is one of ``options``, all equally likely; ``said`` (or the first) is what stands there."""
        ids = tuple(self.encode(option)[0] for option in options)
        self.targets.append((len(self.ids), ids, kind))
        return self.add(said or options[0])


def prompt(doc: Document, template: str, slots: dict[str, str], rng: Random | None = None, noise: float = 0.0) -> None:
    """Add a filled template. With ``noise``, that share of its own words gives way to any word at all."""
    for piece in pieces(template, slots):
        if isinstance(piece, tuple) or not noise or rng is None:
            doc.add(piece if isinstance(piece, str) else piece[1])
            continue
        for word in re.findall(r" ?[A-Za-z]+|[^A-Za-z ]| ", piece):
            is_replaced = word[-1].isalpha() and rng.random() < noise
            doc.add(rng.choice(noise_words() if word[0] == " " else first_words()) if is_replaced else word)


def series(things: list[str]) -> str:
    """The things as a list in prose.

    >>> series(["a cup", "a pen", "a key"])
    'a cup, a pen, and a key'
    """
    return f"{', '.join(things[:-1])}{',' if len(things) > 2 else ''} and {things[-1]}"


def known(name: str) -> list[str]:
    """A word list as the built-in model knows it: it learned the first 100 description nouns only."""
    return list(words(name)[: N_DESCRIPTION_NOUNS if name == "description_nouns" else None])


def train_words(name: str) -> list[str]:
    return split_words(words(name), "train")


@cache
def words_other_than(name: str) -> list[str]:
    """Words that may stand where those of the list ``name`` stand, so that what is learned there is not about the words."""
    lists = ("names", "places", "gifts", "nouns", "objects", "variables")
    pool = {*text_nouns(), *(word for other in lists if other != name for word in known(other))}
    return sorted(pool - set(words(name)))


@cache
def all_words() -> list[str]:
    lists = {f" {word}" for name in LISTS for word in known(name)}
    return sorted(lists | {word for text in vocabulary_texts() for word in re.findall(r" [A-Za-z]+", text)})


@cache
def text_nouns() -> list[str]:
    """The published description nouns that the vocabulary holds at all, whichever list brought them in."""
    return [noun for noun in words("description_nouns") if f" {noun}" in all_words()]


@cache
def noise_words() -> list[str]:
    """What may replace a template's own word: no name and no held-out object, or these would be learned as noise."""
    unwanted = {f" {word}" for word in (*words("names"), *split_words(words("objects"), "held-out"))}
    return [word for word in all_words() if word not in unwanted]


@cache
def first_words() -> list[str]:
    """Words that can open a sentence at the beginning of a line."""
    return sorted({word for text in vocabulary_texts() for word in re.findall(r"^[A-Z][a-z]+(?= )", text)})


@cache
def vocabulary_texts() -> tuple[str, ...]:
    """Texts that hold every token the tokenizer must know, words of held-out templates included."""
    templates = IOI_TEMPLATES + YEAR_TEMPLATES + CONTROL_TEMPLATES + COLOR_TEMPLATES + FILLER
    inside = [" " + re.sub(r" ?\{\w+\}", "", template).removeprefix("Q: ") for template in templates]
    return (
        *inside,
        *(text[1:] for text in inside),
        *(f" {word}" for name in LISTS for word in known(name)),
        *(f" {color.title()}" for color in words("colors")),
        *(f" {century}{year}" for century in CENTURIES for year in YEARS),
        *(f'def(self):\n    """{verb}\n\n    {shape.marker}:' for verb in VERBS for shape in SHAPES),
        *("Q:", "A:", "list: ", "set = = then again: Q: A: : a an The the has and, belongs to. owns is Where is? On \n 20"),
        *words("names"),
    )
