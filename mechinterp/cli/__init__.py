"""The command line. Each command is a file; they look up to ``circuits`` only inside their functions."""

import sys
from collections.abc import Sequence

import typer

from mechinterp.cli.compare import compare
from mechinterp.cli.decompose import decompose
from mechinterp.cli.discover import discover
from mechinterp.cli.export import export, formats
from mechinterp.cli.lists import methods, models, tasks
from mechinterp.cli.repair import repair
from mechinterp.cli.reuse import reuse
from mechinterp.cli.sae import autoencoders
from mechinterp.cli.view import view
from mechinterp.errors import MechinterpError

app = typer.Typer(
    name="mechinterp",
    help="Find the circuit in a transformer that carries a task; draw it, measure it, save it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (discover, compare, reuse, repair, decompose, export, view, tasks, models, methods, formats):
    app.command()(command)
app.add_typer(autoencoders)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. What the toolkit refuses becomes one line on stderr and exit code 2; a bug keeps its traceback."""
    try:
        app(list(arguments) if arguments is not None else None, prog_name="mechinterp")
    except (MechinterpError, OSError) as problem:
        print(f"mechinterp: {' '.join(str(problem).split())}", file=sys.stderr)
        raise SystemExit(2) from None
