"""Tokens to train and to measure on: rows of text, and which of their positions count.

Texts come from a file, a list, any iterable of strings or of records with ``text`` (a ``datasets`` stream, say), or a task's
prompts. Text is packed: documents follow one another, each begun by BOS where the tokenizer has one, and the stream is cut
into rows of ``context`` positions that begin with BOS too (Kissane et al. 2024 train on rows of 128 with BOS in front).
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.errors import SAEError
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.models.transformer import Transformer
from mechinterp.tasks.base import Task, tokenizer_of
from saes.positions import default_keep


@dataclass(frozen=True, eq=False)
class Corpus:
    """Rows of tokens. ``keep`` marks the positions that are trained on and measured: no BOS, no padding.

    BOS draws attention like no other token, and its activations are many times as large; trained along, they would cost
    latents and flatter every average.
    """

    tokens: Int[Tensor, "prompt pos"]
    keep: Bool[Tensor, "prompt pos"]
    name: str = "text"

    def __post_init__(self):
        if self.tokens.shape != self.keep.shape:
            raise SAEError(f"tokens {tuple(self.tokens.shape)} and keep {tuple(self.keep.shape)} must have one shape.")
        if not self.keep.any():
            raise SAEError("no position of these tokens is to be kept, so there is nothing to train on.")

    @classmethod
    def of(cls, tokens: Int[Tensor, "prompt pos"], tokenizer: Tokenizer | None = None, name: str = "tokens") -> "Corpus":
        """Rows of one's own, with what ``default_keep`` keeps of them."""
        return cls(tokens, default_keep(tokens, tokenizer), name)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Any) -> "Corpus":
        """The corpus of some rows: a slice, or their numbers."""
        return replace(self, tokens=self.tokens[rows], keep=self.keep[rows])

    @property
    def n_kept(self) -> int:
        return int(self.keep.sum())

    @property
    def fingerprint(self) -> str:
        """Changes with any token and any kept position."""
        digest = hashlib.sha256(self.tokens.to(torch.int64).contiguous().numpy().data)
        digest.update(self.keep.contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def split(self, held_out: float, seed: int = 0) -> tuple["Corpus", "Corpus"]:
        """Rows to train on, and a share ``held_out`` of rows, drawn by ``seed``, to measure on."""
        n = max(1, round(held_out * len(self)))
        if not 0 < held_out < 1 or n >= len(self):
            raise SAEError(f"held_out={held_out} of {len(self)} rows leaves nothing on one side. Give a share such as 0.1.")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self[order[n:].sort().values], self[order[:n].sort().values]


def corpus_of_texts(
    model: Transformer,
    texts: Iterable[str | Mapping[str, Any]],
    *,
    context: int | None = None,
    n_tokens: int | None = None,
    bos: bool | None = None,
    name: str = "text",
) -> Corpus:
    """Packed rows of ``context`` positions (default: 128, or all that the model reads), until ``n_tokens`` are there.

    ``texts``: strings, or records with a ``text``. ``bos``: whether BOS begins documents and rows; default: where the
    tokenizer has one. The last row, if incomplete, is left out. Memory: the tokens, 16 bytes each. Raises ``SAEError`` if not
    one row comes together, ``TaskError`` for a model without a tokenizer.
    """
    tokenizer, n_ctx = tokenizer_of(model), model.config.n_ctx
    bos_id = tokenizer.bos_id if bos is not False else None
    context = min(128, n_ctx) if context is None else context
    if not 2 <= context <= n_ctx:
        raise SAEError(f"context={context}: {model.config.name} reads 2 to {n_ctx} positions.")
    if n_tokens is not None and n_tokens < 1:
        raise SAEError(f"n_tokens={n_tokens} must be at least 1, or None for all there are.")
    n_rows = None if n_tokens is None else -(-n_tokens // context)
    made = _rows(tokenizer, texts, context, [] if bos_id is None else [bos_id])
    rows = [torch.tensor(row) for row in itertools.islice(tqdm(made, "tokenizing", unit="row", delay=2, disable=None), n_rows)]
    if not rows:
        raise SAEError(f"these texts are shorter than one row of {context} tokens. Give more text, or a smaller context.")
    tokens = torch.stack(rows)
    return Corpus(tokens, torch.ones_like(tokens, dtype=torch.bool) if bos_id is None else tokens != bos_id, name)


def corpus_of_tasks(*tasks: Task, corrupted: bool = True) -> Corpus:
    """The prompts of tasks, clean and (unless told not to) corrupted, each up to its end; all of one model."""
    if not tasks:
        raise SAEError("no task is given. Give at least one.")
    if len(names := {task.tokenizer.name for task in tasks}) > 1:
        raise SAEError(f"these tasks are of several tokenizers ({', '.join(sorted(names))}). Give those of one model.")
    sides = [(task, side) for task in tasks for side in ("clean", "corrupted")[: 1 + corrupted]]
    width = max(task.prompts.clean.shape[1] for task in tasks)
    tokens, keep = [], []
    for task, side in sides:
        found, end = getattr(task.prompts, side), task.prompts.end
        pad = (0, width - found.shape[1])
        tokens.append(torch.nn.functional.pad(found, pad, value=task.tokenizer.pad_id))
        inside = torch.arange(width) <= end.unsqueeze(1)
        bos = task.tokenizer.bos_id
        keep.append(inside & ((tokens[-1] != bos) if bos is not None else True))
    return Corpus(torch.cat(tokens), torch.cat(keep), "+".join(task.name for task in tasks))


def read_texts(path: Path | str) -> Iterator[str]:
    """The documents of a file: lines with ``text`` (.jsonl), a list of strings or records (.json), blank-line blocks (.txt)."""
    path = Path(path)
    if not path.is_file():
        raise SAEError(f"there is no file {str(path)!r}. Give one of text: .jsonl, .json or .txt.")
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                yield from (_text(json.loads(line)) for line in lines if line.strip())
        elif path.suffix == ".json":
            documents = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(documents, list):
                raise SAEError(
                    f"{str(path)!r} holds a {type(documents).__name__}. Give a list of strings or records with 'text'."
                )
            yield from map(_text, documents)
        elif path.suffix == ".txt":
            with path.open(encoding="utf-8") as lines:
                for blank, block in itertools.groupby(lines, lambda line: not line.strip()):
                    if not blank:
                        yield "".join(block)
        else:
            raise SAEError(f"{path.name!r} is not a kind of text that is read. Give .jsonl, .json or .txt.")
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise SAEError(f"{str(path)!r} is not what its name says ({problem}). Mend or rename it.") from None


def _rows(tokenizer: Tokenizer, texts: Iterable[Any], context: int, front: list[int]) -> Iterator[list[int]]:
    """Rows of ``context`` tokens that begin with ``front``, as every document does."""
    ahead: list[int] = []
    for text in texts:
        ahead += [*front, *tokenizer.spans(_text(text))[0]]
        at = 0
        while len(ahead) - at >= (taken := context if ahead[at : at + len(front)] == front else context - len(front)):
            yield [*front, *ahead[at : at + taken]][-context:]
            at += taken
        del ahead[:at]  # once a document: a book has a hundred thousand rows


def _text(record: Any) -> str:
    found = record if isinstance(record, str) else record.get("text") if isinstance(record, Mapping) else None
    if not isinstance(found, str):
        raise SAEError(f"a document must be a string or a record with 'text'; found {str(record)[:60]!r}.")
    return found
