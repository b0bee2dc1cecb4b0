"""ACDC: cut every edge that can be spared, one after another (Conmy et al. 2023, arXiv:2304.14997, algorithm 1).

From the logits down to layer 0, each reader's incoming edges are tried in turn. With H the circuit so far, the edge e is
cut for good if ``d(H - e) - d(H) < threshold``, where d is the KL divergence from the whole model's prediction at END, or
the negated metric. What was cut before stays cut, so a score is *conditional*: it belongs to this threshold and this order.

The paper leaves the order among a reader's writers open and says that it matters; ours is that of the published code
(Automatic-Circuit-Discovery, ``TLACDCExperiment``). We differ in that a port is one node: there, the step from a head's
query *input* to its query is an edge as well (432 more in GPT-2 small), tried before the edges that lead to it.

The decisions are those of the plain loop, edge by edge. The work is not:

1. *what an edge changes* spreads from its reader along kept edges only, at the positions that count (``pruned.py``);
2. *what reaches nothing*, edges into dead parts and edges that carry the same either way, is cut without a run;
3. *guessing ahead*: several edges run in one stack, each as if those before it were cut. Up to and with the first that
   must be kept every guess was right, and the rest is run again.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.ablation import Ablation, replacement_for
from circuits.discovery.pruned import PrunedRun
from circuits.discovery.suffix import CleanRun, at_end
from circuits.discovery.walk import scores_of
from circuits.measure import measure
from circuits.scores import Scores
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError, TaskError, nearest
from mechinterp.models.transformer import ResidualStart, Transformer
from mechinterp.sites import Site
from mechinterp.tasks.base import Task

Distance = Callable[[Float[Tensor, "variant batch 1 d_model"]], Float[np.ndarray, "variant"]]

LOGITS_AT_ONCE = 2**22  # numbers, of which a divergence holds a copy or two: more no longer fits a CPU's cache
TOKENS_AT_ONCE = 1024  # of one stack of guesses


def acdc(
    model: Transformer,
    task: Task,
    *,
    threshold: float = 0.01,
    objective: str = "kl",
    order: str = "published",
    signed: bool = True,
    ablation: str | Ablation = "resample",
    progress: bool = False,
) -> Scores:
    """What each edge cost when it was tried, in nats (KL) or units of the metric; positive: cutting it hurts.

    ``scores.above(threshold, signed=signed)``, with the threshold of the search, **is** ACDC's circuit. By default an edge
    whose loss would bring the circuit *nearer* to the model is cut, however strong (the paper's rule); ``signed=False``
    compares magnitudes and keeps it (the code's ``abs_value_threshold``).

    ``objective``: "kl" sums over the vocabulary and averages over prompts; "metric" takes the fall of the task's metric.
    ``order`` of the writers of a reader: "published" (the latest layer first, its MLP before its heads 0, 1, ...),
    "reverse" (strictly from the last to the first), "forward" (from the input on). Readers always run from the logits down,
    in a layer the MLP, then values, keys and queries of the heads from the last to the first.

    Cost: for each edge into a living part one pass over the kept edges behind it, and some more for wrong guesses: the
    smaller the circuit, the cheaper. Holds a residual stream for every reader that is kept. ``CircuitError`` for a threshold
    that is not positive; ``TaskError`` where the objective is not finite.

    >>> from mechinterp.models.compiled import induction
    >>> planted = induction()
    >>> circuit = acdc(planted.model, planted.task, threshold=0.1).above(0.1, signed=True)
    >>> sorted(f"{writer}->{reader}" for writer, reader in circuit.edges_kept) == sorted(planted.circuit_edges)
    True
    """
    _check(threshold, objective, order)
    replacement = replacement_for(model, task, ablation)
    run = CleanRun.record(model, task.prompts, task.metric, replacement.writes, shares_prefix=replacement.keeps_prefix)
    wiring = Wiring.of(model.config)
    with tqdm(total=wiring.n_edges, desc="acdc", unit="edge", disable=not progress) as bar:
        grid = _search(PrunedRun(run, wiring), OBJECTIVES[objective](run), _Rule(threshold, signed), order, bar)
    settings: dict[str, Any] = {"threshold": threshold, "objective": objective, "order": order, "signed": signed}
    unit = "kl_divergence" if objective == "kl" else None
    return scores_of(model, task, "acdc", wiring.vector(grid), replacement.name, settings=settings, unit=unit)


def readers_in_order(wiring: Wiring) -> Iterator[int]:
    """From the logits down; of a layer the MLP, then v, k and q of its heads, each from the last to the first.

    A key or value that heads share is one reader: it is tried once, for all of them.
    """
    yield from range(len(wiring.readers) - 1, -1, -1)  # which is the wiring's own order, backwards


def writers_in_order(wiring: Wiring, reader: int, order: str = "published") -> list[int]:
    """The writers that ``reader`` may take from, in the order in which ACDC tries them."""
    return ORDERS[order](wiring, range(int(wiring.writers_before[reader])))


def _published(wiring: Wiring, writers: range) -> list[int]:
    """Layers from the last to the first, in each its MLP and then its heads from 0 on; the input last."""

    def place(writer: int) -> tuple[int, bool, int]:
        node = wiring.writers[writer]
        return -1 if node.layer is None else node.layer, node.kind == "mlp", -writer

    return sorted(writers, key=place, reverse=True)


ORDERS: dict[str, Callable[[Wiring, range], list[int]]] = {
    "published": _published,
    "reverse": lambda _, writers: list(reversed(writers)),
    "forward": lambda _, writers: list(writers),
}


@dataclass(frozen=True)
class _Rule:
    """When an edge stays."""

    threshold: float
    signed: bool

    def keeps(self, rise: float) -> bool:
        return bool((rise if self.signed else abs(rise)) >= self.threshold)


@torch.no_grad()
def _search(current: PrunedRun, distance: Distance, rule: _Rule, order: str, bar: tqdm) -> Float[np.ndarray, "writer reader"]:
    """What each edge cost when it was tried. Afterwards ``current.kept`` is the circuit."""
    wiring, grid = current.wiring, np.zeros(current.wiring.allowed.shape)
    trials = _Trials(current, distance, rule, float(distance(current.streams[current.logits][None])[0]))
    for reader in readers_in_order(wiring):
        writers = writers_in_order(wiring, reader, order)
        if current.reach(reader):
            grid[writers, reader] = trials.costs(reader, writers)
        else:
            current.kept[writers, reader] = False
        bar.update(len(writers))
    return grid


class _Trials:
    """Edges on trial, several in a stack, and how many to a stack: a third of the usual way from one that stays to the next."""

    def __init__(self, current: PrunedRun, distance: Distance, rule: _Rule, here: float):
        self.current, self.distance, self.rule, self.here = current, distance, rule, here
        self.tried, self.stayed = 1.0, 0.3

    def costs(self, reader: int, writers: list[int]) -> list[float]:
        """Try a reader's edges in this order, and cut those that may go."""
        carried, matters = self.current.carried(reader)
        costs, left = dict.fromkeys(writers, 0.0), [writer for writer in writers if matters[writer]]
        taken = torch.zeros_like(carried[0])
        while left:
            some = left[: self._guesses(reader)]
            changes = taken + carried[some].cumsum(0)  # as if all before it in the stack were cut
            measured = self.distance(self.current.ends(reader, changes)).tolist()
            rises = [then - now for now, then in pairwise([self.here, *measured])]
            right = next((i for i, rise in enumerate(rises) if self.rule.keeps(rise)), len(some))
            if right:
                self.here, taken = measured[right - 1], changes[right - 1]
            tried = some[: right + 1]
            costs |= zip(tried, rises, strict=False)
            left = left[len(tried) :]
            self._learn(len(tried), right < len(some))
        self.current.cut(reader, [writer for writer in writers if not self.rule.keeps(costs[writer])], taken)
        return list(costs.values())

    def _guesses(self, reader: int) -> int:
        room = max(1, TOKENS_AT_ONCE // self.current.tokens(reader))
        return min(room, max(1, round(self.tried / self.stayed / 3)))

    def _learn(self, tried: int, stays: bool) -> None:
        fades = 0.5 ** (tried / 50)
        self.tried, self.stayed = self.tried * fades + tried, max(0.3, self.stayed * fades + stays)


def _divergence(run: CleanRun) -> Distance:
    """KL from the clean run's prediction: summed over the vocabulary, averaged over prompts."""
    log_p = _logits(run, at_end(run, run["resid_post", run.model.config.n_layers - 1])).log_softmax(-1)
    p = log_p.exp()

    def distance(ends: Tensor) -> np.ndarray:
        some = max(1, LOGITS_AT_ONCE // p.numel())
        return np.concatenate([_mean(_kl(_logits(run, part.flatten(0, 1)))) for part in ends.split(some)])

    def _kl(logits: Tensor) -> Tensor:
        less = logits.log_softmax(-1).unflatten(0, (-1, len(p))).sub_(log_p)  # small where the two agree: sums lose nothing
        return -torch.einsum("bt,vbt->vb", p, less)

    return distance


def _shortfall(run: CleanRun) -> Distance:
    """How far the metric lies below the clean run's, averaged over prompts."""

    def distance(ends: Tensor) -> np.ndarray:
        start = ResidualStart(Site("resid_post", run.model.config.n_layers - 1), ends.flatten(0, 1))
        at = torch.zeros(len(start.value), dtype=torch.long, device=ends.device)
        found, _ = measure(run.model, run.prompts, run.metric, start=start, logits_at=at, variants=len(ends))
        return _mean(run.clean_metric - found)

    return distance


OBJECTIVES: dict[str, Callable[[CleanRun], Distance]] = {"kl": _divergence, "metric": _shortfall}


def _logits(run: CleanRun, ends: Float[Tensor, "row 1 d_model"]) -> Float[Tensor, "row d_vocab"]:
    start = ResidualStart(Site("resid_post", run.model.config.n_layers - 1), ends)
    logits, _ = run.model.run(None, start=start, logits_at="last")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _mean(per_prompt: Float[Tensor, "variant batch"]) -> Float[np.ndarray, "variant"]:
    means = per_prompt.double().mean(1).cpu().numpy()
    if not np.isfinite(means).all():
        raise TaskError(
            "the objective is not finite, so no edge can be compared with the threshold. Look for overflow in half precision "
            "(load the model in float32) or a metric that divides by zero."
        )
    return means


def _check(threshold: float, objective: str, order: str) -> None:
    if not (math.isfinite(threshold) and threshold > 0):
        raise CircuitError(
            f"threshold={threshold} cannot decide which edges to cut: an edge without any effect would be kept, or none. Give "
            "a finite number above 0, in nats (objective='kl') or in units of the metric."
        )
    for what, given, known in (("objective", objective, OBJECTIVES), ("order", order, ORDERS)):
        if given not in known:
            raise CircuitError(f"{what} must be one of {', '.join(known)}, not {given!r}.{nearest(given, known)}")
