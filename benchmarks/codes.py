"""Discrete codes against what patching finds and against circuits set by hand, beside what must be beaten: one command.

    python -m benchmarks.codes              # an hour on one core; writes results/codes.md, codes.json and a picture
    python -m benchmarks.codes --workers 2  # a job a process, so many at a time

Subjects: the tasks of the built-in model, and the models whose circuit is set by hand; 200 clean prompts and 200 corrupted
ones. From seed to seed the prompts stay, the rows to train on and the autoencoder change. All is measured over heads alone.
A job that is finished is not run again; remove results/codes to begin anew.
"""

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks import codes_tables
from benchmarks.codes_sensitivity import sensitivity
from benchmarks.codes_subjects import SUBJECTS, Subject, measures, subject_of
from benchmarks.measure import RESULTS, in_a_process
from circuits.code_pairs import PAIR_SCORES
from circuits.coding import Examples, coded, examples_of
from circuits.discovery.code_edges import codes_edges
from circuits.discovery.code_scores import CODE_SCORES, judge, stand_out
from circuits.discovery.exact import exact
from circuits.discovery.paper_codes import score_of_codes, written_as_published
from circuits.discovery.probes import areas
from circuits.statistics import auroc, average_precision
from circuits.wiring import Wiring
from mechinterp.files import write_text_atomically
from mechinterp.store import ActivationStore
from mechinterp.tasks import TASKS
from saes.code_rows import read_parts, weights_of
from saes.codes import CodeSettings
from saes.paper_codes import PaperSettings, assign_paper_codes

FOLDER = RESULTS / "codes"
N_TRAIN = (5, 10, 25, 100)
LEVEL, RIDGE = 0.05, 1.0
# The cost of the published variant grows with the rows that it trains on.
SEEDS, PAPER_SEEDS, EDGE_SEEDS = 20, {5: 20, 10: 20, 25: 10, 100: 5}, 5
ELSEWHERE, SEEDS_ELSEWHERE = (10, 100), 5  # n_train at other positions than END, where no selection is reported
PERMUTATIONS, FEWER = 1000, 200  # fewer at other positions, and of answers, whose tables are large
TOP_EDGES = 0.05

Row = dict[str, Any]


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    if arguments[:1] == ["--job"]:
        name, kind = arguments[1:]
        rows = [dict(row) for row in JOBS[kind](subject_of(name))]
        write_text_atomically(_file(name, kind), json.dumps(rows) + "\n")
        print("done")
        return
    workers = int(arguments[1]) if arguments[:1] == ["--workers"] else 1
    FOLDER.mkdir(parents=True, exist_ok=True)
    jobs = [(name, kind) for kind in JOBS for name in SUBJECTS if kind != "sensitivity" or name in TASKS]
    todo = [job for job in jobs if not _file(*job).is_file()]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda job: in_a_process("benchmarks.codes", "--job", *job), todo))
    rows = [
        {"subject": name, "kind": kind} | row
        for name, kind in jobs
        for row in json.loads(_file(name, kind).read_text(encoding="utf-8"))
    ]
    codes_tables.write(rows)


def _file(name: str, kind: str) -> Path:
    return FOLDER / f"{'-'.join(re.findall('[a-z]+', name))}-{kind}.json"


def of_codes(subject: Subject) -> Iterator[Row]:
    """Codes, trained and not, by every score; the probe; and what knows nothing of codes. All on the same examples."""
    named = tuple(subject.task.prompts.positions)
    cases = [("END", "END", n_train, seed) for n_train in N_TRAIN for seed in range(SEEDS)]
    cases += [
        (label, places, n_train, seed)
        for label, places in (("mean", "mean"), ("all named", named))
        for n_train in ELSEWHERE
        for seed in range(SEEDS_ELSEWHERE)
    ]
    with tempfile.TemporaryDirectory() as folder:
        store = ActivationStore(folder)
        for label, places, n_train, seed in cases:
            examples = examples_of(subject.model, subject.task, places, n_train, seed=seed, mlps=False, store=store)
            about = {"positions": label, "n_train": n_train, "seed": seed}
            for method, found in _methods(subject, examples, n_train, seed, label == "END"):
                yield about | {"method": method} | found


def _methods(subject: Subject, examples: Examples, n_train: int, seed: int, many: bool) -> Iterator[tuple[str, Row]]:
    for trained in (True, False):
        one = coded(examples, CodeSettings(n_train, trained=trained, seed=seed))
        for score, measure in CODE_SCORES.items():
            n = PERMUTATIONS if many and score != "answer" else FEWER
            found = judge(measure, one, n, LEVEL, seed)
            name = f"codes, {score}" if trained else f"untrained, {score}"
            yield name, measures(subject, found.values, found.selected) | one.facts
    found = stand_out(examples, *areas(examples, RIDGE, PERMUTATIONS if many else FEWER, seed), LEVEL)
    yield "linear probe", measures(subject, found.values, found.selected)
    for name, values in blind(examples).items():
        yield name, measures(subject, values)


def blind(examples: Examples) -> dict[str, Float[np.ndarray, "head"]]:
    """What a score of codes must beat: three lengths that no autoencoder is needed for, best over places.

    With sd the root mean square deviation of the head's output from its mean: sd^2 itself; the distance of the two classes'
    means, in sd; and the root mean square distance of the two outputs of a pair, in sd.
    """
    clean, corrupted = examples.written.heads[:, examples.rows].double().chunk(2, 1)
    both = torch.cat([clean, corrupted], 1)
    variance = _square(both - both.mean(1, keepdim=True)).mean(1)
    apart = _square(clean.mean(1) - corrupted.mean(1))
    changed = _square(clean - corrupted).mean(1)
    quiet = variance <= 1e-10 * _square(both).mean(1)  # rounding
    found = {"variance": variance, "mean difference": apart / variance, "pair distance": changed / variance}
    return {name: values.where(~quiet, torch.zeros(())).amax(0).numpy() for name, values in found.items()}


def _square(rows: Float[Tensor, "*axes d_head"]) -> Float[Tensor, "*axes"]:
    return rows.square().sum(-1)


def of_paper(subject: Subject) -> Iterator[Row]:
    """The published recipe: means over positions, BOS included, one autoencoder for all heads; both of its scores of heads."""
    prompts, n = subject.task.prompts, len(subject.task)
    weights = weights_of(prompts, ("mean-with-bos",), subject.task.tokenizer.bos_id).repeat(1, 2, 1)
    written = read_parts(subject.model, torch.cat([prompts.clean, prompts.corrupted]), weights, mlps=False)
    rows, positive = written_as_published(subject.model, written.heads[0]), np.arange(2 * n) < n
    for n_train, seed in ((n_train, seed) for n_train, seeds in PAPER_SEEDS.items() for seed in range(seeds)):
        training = torch.randperm(2 * n, generator=torch.Generator().manual_seed(seed))[:n_train]
        for trained in (True, False):
            codes = assign_paper_codes(rows, training, PaperSettings(n_train, trained=trained, seed=seed))
            facts = {"l0": codes.l0, "silent": codes.silent}
            for level in ("node", "edge"):
                values = score_of_codes(codes.values, positive, level=level)
                about = {"positions": "mean-with-bos", "n_train": n_train, "seed": seed} | facts
                name = f"published, {level}" if trained else f"published untrained, {level}"
                yield about | {"method": name} | measures(subject, values)


def of_edges(subject: Subject) -> Iterator[Row]:
    """Co-occurrence of codes against an edge list, which is what edges must be judged by."""
    wiring = Wiring.of(subject.model.config)
    truth = np.isin(wiring.edge_names, sorted(subject.edges or _largest_edges(subject)))
    parts = np.array([not name.startswith("input->") and not name.endswith("->logits") for name in wiring.edge_names])
    for score in PAIR_SCORES:
        for places in ("END", "mean"):
            for seed in range(EDGE_SEEDS):
                found = codes_edges(subject.model, subject.task, score=score, positions=places, seed=seed)
                size, row = (
                    np.abs(found.values),
                    {"method": f"edges, {score}", "positions": places, "n_train": 10, "seed": seed},
                )
                for which, some in (("", slice(None)), ("parts_", parts)):
                    row[f"{which}auroc"] = auroc(size[some], truth[some])
                    row[f"{which}ap"] = average_precision(size[some], truth[some])
                    row[f"{which}positives"] = float(truth[some].mean())
                yield row


def _largest_edges(subject: Subject) -> list[str]:
    found = exact(subject.model, subject.others)
    return [found.names[index] for index in np.argsort(-np.abs(found.values), kind="stable")[: round(TOP_EDGES * len(found))]]


JOBS = {"codes": of_codes, "paper": of_paper, "edges": of_edges, "sensitivity": sensitivity}

if __name__ == "__main__":
    main(sys.argv[1:])
