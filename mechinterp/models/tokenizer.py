"""Text to token ids and back, over the Rust ``tokenizers`` library: loading one takes milliseconds, not seconds."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
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

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def strings(self, ids: Sequence[int]) -> list[str]:
        """Each token as text of its own, for labels and tables."""
        return [self.decode([int(i)]) for i in ids]

    def single(self, word: str) -> int | None:
        """The id of ``word`` if it is exactly one known token (mind the leading space), else None.

        >>> load("builtin").tokenizer.single(" Mary") is not None    # doctest: +SKIP
        True
        """
        ids = self.spans(word)[0]
        return ids[0] if len(ids) == 1 and self.decode(ids) == word else None

    def _bos(self) -> int:
        if self.bos_id is None:
            raise ModelError(f"the tokenizer {self.name!r} has no BOS token. Encode with bos=False.")
        return self.bos_id
