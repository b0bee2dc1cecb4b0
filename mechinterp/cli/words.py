"""What the command line says: plain lines for a terminal, made from the values of the library."""

import math
import textwrap
from collections.abc import Collection, Iterable, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns two spaces apart, those in ``right`` aligned to the right.

    >>> print(table(("part", "effect"), [("a9.h6", "1.5"), ("m0", "-12.0")], right=[1]))
    part   effect
    a9.h6     1.5
    m0      -12.0
    """
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def aligned(markdown: str, limit: int = 40, leave_out: Collection[str] = ()) -> str:
    """Lines, then a Markdown table, for a terminal: of more than ``limit`` rows the first and the last; without some columns.

    >>> print(aligned("two layers\\n\\n| place | L0 |\\n| --- | ---: |\\n| z.0 | 5.8 |\\n| z.1 | 16.3 |"))
    two layers
    <BLANKLINE>
    place    L0
    z.0     5.8
    z.1    16.3
    """
    lines = markdown.splitlines()
    whole = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    columns = [column for column, name in enumerate(whole[0]) if name not in leave_out]
    head, rule, *rows = [[line[column] for column in columns] for line in whole]
    if len(rows) > limit:
        rows = [*rows[: limit - 1], [f"... {len(rows) - limit} more", *[""] * (len(head) - 1)], rows[-1]]
    right = [column for column, dashes in enumerate(rule) if dashes.endswith(":")]
    above = [textwrap.fill(line, 120, break_on_hyphens=False) for line in lines[: -len(whole)]]
    return "\n".join([*above, table(head, rows, right)])


def numbers(values: Sequence[float], sign: str = "") -> list[str]:
    """Three digits of the largest, and as many decimals for the others, so that a column can be compared at a glance.

    >>> numbers([7.4312, 0.0312, -0.5])
    ['7.43', '0.03', '-0.50']
    >>> numbers([0.000213], sign="+")
    ['+0.000213']
    """
    largest = max(map(abs, values), default=0.0)
    decimals = min(max(2 - math.floor(math.log10(largest)), 0), 9) if largest else 0
    return [f"{value:{sign}.{decimals}f}" for value in values]


def shortened(text: str, limit: int = 120) -> str:
    """A prompt on one line: its beginning and, more of it, its end.

    >>> shortened("a" * 50 + "b" * 50, limit=20)
    "'aaaaaaa ... bbbbbbbbbbbbb'"
    """
    if len(text) > limit:
        text = f"{text[: limit * 35 // 100]} ... {text[-(limit * 65 // 100) :]}"
    return repr(text)


def model_in_words(config: Any) -> str:
    """
    >>> from types import SimpleNamespace as Config
    >>> model_in_words(Config(n_layers=4, n_heads=8, n_groups=2, d_model=128, d_mlp=None, d_vocab=600))
    '4 layers of 8 heads (in 2 groups with one key and value each), width 128, attention only, vocabulary of 600'
    """
    mlp = "attention only" if config.d_mlp is None else f"MLPs of {config.d_mlp}"
    shared = "" if config.n_groups == config.n_heads else f" (in {config.n_groups} groups with one key and value each)"
    size = f"{config.n_layers} layers of {config.n_heads} heads{shared}, width {config.d_model}"
    return f"{size}, {mlp}, vocabulary of {config.d_vocab:,}"


def answer_in_words(task: Any, row: int = 0, limit: int = 3) -> str:
    """The answers of a prompt as the metric compares them, against its foils, a few of each."""
    tokens, roles = task.prompts.candidates[row], task.prompts.roles[row]
    sides = []
    for sign in (1, -1):
        words = task.tokenizer.strings(tokens[roles == sign].tolist())
        more = f" and {len(words) - limit} more" if len(words) > limit else ""
        sides.append(", ".join(map(repr, words[:limit])) + more)
    return " against ".join(side for side in sides if side)


def dropped_in_words(dropped: Any) -> str:
    """``notes["dropped"]`` of a task, whatever it counts; empty if nothing was dropped."""
    if isinstance(dropped, dict):
        return ", ".join(f"{reason}: {count}" for reason, count in dropped.items() if count)
    return str(dropped or "")
