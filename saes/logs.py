"""What training tells on its way: a callback gets one plain record every so often.

train(activations, directory="run")                                  # run/training.jsonl, without asking
train(activations, callbacks=[to_wandb(project="attention")])        # or a function of your own
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mechinterp.errors import SAEError
from mechinterp.files import write_text_atomically

Record = Mapping[str, Any]
"""``step``, ``rows``, ``lr``, ``weight``; and by place ``loss``, ``error``, ``explained`` (share of the batch's variance),
``l0``, ``dead`` (share of latents idle for ``idle_rows`` rows)."""

Callback = Callable[[Record], None]


def to_jsonl(path: Path | str) -> Callback:
    """A callback that appends each record to a file, one JSON object a line."""
    path = Path(path)

    def write(record: Record) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as problem:
            raise SAEError(f"{str(path)!r} cannot be written ({problem}). Make room and run the same again.") from problem

    return write


def to_wandb(**init: Any) -> Callback:
    """A callback that logs means over places to Weights & Biases; ``init`` goes to ``wandb.init``."""
    try:
        import wandb
    except ImportError:
        raise SAEError("wandb is not installed. Install it (pip install wandb), or log to a file with to_jsonl.") from None
    run = wandb.init(**init)
    return lambda record: run.log(means(record), step=record["step"])


def means(record: Record) -> dict[str, int | float]:
    """A record with each list replaced by its mean."""
    return {name: sum(value) / len(value) if isinstance(value, list) else value for name, value in record.items()}


def read_log(path: Path | str) -> list[Record]:
    """The records of a file that ``to_jsonl`` wrote. A last line that an interruption cut short is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise SAEError(f"{str(path)!r} is no log of a training: {line[:60]!r} has no 'step'. Move it away.")
        records.append(record)
    return records


def cut_log(path: Path | str, step: int) -> None:
    """Forget what a file tells of steps after ``step``: they are about to be trained again."""
    if Path(path).is_file():
        kept = [record for record in read_log(path) if record["step"] <= step]
        write_text_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
