"""The word lists of the tasks, which of them a tokenizer can hold in one token, and which of them are held out."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

from mechinterp.errors import TaskError, nearest
from mechinterp.models.tokenizer import Tokenizer

Split = Literal["all", "train", "held-out"]
Item = TypeVar("Item")

HELD_OUT_EVERY = 5


@cache
def words(name: str) -> tuple[str, ...]:
    """The list called ``name``, as published and in the published order (sources: ``data/README.md``)."""
    lists = json.loads((Path(__file__).parent / "data" / "words.json").read_text())
    return tuple(lists[name])


def split_words(items: Sequence[Item], split: str) -> list[Item]:
    """The train part (four of five), the held-out part (each fifth), or all of a list.

    >>> split_words("abcdefghij", "held-out")
    ['e', 'j']
    """
    if split not in ("all", "train", "held-out"):
        raise TaskError(f"split={split!r} is not a split. Choose 'all', 'train' or 'held-out'.")
    last = HELD_OUT_EVERY - 1
    return [
        item for index, item in enumerate(items) if split == "all" or (index % HELD_OUT_EVERY == last) == (split == "held-out")
    ]


def chosen_templates(count: int, split: str, template: int | None) -> list[int]:
    """The one template asked for, or all of the split; ``TaskError`` for a number that there is not."""
    if template is None:
        return split_words(range(count), split)
    if not 0 <= template < count:
        raise TaskError(f"template={template} is none of the {count} templates. Give 0 to {count - 1}, or None for all.")
    return [template]


def usable(tokenizer: Tokenizer, split: Split, **at_least: int) -> tuple[dict[str, list[str]], dict[str, int]]:
    """For each named list, the words of ``split`` that are one token with a leading space; and how many were not.

    Raises ``TaskError`` where fewer than the given number survive.
    """
    kept, dropped = {}, {}
    for name, minimum in at_least.items():
        wanted = split_words(words(name), split)
        kept[name] = [word for word in wanted if tokenizer.single(f" {word}") is not None]
        dropped[name] = len(wanted) - len(kept[name])
        if len(kept[name]) < minimum:
            raise TaskError(
                f"only {len(kept[name])} of {len(wanted)} {name} (split {split!r}) are single tokens with a leading space "
                f"in the tokenizer {tokenizer.name!r}, and this task needs {minimum}. Use split='all', or a model with a "
                "larger vocabulary."
            )
    return kept, dropped


def choose(options: Mapping[str, Item], given: str, what: str) -> Item:
    """``options[given]``, or a ``TaskError`` that lists them.

    >>> choose({"abc": 1}, "abd", "corruption of IOI")
    Traceback (most recent call last):
    mechinterp.errors.TaskError: 'abd' is no corruption of IOI. There are: abc. Did you mean 'abc'?
    """
    if given not in options:
        raise TaskError(f"{given!r} is no {what}. There are: {', '.join(options)}.{nearest(given, options)}")
    return options[given]
