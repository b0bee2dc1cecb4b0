"""How the area moves with the weight of sparsity and the number of latents: both variants, task by task, as one picture."""

import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from benchmarks.codes_subjects import Subject, measures, of_heads
from circuits.coding import coded, examples_of
from circuits.discovery.code_scores import CODE_SCORES, judge
from circuits.discovery.paper_codes import paper_codes
from mechinterp.files import write_beside
from mechinterp.store import ActivationStore
from saes.codes import CodeSettings

SEEDS, PAPER_SEEDS, N_TRAIN, N_PERMUTATIONS = 3, 2, 10, 200
SPARSITIES, LATENTS = (0.1, 0.4, 1.6, 6.4, 25.6, 102.4), (8, 16, 64, 256, 512)
PAPER_SPARSITIES, PAPER_LATENTS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3), (25, 100, 200, 400, 800)
GRIDS = {  # what is drawn, row by row: sparsities, numbers of latents, where the default lies
    "information": (SPARSITIES, LATENTS),
    "change": (SPARSITIES, LATENTS),
    "published, node": (PAPER_SPARSITIES, PAPER_LATENTS),
}


def sensitivity(subject: Subject) -> Iterator[dict[str, Any]]:
    """ReLU autoencoders of every size and sparsity, ten training examples; codes at END, the published ones as published."""
    with tempfile.TemporaryDirectory() as folder:
        store = ActivationStore(folder)
        for d_sae, sparsity, seed in product(LATENTS, SPARSITIES, range(SEEDS)):
            examples = examples_of(subject.model, subject.task, "END", N_TRAIN, seed=seed, mlps=False, store=store)
            one = coded(examples, CodeSettings(N_TRAIN, d_sae, architecture="relu", sparsity=sparsity, seed=seed))
            about = {"d_sae": d_sae, "sparsity": sparsity, "seed": seed} | one.facts
            for score in ("information", "change"):
                found = judge(CODE_SCORES[score], one, N_PERMUTATIONS, 0.05, seed)
                yield about | {"method": score} | measures(subject, found.values)
        for d_sae, sparsity, seed in product(PAPER_LATENTS, PAPER_SPARSITIES, range(PAPER_SEEDS)):
            made: dict[str, Any] = {"d_sae": d_sae, "sparsity": sparsity, "seed": seed}
            scores = paper_codes(subject.model, subject.task, n_train=N_TRAIN, store=store, **made)
            facts = {name: scores.settings[name] for name in ("l0", "silent", "codes_a_part")}
            yield made | facts | {"method": "published, node"} | measures(subject, of_heads(scores))


def areas_of(rows: Sequence[dict[str, Any]], subject: str, method: str) -> Float[np.ndarray, "latents sparsity"]:
    """Means over seeds."""
    sparsities, latents = GRIDS[method]
    of = [row for row in rows if row["subject"] == subject and row["method"] == method]
    return np.array(
        [[np.mean([r["auroc"] for r in of if r["d_sae"] == d and r["sparsity"] == s]) for s in sparsities] for d in latents]
    )


def draw_sensitivity(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A grid of squares for each variant and task: sparsity to the right, latents upwards, the area as colour and number."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    figure = Figure(
        figsize=(3.5 * len(subjects) + 0.8, 3.1 * len(GRIDS) + 0.7), dpi=130, facecolor="white", layout="constrained"
    )
    drawn = figure.subplots(len(GRIDS), len(subjects), squeeze=False)
    colours = ScalarMappable(Normalize(0, 1), "PuOr")
    for axes_row, (method, (sparsities, latents)) in zip(drawn, GRIDS.items(), strict=True):
        for axes, subject in zip(axes_row, subjects, strict=True):
            areas = areas_of(rows, subject, method)
            axes.imshow(areas, origin="lower", cmap=colours.cmap, norm=colours.norm, aspect="auto")
            for (row, column), area in np.ndenumerate(areas):
                dark = abs(area - 0.5) > 0.3
                axes.text(column, row, f"{area:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
            axes.set_xticks(range(len(sparsities)), [f"{value:.3g}" for value in sparsities], fontsize=8)
            axes.set_yticks(range(len(latents)), list(map(str, latents)), fontsize=8)
            axes.set_title(f"{subject}: {method}", fontsize=10)
            axes.tick_params(length=0)
        axes_row[0].set_ylabel("latents", fontsize=9)
    for axes in drawn[-1]:
        axes.set_xlabel("sparsity (λ)", fontsize=9)
    figure.colorbar(colours, ax=drawn, shrink=0.5, label="AUROC over heads, by exact patching")
    seeds = f"mean of {SEEDS} seeds ({PAPER_SEEDS} of the published variant)"
    figure.suptitle(f"Codes of ReLU autoencoders, {N_TRAIN} training examples, {seeds}; 0.5 is chance", fontsize=11)
    with write_beside(path) as beside:
        figure.savefig(beside)
