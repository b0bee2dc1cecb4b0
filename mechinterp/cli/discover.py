"""``mechinterp discover``: from a task to its circuit, drawn, measured and saved."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mechinterp.cli import say
from mechinterp.cli.owners import clashes
from mechinterp.cli.results import folder_written_whole
from mechinterp.errors import CircuitError, ModelError, TaskError, nearest

FILES = ("circuit.json", "circuit.png", "report.json", "scores.json")
FRESH = 1_000_003  # faithfulness is measured on prompts of seed + FRESH, which the search has not seen


def discover(
    task: Annotated[str, typer.Argument(help="A task (see `mechinterp tasks`), or a file of prompt pairs.")],
    model: Annotated[str, typer.Option(help="builtin, a model's name, or a directory with weights.")] = "builtin",
    method: Annotated[str, typer.Option(help="How edges are scored (see `mechinterp methods`).")] = "eap-ig",
    prompts: Annotated[int, typer.Option(help="How many prompt pairs (from a file: at most).")] = 64,
    edges: Annotated[int, typer.Option(help="How many edges the circuit keeps.")] = 100,
    ablation: Annotated[str, typer.Option(help="What cut edges carry: resample, mean or zero.")] = "resample",
    corruption: Annotated[str | None, typer.Option(help="How prompts are corrupted. Default: the task's own.")] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts, the intervals and the random circuits.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    out: Annotated[
        Path | None,
        typer.Option(help="A folder for everything, or a file (.json, .png) for the circuit. Default: mechinterp-TASK."),
    ] = None,
    trust_ids: Annotated[bool, typer.Option("--trust-ids", help="Token ids in a prompt file are this model's.")] = False,
) -> None:
    """Find the circuit that carries a task; draw it, measure it, save it."""
    from circuits import attention_roles, evaluate
    from circuits import discover as score

    _check(prompts, edges, method, ablation)
    out = out or Path(f"mechinterp-{Path(task).stem}")
    is_file = _names_a_file(out)
    with folder_written_whole(out.parent if is_file else out, () if is_file else FILES) as scratch:
        for warning in clashes():
            say.warn(warning)
        transformer = _load(model, device, edges)
        made, fresh = _make_tasks(task, transformer, prompts, seed, corruption, trust_ids)
        say.what_is_analysed(model, transformer, made)
        started, shows_progress = time.perf_counter(), sys.stderr.isatty()
        scores = score(transformer, made, method, ablation=ablation, progress=shows_progress)
        print(f"Method  {method}: {len(scores):,} {scores.items}s scored in {time.perf_counter() - started:.1f} s")
        circuit = report = None
        if scores.items == "node":
            say.parts_ranked(scores, attention_roles(transformer, fresh, _heads(scores), n=2))
        else:
            circuit = scores.top(edges)
            say.circuit_found(circuit, scores.unit, attention_roles(transformer, fresh, circuit.heads, n=2))
            report = evaluate(transformer, fresh, circuit, scores, ablation=ablation, seed=seed, progress=shows_progress)
            circuit.graph.update(report.facts)
            say.how_faithful(report, fresh is not made)
        _save(scratch, out.name if is_file else None, circuit, scores, report)
        written = sorted(file.name for file in scratch.iterdir())
    print(f"\nWritten to {out.parent if is_file else out}: {', '.join(written)}")


def _check(prompts: int, edges: int, method: str, ablation: str) -> None:
    """What can be refused before anything is loaded."""
    from circuits import ABLATIONS, ALGORITHMS

    if edges < 1:
        raise CircuitError(f"--edges {edges} keeps nothing. Ask for at least 1.")
    if prompts < 1:
        raise TaskError(f"--prompts {prompts} asks for no prompts. Ask for at least 1.")
    if method not in ALGORITHMS:
        raise CircuitError(f"there is no method {method!r}. There are: {', '.join(ALGORITHMS)}.{nearest(method, ALGORITHMS)}")
    if ablation not in ABLATIONS:
        raise CircuitError(
            f"there is no ablation {ablation!r}. There are: {', '.join(ABLATIONS)}.{nearest(ablation, ABLATIONS)}"
        )


def _names_a_file(out: Path) -> bool:
    """Whether the suffix is one that circuits are saved under; a folder may have dots in its name."""
    from circuits.export import FORMATS

    return out.suffix in {format.suffix for format in FORMATS.values()} and not out.is_dir()


def _load(name: str, device: str, edges: int) -> Any:
    import torch

    from circuits import Wiring
    from mechinterp import load

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).strip().partition("\n")[0]
        raise ModelError(f"--device {device} cannot be used here ({reason}). Use --device cpu.") from None
    transformer = load(name, device=device)
    if edges > (there_are := Wiring.of(transformer.config).n_edges):
        raise CircuitError(f"--edges {edges:,} is more than {name} has. Ask for 1 to {there_are:,}.")
    return transformer


def _make_tasks(name: str, transformer: Any, n: int, seed: int, corruption: str | None, trust_ids: bool) -> tuple[Any, Any]:
    """The prompts to search with, and fresh ones to measure on (the same ones where a file holds no others)."""
    from mechinterp.tasks import TASKS
    from mechinterp.tasks.files import from_file

    if name in TASKS:
        chosen = {} if corruption is None else {"corruption": corruption}
        made, fresh = (TASKS[name](transformer, n_prompts=n, seed=seed + shift, **chosen) for shift in (0, FRESH))
        return made, fresh
    if not Path(name).is_file():
        raise TaskError(
            f"there is no task and no file {name!r}. Tasks: {', '.join(TASKS)}.{nearest(name, TASKS)} A file holds one JSON "
            'object a line: {"clean": ..., "corrupted": ..., "answers": [" Mary"], "foils": [" John"]}.'
        )
    both = from_file(transformer, name, n_prompts=2 * n, seed=seed, corruption=corruption, trust_ids=trust_ids)
    made = replace(both, prompts=both.prompts[:n])
    return made, replace(both, prompts=both.prompts[n:]) if len(both) > n else made


def _heads(scores: Any) -> list[Any]:
    return [node for node in scores.wiring.writers if node.kind == "head"]


def _save(folder: Path, circuit_file: str | None, circuit: Any, scores: Any, report: Any) -> None:
    """Everything, or the circuit alone under the name asked for."""
    if circuit_file and circuit is None:
        raise CircuitError(f"{scores.method!r} ranks parts and cuts no circuit to save as {circuit_file}. Give a folder.")
    if circuit_file:
        circuit.save(folder / circuit_file)
        return
    scores.save(folder / "scores.json")
    if circuit is not None:
        circuit.save(folder / "circuit.json")
        circuit.save(folder / "circuit.png")
        report.save(folder / "report.json")
