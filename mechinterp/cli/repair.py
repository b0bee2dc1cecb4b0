"""``mechinterp repair``: what becomes of a task when a few heads are made to look elsewhere."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mechinterp.cli import say
from mechinterp.cli.inputs import check_positive, load_model, make_tasks
from mechinterp.cli.owners import clashes
from mechinterp.cli.results import folder_written_whole
from mechinterp.cli.words import dropped_in_words
from mechinterp.errors import CircuitError

FILES = ("repair.json", "repair.png", "proposal.json")


def repair(
    task: Annotated[str, typer.Argument(help="A task (see `mechinterp tasks`), or a file of prompt pairs.")],
    to: Annotated[
        list[str],
        typer.Option(help="Where heads look: positions with commas, as in color1,color2,color3,-answer_color. Repeatable."),
    ],
    heads: Annotated[str | None, typer.Option(help="Heads with commas. Default: those that a search proposes.")] = None,
    at: Annotated[str, typer.Option(help="The position from which they look.")] = "END",
    most: Annotated[int, typer.Option(help="How many heads a search may propose.")] = 4,
    model: Annotated[str, typer.Option(help="builtin, a model's name, or a directory with weights.")] = "builtin",
    prompts: Annotated[int, typer.Option(help="How many prompts, and as many to search on (from a file: at most).")] = 64,
    corruption: Annotated[str | None, typer.Option(help="How prompts are corrupted. Default: the task's own.")] = None,
    random: Annotated[int, typer.Option(help="Draws of random heads to compare with; 0: none.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time: small for large models.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the prompts and the random heads.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="A folder. Default: mechinterp-repair-TASK.")] = None,
    trust_ids: Annotated[bool, typer.Option("--trust-ids", help="Token ids in a prompt file are this model's.")] = False,
) -> None:
    """Edit where heads look: accuracy, errors and later heads before and after, beside random heads."""
    from circuits.repairs.picture import draw_repair
    from circuits.repairs.repairing import repair as edit_attention
    from circuits.repairs.search import propose

    for option, number in (("--prompts", prompts), ("--most", most), ("--batch-size", batch_size)):
        check_positive(option, number)
    if random < 0:
        raise CircuitError(f"--random {random} is no number of draws. Ask for 0 or more.")
    if heads is not None and len(to) > 1:
        raise CircuitError(f"--heads are named, and --to {len(to)} times: they take one --to. Several are for a search.")
    targets = {places: [name.strip() for name in places.split(",") if name.strip()] for places in to}
    settings: dict[str, Any] = {"batch_size": batch_size, "progress": sys.stderr.isatty()}
    out = out or Path(f"mechinterp-repair-{Path(task).stem}")
    with folder_written_whole(out, FILES) as scratch:
        for warning in clashes():
            say.warn(warning)
        transformer = load_model(model, device)
        search, fresh = make_tasks(task, transformer, prompts, seed, corruption, trust_ids)
        if dropped := dropped_in_words(fresh.notes.get("dropped")):
            print(f"left out: {dropped}\n")
        if heads is None and fresh is search:
            raise CircuitError(
                f"{task} has {len(fresh)} usable prompts, and a search on all of them leaves none to judge it by. Search on "
                f"fewer (--prompts {max(len(fresh) // 2, 1)}), name --heads, or add prompts."
            )
        if heads is None:
            proposal = propose(transformer, search, attention=targets, n=most, at=at, **settings)
            print(f"{proposal}\n")
            edit = proposal.edit
            proposal.save(scratch / "proposal.json")
        else:
            named = [name.strip() for name in heads.split(",") if name.strip()]
            edit = {"heads": named, "attention": targets[to[0]], "at": at}
        found = edit_attention(transformer, fresh, **edit, n_random=random, seed=seed, **settings)
        found.save(scratch / "repair.json")
        draw_repair(found, scratch / "repair.png")
    print(found)
    print(f"\nWritten to {out}: {', '.join(name for name in FILES if heads is None or name != 'proposal.json')}")
