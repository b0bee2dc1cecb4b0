"""Merullo et al. 2024 (arXiv:2310.08744, section 5) as one command: four heads of GPT-2 medium repair colored objects.

    python -m benchmarks.repair_gpt2_medium                                  # our prompts, weights from the hub
    python -m benchmarks.repair_gpt2_medium --model DIRECTORY --file merullo_cobjs_data_42.json

The inhibition heads of indirect object identification (12.3, 13.4, 13.13) and its negative mover (19.1) are made to attend
from END to the two colors that are *not* asked for, half to each; accuracy is the likeliest token of the whole vocabulary;
no BOS. ``--file`` takes the authors' released prompts (``merullo_cobjs_data_42.json``, with the minimal pairs beside it);
without it our own prompts of the same kind are used, and the published numbers are no more than a neighbour's.

One forward of 1,000 prompts of 62 tokens is about 44 TFLOP, some twenty minutes on one core. Only END is edited, so that
all conditions and random heads together add little to that. Prompts go through in batches and one number a prompt is kept, so
memory is the weights (1.4 GB in float32), and keys, values and streams of a batch (some 15 MB a prompt).

The paper reports a rank correlation of .69 between repair effect and path-patching importance; our sources do not say over
what. ``--path-prompts 25`` prints ours: over later heads, how much the direct effect moved against path patching to the logits.
"""

import argparse
import re
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.measure import RESULTS
from circuits.discovery.paths import path_patching
from circuits.published import PUBLISHED
from circuits.repairs.repairing import ALL, repair
from circuits.repairs.report import UNEDITED, Repair, markdown
from mechinterp import load
from mechinterp.errors import TaskError
from mechinterp.models.transformer import Transformer
from mechinterp.tasks.base import Task, tokenizer_of
from mechinterp.tasks.colored_objects import N_OBJECTS, colored_objects
from mechinterp.tasks.files import from_file

PAPER = PUBLISHED["ioi-medium"]
HEADS = {"inhibition": PAPER.heads("inhibition"), "negative mover": PAPER.heads("negative mover")}
COLORS = tuple(f"color{n + 1}" for n in range(N_OBJECTS))
WRONG_COLORS = (*COLORS, "-answer_color")
PUBLISHED_ACCURACY = {UNEDITED: 49.6, "inhibition": 81.5, "negative mover": 78.1, ALL: 93.7}


def main(given: list[str] | None = None) -> Repair:
    asked = _arguments().parse_args(given)
    model = load(asked.model, device=asked.device, dtype=getattr(torch, asked.dtype))
    make = released_prompts if asked.file else our_prompts
    task = make(model, asked.prompts, asked.seed, *([asked.file] if asked.file else []))
    found = run(model, task, n_random=asked.random, seed=asked.seed, batch_size=asked.batch_size)
    print(beside_published(found), "\n", found, sep="\n")
    if asked.path_prompts:
        few = replace(task, prompts=task.prompts[: asked.path_prompts])
        scores = path_patching(model, few, senders="heads", batch_size=asked.batch_size)
        print(
            f"\nSpearman, change of direct effect and path patching to the logits: {found.correlation(scores)} (published .69)"
        )
    if asked.out:
        found.save(asked.out)
    return found


def run(model: Transformer, task: Task, *, n_random: int = 4, seed: int = 0, batch_size: int = 16) -> Repair:
    """The paper's conditions: unedited, inhibition heads, negative mover, all four; and random heads in their place."""
    return repair(model, task, HEADS, WRONG_COLORS, n_random=n_random, seed=seed, batch_size=batch_size)


def our_prompts(model: Transformer, n_prompts: int, seed: int) -> Task:
    """The toolkit's colored objects: one solved question in front, no BOS."""
    return colored_objects(model, n_prompts, seed, bos=False)


def released_prompts(model: Transformer, n_prompts: int, seed: int, path: str | Path) -> Task:
    """The authors' prompts, with the colors of the question named as in our own task, found in the text of each."""
    task, tokenizer = (
        from_file(model, path, format="circuit-reuse", n_prompts=n_prompts, seed=seed, bos=False),
        tokenizer_of(model),
    )
    named: dict[str, list[int]] = {name: [] for name in (*COLORS, "answer_color")}
    for row in range(len(task)):
        text = task.text(row)
        scene = [found for found in re.finditer(r"\ban? (\w+) \w+", text) if found.start() > text.rindex("Q:")]
        answer = tokenizer.decode([int(task.prompts.answer[row])]).strip().lower()
        right = [n for n, found in enumerate(scene) if found[1] == answer]
        if len(scene) != N_OBJECTS or len(right) != 1:
            raise TaskError(f"prompt {row} does not show {answer!r} once among {N_OBJECTS} colored things: {text!r}.")
        _, offsets = tokenizer.spans(text)
        places = [max(at for at, (start, _) in enumerate(offsets) if start < found.end(1)) for found in scene]
        for name, place in zip((*COLORS, "answer_color"), (*places, places[right[0]]), strict=True):
            named[name].append(place)
    positions = {**task.prompts.positions, **{name: torch.tensor(places) for name, places in named.items()}}
    return replace(task, prompts=replace(task.prompts, positions=positions))


def beside_published(found: Repair) -> str:
    """Our accuracies beside the paper's, as Markdown."""
    rows = [
        (condition.name, " ".join(condition.heads), condition.accuracy.percent(), f"{PUBLISHED_ACCURACY[condition.name]:.1f}")
        for condition in found.conditions
    ]
    return markdown(("edited", "heads", "accuracy, %", "published, %"), rows, "llrr")


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="gpt2-medium", help="a name on the hub, or a directory with weights")
    parser.add_argument("--file", type=Path, help="the authors' prompts; without it, our own")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--random", type=int, default=4, help="draws of random heads")
    parser.add_argument("--path-prompts", type=int, default=0, help="path patching on these many, for the rank correlation")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", type=Path, help=f"where to save the result as JSON, e.g. in {RESULTS.name}/")
    return parser


if __name__ == "__main__":
    main()
