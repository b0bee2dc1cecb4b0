"""What the commands of ``mechinterp sae`` are asked, worded once for all of them."""

from pathlib import Path

import typer

ROWS, BATCH_SIZE, LR, ARCHITECTURE, PRECISION = 500_000, 1024, 1e-3, "batchtopk", "float32"
PROMPTS, TOKENS, HELD_OUT, LIMIT = 4000, 1_000_000, 0.1, 500
TRAINED = Path("mechinterp-sae")

FOLDER = typer.Argument(help="What `train` wrote, or a folder in SAELens' format.")
MODEL = typer.Option(help="builtin, a model's name, or a directory with weights.")
DATA = typer.Option(
    help="Repeat for several: a task (see `mechinterp tasks`), a file of text (.jsonl, .json, .txt), or a data set "
    "(roneneldan/TinyStories; owner/name:configuration). Default for builtin: every task."
)
PROMPTS_OF_TASKS = typer.Option("--prompts", help="How many prompt pairs of each task.")
TOKENS_OF_TEXTS = typer.Option("--tokens", help="How many tokens of each file or data set, at most.")
CONTEXT = typer.Option(help="Positions of a row of text. Default: 128, or all that the model reads.")
HELD_OUT_SHARE = typer.Option("--held-out", help="The share of rows that is measured on, and not trained on.")
LIMIT_OF_ROWS = typer.Option("--limit", help="How many rows are looked at, at most; drawn by the seed.")
DEVICE = typer.Option(help="cpu, cuda or mps.")

PLACES = typer.Option(
    help="Repeat for several: z (the heads of a layer side by side, for every layer), z.5 (one layer), z.5.h3 (one head)."
)
EACH_HEAD = typer.Option("--each-head", help="An autoencoder for every head of every layer: --places 'z.*.h*'.")
D_SAE = typer.Option(help="How many latents each has. Default: 8 times the numbers that it reads.")
ROWS_TRAINED = typer.Option("--rows", help="How many positions each is trained on, over and over if there are fewer.")
BATCH = typer.Option("--batch-size", help="Positions a step.")
LEARNING_RATE = typer.Option("--lr", help="Adam's learning rate.")
PRECISIONS = typer.Option("--precision", help="What is multiplied in: float32 or bfloat16.")
STORE = typer.Option(help="A folder to record activations in, once for all trainings. Default: they are computed anew.")
