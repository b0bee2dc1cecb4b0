"""The protocol of CD-T's paper (Hsu et al. 2024/2025, arXiv:2407.00886, figures 1 and 2), on a model of yours.

    python -m benchmarks.cdt_protocol                       # the built-in model, a stand-in for the published lists
    python -m benchmarks.cdt_protocol --model gpt2          # IOI and greater-than; the weights are fetched
    python -m benchmarks.cdt_protocol --model attn-only-4l  # docstring; --acdc adds ACDC, which takes hours

1. *Prompts* of one template: as many as the paper searches, and 100 others; of docstring only those that the model solves.
2. *Search* in the published way at each percentile from 90 to 99, from one relevance table; pruning: thousands of forwards.
3. *Agreement*: each set of heads is a point (false, true positive rate) against the published list; the area is by
   trapezoids through these ten points, (0, 0) and (1, 1). No set holds more than a part of the heads, so much of that area
   lies under the last straight piece: beside it stands the AUROC of whole rankings, by magnitude, of CD-T and of others.
4. *Faithfulness* on the other prompts, all MLPs kept: of the found set whose size is nearest to the list's, of as many heads
   from the top of each ranking, and of the list. Means before the ratio. The ablation is everywhere the mean.

Which lists apply is decided by the model's shape. Weights are as ``load`` gives them: the published rules depend on how they
are processed. Writes results/cdt-protocol-<model>.json. Seconds on a CPU are of one thread.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import RESULTS
from circuits import ALGORITHMS, PUBLISHED, cdt_search, relevance_table
from circuits.ablation import replacement_for
from circuits.discovery.cdt_search import PAPER
from circuits.discovery.cdt_table import Part
from circuits.discovery.heads_alone import HeadsAlone
from circuits.ground_truth import PublishedCircuit, heads_of
from circuits.solving import fitness
from circuits.statistics import auroc
from circuits.wiring import Wiring
from mechinterp import TASKS, Node, Task, Transformer, load
from mechinterp.errors import CircuitError, MechinterpError, ModelError, TaskError

N_SEARCH = {"ioi": 25, "greater-than": 100, "docstring": 100, "colored-objects": 100}  # the paper has no colored objects
N_OTHERS, FRESH = 100, 1_000_003
SPARE = 8  # times as many prompts are drawn, so that enough are of one length, and solved
TEMPLATES = {"ioi": 0, "greater-than": 4, "docstring": 4, "colored-objects": 0}  # docstring's is the published one
SOLVED_ONLY = {"docstring"}
PERCENTILES = range(90, 100)
LISTS = ("ioi", "greater-than-cd-t", "docstring-post")  # 26, 8 and 11 heads, as "manual" in the paper's figure 2
LENS_ONLY = {"attn-only-4l": "NeelNanda/Attn_Only_4L512W_C4_Code"}  # not in the form of transformers, which load() needs
SEARCH, EAP, ACDC, LIST = "CD-T search, as published", "EAP, nodes", "ACDC, nodes", "the known heads"
RANKINGS: dict[str, Callable[..., Any]] = {
    **{f"CD-T ranking, {rules}": partial(ALGORITHMS["cdt"], rules=rules) for rules in ("paper", "frozen", "tail")},
    EAP: ALGORITHMS["eap"],
    ACDC: ALGORITHMS["acdc"],
    "exact patching": ALGORITHMS["patching"],
}
# Published, not measured here: AUC, seconds on an A100, faithfulness at the size of the list. Read off figures 1 and 2.
IN_PAPER: dict[str, dict[str, tuple[str, str, str]]] = {
    "ioi": {SEARCH: (".954", "2.73", ".20"), EAP: (".907", "6.30", ".55"), ACDC: (".871", "7200", ""), LIST: ("", "", ".84")},
    "greater-than": {SEARCH: (".968", "4.92", ".83"), EAP: (".899", "5.76", ".82"), ACDC: (".792", "5767", "")},
    "docstring": {SEARCH: (".988", "1.04", ".72"), EAP: (".976", ".48", ".71"), ACDC: (".950", "147", "")},
}
IN_PAPER["greater-than"][LIST], IN_PAPER["docstring"][LIST] = ("", "", ".90"), ("", "", ".98")
STAND_IN = f"""No list is published for this model. The known heads are a stand-in: the quarter of largest |exact mean-ablation
effect| on {N_OTHERS} further prompts. This exercises every step and reproduces nothing of the paper. How far the AUC of exact
patching is from 1 says how much of the stand-in is noise."""
OF_LISTS = """The lists are of the published model of this shape; that these are its weights is not checked. Columns after
"published" are read off the figures of the paper."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cdt_protocol", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="builtin", help="builtin, gpt2, attn-only-4l, or a directory of such a shape")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--acdc", action="store_true", help="ACDC too; slow")
    parser.add_argument("--allow-unsolved", action="store_true", help="go on where the model does not do the task")
    given = parser.parse_args()
    torch.set_num_threads(1)
    try:
        protocol(given.model, given.device, acdc=given.acdc, allow_unsolved=given.allow_unsolved)
    except MechinterpError as problem:
        sys.exit(f"{type(problem).__name__}: {problem}")


def protocol(source: str, device: str, *, acdc: bool, allow_unsolved: bool) -> None:
    model, name = _loaded(source, device), Path(source).resolve().name
    lists = _lists_for(model, source)
    rankings = {label: method for label, method in RANKINGS.items() if acdc or label != ACDC}
    found: dict[str, dict[str, Any]] = {}
    print(f"# CD-T's protocol on {name}\n\n{OF_LISTS if lists else STAND_IN}")
    for task_name in lists or TASKS:
        found[task_name] = one(model, task_name, lists.get(task_name), rankings, allow_unsolved)
        print(f"\n## {task_name}\n\n{_text(found[task_name])}", flush=True)
    about = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "torch": torch.__version__, "device": device}
    about |= {"model": name, "weights": model.weights.fingerprint, "dtype": str(model.dtype), "tasks": found}
    (RESULTS / f"cdt-protocol-{name}.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def one(model: Transformer, name: str, known: PublishedCircuit | None, rankings, allow_unsolved: bool) -> dict[str, Any]:
    """One task: what is known, the sweep, and a row a method."""
    draw = partial(drawn, model, name, allow_unsolved=allow_unsolved)
    task, others, wiring = draw(N_SEARCH[name], seed=0), draw(N_OTHERS, seed=FRESH), Wiring.of(model.config)
    accuracy = fitness(model, task, allow_unsolved=allow_unsolved).accuracy
    truth = known.head_truth() if known else stand_in(model, draw(N_OTHERS, seed=2 * FRESH))
    heads = np.array([writer for writer in wiring.writers if writer.kind == "head"], dtype=object)
    swept, rows = sweep(model, task, heads, truth, allow_unsolved)
    for label, method in rankings.items():
        scores, seconds = _timed(partial(method, model, task, ablation="mean"))
        size = np.abs(heads_of(wiring, scores.nodes))
        first = np.argsort(-size, kind="stable")[: truth.sum()]
        rows[label] = {"auc": auroc(size, truth), "seconds": seconds, "heads": heads[first]}
    rows[LIST] = {"heads": heads[truth]}
    values = faithfulness(model, others, [row["heads"] for row in rows.values()])
    for (label, row), value in zip(rows.items(), values, strict=True):
        published = IN_PAPER[name].get(label) if known else None
        row |= {"faithfulness": value, "heads": list(map(str, row["heads"])), "published": published}
    about = {"known": f"those of {known.name!r}, {known.citation}" if known else "a stand-in", "n_heads": len(heads)}
    return {**about, "n_search": len(task), "accuracy": accuracy, **swept, "rows": rows}


def drawn(model: Transformer, name: str, n: int, *, seed: int, allow_unsolved: bool) -> Task:
    """``n`` prompts of one template and one length, so that a mean is over all; where the paper asks, such as are solved."""
    task = TASKS[name](model, n_prompts=SPARE * n, seed=seed, template=TEMPLATES[name])
    usable = task.prompts.end == task.prompts.end.mode().values
    if name in SOLVED_ONLY:
        solved = usable & torch.as_tensor(fitness(model, task, allow_unsolved=allow_unsolved).right > 0)
        usable = usable if allow_unsolved and int(solved.sum()) < n else solved
    rows = usable.nonzero().flatten()[:n]
    if len(rows) < n:
        raise TaskError(f"only {len(rows)} of {len(task)} prompts of {name!r} are of one length and solved; {n} are needed.")
    return replace(task, prompts=task.prompts[rows], notes={})


def stand_in(model: Transformer, task: Task) -> np.ndarray:
    """The quarter of the heads whose mean ablation changes the metric most."""
    effect = np.abs(heads_of(Wiring.of(model.config), ALGORITHMS["patching"](model, task, ablation="mean").nodes))
    return np.isin(np.arange(len(effect)), np.argsort(-effect, kind="stable")[: len(effect) // 4])


def sweep(model: Transformer, task: Task, heads: np.ndarray, truth: np.ndarray, allow_unsolved: bool) -> tuple[dict, dict]:
    """The search at every percentile, and as a row the area of its points and the set whose size is nearest to the list's."""
    table, of_table = _timed(partial(relevance_table, model, task, rules=PAPER["rules"], ablation=PAPER["ablation"]))
    search = partial(cdt_search, model, task, **PAPER, table=table, allow_unsolved=allow_unsolved)
    found, seconds = _timed(lambda: {at: search(percentile=at).heads for at in PERCENTILES})
    taken = {at: np.array([head in some for head in heads]) for at, some in found.items()}
    points = [(float(of[~truth].mean()), float(of[truth].mean())) for of in taken.values()]
    nearest = min(taken, key=lambda at: abs(int(taken[at].sum()) - int(truth.sum())))
    sizes = {at: (int(of.sum()), int(of[truth].sum())) for at, of in taken.items()}
    row = {"auc": area(points), "seconds": of_table + seconds, "heads": heads[taken[nearest]]}
    return {"sizes": sizes, "points": points, "percentile": nearest, "seconds_of_table": of_table}, {SEARCH: row}


def area(points: Sequence[tuple[float, float]]) -> float:
    """Under straight lines from (0, 0) through the points, ordered by false, then by true positive rate, to (1, 1)."""
    ordered = sorted([(0.0, 0.0), *points, (1.0, 1.0)])
    return sum((right - left) * (low + high) / 2 for (left, low), (right, high) in pairwise(ordered))


def faithfulness(model: Transformer, task: Task, circuits: Sequence[Sequence[Node]]) -> list[float]:
    """``(m(C) - m(∅)) / (m(M) - m(∅))`` of each set of heads."""
    alone = HeadsAlone(model, task, replacement_for(model, task, "mean").writes)
    empty, *metrics = alone.metrics([(), *(tuple(map(Part, heads)) for heads in circuits)])
    whole = fitness(model, task, allow_unsolved=True).clean.mean()
    return [float((metric - empty) / (whole - empty)) for metric in metrics]


def _loaded(source: str, device: str) -> Transformer:
    if source not in LENS_ONLY:
        return load(source, device=device)
    from transformer_lens import HookedTransformer

    try:
        hooked = HookedTransformer.from_pretrained_no_processing(LENS_ONLY[source], device="cpu")
    except Exception as error:  # the hub, the network and TransformerLens each have their own way to fail
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"TransformerLens could not fetch {source!r} ({reason}). Without a network use builtin.") from error
    return load(hooked, device=device)


def _lists_for(model: Transformer, source: str) -> dict[str, PublishedCircuit]:
    """The paper's lists, by task, of models of this shape; none for the built-in model, and ``CircuitError`` for others."""
    known = {PUBLISHED[name].task: PUBLISHED[name] for name in LISTS}
    lists = {task: each for task, each in known.items() if each.wiring == Wiring.of(model.config)}
    if not lists and source != "builtin":
        shapes = " and ".join(dict.fromkeys(f"{each.model} ({_shape(each.wiring)})" for each in known.values()))
        raise CircuitError(f"{source!r} has {_shape(Wiring.of(model.config))}; the paper's lists are of {shapes}.")
    return lists


def _shape(wiring: Wiring) -> str:
    return f"{wiring.n_layers} layers of {wiring.n_heads} heads, with{'' if wiring.has_mlp else 'out'} MLPs"


def _timed(job: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return job(), time.perf_counter() - began


def _text(found: dict[str, Any]) -> str:
    rows, sizes = found["rows"], ", ".join(f"{at}: {n} ({hits})" for at, (n, hits) in found["sizes"].items())
    is_published = rows[SEARCH]["published"] is not None
    lines = [
        f"{found['n_search']} prompts searched ({found['accuracy']:.0%} solved), {N_OTHERS} others measured.",
        f"{len(rows[LIST]['heads'])} of {found['n_heads']} heads are known: {found['known']}.",
        f"Heads found (known ones among them) at each percentile: {sizes}.",
        f"The row of the search: area and seconds of the whole sweep ({found['seconds_of_table']:.2f} of them for its table),",
        f"and the heads found at {found['percentile']}.\n",
        "| method | AUC | seconds | heads | faithful |" + is_published * " published: AUC | seconds, A100 | faithful |",
        "| --- |" + " ---: |" * (4 + 3 * is_published),
    ]
    for label, row in rows.items():
        judged = (f"{row['auc']:.3f}", f"{row['seconds']:.2f}") if "auc" in row else ("", "")
        cells = [label, *judged, str(len(row["heads"])), f"{row['faithfulness']:.2f}"]
        lines.append(f"| {' | '.join([*cells, *(row['published'] or is_published * [''] * 3)])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
