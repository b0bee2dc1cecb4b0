"""Prompts of a task that a 260-thousand-parameter storyteller does: whom does somebody speak to?

    python -m benchmarks.addressee            # writes addressee.jsonl, for `mechinterp discover` or `from_file`

Two children, each named twice; one of them is in trouble and the other asks. The answer is the one who is in trouble, and
the corrupted prompt changes their parts. Names are those that stories260K writes with equally many tokens, so that pairs
align; answers are the first token of a name.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import permutations
from pathlib import Path

FILE = Path(__file__).parent / "addressee.jsonl"

# name -> its first token, by how many tokens a name has
NAMES: tuple[dict[str, str], ...] = (
    {"Lily": " Lily", "Tim": " Tim", "Timmy": " Timmy"},
    {"Sam": " S", "Ben": " B", "Tom": " T"},
    {"Max": " M", "Sue": " S", "Bob": " B", "Leo": " L"},
)
TEMPLATES = (
    '{A} fell down. {B} saw that {A} was sad. {B} asked, "Are you okay,',
    '{A} fell down the hill. {B} ran to help {A}. {B} asked, "Are you okay,',
    '{A} fell in the mud. {B} saw {A} and was sad. {B} asked, "Are you okay,',
    '{A} started to cry. {B} came to see {A}. {B} asked, "Are you okay,',
    'One day, {A} fell down. {B} heard {A} cry. {B} asked, "Are you okay,',
    '{A} lost a toy. {B} saw that {A} was sad. {B} asked, "What is wrong,',
)


# The one who asks is named first here: a model that goes by the first name alone is wrong on all of them.
CONTROLS = (
    '{B} saw {A} fall down. {B} asked, "Are you okay,',
    '{B} saw that {A} was sad. {B} asked, "Are you okay,',
    'One day, {B} saw {A}. {A} fell down and was sad. {B} asked, "Are you okay,',
)


def rows(templates: Sequence[str] = TEMPLATES) -> Iterator[dict[str, str | list[str]]]:
    """Every template with every ordered pair of names of one length."""
    for template in templates:
        for first in NAMES:
            for a, b in permutations(first, 2):
                yield {
                    "clean": template.format(A=a, B=b),
                    "corrupted": template.format(A=b, B=a),
                    "answers": [first[a]],
                    "foils": [first[b]],
                }


def write(file: Path, templates: Sequence[str] = TEMPLATES) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(templates)), encoding="utf-8")


if __name__ == "__main__":
    write(FILE)
