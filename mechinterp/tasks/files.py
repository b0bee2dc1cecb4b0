"""A task from a file of prompts: your own, or one that a paper published (formats: ``published.py``)."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from mechinterp.errors import TaskError, nearest
from mechinterp.metrics import METRICS
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.prompts import PromptBatch
from mechinterp.tasks.base import HasTokenizer, Task, tokenizer_of
from mechinterp.tasks.published import FORMATS, Pair, Prompt, Source, Word, detect
from mechinterp.tasks.rows import read_rows


@dataclass(frozen=True)
class _Row:
    """A pair in token ids. ``roles`` are +1 for an answer and -1 for a foil."""

    clean: list[int]
    corrupted: list[int]
    candidates: list[int]
    roles: list[int]


def from_file(
    model: HasTokenizer,
    path: str | Path,
    *,
    format: str | None = None,
    n_prompts: int | None = None,
    seed: int = 0,
    corruption: str | None = None,
    companion: str | Path | None = None,
    metric: str | None = None,
    trust_ids: bool = False,
    bos: bool | None = None,
) -> Task:
    """The prompts of a csv, JSON or JSON-lines file as a task; our own format is one object a line::

        {"clean": "Mary and John left. John thanked", "corrupted": "Mary and John left. Mary thanked",
         "answers": [" Mary"], "foils": [" John"]}

    ``format`` is one of ``FORMATS`` (``None``: told from the columns). At most ``n_prompts`` are drawn (``None``: all, in
    the file's order). ``corruption`` chooses among the corrupted columns a file has; ``companion`` is the second file of
    formats that come in two (``None``: its usual name beside the first). ``metric`` is one of ``METRICS`` (``None``: the
    format's usual one). ``trust_ids`` says that token ids in the file are this tokenizer's. ``bos`` prepends BOS
    (``None``: as the model was trained).

    Pairs that do not align, answers of several tokens and positions of another tokenizer are dropped;
    ``notes["dropped"]`` counts them by reason. Named positions: ``END``, ``CHANGED`` (the first token that differs
    between clean and corrupted) and those in the file. Prompts of equal length form a group. Raises ``TaskError``.
    """
    path, tokenizer = Path(path), tokenizer_of(model)
    content = read_rows(path)
    format = format or detect(content, path)
    if format not in FORMATS:
        raise TaskError(f"{format!r} is no prompt file format: {', '.join(FORMATS)}.{nearest(format, FORMATS)}")
    source = Source(path, content, tokenizer, Path(companion) if companion else None, corruption, trust_ids)
    pairs, found = _read(format, source)
    if corruption not in (None, found):
        raise TaskError(f"{path.name} corrupts its prompts in one way, {found!r}, and not by {corruption!r}. Leave it out.")
    if n_prompts is not None and n_prompts < 1:
        raise TaskError(f"n_prompts={n_prompts} asks for no prompts. Ask for at least 1, or pass None for all.")
    bos = tokenizer.prepends_bos if bos is None else bos
    rows, dropped = _tokenize(pairs, tokenizer, bos)
    if not rows:
        raise TaskError(_nothing_left(path, len(pairs), dropped, tokenizer))
    if n_prompts is not None:
        rows = random.Random(seed).sample(rows, min(n_prompts, len(rows)))
    metric = metric or FORMATS[format].metric
    if metric not in METRICS:
        raise TaskError(f"{metric!r} is no metric. There are {', '.join(METRICS)}.{nearest(metric, METRICS)}")
    words = content.get("word_idxs", {}) if isinstance(content, dict) else {}
    named, lengths = _named(words, rows, bos), sorted({len(row.clean) for row in rows})
    if unfit := sum(label not in named for label in words):
        dropped["named positions that do not fit these tokens"] = unfit
    notes = {"file": path.name, "format": format, "rows": len(pairs), "dropped": dict(dropped), "seed": seed, "bos": bos}
    return Task(
        name=path.stem,
        prompts=_batch(rows, lengths, named, tokenizer.pad_id),
        metric=METRICS[metric],
        metric_name=metric,
        corruption=found,
        group_names=tuple(f"{length} tokens" for length in lengths),
        tokenizer=tokenizer,
        notes=notes,
    )


def _read(format: str, source: Source) -> tuple[list[Pair], str]:
    try:
        return FORMATS[format].read(source)
    except (KeyError, IndexError, TypeError, ValueError, SyntaxError) as problem:
        if isinstance(problem, TaskError):
            raise
        keys = ", ".join(sorted(FORMATS[format].keys))
        raise TaskError(
            f"{source.path.name} cannot be read as {format!r} (which needs {keys}): {type(problem).__name__}: {problem}."
        ) from problem


def _tokenize(pairs: Sequence[Pair], tokenizer: Tokenizer, bos: bool) -> tuple[list[_Row], Counter[str]]:
    """The pairs that align and whose words are single tokens, and how many were dropped for which reason."""
    rows, dropped = [], Counter()
    several: set[Word] = set()

    def ids(words: Sequence[Word]) -> list[int]:
        tokens = {word: word if isinstance(word, int) else tokenizer.single(word) for word in words}
        several.update(word for word, token in tokens.items() if token is None)
        return [token for token in tokens.values() if token is not None]

    @cache  # verb lists repeat the same thousand words in thousands of rows
    def compared(answers: tuple[Word, ...], foils: tuple[Word, ...]) -> tuple[list[int], list[int], str]:
        right, wrong = ids(answers), ids(foils)
        trouble = "" if right and wrong else "no answer or no foil is a single token"
        trouble = "a token is both answer and foil" if set(right) & set(wrong) else trouble
        return right + wrong, [1] * len(right) + [-1] * len(wrong), trouble

    for pair in pairs:
        clean, corrupted = (_encode(prompt, tokenizer, bos) for prompt in (pair.clean, pair.corrupted))
        candidates, roles, trouble = compared(tuple(pair.answers), tuple(pair.foils))
        trouble = trouble if len(clean) == len(corrupted) else "clean and corrupted differ in length"
        trouble = "clean and corrupted are the same" if clean == corrupted else trouble
        if trouble:
            dropped[trouble] += 1
        else:
            rows.append(_Row(clean, corrupted, candidates, roles))
    if several:
        dropped["words of several tokens"] = len(several)
    return rows, dropped


def _encode(prompt: Prompt, tokenizer: Tokenizer, bos: bool) -> list[int]:
    return tokenizer.encode(prompt, bos) if isinstance(prompt, str) else [int(token) for token in prompt]


def _named(words: Mapping[str, int], rows: Sequence[_Row], bos: bool) -> dict[str, list[int]]:
    """END, CHANGED, and the file's own positions moved to this task's choice of BOS, if they fit its tokens."""
    moved = {label: [index] * len(rows) for label, index in _moved(words, {len(row.clean) for row in rows}, bos).items()}
    return moved | {"END": [len(row.clean) - 1 for row in rows], "CHANGED": [_first_change(row) for row in rows]}


def _moved(words: Mapping[str, int], lengths: set[int], bos: bool) -> dict[str, int]:
    """Empty where the positions were made with another tokenizer, or stand for prompts of one length and these differ.

    auto-circuit stores some files' indices with BOS and some without, and says nothing. ``starts`` (the first token of
    the text) is then 1 or 0; where it is missing, ``end`` or else the last label tells it from the prompts' length.
    """
    if not words or len(lengths) > 1:
        return {}
    last = max(lengths) - bos - 1
    end = words.get("end", max(words.values()))
    counted_bos = words.get("starts", end - last)
    fits = counted_bos in (0, 1) and (end == last + counted_bos if "end" in words else end <= last + counted_bos)
    return {label: index - counted_bos + bos for label, index in words.items()} if fits else {}


def _first_change(row: _Row) -> int:
    changed = (pos for pos, (a, b) in enumerate(zip(row.clean, row.corrupted, strict=True)) if a != b)
    return next(changed, len(row.clean) - 1)


def _batch(rows: Sequence[_Row], lengths: list[int], named: Mapping[str, list[int]], pad_id: int) -> PromptBatch:
    return PromptBatch(
        clean=_padded([row.clean for row in rows], pad_id),
        corrupted=_padded([row.corrupted for row in rows], pad_id),
        end=torch.tensor(named["END"]),
        candidates=_padded([row.candidates for row in rows], 0),
        roles=_padded([row.roles for row in rows], 0),
        groups=torch.tensor([lengths.index(len(row.clean)) for row in rows]),
        positions={label: torch.tensor(index) for label, index in sorted(named.items())},
    )


def _padded(rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])


def _nothing_left(path: Path, n_pairs: int, dropped: Mapping[str, int], tokenizer: Tokenizer) -> str:
    reasons = "; ".join(f"{reason}: {count}" for reason, count in dropped.items())
    return (
        f"none of the {n_pairs} pairs in {path.name} can be used with the tokenizer {tokenizer.name!r} ({reasons}). "
        "Answers must be one token, with their leading space; clean and corrupted must have equally many tokens."
    )
