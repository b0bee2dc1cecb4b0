"""Training states on disk, whole or absent: a run that is taken up again ends with the numbers of one that never stopped.

A checkpoint is a folder ``checkpoint-00001200`` with the tensors (parameters, Adam's moments, how long each latent has been
idle) and, in JSON, the step, the settings and what was trained on. It is written under a hidden name and then renamed; only
then is the one before it removed. Nothing in it is executable.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechinterp.errors import SAEError
from mechinterp.files import read_document, to_document

_KIND, _VERSION = "mechinterp sae checkpoint", 1


def write_checkpoint(directory: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Make this the newest checkpoint. ``SAEError``, with the older one left as it was, if it cannot be written."""
    if directory / f"checkpoint-{step:08d}" in checkpoints(directory):
        return  # that step's numbers: whoever got here read it, or went on from before it and came to the same
    final, beside = directory / f"checkpoint-{step:08d}", directory / f".checkpoint-{step:08d}.partial"
    try:
        for abandoned in directory.glob(".checkpoint-*.partial"):  # by a process that was killed while it wrote
            shutil.rmtree(abandoned, ignore_errors=True)
        beside.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside / "state.safetensors")
        content = {"step": step, "crc32": _crc32(beside / "state.safetensors"), **facts}
        (beside / "state.json").write_text(to_document(_KIND, _VERSION, content), encoding="utf-8")
        for path in beside.iterdir():
            _to_disk(path)
        older = checkpoints(directory)
        beside.rename(final)
    except (OSError, SafetensorError) as problem:
        shutil.rmtree(beside, ignore_errors=True)
        names = [path.name for path in checkpoints(directory)]
        kept = f"{names[-1]} is whole" if names else "There is none before it"
        raise SAEError(
            f"the checkpoint of step {step} cannot be written to {str(directory)!r} ({problem}). "
            f"{kept}; make room and run the same again to go on from there."
        ) from problem
    for path in older:
        if path != final:
            shutil.rmtree(path, ignore_errors=True)


def checkpoints(directory: Path) -> list[Path]:
    """Those there are, oldest first."""
    found = {path: re.fullmatch(r"checkpoint-(\d{8,})", path.name) for path in directory.glob("checkpoint-*")}
    return sorted((path for path, name in found.items() if name), key=lambda path: int(path.name[11:]))


def read_checkpoint(directory: Path, expected: Mapping[str, Any]) -> tuple[int, dict[str, Tensor]] | None:
    """The newest checkpoint of a run that was asked for with the same ``expected`` facts; None where there is none.

    Raises ``SAEError`` for one that is damaged or of another run, and touches neither.
    """
    found = checkpoints(directory)
    if not found:
        return None
    path = found[-1]
    try:
        document = read_document(path / "state.json", _KIND, _VERSION, SAEError)
        if _crc32(path / "state.safetensors") != document["crc32"]:
            raise SAEError("its tensors are not those that were written")
        step, tensors = int(document["step"]), load_file(path / "state.safetensors")
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as problem:
        raise SAEError(
            f"the checkpoint {str(path)!r} cannot be used ({problem}). Move it away to go on from "
            f"{found[-2].name if len(found) > 1 else 'the beginning'}."
        ) from None
    check_same(path, document, json.loads(json.dumps(expected)))
    return step, tensors


def check_same(path: Path, document: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """A checkpoint of other settings or data is not gone on from: the mixture would be neither."""
    for part, wanted in expected.items():
        given = document.get(part)
        if given == wanted:
            continue
        if isinstance(given, dict) and isinstance(wanted, dict):
            name = next(key for key in [*wanted, *given] if given.get(key) != wanted.get(key))
            part, given, wanted = f"{part}.{name}", given.get(name), wanted.get(name)
        raise SAEError(
            f"{str(path)!r} is of another run: its {part} is {_short(given)}, and {_short(wanted)} is asked for. Use another "
            "directory, or ask for the same."
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _to_disk(path: Path) -> None:
    """Before a name vouches for a file, its bytes must have arrived: power may fail."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum
