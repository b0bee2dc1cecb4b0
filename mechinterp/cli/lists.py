"""``mechinterp tasks``, ``models``, ``methods``: what there is, each with the first line of its own docstring."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from mechinterp.cli.words import model_in_words


def tasks() -> None:
    """The tasks that can be analysed by name."""
    from mechinterp.tasks import TASKS
    from mechinterp.tasks.published import FORMATS

    _show({name: _first_line(make) for name, make in TASKS.items()})
    print(f"\nOr a file of prompt pairs (.jsonl, .json, .csv), in the form of: {', '.join(FORMATS)}.")


def models() -> None:
    """The models that ship with the toolkit, and what else --model takes."""
    from mechinterp import load
    from mechinterp.models.load import BUILTIN

    _show({name: model_in_words(load(name).config) for name in BUILTIN})
    print("\nOr a model's name on the Hugging Face hub (such as gpt2), or a directory with its weights.")


def methods() -> None:
    """The ways to score edges."""
    from circuits.discovery import ALGORITHMS

    _show({name: _first_line(algorithm) for name, algorithm in ALGORITHMS.items()})


def _first_line(function: Any) -> str:
    """What a function gives; for a ``partial``, with the settings that it fixes."""
    if isinstance(function, partial):
        fixed = ", ".join(f"{name}={value!r}" for name, value in function.keywords.items())
        return f"{_first_line(function.func)} ({fixed})"
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _show(lines: Mapping[str, str]) -> None:
    width = max(map(len, lines))
    for name, line in lines.items():
        print(f"{name:<{width}}  {line}".rstrip())
