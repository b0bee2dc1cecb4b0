"""``mechinterp sae train``: from a model and text to autoencoders, measured on text that they have not seen."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from mechinterp.cli import say
from mechinterp.cli.inputs import check_positive, load_model
from mechinterp.cli.owners import clashes
from mechinterp.cli.sae import options as option
from mechinterp.cli.sae.data import Data, activations_of, drawn, say_text, split
from mechinterp.cli.sae.evaluate import say_report
from mechinterp.cli.sae.runs import begin_run, check_folders, check_same_run, data_in_run
from mechinterp.cli.sae.settings import check_choices, make_settings, places_asked, say_places
from mechinterp.cli.words import model_in_words


def train(
    model: Annotated[str, option.MODEL] = "builtin",
    data: Annotated[list[str] | None, option.DATA] = None,
    prompts: Annotated[int, option.PROMPTS_OF_TASKS] = option.PROMPTS,
    tokens: Annotated[int, option.TOKENS_OF_TEXTS] = option.TOKENS,
    context: Annotated[int | None, option.CONTEXT] = None,
    held_out: Annotated[float, option.HELD_OUT_SHARE] = option.HELD_OUT,
    places: Annotated[list[str] | None, option.PLACES] = None,
    each_head: Annotated[bool, option.EACH_HEAD] = False,
    architecture: Annotated[
        str, typer.Option(help="topk, batchtopk, matryoshka (they count latents); relu, gated, jumprelu.")
    ] = option.ARCHITECTURE,
    d_sae: Annotated[int | None, option.D_SAE] = None,
    k: Annotated[
        int | None, typer.Option(help="Latents a position, where they are counted. Default: 16, or d_in / 4 if less.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Weight of the penalty, for the others. Default: 1.")] = None,
    rows: Annotated[int, option.ROWS_TRAINED] = option.ROWS,
    batch_size: Annotated[int, option.BATCH] = option.BATCH_SIZE,
    lr: Annotated[float, option.LEARNING_RATE] = option.LR,
    precision: Annotated[str, option.PRECISIONS] = option.PRECISION,
    seed: Annotated[int, typer.Option(help="Of the prompts, the rows held out, and the training.")] = 0,
    device: Annotated[str, option.DEVICE] = "cpu",
    store: Annotated[Path | None, option.STORE] = None,
    limit: Annotated[int, option.LIMIT_OF_ROWS] = option.LIMIT,
    wandb: Annotated[str | None, typer.Option(help="A project of Weights & Biases to log to.")] = None,
    out: Annotated[
        Path, typer.Option(help="A folder. Type the same again to go on where a training stopped.")
    ] = option.TRAINED,
) -> None:
    """Train autoencoders, and measure them.

    One at every place, all in one pass; measured on rows of text held out of the training.
    """
    from saes import evaluate, to_wandb
    from saes import train as train_on

    check_positive("--limit", limit)
    names = places_asked(places, each_head)
    asked = Data(model, tuple(data or ()), prompts, tokens, context, held_out, seed).checked()
    numbers = {"n_rows": rows, "batch_size": batch_size, "lr": lr, "precision": precision, "seed": seed}
    check_choices(architecture, k, sparsity)
    check_folders(out, store)
    for warning in clashes():
        say.warn(warning)
    transformer = load_model(model, device)
    print(f"Model   {model}: {model_in_words(transformer.config)}")
    found, settings = make_settings(transformer, names, architecture, d_sae, k, sparsity, **numbers)
    run = {"data": data_in_run(asked), "places": list(map(str, found)), "settings": settings.to_dict()}
    has_begun, is_done = check_same_run(out, run), (out / "autoencoder").is_dir()
    callbacks = [] if wandb is None or is_done else [to_wandb(project=wandb, config=run)]
    training, unseen = split(asked, transformer)
    activations = activations_of(transformer, training, found, store)
    say_text(asked, training, unseen)
    say_places(found, activations.d_in, settings)
    _say_method(training.n_kept, settings, out, has_begun)
    begin_run(out, run)
    started, shows = time.perf_counter(), sys.stderr.isatty()
    autoencoder = train_on(activations, settings, directory=out, callbacks=callbacks, device=device, progress=shows)
    if not is_done:
        print(f"Trained in {time.perf_counter() - started:.1f} s{_kept_as(autoencoder.kind, architecture)}")
    looked_at = drawn(unseen, limit, seed)
    report = evaluate(transformer, autoencoder.to(device), looked_at.tokens, keep=looked_at.keep)
    report.save(out / "report.json")
    print(f"\nMeasured on {len(looked_at):,} of the {len(unseen):,} rows held out:")
    say_report(report)
    print(f"\nWritten to {out}: autoencoder (reads like any of SAELens), training.jsonl, report.json, run.json")
    print(f"Next    mechinterp sae dashboard {out}")


def _kept_as(kind: str, architecture: str) -> str:
    return "" if kind == architecture else f"; what {architecture} trained is kept as {kind}, with the threshold that it learnt"


def _say_method(n_kept: int, settings: Any, out: Path, has_begun: bool) -> None:
    """How it is trained, and where a training goes on from."""
    from saes.checkpoints import checkpoints

    sparsity = f"k {settings.k}" if settings.counts else f"sparsity {settings.sparsity:g}"
    passes = settings.n_rows / n_kept
    print(f"Method  {settings.architecture}, {sparsity}: {settings.n_rows:,} positions, {passes:.2g} passes over the text")
    if (out / "autoencoder").is_dir():
        print(f"        {out} holds this training, finished: it is read back")
    elif has_begun and (found := checkpoints(out)):
        print(f"        {out} holds this training: it goes on from step {int(found[-1].name.rpartition('-')[2]):,}")
    else:
        print(f"        {settings.n_steps:,} steps; stopped, the same command goes on from the last checkpoint (one a minute)")
