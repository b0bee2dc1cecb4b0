"""What the benchmark of codes found, as Markdown tables and JSON: means and standard deviations over seeds."""

import json
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.codes_sensitivity import draw_sensitivity
from benchmarks.codes_subjects import SUBJECTS
from benchmarks.measure import RESULTS
from circuits.discovery.code_scores import CODE_SCORES
from mechinterp.files import write_text_atomically

PICTURE = Path(__file__).parent.parent / "docs" / "codes_sensitivity.png"
BY_HAND = [name for name in SUBJECTS if name.endswith("(by hand)")]
CODES = [f"codes, {score}" for score in CODE_SCORES]
UNTRAINED = [f"untrained, {score}" for score in CODE_SCORES]
PAPER = [f"published{control}, {level}" for level in ("node", "edge") for control in ("", " untrained")]
BLIND = ["variance", "mean difference", "pair distance"]
ONE_ROW = [*BLIND, *(name for name in PAPER if "untrained" in name)]  # whatever n is
METHODS = [*(name for pair in zip(CODES, UNTRAINED, strict=True) for name in pair), *PAPER, "linear probe", *BLIND]
N_TRAIN = (5, 10, 25, 100)
PLACES = ("END", "mean", "all named")

Row = dict[str, Any]

ABOUT = """\
Subjects: the four tasks of the built-in model (4 layers of 8 heads), and the two models whose circuit is set by hand; 200
clean and 200 corrupted prompts. `n` rows train (half of them clean) and the other pairs are counted, but for the published
variant, which draws its rows from both kinds at random and counts all 400. Mean ± standard deviation over 20 seeds (the
published variant: 10 with n = 25, 5 with n = 100, since its cost grows with the rows; other positions than END: 5). From seed
to seed the prompts stay; the rows to train on and the autoencoder change. *Untrained*: the same score with autoencoders left
at their random directions. *Variance*, *mean difference* (of the two classes, in standard deviations) and *pair distance* (of
a prompt and its partner, root mean square, in standard deviations) are read off the heads' outputs: no autoencoder, no
training, so one row each.

AUROC and average precision (AP) are over **heads alone** (32; 8 and 16 in the models set by hand), all of them ranked, ties at
their average rank. *By patching*: the truth is the quarter of the heads with the largest |exact patching| on 48 other prompts
(8 heads; 2 and 4), and rho is Spearman's correlation with |exact patching| of all heads. *Known circuit*: the heads that were
given a role (2 of 8; 5 of 16). Chance is AUROC 0.5, AP 0.25 (known circuit: 0.25 and 0.31), rho 0."""


def write(rows: Sequence[Row]) -> None:
    """results/codes.md, results/codes.json and the picture."""
    heads = [row for row in rows if row["kind"] in ("codes", "paper")]
    sections = [
        "# Discrete codes against what matters",
        f"Written by `python -m benchmarks.codes` on {datetime.now(UTC):%Y-%m-%d}.\n\n{ABOUT}",
        f"## How to read it\n\n{READING}",
        f"## At a glance: AUROC by patching, n = 10, at END\n\n{glance(heads)}",
        f"## By patching: AUROC / AP\n\n{by_n(heads, SUBJECTS, pair('auroc', 'ap'))}",
        f"## By patching: rho\n\n{by_n(heads, SUBJECTS, single('rho'))}",
        f"## Known circuit: AUROC / AP\n\n{by_n(heads, BY_HAND, pair('known_auroc', 'known_ap'))}",
        f"## Other positions: AUROC by patching\n\n{elsewhere(heads, SUBJECTS, 'auroc')}",
        f"## Other positions: AUROC against the known circuit\n\n{elsewhere(heads, BY_HAND, 'known_auroc')}",
        f"## What is selected with no answer key\n\n{SELECTION}\n\n{selection(heads)}",
        f"## Edges\n\n{EDGES}\n\n{edges([row for row in rows if row['kind'] == 'edges'])}",
        f"## Sensitivity\n\n{SENSITIVITY}",
    ]
    write_text_atomically(RESULTS / "codes.md", "\n\n".join(sections) + "\n")
    lines = ",\n".join(json.dumps(one) for one in summary(rows))
    write_text_atomically(RESULTS / "codes.json", f"[\n{lines}\n]\n")
    draw_sensitivity([row for row in rows if row["kind"] == "sensitivity"], PICTURE)


def summary(rows: Sequence[Row]) -> list[Row]:
    """One entry a cell: every measure as [mean, standard deviation], and how many seeds."""
    about = ("kind", "subject", "method", "positions", "n_train", "d_sae", "sparsity")
    cells: dict[tuple, list[Row]] = {}
    for row in rows:
        cells.setdefault(tuple(row.get(name) for name in about), []).append(row)
    found = []
    for key, here in cells.items():
        names = list(dict.fromkeys(name for row in here for name in row if name not in (*about, "seed")))
        spread = {name: [round(one, 4) for one in _spread(here, name)] for name in names}
        found.append({n: v for n, v in zip(about, key, strict=True) if v is not None} | {"seeds": len(here)} | spread)
    return found


def glance(rows: Sequence[Row]) -> str:
    def line(method: str) -> list[str]:
        of = [_some(rows, name, method, _place(method), 10) for name in SUBJECTS]
        means = [np.mean([row["auroc"] for row in here]) for here in of[: -len(BY_HAND)]]
        return [method, *(single("auroc")(here) for here in of), f"{np.mean(means):.2f}"]

    return table(["method", *SUBJECTS, "mean of the four tasks"], map(line, METHODS))


def by_n(rows: Sequence[Row], subjects: Sequence[str], cell: Callable[[Sequence[Row]], str]) -> str:
    lines = []
    for method in METHODS:
        for n in (10,) if method in ONE_ROW else N_TRAIN:
            cells = [cell(_some(rows, name, method, _place(method), n)) for name in subjects]
            lines.append([method, "" if method in ONE_ROW else str(n), *cells])
    return table(["method", "n", *subjects], lines)


def elsewhere(rows: Sequence[Row], subjects: Sequence[str], name: str) -> str:
    lines = []
    for method in [method for method in METHODS if method not in PAPER]:
        for place in PLACES:
            for n in (10,) if method in BLIND else (10, 100):
                cells = [single(name)(_some(rows, subject, method, place, n)) for subject in subjects]
                lines.append([method, place, "" if method in BLIND else str(n), *cells])
    return table(["method", "positions", "n", *subjects], lines)


def selection(rows: Sequence[Row]) -> str:
    def cell(here: Sequence[Row]) -> str:
        share = _spread(here, "any")[0]
        return "0 %" if share == 0 else f"{share:.0%} · {_spread(here, 'precision')[0]:.2f} · {_spread(here, 'recall')[0]:.2f}"

    lines = [
        [method, *(cell(_some(rows, name, method, "END", 10)) for name in SUBJECTS)]
        for method in [*(name for both in zip(CODES, UNTRAINED, strict=True) for name in both), "linear probe"]
    ]
    return table(["method", *SUBJECTS], lines)


def edges(rows: Sequence[Row]) -> str:
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        for place in dict.fromkeys(row["positions"] for row in rows):
            for which in ("", "parts_"):
                cells = []
                for name in SUBJECTS:
                    here = [r for r in rows if (r["subject"], r["positions"], r["method"]) == (name, place, method)]
                    chance = f" ({_spread(here, which + 'positives')[0]:.3f})" if here else ""
                    cells.append(pair(f"{which}auroc", f"{which}ap")(here) + chance)
                lines.append([method, place, "between parts" if which else "all", *cells])
    return table(["method", "positions", "edges", *SUBJECTS], lines)


def single(name: str) -> Callable[[Sequence[Row]], str]:
    return lambda here: _cell(here, name)


def pair(one: str, other: str) -> Callable[[Sequence[Row]], str]:
    return lambda here: f"{_cell(here, one)} / {_cell(here, other)}"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _place(method: str) -> str:
    return "mean-with-bos" if method in PAPER else "END"


def _some(rows: Sequence[Row], subject: str, method: str, place: str, n: int) -> list[Row]:
    wanted = (subject, method, place, n)
    return [row for row in rows if (row["subject"], row["method"], row["positions"], row["n_train"]) == wanted]


def _cell(here: Sequence[Row], name: str) -> str:
    mean, deviation = _spread(here, name)
    return f"{mean:.2f} ± {deviation:.2f}"


def _spread(here: Sequence[Row], name: str) -> tuple[float, float]:
    values = [row[name] for row in here if name in row]
    return float(np.mean(values)), float(np.std(values))


READING = """\
* **As a ranking of heads, codes find little that distances do not find.** Where a score of codes is good, *pair distance* or
  *variance*, which need no autoencoder, is about as good or better; the one exception is *change* with all named positions on
  the hand-set indirect object (.94 against .88). What codes add is not in these tables: kinds of examples to look at.
* **Training the autoencoder does not help.** On the four tasks the untrained ones rank as well by every score (means of
  .71 for .72, .87 for .85, .77 for .77, .57 for .59), on the models set by hand now better, now worse. So it matters little
  whether 5 rows train or 100, but for *information* on colored objects (.71 to .83).
* *Information* asks whether one prompt alone shows its label. **It works on greater-than**, whose corrupted years end in 01, as
  the linear probe does, and **is at chance on IOI**, where clean and corrupted prompts are drawn from the same names: at END no
  head's code tells one from the other, nor does its probe, and nothing is selected. That is a right answer, to another question
  than "what is the circuit". Docstring and colored objects, whose corruption leaves traces in some heads, lie between.
* *Change* compares a prompt with its own partner: **it uses pairs, where information uses labels alone**, so read it beside
  *pair distance*. It is the best score of codes over the four tasks, and weak on IOI (as pair distance is). It says which heads
  hear of the corruption, not which act on it. Its selection is Otsu's cut alone, which divides heads that hear nothing from
  all others: what matters is kept, and as much again or twice that does not.
* *Answer* (clean prompts alone) finds heads that move the answer, and no others: on the models set by hand it selects those,
  half of the truth, with precision 1; on IOI, where heads that know the names are many, it is at chance.
* The circuits set by hand stand among heads that are louder and differ more between clean and corrupted prompts, and most of
  their heads do not act at END. There pair distance and mean difference are below chance (the probe on one of the two), codes
  near it. At other positions *change* and pair distance find them.
* *Published* (λ = .02, 200 latents): near or below chance on the four tasks, where its untrained control is as good or better;
  .74 to .93 on the models set by hand. One autoencoder for heads of all sizes: a head's mean decides which latent is strongest,
  most heads have one code for all prompts, and count 0. The paper's own figures (.85 to .87) are of GPT-2 small, whose weights
  were not at hand. The count does no better on our codes, but for greater-than, where *information* is better.
* *Mean difference* has no null here, and needs one: with labels permuted within pairs it still ranks by .62 on IOI, .79 on
  docstring and .83 on colored objects, since what chance leaves of a difference grows with how far pairs lie apart. *Variance*
  is that of `z`, as the codes read it."""
SELECTION = """\
At END, n = 10: heads beyond Otsu's cut, and (but for *change*, which has no chance level) at a false discovery rate of 5 % by
1,000 permutations (*answer*: 200, which is too few for less than four heads). Share of seeds in which anything is selected ·
precision · recall against the truth by patching. Precision is over the seeds that select."""
EDGES = """\
AUROC / AP of |`codes_edges`| (n = 10, 5 seeds; the share of positives, AP's chance level, in brackets), against the edges of
the circuit set by hand, and for the built-in model against the 5 % of the edges with the largest |exact patching| on 48 other
prompts. *All*: every edge of the wiring, those from the input and to the logits among them; *between parts*: the others. Little
is found: the interaction is above chance on greater-than and, between parts at END, on IOI; the conditional score, 0 for edges
from the input, is often below chance: parts that read the same word share it, whether or not one reads the other."""
SENSITIVITY = """\
![AUROC over heads, by number of latents and sparsity](../../docs/codes_sensitivity.png)

ReLU autoencoders in place of top-k ones, ten training examples. Ours, one autoencoder a head on standardised inputs, moves
about as much as from seed to seed over three decades of λ and from 8 to 512 latents. The published variant hardly depends on
the number of latents and strongly on λ: on greater-than from .3 at λ = .03, near its default, to .8 at .3, where a quarter of
the rows or more have no active latent and codes tell large activations from small ones; on docstring it falls to .16 at .1.
Nothing but the answer key would say which λ to take."""
