"""``mechinterp view``: a saved circuit in the browser, as one HTML file."""

from pathlib import Path
from typing import Annotated

import typer

from mechinterp.cli.inputs import check_positive, load_model, make_tasks
from mechinterp.errors import TaskError

N_LOOKS = 32  # prompts over which it is averaged where a head looks


def view(
    circuit: Annotated[Path, typer.Argument(help="A circuit in a file: .json, .graphml, .gexf ...")],
    out: Annotated[Path | None, typer.Option(help="Where to write the page. Default: beside the circuit, .html.")] = None,
    task: Annotated[str | None, typer.Option(help="Show attention on prompts of this task, or file of prompt pairs.")] = None,
    model: Annotated[str | None, typer.Option(help="The circuit's model, with --task. Default: builtin.")] = None,
    prompts: Annotated[int, typer.Option(help="How many prompts attention is shown on.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in the browser.")] = True,
    trust_ids: Annotated[bool, typer.Option("--trust-ids", help="Token ids in prompt files are this model's.")] = False,
) -> None:
    """Write a page to look around in a circuit with, and open it. It needs no network and can be sent to anybody."""
    from circuits.graph import Circuit
    from circuits.viewer import view as write_view

    check_positive("--prompts", prompts)
    if model is not None and task is None:
        raise TaskError(f"--model {model} alone shows no attention: name a --task too, such as --task ioi.")
    graph = Circuit.load(circuit)
    page = circuit.with_suffix(".html") if out is None else out
    if task is None:
        write_view(graph, path=page, open_page=show)
    else:
        transformer = load_model(model or "builtin", device)
        made, _ = make_tasks(task, transformer, max(prompts, N_LOOKS), seed, None, trust_ids)
        write_view(graph, transformer, made, page, n_prompts=prompts, open_page=show)
    print(f"{graph!r}\nWritten to {page}")
