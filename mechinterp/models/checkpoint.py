"""A checkpoint on disk, read one tensor at a time: safetensors only, in one file or in shards, never a pickle."""

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mechinterp.errors import ModelError

_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a directory by name. Each access reads one from disk into memory of its own, and nothing is kept.

    Read and not mapped: a file that somebody writes over must not change a loaded model, and mapped pages count as memory,
    so that the largest tensor would be held twice. Into pages of its own: those of a tensor that is converted or packed go
    back to the system at once, where freed blocks among those that stay would be holes (a third of GPT-2, on a bad day).
    ``ModelError`` for what is missing, truncated, or no safetensors file.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        index = directory / _INDEX
        if (directory / _WHOLE).is_file():  # first, as Hugging Face does: an index beside it is left over
            files = dict.fromkeys(set(self._table(_WHOLE).entries) - {"__metadata__"}, _WHOLE)
        elif index.is_file():
            files = self._listed(index)
        else:
            raise self._lacks([_WHOLE])
        missing = sorted({file for file in files.values() if not (directory / file).is_file()})
        if missing:
            raise self._lacks(missing)
        self._files = files
        self._tables: dict[str, _Table] = {}

    def __getitem__(self, name: str) -> Tensor:
        file = self._files[name]
        if file not in self._tables:
            self._tables[file] = self._table(file)
        table = self._tables[file]
        if name not in table.entries:
            raise ModelError(f"{self.directory / file} lacks {name!r}, which the index says it holds. Download both again.")
        entry = table.entries[name]
        if entry["dtype"] not in _DTYPES:
            raise ModelError(
                f"{self.directory / file} holds {name!r} in {entry['dtype']}, which the engine does not multiply by; it reads "
                f"{', '.join(_DTYPES)}. Load the checkpoint that it was made from."
            )
        first, end = entry["data_offsets"]
        pages = mmap.mmap(-1, max(end - first, 1), **_PRIVATE)
        with (self.directory / file).open("rb") as opened:
            opened.seek(table.begin + first)
            if opened.readinto(memoryview(pages)[: end - first]) != end - first:
                raise self._broken(file, "it ended too early")
        return torch.frombuffer(pages, dtype=_DTYPES[entry["dtype"]], count=math.prod(entry["shape"])).reshape(entry["shape"])

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def _listed(self, index: Path) -> dict[str, str]:
        try:
            return {str(name): str(file) for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise ModelError(f"{index} does not say which shard holds which tensor. Download it again.") from problem

    def _table(self, file: str) -> "_Table":
        """A file's table of contents: eight bytes of length, then JSON. safetensors itself checks that the file is whole."""
        try:
            with safe_open(self.directory / file, framework="pt"):
                pass
            with (self.directory / file).open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                return _Table(8 + length, json.loads(opened.read(length)))
        except (SafetensorError, OSError) as problem:
            raise self._broken(file, problem) from problem

    def _lacks(self, files: list[str]) -> ModelError:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.directory.glob(pattern))
        there = f" It has {', '.join(pickles)}: pickles, which can run code and are never opened here." if pickles else ""
        more = f" and {len(files) - 3} more files" if len(files) > 3 else ""
        return ModelError(
            f"{self.directory} lacks {', '.join(files[:3])}{more}.{there} Download it again, or write it with "
            "`model.save_pretrained(directory)`, which makes safetensors."
        )

    def _broken(self, file: str, problem: Exception | str) -> ModelError:
        return ModelError(f"{self.directory / file} is no whole safetensors file ({problem}). Download or write it again.")


@dataclass(frozen=True)
class _Table:
    """Where a file's tensors begin, and of each by name its dtype, shape and place after that."""

    begin: int
    entries: dict[str, Any]
