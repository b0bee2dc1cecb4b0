"""Timing on a machine that others use too, and memory above what is already loaded.

Cases take turns, round after round, so that a busy minute hits all of them; what is reported of two cases is the ratio
within each round. Seconds are CPU time of this process (user + system, all threads) beside the clock on the wall.
"""

import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Seconds of one case, round by round; ``scale`` is how many such runs the whole job takes."""

    cpu: list[float]
    wall: list[float]
    scale: float = 1.0

    def per(self, other: "Timing") -> dict[str, float]:
        """How many times as long this takes as ``other``: median and extremes of the rounds, and minimum over minimum."""
        factor = self.scale / other.scale
        cpu = [factor * mine / theirs for mine, theirs in zip(self.cpu, other.cpu, strict=True)]
        wall = [factor * mine / theirs for mine, theirs in zip(self.wall, other.wall, strict=True)]
        return {
            "cpu": statistics.median(cpu),
            "wall": statistics.median(wall),
            "cpu_lowest": min(cpu),
            "cpu_highest": max(cpu),
            "cpu_of_minima": factor * min(self.cpu) / min(other.cpu),
        }


def interleave(
    cases: Mapping[str, Callable[[], Any]], rounds: int, scales: Mapping[str, float] | None = None, warm_up: bool = True
) -> dict[str, Timing]:
    """Each case in turn, ``rounds`` times, after one round that does not count."""
    cpu: dict[str, list[float]] = {name: [] for name in cases}
    wall: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + warm_up):
        for name, case in cases.items():
            gc.collect()
            began, began_wall = time.process_time(), time.perf_counter()
            result = case()
            spent, spent_wall = time.process_time() - began, time.perf_counter() - began_wall
            del result
            if turn >= warm_up:
                cpu[name].append(spent)
                wall[name].append(spent_wall)
    return {name: Timing(cpu[name], wall[name], (scales or {}).get(name, 1.0)) for name in cases}


def peak_above(job: Callable[[], Any]) -> float:
    """GiB that ``job`` needs at its peak above what is resident now. Linux only. Call it in a process of its own."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    job()
    return (_status("VmHWM") - before) / 2**20


def in_a_process(module: str, *arguments: str) -> str:
    """The last line that ``python -m module arguments`` prints: for what must not see another case's memory."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def table(rows: list[tuple[str, str, str]]) -> str:
    """A Markdown table of what was measured, what it must reach, and what it reached."""
    lines = [("measured", "target", "reached"), ("---", "---", "---"), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def save(subject: str, facts: Mapping[str, Any]) -> Path:
    """Write ``results/<date>-<subject>.json`` with what ran where."""
    now = datetime.now(UTC)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{now:%Y-%m-%d}-{subject}.json"
    about = {"when": now.isoformat(timespec="seconds"), "torch": torch.__version__, "threads": torch.get_num_threads()}
    plain = {name: asdict(fact) if isinstance(fact, Timing) else fact for name, fact in facts.items()}
    path.write_text(json.dumps({**about, **plain}, indent=1) + "\n", encoding="utf-8")
    return path


def _status(field: str) -> int:
    """A field of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1])
