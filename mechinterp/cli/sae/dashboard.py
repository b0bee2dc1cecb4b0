"""``mechinterp sae dashboard``: the latents of an autoencoder in one HTML file."""

from pathlib import Path
from typing import Annotated

import typer

from mechinterp.cli.inputs import check_positive
from mechinterp.cli.results import file_written_whole
from mechinterp.cli.sae import options as option
from mechinterp.cli.sae.runs import load_its_model, read_trained, unseen_text
from mechinterp.errors import SAEError


def dashboard(
    folder: Annotated[Path, option.FOLDER],
    place: Annotated[str | None, typer.Option(help="One of its places, such as z.5 or z.5.h3. Default: all of them.")] = None,
    latents: Annotated[str | None, typer.Option(help="Numbers with commas, of every place: 1,5,7.")] = None,
    n_latents: Annotated[int, typer.Option(help="How many are drawn, where none are named.")] = 100,
    model: Annotated[str | None, option.MODEL] = None,
    data: Annotated[list[str] | None, option.DATA] = None,
    prompts: Annotated[int | None, option.PROMPTS_OF_TASKS] = None,
    tokens: Annotated[int | None, option.TOKENS_OF_TEXTS] = None,
    context: Annotated[int | None, option.CONTEXT] = None,
    seed: Annotated[int | None, typer.Option(help="Of the prompts, the rows looked at and the latents drawn.")] = None,
    limit: Annotated[int, option.LIMIT_OF_ROWS] = 200,
    device: Annotated[str, option.DEVICE] = "cpu",
    out: Annotated[Path, typer.Option(help="An HTML file.")] = Path("sae.html"),
) -> None:
    """Show latents in one HTML file.

    What they fire on, which heads they read, what they write. Model and text are those that the autoencoder was trained
    on here (the rows held out), unless you name others.
    """
    from saes import write_dashboard

    check_positive("--limit", limit)
    check_positive("--n-latents", n_latents)
    named = None if latents is None else _numbers(latents)
    if out.suffix != ".html" and not out.is_dir():
        raise SAEError(f"--out {out}: a dashboard is one file. Name it .html.")
    with file_written_whole(out) as scratch:
        trained = read_trained(folder)
        chosen = trained.autoencoder if place is None else trained.autoencoder.group(place)
        if named and (missing := [number for number in named if number >= chosen.d_sae]):
            raise SAEError(f"--latents {missing[0]}: they run from 0 to {chosen.d_sae - 1}.")
        asked = trained.asked(model, data, prompts=prompts, tokens=tokens, context=context, seed=seed)
        transformer = load_its_model(trained, asked, device)
        corpus, words = unseen_text(trained, asked, transformer, limit)
        looks = {"latents": named, "n_latents": n_latents, "seed": asked.seed}
        write_dashboard(transformer, chosen.to(device), corpus.tokens, scratch, keep=corpus.keep, data=words, **looks)
        size = scratch.stat().st_size / 1e6
    print(f"\nWritten to {out} ({size:.1f} MB): open it in a browser; it needs nothing else")


def _numbers(latents: str) -> list[int]:
    """The numbers of latents, in the order given."""
    names = [name.strip() for name in latents.split(",") if name.strip()]
    if not names or not all(name.isdecimal() for name in names):
        raise SAEError(f"--latents {latents!r} names no latents. Give their numbers with commas: 1,5,7.")
    return list(map(int, names))
