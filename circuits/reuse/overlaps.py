"""What two or more circuits share, and what they would share by chance.

Circuits are compared as sets of edges, of nodes (heads and MLPs) or of heads alone; scores are cut at a size first. Only
what every one of them judged counts: a method that scored heads, or a published list that names no MLP, says nothing of
MLPs. Overlap is not faithfulness: circuits that share nine in ten of their nodes may do nothing for each other's task
(Hanna et al. 2024, arXiv:2403.17806), which ``compare_tasks`` measures beside it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Bool

from circuits.discovery.stages import Stage
from circuits.reuse.chance import Chance, shared_by_chance, with_same_degrees
from circuits.reuse.chosen import Chosen, Level, Source, judged_by, values_at
from circuits.scores import Scores
from circuits.statistics import rank_correlation
from mechinterp.errors import CircuitError
from mechinterp.nodes import PORTS

SIZES = (0.01, 0.02, 0.05, 0.1, 0.2)
N_DRAWS = 200


@dataclass(frozen=True)
class Overlap:
    """What the circuits called ``names`` have all in common, of the ``n_items`` that all of them judged.

    ``sizes``: how many of these each keeps; ``n_union``: how many any keeps. ``chance``: of sets of these sizes drawn evenly;
    ``same_degrees``: of random circuits with the same degrees (edges only). ``shared``: their names (nodes only).
    ``cut``: the share of the items that scores were cut at; ``stage``: of path patching.
    """

    names: tuple[str, ...]
    level: str
    n_items: int
    sizes: tuple[int, ...]
    n_shared: int
    n_union: int
    chance: Chance
    same_degrees: Chance | None = None
    shared: tuple[str, ...] | None = None
    cut: float | None = None
    stage: str | None = None

    @property
    def jaccard(self) -> float | None:
        """``|A and B| / |A or B|``; None where no circuit keeps anything."""
        return self.n_shared / self.n_union if self.n_union else None

    @property
    def coefficient(self) -> float | None:
        """``|A and B| / min(|A|, |B|)``, the overlap coefficient: 1 if one holds the other. None where one is empty."""
        return self.n_shared / min(self.sizes) if min(self.sizes) else None

    @classmethod
    def from_plain(cls, facts: Mapping[str, Any]) -> "Overlap":
        """From what ``asdict`` and JSON made of one. ``TypeError`` for something else."""
        plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
        plain |= {name: plain[name] and Chance(**plain[name]) for name in ("chance", "same_degrees")}
        return cls(**plain)


def overlap(
    sources: Mapping[str, Source],
    *,
    level: Level = "edge",
    n: int | None = None,
    n_draws: int = N_DRAWS,
    seed: int = 0,
) -> tuple[Overlap, ...]:
    """What each pair of circuits shares and, of more than two, what all of them do.

    ``n``: where scores are cut, each among what it judged itself; ``sizes`` say how many of these all judged. ``n_draws``:
    random circuits with the same degrees behind every number of shared edges, 0 for none. Identical circuits give 1,
    disjoint ones 0. Cost: half a second a circuit for 1,000 edges of GPT-2 small. ``CircuitError`` for fewer than two
    circuits and for circuits of models of different shapes.

    >>> from circuits.wiring import Wiring
    >>> wiring = Wiring(n_layers=1, n_heads=2)
    >>> values = np.eye(wiring.n_edges)
    >>> about = {"method": "eap", "unit": "logit_diff", "model": "toy", "task": "t"}
    >>> first, second = (Scores(wiring, values[at] + values[7], **about) for at in (0, 3))
    >>> (found,) = overlap({"first": first, "second": second}, n=2, n_draws=0)
    >>> found.n_shared, found.jaccard, found.coefficient, round(found.chance.p_value, 3)
    (1, 0.3333333333333333, 0.5, 0.295)
    """
    if n_draws < 0:
        raise CircuitError(f"n_draws={n_draws} is no number of circuits. Give 0 or more.")
    kept = {name: Chosen.of(source, level, n) for name, source in sources.items()}
    _check(kept)
    draws = {}
    if level == "edge" and n_draws:
        draws = {
            name: with_same_degrees(one.wiring, one.kept, n_draws, seed + index, judged=one.judged)
            for index, (name, one) in enumerate(kept.items())
        }
    return tuple(_overlap({name: kept[name] for name in some}, draws) for some in combinations_of(list(kept)))


def overlap_sweep(
    scores: Mapping[str, Scores],
    *,
    level: Level = "edge",
    sizes: Sequence[float] = SIZES,
    n_draws: int = N_DRAWS,
    seed: int = 0,
) -> tuple[Overlap, ...]:
    """``overlap`` at each of ``sizes``, shares of all items that every method judged, instead of at one cut.

    At least one item is kept; in small models two shares may be the same number, which is then given once.
    """
    counts = cut_counts(scores, level, sizes)
    return tuple(
        replace(found, cut=share)
        for n, share in counts.items()
        for found in overlap(scores, level=level, n=n, n_draws=n_draws, seed=seed)
    )


def check_shares(sizes: Sequence[float]) -> None:
    if not sizes or (bad := [share for share in sizes if not 0 < share <= 1]):
        what = f"{bad[0]} is no share of the items" if sizes else "there is no size to cut at"
        raise CircuitError(f"{what}. Give sizes above 0 and up to 1, such as 0.02.")


def cut_counts(scores: Mapping[str, Scores], level: Level, sizes: Sequence[float]) -> dict[int, float]:
    """How many items each share is, of those that all judged, and the first share of which that is true."""
    check_shares(sizes)
    kept = {name: Chosen.of(one, level, 1) for name, one in scores.items()}
    _check(kept)
    n_items = int(_judged_by_all(list(kept.values())).sum())
    counts: dict[int, float] = {}
    for share in sizes:
        counts.setdefault(max(1, int(share * n_items + 1e-9)), float(share))
    return counts


def stage_overlaps(traces: Mapping[str, Sequence[Stage]]) -> tuple[Overlap, ...]:
    """What the heads kept by each stage of path patching (``staged``) share, and all stages together.

    The last rows, ``stage="all"``, count (stage, head) slots: a head kept by two stages is two. Merullo et al. 2024
    (arXiv:2310.08744) give 25/32 = 78 % "per path patching stage", which their text lets be read both as the overlap
    coefficient over such slots and as Jaccard's index: so here are both. Even draws are made stage by stage, each from the
    parts that could send, and the numbers added. Stages beyond the shorter trace have nothing to be compared with and are
    left out. ``CircuitError`` for fewer than two traces, and for an empty one.
    """
    if empty := [name for name, stages in traces.items() if not stages]:
        raise CircuitError(f"the trace of {empty[0]!r} has no stage, so there is nothing to compare.")
    kept = {name: [_of_stage(stage) for stage in stages] for name, stages in traces.items()}
    _check({name: stages[0] for name, stages in kept.items()})
    found: list[Overlap] = []
    for some in combinations_of(list(traces)):
        rows = [_measured(at, some) for at in zip(*(kept[name] for name in some), strict=False)]
        found += [replace(row, stage=_stage_name(traces[some[0]][at], at)) for at, row in enumerate(rows)]
        found.append(_slots(rows))
    return tuple(found)


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's, of two methods' or tasks' scores over the ``n_items`` that both judged: by magnitude and by value.

    None where one side has no order.
    """

    names: tuple[str, str]
    level: str
    n_items: int
    magnitude: float | None
    signed: float | None


def rank_correlations(scores: Mapping[str, Scores], *, level: Level = "edge") -> tuple[RankCorrelation, ...]:
    """How alike each pair ranks all items, without any cut. Most items matter to no task, and their order is noise."""
    kept = {name: Chosen.of(one, level, 1) for name, one in scores.items()}
    _check(kept)
    found = []
    for one, other in combinations(scores, 2):
        both = _judged_by_all([kept[one], kept[other]])
        values = [values_at(scores[name], level)[both] for name in (one, other)]
        by_size, by_value = rank_correlation(*map(np.abs, values)), rank_correlation(*values)
        found.append(RankCorrelation((one, other), level, int(both.sum()), by_size, by_value))
    return tuple(found)


def combinations_of(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Each pair and, of more than two, all together."""
    yield from combinations(names, 2)
    if len(names) > 2:
        yield tuple(names)


def _measured(kept: Sequence[Chosen], names: Sequence[str]) -> Overlap:
    judged = _judged_by_all(kept)
    masks = np.stack([one.kept & judged for one in kept])
    both, sizes, n_items = masks.all(0), tuple(masks.sum(1).tolist()), int(judged.sum())
    n_shared, shared = int(both.sum()), None
    if kept[0].level != "edge":
        shared = tuple(str(kept[0].wiring.writers[item]) for item in np.flatnonzero(both))
    chance = Chance.exact(shared_by_chance(n_items, sizes), n_shared)
    return Overlap(tuple(names), kept[0].level, n_items, sizes, n_shared, int(masks.any(0).sum()), chance, shared=shared)


def _of_stage(stage: Stage) -> Chosen:
    wiring, kept = stage.scores.wiring, set(stage.kept)
    judged = judged_by(stage.scores, "node")
    return Chosen(wiring, "node", judged, judged & np.array([writer in kept for writer in wiring.writers]))


def _stage_name(stage: Stage, at: int) -> str:
    ports = "".join(port for port in PORTS if any(receiver.port == port for receiver in stage.receivers))
    return f"{at + 1}: {ports or 'logits'}" + (f"@{stage.position}" if stage.position else "")


def _slots(rows: Sequence[Overlap]) -> Overlap:
    """All stages as one: sizes and shared slots are sums, and so is what chance shares."""
    chances = [shared_by_chance(row.n_items, row.sizes) for row in rows]
    n_shared = sum(row.n_shared for row in rows)
    return Overlap(
        names=rows[0].names,
        level=rows[0].level,
        n_items=sum(row.n_items for row in rows),
        sizes=tuple(sum(sizes) for sizes in zip(*(row.sizes for row in rows), strict=True)),
        n_shared=n_shared,
        n_union=sum(row.n_union for row in rows),
        chance=Chance.exact(reduce(np.convolve, chances), n_shared),
        stage="all",
    )


def _overlap(kept: Mapping[str, Chosen], draws: Mapping[str, Bool[np.ndarray, "draw edge"]]) -> Overlap:
    found = _measured(list(kept.values()), list(kept))
    if not draws:
        return found
    together = np.logical_and.reduce([draws[name] for name in kept]) & _judged_by_all(list(kept.values()))
    return replace(found, same_degrees=Chance.drawn(together.sum(1), found.n_shared))


def _judged_by_all(kept: Sequence[Chosen]) -> Bool[np.ndarray, "item"]:
    return np.logical_and.reduce([one.judged for one in kept])


def _check(kept: Mapping[str, Chosen]) -> None:
    if len(kept) < 2:
        raise CircuitError(f"it takes two circuits to share anything; there are {len(kept)}: {', '.join(kept) or 'none'}.")
    (name, first), *others = kept.items()
    for other, one in others:
        if one.wiring != first.wiring:
            raise CircuitError(
                f"{name!r} and {other!r} are of models of different shapes, {first.wiring} and {one.wiring}: no part of one "
                "is a part of the other. Compare circuits of one model."
            )
    if not _judged_by_all(list(kept.values())).any():
        raise CircuitError(f"there is no {first.level} that {', '.join(kept)} all judged. Compare at another level.")
