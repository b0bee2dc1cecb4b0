"""``mechinterp export``: a saved circuit in another format, or on one prompt. ``mechinterp formats``: which there are."""

from pathlib import Path
from typing import Annotated

import typer

from mechinterp.cli.inputs import load_model, make_tasks
from mechinterp.errors import CircuitError


def export(
    circuit: Annotated[Path, typer.Argument(help="A circuit: circuit.json, or any format that can be read.")],
    out: Annotated[Path, typer.Argument(help="Where to. Its suffix says the format; a folder for a graph on a prompt.")],
    format: Annotated[
        str | None, typer.Option(help="The format, where the suffix does not say it (see `mechinterp formats`).")
    ] = None,
    source: Annotated[str | None, typer.Option("--from", help="The format of CIRCUIT, likewise.")] = None,
    on: Annotated[str | None, typer.Option(help="A task, or a file of prompts: the circuit on one of these.")] = None,
    prompt: Annotated[int, typer.Option(help="Which prompt of --on, from 0.")] = 0,
    model: Annotated[str, typer.Option(help="Of --on: builtin, a model's name, or a directory with weights.")] = "builtin",
    seed: Annotated[int, typer.Option(help="Of the prompts of --on.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
) -> None:
    """Write a circuit as GraphML, Mermaid, an attribution graph, EAP-IG's JSON, a picture, ..."""
    from circuits.graph import Circuit

    if on is not None and (format or "attribution-graph") != "attribution-graph":
        raise CircuitError(f"--on draws an attribution graph, and not {format}. Leave --format out, or --on.")
    if on is not None and (other := _other_format(out)):
        raise CircuitError(
            f"--on draws an attribution graph, and {str(out)!r} names {other}. Name a folder, or a file that ends in .json."
        )
    if prompt < 0:
        raise CircuitError(f"--prompt {prompt} is none. They are counted from 0.")
    found = Circuit.load(circuit, source)
    if on is None:
        found.save(out, format)
        print(f"{found!r}\nWritten to {out}")
        return
    from circuits.prompt_attribution import attribution_graph

    transformer = load_model(model, device)
    task, _ = make_tasks(on, transformer, prompt + 1, seed, None, False)
    graph = attribution_graph(transformer, task, found, prompt)
    if out.suffix == ".json":
        graph.save(out)
    else:
        out = graph.save_in(out)
    print(f"{graph!r}\nWritten to {out}")


def _other_format(out: Path) -> str | None:
    """The format that a file's suffix promises, unless an attribution graph may be written there."""
    from circuits.export import FORMATS

    fitting = [(len(known.suffix), name) for name, known in FORMATS.items() if out.name.lower().endswith(known.suffix)]
    return next((name for _, name in sorted(fitting, reverse=True)[:1] if name not in ("json", "attribution-graph")), None)


def formats() -> None:
    """The formats in which circuits are written."""
    from circuits.export import FORMATS

    for name, known in FORMATS.items():
        print(f"{name:<18} {known.suffix:<24} {known.what}{'' if known.read else ' (cannot be read back)'}")
