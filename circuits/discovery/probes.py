"""A linear probe of every part: the honest baseline of codes, on the same examples and judged in the same way.

    rows -> standardised, part by part -> a direction, fitted to a few of them -> how well it ranks the others by their label

The direction is that of ridge regression on labels of -1 and +1, in closed form. With K = X X^T / d of the training rows,

    alpha = (K + ridge 1)^-1 y,    f(x) = alpha . X x / d,

so that what is solved is as large as the training examples are many, however wide the part. Rows have a mean square of 1 and
K a diagonal near 1: ``ridge`` means the same for a head and for an MLP. A probe says what a part *knows*, as codes do.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from circuits.code_statistics import check_test, permuted_labels
from circuits.coding import Examples, examples_of
from circuits.discovery.code_scores import facts_of, in_scores, stand_out
from circuits.scores import Scores
from mechinterp.errors import CircuitError
from mechinterp.models.transformer import Transformer
from mechinterp.store import ActivationStore
from mechinterp.tasks.base import Task
from saes.codes import moments

Areas = tuple[Float[np.ndarray, "place part"], Float[np.ndarray, "place draw part"]]


def probe(
    model: Transformer,
    task: Task,
    *,
    positions: str | Sequence[str] = "END",
    n_train: int = 10,
    ridge: float = 1.0,
    n_permutations: int = 1000,
    level: float = 0.05,
    seed: int = 0,
    store: ActivationStore | None = None,
    progress: bool = False,
) -> Scores:
    """How well a linear probe of what each head and MLP writes tells clean from corrupted: AUROC above chance, 0 to some 1/2.

    Probed are a head's ``z`` and an MLP's output; the input is not, and scores 0.

    The area rather than the information of a yes or no: the direction is what ten examples can find, a threshold is not.
    It is taken on the prompts that the probe was not fitted to, less the mean under labels permuted within pairs; a probe
    that is wrong more often than right counts as 0. ``positions``, ``n_train``, ``level``, ``settings["selected"]`` and
    ``settings["p"]`` are as in ``codes``, with the same examples for the same ``seed``.

    Cost: one forward pass of clean and corrupted prompts, or none with a ``store`` that has them, and a system of
    ``n_train`` equations a part. Raises ``SAEError`` for too few prompts, for ``n_train`` below 2 and for parts that all write
    the same on every prompt, ``CircuitError`` for a ``ridge`` that is not positive, no permutations, and a ``level`` that is
    not between 0 and 1.
    """
    check_test(n_permutations, level)
    examples = examples_of(model, task, positions, n_train, seed=seed, store=store)
    found = stand_out(examples, *areas(examples, ridge, n_permutations, seed, progress=progress), level)
    facts: dict[str, Any] = {"positions": list(examples.places), "n_train": n_train, "ridge": ridge, "seed": seed}
    facts |= {"n_counted": len(examples.rows), "n_permutations": n_permutations, "level": level}
    return in_scores(examples, found.values, "probe", "AUROC above chance", facts | facts_of(examples, found))


def areas(examples: Examples, ridge: float, n_permutations: int, seed: int, *, progress: bool = False) -> Areas:
    """The area under each probe's ROC curve on the counted examples, ties counting half; the same for permuted labels."""
    if not ridge > 0:
        raise CircuitError(f"ridge={ridge} does not hold a probe of few examples in place. Give more than 0; 1 is usual.")
    labels = examples.labels
    draws = np.concatenate([labels[None], permuted_labels(labels, n_permutations, seed, paired=True)])
    signs = 2.0 * (examples.training < len(examples.task)).double() - 1
    found = []
    for at in tqdm(range(len(examples.places)), desc="probe", unit="place", delay=2, disable=not progress):
        kinds = [examples.written.heads[at], *([] if examples.written.mlps is None else [examples.written.mlps[at]])]
        told = [fitted(rows, examples.training, signs, ridge)[examples.rows] for rows in kinds]
        found.append(roc_areas(torch.cat(told, 1), torch.as_tensor(draws)).numpy())
    return np.stack(found)[:, 0], np.stack(found)[:, 1:]


def fitted(
    rows: Float[Tensor, "example part d_in"], training: Int[Tensor, "some"], signs: Float[Tensor, "some"], ridge: float
) -> Float[Tensor, "example part"]:
    """What a probe of each part, fitted to ``rows[training]`` and their ``signs``, says of every row; 0 if a part is constant.

    Mean and scale are those of the training rows, as with codes. The intercept is the mean of ``signs``, and left out.
    """
    mean, scale = moments(rows[training].double())
    standard = (rows.double() - mean) * scale.reciprocal().nan_to_num(posinf=0.0).unsqueeze(-1)
    seen, d_in = standard[training], rows.shape[2]
    gram = torch.einsum("ipd,jpd->pij", seen, seen) / d_in
    alpha = torch.linalg.solve(gram + ridge * torch.eye(len(signs), dtype=gram.dtype), signs - signs.mean())
    return torch.einsum("epd,pd->ep", standard, torch.einsum("pi,ipd->pd", alpha, seen) / d_in)


def roc_areas(values: Float[Tensor, "example part"], labels: Int[Tensor, "draw example"]) -> Float[Tensor, "draw part"]:
    """The area under the ROC curve of each part's values, for each row of labels: Mann and Whitney's U, from mean ranks."""
    ranked, given = values.T.contiguous().sort(-1).values, values.T.contiguous()
    below, up_to = (torch.searchsorted(ranked, given, right=right) for right in (False, True))
    ranks = (below + up_to + 1).double() / 2
    positives = labels.double()
    n = positives.sum(1, keepdim=True)
    sums = torch.einsum("de,pe->dp", positives, ranks)
    return (sums - n * (n + 1) / 2) / (n * (labels.shape[1] - n))
