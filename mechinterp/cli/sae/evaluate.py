"""``mechinterp sae evaluate``: what an autoencoder rebuilds, with how few latents, and what the model makes of it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mechinterp.cli.inputs import check_positive
from mechinterp.cli.results import file_written_whole
from mechinterp.cli.sae import options as option
from mechinterp.cli.sae.runs import load_its_model, read_trained, unseen_text
from mechinterp.cli.words import aligned

COLUMNS = """\
L0: latents active at a position; dead: never active here; > 10 %: active at more than a tenth of positions
CE, KL: what sending the activations through the autoencoder costs, in nats a prediction; rec.: the share kept of what
ablation to the mean, or to zero, destroys: 1 is the model itself; undefined: ablation does no harm. all: every place at once"""


def evaluate(
    folder: Annotated[Path, option.FOLDER],
    model: Annotated[str | None, option.MODEL] = None,
    data: Annotated[list[str] | None, option.DATA] = None,
    prompts: Annotated[int | None, option.PROMPTS_OF_TASKS] = None,
    tokens: Annotated[int | None, option.TOKENS_OF_TEXTS] = None,
    context: Annotated[int | None, option.CONTEXT] = None,
    seed: Annotated[int | None, typer.Option(help="Of the prompts, and of the rows looked at.")] = None,
    limit: Annotated[int, option.LIMIT_OF_ROWS] = option.LIMIT,
    device: Annotated[str, option.DEVICE] = "cpu",
    out: Annotated[Path, typer.Option(help="A file for everything measured.")] = Path("report.json"),
) -> None:
    """Measure an autoencoder on text.

    Model and text are those that it was trained on here (the rows held out), unless you name others.
    """
    from saes import evaluate as measure

    check_positive("--limit", limit)
    with file_written_whole(out) as scratch:
        trained = read_trained(folder)
        asked = trained.asked(model, data, prompts=prompts, tokens=tokens, context=context, seed=seed)
        transformer = load_its_model(trained, asked, device)
        corpus, _ = unseen_text(trained, asked, transformer, limit)
        report = measure(transformer, trained.autoencoder.to(device), corpus.tokens, keep=corpus.keep)
        print()
        say_report(report)
        report.save(scratch)
    print(f"\nWritten to {out}")


def say_report(report: Any) -> None:
    print(aligned(report.table()))
    print(COLUMNS)
