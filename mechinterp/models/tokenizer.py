"""Text to token ids and back, over the Rust ``tokenizers`` library: loading one takes milliseconds, not seconds."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import tokenizers

from mechinterp.errors import ModelError


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and the three facts that its file does not tell: its name, BOS and what pads.

    ``prepends_bos`` says whether the model was trained with BOS in front, so that prompts need it;
    where it is False a task's own published convention decides.
    """

    backend: tokenizers.Tokenizer
    name: str
    bos_id: int | None = None
    pad_id: int = 0
    prepends_bos: bool = False

    @classmethod
    def from_file(cls, path: Path | str, name: str, bos: str | None = None, prepends_bos: bool = False) -> "Tokenizer":
        """Read a ``tokenizer.json``. ``bos`` is the beginning-of-sequence token as text."""
        if not Path(path).is_file():
            raise ModelError(
                f"there is no tokenizer file at {path}. Save one there with `save_pretrained`, or pass a tokenizer."
            )
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.no_padding()
        backend.no_truncation()
        bos_id = backend.token_to_id(bos) if bos else None
        pad_id = backend.token_to_id("<pad>")
        return cls(backend, name, bos_id, pad_id if pad_id is not None else (bos_id or 0), prepends_bos)

    @classmethod
    def from_directory(cls, directory: Path, name: str) -> "Tokenizer":
        """What ``save`` wrote: ``tokenizer.json`` and, beside it, the facts it does not hold."""
        facts = json.loads((directory / "tokenizer_facts.json").read_text(encoding="utf-8"))
        tokenizer = cls.from_file(directory / "tokenizer.json", name)
        return replace(tokenizer, bos_id=facts["bos_id"], pad_id=facts["pad_id"], prepends_bos=facts["prepends_bos"])

    def save(self, directory: Path) -> None:
        facts = {"bos_id": self.bos_id, "pad_id": self.pad_id, "prepends_bos": self.prepends_bos}
        self.backend.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_facts.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")

    @classmethod
    def from_transformers(cls, tokenizer, name: str | None = None, prepends_bos: bool | None = None) -> "Tokenizer":
        """Wrap a fast Hugging Face tokenizer (``AutoTokenizer.from_pretrained(...)``)."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"{type(tokenizer).__name__} is a slow tokenizer. Load a fast one: AutoTokenizer(..., use_fast=True)."
            )
        backend = tokenizers.Tokenizer.from_str(backend.to_str())
        backend.no_padding()
        backend.no_truncation()
        bos_id = tokenizer.bos_token_id
        if prepends_bos is None:
            prepends_bos = bos_id is not None and backend.encode("a").ids[:1] == [bos_id]
        pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, bos_id) if i is not None), 0)
        return cls(backend, name or tokenizer.name_or_path, bos_id, pad_id, prepends_bos)

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        """Token ids of ``text``. ``bos=None`` prepends BOS where the model was trained with it."""
        ids = self.spans(text)[0]
        return [self._bos(), *ids] if (self.prepends_bos if bos is None else bos) else ids

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids without BOS, and the (start, end) characters that each stands for."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text of ``ids``. ``after``: the ids before them, where they are not the beginning of a text (``strings``)."""
        whole = self.backend.decode([*after, *ids] if self._puts_space_first else list(ids), skip_special_tokens=False)
        return whole[len(self.decode(after)) :] if after and self._puts_space_first else whole

    def strings(self, ids: Sequence[int]) -> list[str]:
        """Each token as it stands inside of a text, leading space included, for labels and tables."""
        front = self.spans("a")[0]
        return [self.decode([int(i)], after=front) for i in ids]

    def single(self, word: str) -> int | None:
        """The id of ``word`` if inside of a text it is exactly one known token (mind the leading space), else None.

        >>> from mechinterp.models.load import load
        >>> load("builtin").tokenizer.single(" Mary") is not None
        True
        """
        front = "\n" if self._puts_space_first else ""  # merges with nothing that follows
        ids = self.spans(front + word)[0][len(self.spans(front)[0]) :]
        return ids[0] if len(ids) == 1 and self.strings(ids) == [word] else None

    @cached_property
    def _puts_space_first(self) -> bool:
        """SentencePiece's tokenizers (Llama 2, Mistral) begin a text with a space of their own, and take it off again.

        So the token of " Mary" is, at the beginning of a text, that of "Mary".
        """
        return self.backend.encode("a", add_special_tokens=False).tokens[:1] in (["▁"], ["▁a"])

    def _bos(self) -> int:
        if self.bos_id is None:
            raise ModelError(f"the tokenizer {self.name!r} has no BOS token. Encode with bos=False.")
        return self.bos_id
