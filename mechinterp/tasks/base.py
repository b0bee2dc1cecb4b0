"""A task: prompt pairs, the metric that says how well a model does them, and how both were made.

A generator writes each prompt as pieces of text, some of them labelled (``("IO", " Mary")``), and says which labels the
corruption replaces. ``assemble`` does the rest for every tokenizer: it finds each label's tokens by character offsets,
checks that clean and corrupted prompts align token by token, pads, and names what is wrong if they do not.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from mechinterp.errors import TaskError
from mechinterp.metrics import Metric
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.prompts import PromptBatch
from mechinterp.task_html import task_html

Piece = str | tuple[str, str]


@runtime_checkable
class HasTokenizer(Protocol):
    """A model, as far as tasks care."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...


@dataclass(frozen=True)
class Task:
    """Prompt pairs with their metric. ``notes`` records how they were made (seed, split, words dropped, ...)."""

    name: str
    prompts: PromptBatch
    metric: Metric
    metric_name: str
    corruption: str
    group_names: tuple[str, ...]
    tokenizer: Tokenizer
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def batches(self, batch_size: int) -> Iterator[PromptBatch]:
        return self.prompts.split(batch_size)

    def text(self, index: int, corrupted: bool = False) -> str:
        """Prompt ``index`` as text, BOS included if the tokens have it."""
        tokens = self.prompts.corrupted if corrupted else self.prompts.clean
        return self.tokenizer.decode(tokens[index, : int(self.prompts.end[index]) + 1].tolist())

    def _repr_html_(self) -> str:
        about = f"{self.name}: {self.metric_name}, corrupted by {self.corruption}"
        return task_html(about, self.prompts, self.tokenizer, self.group_names)


@dataclass(frozen=True)
class Example:
    """One prompt pair before tokenization.

    ``pieces`` concatenate to the clean text; ``("IO", " Mary")`` is a labelled piece. ``replaced`` maps labels to the
    text that stands there in the corrupted prompt. ``answers`` and ``foils`` are texts of one token each. ``beside``
    names further positions by a label and a step from it: ``{"S1+1": ("S1", 1)}``.
    """

    pieces: Sequence[Piece]
    replaced: Mapping[str, str]
    answers: Sequence[str]
    foils: Sequence[str]
    group: int = 0
    beside: Mapping[str, tuple[str, int]] = field(default_factory=dict)


def pieces(template: str, words: Mapping[str, str]) -> list[Piece]:
    """``template`` cut at its slots, each filled: a slot's piece owns the space in front of it, as its token does.

    >>> pieces("Then, {A} left", {"A": "Mary"})
    ['Then,', ('A', ' Mary'), ' left']
    """
    cut = re.split(r"( ?)\{(\w+)\}", template)
    found: list[Piece] = [cut[0]] if cut[0] else []
    for space, label, text in zip(cut[1::3], cut[2::3], cut[3::3], strict=True):
        found.append((label, space + words[label]))
        found.extend([text] if text else [])
    return found


def tokenizer_of(model: HasTokenizer) -> Tokenizer:
    """The model's tokenizer; ``TaskError`` if it was loaded without one."""
    if model.tokenizer is None:
        raise TaskError(
            "this model has no tokenizer, and prompts are text. Load it with one: load(..., tokenizer=AutoTokenizer...), or "
            "save the tokenizer's files beside the weights."
        )
    return model.tokenizer


def assemble(tokenizer: Tokenizer, examples: Sequence[Example], *, bos: bool) -> PromptBatch:
    """Tokenize, align and pad ``examples``. Raises ``TaskError`` naming the first pair that does not align."""
    rows = [_tokenize(tokenizer, example, bos) for example in examples]
    if not rows:
        raise TaskError("there are no prompts to assemble. Ask for n_prompts >= 1.")
    candidates = [[single_token(tokenizer, word) for word in [*e.answers, *e.foils]] for e in examples]
    roles = [[1] * len(e.answers) + [-1] * len(e.foils) for e in examples]
    labels = set(rows[0][2])
    return PromptBatch(
        clean=_pad([row[0] for row in rows], tokenizer.pad_id),
        corrupted=_pad([row[1] for row in rows], tokenizer.pad_id),
        end=torch.tensor([len(row[0]) - 1 for row in rows]),
        candidates=_pad(candidates, 0),
        roles=_pad(roles, 0),
        groups=torch.tensor([example.group for example in examples]),
        positions={
            label: torch.tensor([row[2][label] for row in rows])
            for label in sorted(labels.intersection(*(row[2] for row in rows)))
        },
    )


def wants_bos(tokenizer: Tokenizer, asked: bool | None, *, published: bool) -> bool:
    """Whether prompts start with BOS: as asked, else where the model was trained so, else as the task was published."""
    if asked is not None:
        return asked
    return tokenizer.prepends_bos or (published and tokenizer.bos_id is not None)


def _tokenize(tokenizer: Tokenizer, example: Example, bos: bool) -> tuple[list[int], list[int], dict[str, int]]:
    clean_text, spans = _join(example.pieces, {})
    corrupted_text, _ = _join(example.pieces, example.replaced)
    clean, offsets = tokenizer.spans(clean_text)
    corrupted, _ = tokenizer.spans(corrupted_text)
    if len(clean) != len(corrupted):
        raise TaskError(
            f"clean and corrupted prompt have {len(clean)} and {len(corrupted)} tokens:\n  {clean_text!r}\n  "
            f"{corrupted_text!r}\nReplace words only by words of equally many tokens in {tokenizer.name!r}."
        )
    shift = int(bos)
    positions = {label: _last_token(offsets, end) + shift for label, (_, end) in spans.items()}
    positions["END"] = len(clean) - 1 + shift
    positions |= {name: positions[label] + step for name, (label, step) in example.beside.items()}
    if not bos:
        return clean, corrupted, positions
    if tokenizer.bos_id is None:
        raise TaskError(f"this task needs a BOS token and the tokenizer {tokenizer.name!r} has none. Pass bos=False.")
    return [tokenizer.bos_id, *clean], [tokenizer.bos_id, *corrupted], positions


def _join(pieces: Sequence[Piece], replaced: Mapping[str, str]) -> tuple[str, dict[str, tuple[int, int]]]:
    """The text, and the characters of each labelled piece."""
    text, spans = "", {}
    for piece in pieces:
        label, words = (None, piece) if isinstance(piece, str) else piece
        words = replaced.get(label, words) if label else words
        if label:
            spans[label] = (len(text), len(text) + len(words))
        text += words
    return text, spans


def _last_token(offsets: Sequence[tuple[int, int]], end: int) -> int:
    """The token that holds the last character before ``end``: where a causal model has read the whole word."""
    return max(i for i, (start, _) in enumerate(offsets) if start < end)


def single_token(tokenizer: Tokenizer, word: str) -> int:
    """The id of a word that must be one token; ``TaskError`` if it is several."""
    token = tokenizer.single(word)
    if token is None:
        raise TaskError(
            f"the answer {word!r} is {len(tokenizer.spans(word)[0])} tokens in {tokenizer.name!r}; answers must be one token. "
            "Mind the leading space, or choose another word."
        )
    return token


def _pad(rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])
