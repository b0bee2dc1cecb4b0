"""``mechinterp discover``: from a task to its circuit, drawn, measured and saved."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from mechinterp.cli import say, watched
from mechinterp.cli.inputs import check_choices, check_positive, load_model, make_tasks
from mechinterp.cli.owners import clashes
from mechinterp.cli.results import folder_written_whole
from mechinterp.errors import CircuitError, TaskError

FILES = ("circuit.json", "circuit.png", "report.json", "scores.json")
CODES = "codes.json"  # of methods by codes, beside the others
N_EDGES, N_PARTS = 100, 20  # unless asked for others


def discover(
    task: Annotated[str, typer.Argument(help="A task (see `mechinterp tasks`), or a file of prompt pairs.")],
    model: Annotated[str, typer.Option(help="builtin, a model's name, or a directory with weights.")] = "builtin",
    method: Annotated[str, typer.Option(help="How edges are scored (see `mechinterp methods`).")] = "eap-ig",
    prompts: Annotated[int, typer.Option(help="How many prompt pairs (from a file: at most).")] = 64,
    edges: Annotated[
        int | None, typer.Option(help="How many edges the circuit keeps. Default: 100, or all in a smaller model.")
    ] = None,
    parts: Annotated[
        int | None,
        typer.Option(help="How many heads and MLPs, by a method that scores them. Default: those that stand out, or 20."),
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Keep edges of at least this score instead; acdc's own.")] = None,
    ablation: Annotated[str, typer.Option(help="What cut edges carry: resample, mean, zero or optimal.")] = "resample",
    corruption: Annotated[str | None, typer.Option(help="How prompts are corrupted. Default: the task's own.")] = None,
    positions: Annotated[
        str | None, typer.Option(help="Where codes and probes read: END, mean or a task's positions, with commas.")
    ] = None,
    train_examples: Annotated[int | None, typer.Option(help="How many prompts codes and probes train on. Default: 10.")] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts, the training, the intervals and the random circuits.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    out: Annotated[
        Path | None,
        typer.Option(help="A folder for everything, or a file (.json, .png) for the circuit. Default: mechinterp-TASK."),
    ] = None,
    allow_unsolved: Annotated[bool, typer.Option("--allow-unsolved", help="Go on where the model fails the task.")] = False,
    trust_ids: Annotated[bool, typer.Option("--trust-ids", help="Token ids in a prompt file are this model's.")] = False,
) -> None:
    """Find the circuit that carries a task; draw it, measure it, save it."""
    from circuits import attention_roles, evaluate
    from circuits import discover as score
    from circuits.discovery import WATCHING

    check_positive("--prompts", prompts)
    check_choices([method], ablation)
    own = _own_settings(method, positions, train_examples)
    out = out or Path(f"mechinterp-{Path(task).stem}")
    is_file = _names_a_file(out)
    with folder_written_whole(out.parent if is_file else out, () if is_file else (*FILES, CODES)) as scratch:
        for warning in clashes():
            say.warn(warning)
        transformer = load_model(model, device)
        edges = _checked_sizes(transformer.config, model, edges, parts)
        made, fresh = make_tasks(task, transformer, prompts, seed, corruption, trust_ids)
        say.what_is_analysed(model, transformer, made, allow_unsolved)
        started, shows_progress = time.perf_counter(), sys.stderr.isatty()
        own |= _settings(method, ablation, threshold, seed, shows_progress)
        scores = score(transformer, made, method, allow_unsolved=True, **own)
        print(f"Method  {method}: {len(scores):,} {scores.items}s scored in {time.perf_counter() - started:.1f} s")
        circuit = report = None
        if scores.items != "edge":
            roles = attention_roles(transformer, fresh, _heads(scores), n=2) if scores.items == "node" else {}
            say.parts_ranked(scores, roles)
        meanings = _meanings(transformer, made, scores)
        if scores.items in ("edge", "node"):
            circuit = _circuit(scores, method, edges, parts, threshold)
            roles = attention_roles(transformer, fresh, circuit.heads, n=2)
            say.circuit_found(circuit, scores, roles)
            settings = {"ablation": ablation, "seed": seed, "allow_unsolved": True, "progress": shows_progress}
            try:
                report = evaluate(transformer, fresh, circuit, scores, **settings)
            except TaskError as problem:  # those that watch have found what they find, faithful or not
                if method not in WATCHING:
                    raise
                say.warn(f"the circuit could not be measured: {problem}")
            else:
                circuit.graph.update(report.facts)
                say.how_faithful(report, fresh is not made)
        _save(scratch, out.name if is_file else None, circuit, scores, report, meanings)
        written = sorted(file.name for file in scratch.iterdir())
    print(f"\nWritten to {out.parent if is_file else out}: {', '.join(written)}")


def _checked_sizes(config: Any, name: str, edges: int | None, parts: int | None) -> int:
    """How many edges to keep; ``CircuitError`` for what the model cannot give."""
    from circuits import Wiring

    for option, n in (("--edges", edges), ("--parts", parts)):
        if n is not None and n < 1:
            raise CircuitError(f"{option} {n} keeps nothing. Ask for at least 1.")
    there_are = Wiring.of(config).n_edges
    if edges is not None and edges > there_are:
        raise CircuitError(f"--edges {edges:,} is more than {name} has. Ask for 1 to {there_are:,}.")
    return min(N_EDGES, there_are) if edges is None else edges


def _own_settings(method: str, positions: str | None, train_examples: int | None) -> dict[str, Any]:
    """What only some methods take; ``CircuitError`` where it is asked of others."""
    from circuits.discovery import ALGORITHMS, settings_of

    given: dict[str, Any] = {} if train_examples is None else {"n_train": train_examples}
    if positions is not None:
        given["positions"] = tuple(name.strip() for name in positions.split(",") if name.strip())
    for name in given:
        if name not in settings_of(method):
            option = {"positions": "--positions", "n_train": "--train-examples"}[name]
            able = ", ".join(other for other in ALGORITHMS if name in settings_of(other))
            raise CircuitError(f"{method!r} takes no {option}. Leave it out, or use a method that does: {able}.")
    return given


def _settings(method: str, ablation: str, threshold: float | None, seed: int, progress: bool) -> dict[str, Any]:
    """What was asked for, as far as the method takes it."""
    from circuits.discovery import settings_of

    asked = {"ablation": ablation, "seed": seed, "progress": progress} | ({} if threshold is None else {"threshold": threshold})
    return {name: value for name, value in asked.items() if name in settings_of(method)}


def _circuit(scores: Any, method: str, edges: int, parts: int | None, threshold: float | None) -> Any:
    """Cut as the method is meant to be: ACDC at its own threshold, shares of a reader from the logits upstream."""
    from circuits.discovery import CUT_GREEDILY

    if scores.items == "node" and threshold is not None:
        say.warn(f"--threshold is for edges, and {method!r} scores parts: it was not used. Ask for --parts.")
    if scores.items == "edge" and parts is not None:
        say.warn(f"--parts is for methods that score parts, and {method!r} scores edges: it was not used. Ask for --edges.")
    if scores.items == "node":
        chosen = scores.settings.get("selected")
        return scores.among(chosen) if chosen and parts is None else scores.top(parts or min(N_PARTS, scores.n_selectable))
    if method == "acdc":
        return scores.above(scores.settings["threshold"], signed=scores.settings["signed"])
    if threshold is not None:
        return scores.above(threshold)
    return scores.greedy(edges) if method in CUT_GREEDILY else scores.top(edges)


def _meanings(transformer: Any, task: Any, scores: Any) -> Any:
    """What the codes of the parts that stand out mean, said and returned; None where a method has none."""
    from circuits.code_meanings import explain_codes, is_explainable

    if scores.items != "node" or "selected" not in scores.settings:
        return None
    if not scores.settings["selected"]:
        say.warn(watched.try_next(scores, task))
        return None
    if not is_explainable(scores):
        return None
    found = explain_codes(transformer, task, scores)
    watched.codes_explained(found)
    return found


def _names_a_file(out: Path) -> bool:
    """Whether the suffix is one that circuits are saved under; a folder may have dots in its name."""
    from circuits.export import FORMATS

    return out.suffix in {format.suffix for format in FORMATS.values()} and not out.is_dir()


def _heads(scores: Any) -> list[Any]:
    return [node for node in scores.wiring.writers if node.kind == "head"]


def _save(folder: Path, circuit_file: str | None, circuit: Any, scores: Any, report: Any, meanings: Any) -> None:
    """Everything, or the circuit alone under the name asked for."""
    if circuit_file and circuit is None:
        raise CircuitError(f"{scores.method!r} ranks parts and cuts no circuit to save as {circuit_file}. Give a folder.")
    if circuit_file:
        circuit.save(folder / circuit_file)
        return
    scores.save(folder / "scores.json")
    if meanings is not None:
        meanings.save(folder / CODES)
    if circuit is not None:
        circuit.save(folder / "circuit.json")
        circuit.save(folder / "circuit.png")
    if report is not None:
        report.save(folder / "report.json")
