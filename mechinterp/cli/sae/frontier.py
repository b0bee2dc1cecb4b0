"""``mechinterp sae frontier``: architectures compared over all sparsities, in a table, a picture and a file."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mechinterp.cli import say
from mechinterp.cli.inputs import check_positive, load_model
from mechinterp.cli.owners import clashes
from mechinterp.cli.sae import options as option
from mechinterp.cli.sae.data import Data, activations_of, drawn, say_text, split
from mechinterp.cli.sae.runs import begin_run, check_folders, check_same_run, data_in_run
from mechinterp.cli.sae.settings import check_choices, make_settings, places_asked, say_places
from mechinterp.cli.words import aligned, model_in_words
from mechinterp.errors import SAEError


def frontier(
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="Repeat for several: an architecture and its k, or its sparsity: topk=8,16,32 or relu=0.5,1,2."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many trainings of each, with other seeds.")] = 3,
    model: Annotated[str, option.MODEL] = "builtin",
    data: Annotated[list[str] | None, option.DATA] = None,
    prompts: Annotated[int, option.PROMPTS_OF_TASKS] = option.PROMPTS,
    tokens: Annotated[int, option.TOKENS_OF_TEXTS] = option.TOKENS,
    context: Annotated[int | None, option.CONTEXT] = None,
    held_out: Annotated[float, option.HELD_OUT_SHARE] = option.HELD_OUT,
    places: Annotated[list[str] | None, option.PLACES] = None,
    each_head: Annotated[bool, option.EACH_HEAD] = False,
    d_sae: Annotated[int | None, option.D_SAE] = None,
    rows: Annotated[int, option.ROWS_TRAINED] = option.ROWS,
    batch_size: Annotated[int, option.BATCH] = option.BATCH_SIZE,
    lr: Annotated[float, option.LEARNING_RATE] = option.LR,
    precision: Annotated[str, option.PRECISIONS] = option.PRECISION,
    seed: Annotated[int, typer.Option(help="Of the prompts and the rows held out, and the first training's.")] = 0,
    device: Annotated[str, option.DEVICE] = "cpu",
    store: Annotated[Path | None, option.STORE] = None,
    limit: Annotated[int, option.LIMIT_OF_ROWS] = option.LIMIT,
    out: Annotated[Path, typer.Option(help="A folder. Type the same again to go on.")] = Path("mechinterp-frontier"),
) -> None:
    """Compare architectures at several sparsities.

    Each is trained with several seeds; the picture shows how few latents make how faithful a model.
    """
    from saes import evaluate, trace_frontier
    from saes.frontier import MEASURES

    check_positive("--seeds", seeds)
    check_positive("--limit", limit)
    stops = _sweep(sweep or ())
    names = places_asked(places, each_head)
    asked = Data(model, tuple(data or ()), prompts, tokens, context, held_out, seed).checked()
    numbers = {"n_rows": rows, "batch_size": batch_size, "lr": lr, "precision": precision}
    check_folders(out, store)
    for warning in clashes():
        say.warn(warning)
    transformer = load_model(model, device)
    print(f"Model   {model}: {model_in_words(transformer.config)}")
    found, base = make_settings(transformer, names, "topk", d_sae, 1, None, **numbers)
    _check_stops(stops, base)
    run = {"data": data_in_run(asked), "places": list(map(str, found)), "settings": base.to_dict(), "limit": limit}
    check_same_run(out, run)
    training, unseen = split(asked, transformer)
    activations, looked_at = activations_of(transformer, training, found, store), drawn(unseen, limit, seed)
    say_text(asked, training, unseen)
    say_places(found, activations.d_in, base)
    n_runs = seeds * sum(map(len, stops.values()))
    print(
        f"Runs    {n_runs}, each of {base.n_rows:,} positions and measured on {len(looked_at):,} rows; finished ones are kept"
    )
    begin_run(out, run)
    traced = trace_frontier(
        activations,
        lambda autoencoder: evaluate(
            transformer, autoencoder.to(device), looked_at.tokens, keep=looked_at.keep, with_cosines=False
        ),
        stops,
        base=base,
        seeds=range(seed, seed + seeds),
        directory=out / "runs",
        device=device,
    )
    traced.save(out / "frontier.json")
    measures = (_recovered(traced), "explained_variance")
    traced.draw(out / "frontier.png", measures=measures)
    shown = (*measures, "dead_share")  # a terminal is not wide enough for all of them
    print(f"\n{aligned(traced.table(), leave_out=[label for name, label in MEASURES.items() if name not in shown])}")
    print("setting: k, or the sparsity; L0: latents active at a position. The other measures are in frontier.json")
    print(f"\nWritten to {out}: frontier.png, frontier.json, run.json, and each run's autoencoder in runs/")


def _recovered(traced: Any) -> str:
    """Of cross-entropy; of KL where ablating the places does not harm the predictions, and none of that can be recovered."""
    is_defined = any(point.ce_recovered_mean == point.ce_recovered_mean for point in traced.points if point.place == "all")
    return "ce_recovered_mean" if is_defined else "kl_recovered_mean"


def _sweep(given: Sequence[str]) -> dict[str, list[float]]:
    """``["topk=8,16"]`` as ``{"topk": [8.0, 16.0]}``."""
    if not given:
        raise SAEError("what is to be swept? Name it: --sweep topk=8,16,32 --sweep relu=0.5,1,2, say.")
    stops: dict[str, list[float]] = {}
    for text in given:
        architecture, _, values = text.partition("=")
        check_choices(architecture, None, None)
        if architecture in stops:
            raise SAEError(f"--sweep names {architecture!r} twice. Give all its values at once: {architecture}=8,16.")
        try:
            stops[architecture] = [float(value) for value in values.split(",")]
        except ValueError:
            raise SAEError(f"--sweep {text!r} lacks numbers. Write an architecture and its values: topk=8,16,32.") from None
    return stops


def _check_stops(stops: Mapping[str, Sequence[float]], base: Any) -> None:
    """Every setting is possible, before the first is trained."""
    for architecture, values in stops.items():
        counts = replace(base, architecture=architecture).counts
        for value in values:
            if not 0 <= value < float("inf") or (counts and value != int(value)):
                raise SAEError(f"--sweep {architecture}={value:g}: {'a whole number' if counts else 'a weight'} is wanted.")
            replace(base, architecture=architecture, **({"k": int(value)} if counts else {"sparsity": value}))
