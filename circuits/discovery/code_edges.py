"""Edges from discrete codes: which ordered pairs of parts tell, together, what neither tells alone; or say the same.

O'Neill & Bui 2024 (arXiv:2405.12522) count pairs of codes for every pair of heads, in either order, and rank heads by them.
Here a pair is an edge of the wiring, writer before reader, and its score is what the two codes do beyond each alone:

* ``"interaction"`` (the default): I(y; (c1, c2)) - I(y; c1) - I(y; c2), y the label (clean or corrupted), each of the three
  adjusted for chance (``code_pairs.interaction``). Positive: synergy. Negative: redundancy.
* ``"conditional"``: I(c1; c2 | y), less chance: what two parts share that the label does not explain.

**Such an edge is a co-occurrence and not a path.** Two parts that read the same word share it without either reading the
other, and codes cannot tell q, k and v apart: a pair's score stands on each port of the reader (on a key or value that heads
share, that of the strongest of them). The ends are coded too, so
that every edge has a number: the input's code is the label, which the prompt determines; that of the logits is the metric,
cut at its median. An edge from the input then has the interaction -I(y; c2), and the conditional 0: given the label, the
label says nothing (were the code the prompt itself, chance would be as high, and the difference 0 again).

Do not take a circuit from these scores alone. Against exact edge patching and the hand-set circuits they rank edges mostly
no better than the product of what the two parts know of the label each alone, and untrained autoencoders do about as well.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from circuits.code_pairs import JudgedPairs, judge_pairs, known_pair_score, pairs_of
from circuits.code_statistics import check_test
from circuits.coding import Coded, Examples, coded, examples_of
from circuits.discovery.walk import scores_of
from circuits.scores import Scores
from circuits.statistics import rank_correlation
from circuits.wiring import Wiring
from mechinterp.models.transformer import Transformer
from mechinterp.store import ActivationStore
from mechinterp.tasks.base import Task
from saes.codes import CodeSettings

_NAMED = 100  # pairs that settings name
_NOTE = "a co-occurrence of codes, not a path; q, k and v of a reader score alike"


def codes_edges(
    model: Transformer,
    task: Task,
    *,
    score: str = "interaction",
    positions: str | Sequence[str] = "END",
    n_train: int = 10,
    d_sae: int = 16,
    k: int = 1,
    steps: int = 300,
    architecture: str = "topk",
    sparsity: float = 1.0,
    n_permutations: int = 200,
    level: float = 0.05,
    seed: int = 0,
    store: ActivationStore | None = None,
    progress: bool = False,
) -> Scores:
    """What the codes of every writer and reader tell together, by ``score`` (a key of ``PAIR_SCORES``), in nats; 0 is chance.

    Unlike other scores these do not say what a cut costs: see above for the sign. Of several ``positions`` each pair's best
    counts, both parts read at the same one. The other settings are those of ``codes``. ``settings["selected"]`` names the
    strongest pairs of parts (at most 100, without ports) at a false discovery rate of ``level`` and above Otsu's cut, with no
    answer key; pairs with the input or the logits are scored, but not tested: that the metric knows the label is no finding.
    ``n_selected`` counts all, ``untrained`` is the same of the control.

    Cost: two forward passes of clean and corrupted prompts (one with a ``store`` that has them), the autoencoders, then
    seconds for all pairs: it grows with examples, permutations, and the pairs of codes in use. Errors as in ``codes``, and
    ``CircuitError`` for a score of edges that there is not.
    """
    check_test(n_permutations, level)
    measure = known_pair_score(score)
    made = CodeSettings(n_train, d_sae, k, steps, architecture=architecture, sparsity=sparsity, seed=seed)
    examples = examples_of(model, task, positions, n_train, seed=seed, store=store)
    ends, wiring = metric_codes(examples), Wiring.of(model.config)
    n_before, inner = readable(wiring), of_parts(wiring)
    trained, control = (coded(examples, replace(made, trained=by), progress=progress) for by in (True, False))

    def judged(one: Coded) -> JudgedPairs:
        nodes = codes_of_nodes(one, wiring, ends)
        found = [measure(values, examples.labels, n_before, n_permutations, seed) for values in nodes]
        return judge_pairs(np.stack(found), level, inner)

    found, untrained = judged(trained), judged(control)
    facts = {"score": score, "positions": list(examples.places), **asdict(made)}
    facts |= {"n_counted": len(examples.rows), "n_permutations": n_permutations, "level": level, **trained.facts}
    facts |= {"edges_are": _NOTE, **_standing_out(found, wiring)}
    alike = rank_correlation(np.abs(found.values), np.abs(untrained.values))
    facts["untrained"] = _standing_out(untrained, wiring) | {"rank_correlation": alike}
    method = "codes-edges" if score == "interaction" else f"codes-edges-{score}"
    values = on_edges(found.values, wiring)
    return scores_of(model, task, method, values, None, settings=facts, items="edge", unit="nats", allow_zero=True)


def readable(wiring: Wiring) -> Int[np.ndarray, "node"]:
    """How many writers each node may read from: the writers, in their order, then the logits."""
    return (wiring.reads * wiring.writers_before).max(1)


def of_parts(wiring: Wiring) -> Bool[np.ndarray, "pair"]:
    """Which pairs are of two parts, neither the input nor the logits."""
    writers, readers = pairs_of(readable(wiring))
    return (writers > 0) & (readers < len(wiring.writers))


def codes_of_nodes(one: Coded, wiring: Wiring, ends: Bool[np.ndarray, "example"]) -> Int[np.ndarray, "place example node"]:
    """The label for the input, each part's codes in wiring order, and ``ends`` for the logits."""
    number = {part: index for index, part in enumerate(one.examples.parts)}
    parts = one.values[:, :, [number[writer] for writer in wiring.writers[1:]]]
    label, last = (np.broadcast_to(end[None, :, None], (*parts.shape[:2], 1)) for end in (one.examples.labels, ends))
    return np.concatenate([label, parts, last.astype(int)], 2)


@torch.no_grad()
def metric_codes(examples: Examples, batch_size: int = 32) -> Bool[np.ndarray, "example"]:
    """Whether the metric is above its median over all examples that are counted, clean and corrupted."""
    model, metric, found = examples.model, examples.task.metric, []
    for side in ("clean", "corrupted"):
        for prompts in examples.prompts.split(batch_size):
            here = prompts.to(model.device)
            found.append(metric(model.run(getattr(here, side), logits_at=here.end)[0], here).double().cpu())
    values = torch.cat(found).numpy()
    return values > np.median(values)


def on_edges(values: Float[np.ndarray, "pair"], wiring: Wiring) -> Float[np.ndarray, "edge"]:
    """Each pair's score on all edges between the two: on q, k and v of a head, the strongest pair's where heads share one."""
    grid = np.zeros((len(wiring.writers), len(wiring.writers) + 1))
    grid[pairs_of(readable(wiring))] = values
    owners = [grid[:, reads] for reads in wiring.reads.T]
    strongest = [np.take_along_axis(own, np.abs(own).argmax(1, keepdims=True), 1)[:, 0] for own in owners]
    return wiring.vector(np.stack(strongest, 1))


def _standing_out(found: JudgedPairs, wiring: Wiring) -> dict[str, Any]:
    """How many pairs there are and stand out, and the names of the strongest that do, with their scores."""
    writers, readers = pairs_of(readable(wiring))
    nodes = [*map(str, wiring.writers), "logits"]
    chosen = [pair for pair in np.argsort(-np.abs(found.values), kind="stable") if found.selected[pair]][:_NAMED]
    named = {f"{nodes[writers[pair]]}->{nodes[readers[pair]]}": float(f"{found.values[pair]:.6g}") for pair in chosen}
    return {"n_pairs": int(of_parts(wiring).sum()), "n_selected": int(found.selected.sum()), "selected": named}
