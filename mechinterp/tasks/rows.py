"""The bare content of a prompt file: JSON, JSON lines or csv, without knowing yet what the columns mean."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from mechinterp.errors import TaskError


def read_rows(path: Path) -> Any:
    """A list of rows (objects, or lists), or the one object of a JSON file. ``TaskError`` if it is none of these, or empty."""
    if not path.is_file():
        raise TaskError(f"there is no prompt file at {path}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = _parse(text, path.suffix.lower())
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as problem:
        raise TaskError(f"{path} cannot be read as {path.suffix or 'JSON lines'}: {problem}.") from None
    if not content or not isinstance(content, list | dict):
        raise TaskError(f"{path} holds no rows.")
    if isinstance(content, list):
        _check_alike(content, path)
    return content


def _parse(text: str, suffix: str) -> Any:
    if suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    if suffix == ".json":
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _check_alike(rows: list, path: Path) -> None:
    """Every row has at least the keys of the first, so that readers may index without looking."""
    first = rows[0]
    for number, row in enumerate(rows, start=1):
        if type(row) is not type(first) or not isinstance(row, dict | list):
            raise TaskError(f"{path}: row {number} is {type(row).__name__}, the first is {type(first).__name__}.")
        if isinstance(row, dict) and (missing := [key for key in first if row.get(key) is None and first[key] is not None]):
            raise TaskError(f"{path}: row {number} lacks {', '.join(map(repr, missing))}, which the first row has.")
        if isinstance(row, list) and len(row) != len(first):
            raise TaskError(f"{path}: row {number} has {len(row)} entries, the first has {len(first)}.")
