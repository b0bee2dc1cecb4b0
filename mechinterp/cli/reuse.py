"""``mechinterp reuse``: what the circuits of several tasks share, in tables, one picture and two files."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mechinterp.cli import say
from mechinterp.cli.inputs import check_choices, check_positive, load_model, make_tasks
from mechinterp.cli.owners import clashes
from mechinterp.cli.results import folder_written_whole
from mechinterp.cli.words import table
from mechinterp.errors import CircuitError

FILES = ("reuse.json", "reuse.png", "union.json", "union.graphml")


def reuse(
    tasks: Annotated[list[str], typer.Argument(help="Two or more tasks (see `mechinterp tasks`), or files of prompt pairs.")],
    model: Annotated[str, typer.Option(help="builtin, a model's name, or a directory with weights.")] = "builtin",
    method: Annotated[str, typer.Option(help="How all tasks are scored (see `mechinterp methods`).")] = "eap-ig",
    prompts: Annotated[int, typer.Option(help="How many prompt pairs a task (from a file: at most).")] = 64,
    sizes: Annotated[str, typer.Option(help="Percent of all items that circuits keep, with commas.")] = "1,2,5,10,20",
    drawn: Annotated[float | None, typer.Option(help="Which size is drawn and joined. Default: 10, or the last.")] = None,
    ablation: Annotated[str, typer.Option(help="What is cut carries: resample, mean, zero or optimal.")] = "resample",
    draws: Annotated[int, typer.Option(help="Random circuits with the same degrees, behind shared edges; 0: none.")] = 200,
    ceiling: Annotated[
        bool, typer.Option("--ceiling", help="Score each task on other prompts too: what it shares with itself.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the prompts, the intervals and the random circuits.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="A folder. Default: mechinterp-reuse-TASK-TASK.")] = None,
    allow_unsolved: Annotated[bool, typer.Option("--allow-unsolved", help="Go on where the model fails a task.")] = False,
    trust_ids: Annotated[bool, typer.Option("--trust-ids", help="Token ids in prompt files are this model's.")] = False,
) -> None:
    """Score several tasks alike and compare their circuits: what is shared, by chance or not, and what each does for others."""
    from circuits.reuse.comparing import circuits_at, compare_tasks, score_tasks
    from circuits.reuse.picture import draw_reuse
    from circuits.reuse.union import union_graph

    check_positive("--prompts", prompts)
    check_choices([method], ablation)
    names, shares = _names(tasks), _shares(sizes)
    shown = _shown(drawn, shares)
    if draws < 0:
        raise CircuitError(f"--draws {draws} is no number of circuits. Ask for 0 or more.")
    out = out or Path("-".join(["mechinterp-reuse", *names]))
    with folder_written_whole(out, FILES) as scratch:
        for warning in clashes():
            say.warn(warning)
        transformer = load_model(model, device)
        pairs = {name: make_tasks(task, transformer, prompts, seed, None, trust_ids) for name, task in names.items()}
        made, fresh = ({name: pair[which] for name, pair in pairs.items()} for which in (0, 1))
        for task in made.values():
            say.what_is_analysed(model, transformer, task, allow_unsolved)
        if same := [name for name, task in made.items() if ceiling and fresh[name] is task]:
            say.warn(f"{same[0]} has no other prompts, so its --ceiling compares it with itself: ask for fewer --prompts.")
        settings: dict[str, Any] = {"ablation": ablation, "allow_unsolved": True, "progress": sys.stderr.isatty()}
        settings["resume"] = out / "scores"
        scores = score_tasks(transformer, made, method, **settings)
        again = fresh if ceiling else None
        facts = {"sizes": shares, "n_draws": draws, "seed": seed, "on": fresh, "again": again, **settings}
        found = compare_tasks(transformer, made, method, scores=scores, **facts)
        union = union_graph(circuits_at(scores, shown))
        found.save(scratch / "reuse.json")
        draw_reuse(found, scratch / "reuse.png", cut=max(cut for cut in found.cuts if cut <= shown))
        for file in ("union.json", "union.graphml"):
            union.save(scratch / file)
    _say(found, union, shown)
    print(f"\nWritten to {out}: {', '.join(FILES)}")


def _names(tasks: list[str]) -> dict[str, str]:
    """Tasks by the name they are shown under: their own, of files the stem."""
    from mechinterp.tasks import TASKS

    if len(tasks) < 2:
        raise CircuitError(f"only {tasks[0]!r} is given. Name two tasks or more: `mechinterp reuse ioi colored-objects`.")
    names = [task if task in TASKS else Path(task).stem for task in tasks]
    if joined := [name for name in names if "," in name]:
        raise CircuitError(f"{joined[0]!r} has a comma, which stands between tasks in the union graph. Rename the file.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise CircuitError(f"{twice[0]!r} is named twice. Every task needs a name of its own; rename one of two files.")
    return dict(zip(names, tasks, strict=True))


def _shares(sizes: str) -> tuple[float, ...]:
    try:
        percent = sorted({float(size) for size in sizes.split(",") if size.strip()})
    except ValueError:
        percent = []
    if not percent or not 0 < percent[0] <= percent[-1] <= 100:
        raise CircuitError(f"--sizes {sizes!r} is no list of percentages. Give numbers above 0 and up to 100, such as 1,5,10.")
    return tuple(size / 100 for size in percent)


def _shown(drawn: float | None, shares: tuple[float, ...]) -> float:
    """The share that is drawn."""
    if drawn is None:
        return 0.1 if 0.1 in shares else shares[-1]
    if drawn / 100 not in shares:
        listed = ", ".join(f"{100 * share:.3g}" for share in shares)
        raise CircuitError(f"--drawn {drawn:g} is not among the sizes {listed}. Choose one of them, or add it to --sizes.")
    return drawn / 100


def _say(found: Any, union: Any, shown: float) -> None:
    from circuits.reuse.report import left_columns

    print(f"\n{found.about()}")
    for title, head, rows in found.tables():
        print(f"\n{title}\n" + table(head, rows, right=range(left_columns(head), len(head))))
    print("\nby chance: sets of these sizes drawn evenly, [95 %]; p: as many shared, or more, by chance; same degrees: random")
    print(
        "circuits in which each part keeps its numbers of edges in and out. Overlap is not faithfulness: see the last tables.\n"
        "faithfulness: [95 %] over prompts; of random circuits the mean [lowest, highest]."
    )
    n_shared = sum(facts.get("n_tasks") == len(found.tasks) for writer, _, facts in union.edges(data=True) if not writer.port)
    print(f"\nThe union at {100 * shown:.3g} %: {union.n_edges_kept:,} edges, of which all tasks use {n_shared:,}")
