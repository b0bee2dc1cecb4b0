"""``mechinterp sae``: train sparse autoencoders, measure them, look at their latents, compare architectures."""

import typer

from mechinterp.cli.sae.dashboard import dashboard
from mechinterp.cli.sae.evaluate import evaluate
from mechinterp.cli.sae.frontier import frontier
from mechinterp.cli.sae.train import train

autoencoders = typer.Typer(
    name="sae",
    help="Sparse autoencoders on attention outputs: train, measure, look at latents, compare.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
for command in (train, evaluate, dashboard, frontier):
    autoencoders.command()(command)
