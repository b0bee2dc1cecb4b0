"""Is anything missing from a circuit, and is anything in it idle? (Wang et al. 2022, arXiv:2211.00593, section 4.)

A circuit may score as the model does and lack half of the mechanism: a backup that sleeps while the rest is well, or two
omissions that cancel. So take the same parts ``K`` from circuit ``C`` and model ``M`` and see whether they stay alike:

* *completeness*: ``|F(C \\ K) - F(M \\ K)|`` is small for every ``K`` in ``C``. ``F`` is the mean metric.
* *minimality*: for every part ``v`` of ``C`` there is a ``K`` with ``|F(C \\ (K + v)) - F(C \\ K)|`` above 1 % of ``F(M)``.

Nobody can try every ``K``. Wang et al. take random ones (each part in with chance 1/2), whole classes, and those that a
greedy search finds. Their search looks at ten random heads a step and starts ten times; ours looks at all parts and so
needs one start. They knock heads out at the circuit's own positions, we at all, and MLPs as well as heads.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

from circuits.ablation import Ablation
from circuits.graph import Circuit
from circuits.ground_truth import PublishedCircuit
from circuits.knockouts import (
    ROUNDING,
    Classes,
    Names,
    Runs,
    class_sets,
    inside,
    part_name,
    parts_of,
    random_sets,
    search,
)
from circuits.statistics import bootstrap_means, interval, may_be_zero
from mechinterp.errors import CircuitError, TaskError, nearest
from mechinterp.files import read_document, to_document, write_text_atomically
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node
from mechinterp.tasks.base import Task

_KINDS = ("random", "classes", "greedy")
_VERSION = 1
_Result = TypeVar("_Result", "Completeness", "Minimality")


@dataclass(frozen=True)
class Knockout:
    """One ``K``: what ``parts`` are taken out, and the mean metric of model and circuit without them.

    ``gap`` is circuit minus model, with its 95 % bootstrap interval over prompts.
    """

    name: str
    parts: Names
    model: float
    circuit: float
    gap: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Completeness:
    """How far circuit and model come apart when the same parts are taken from both; ``knockouts[0]`` takes nothing.

    ``mean`` and ``max`` are of ``|gap|`` over all knockouts, in units of the metric, with 95 % bootstrap intervals over
    prompts. Noise cannot make ``|gap|`` smaller than nothing, so both lean upwards, ``max`` more than ``mean``.
    """

    facts: Mapping[str, Any]
    kind: str
    clean: float
    mean: float
    mean_interval: tuple[float, float]
    max: float
    max_interval: tuple[float, float]
    knockouts: tuple[Knockout, ...]

    @property
    def worst(self) -> Knockout:
        """The ``K`` with the largest gap."""
        return max(self.knockouts, key=lambda knockout: abs(knockout.gap))

    def save(self, path: str | os.PathLike) -> None:
        """JSON, whole or not at all."""
        _save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Completeness":
        """What ``save`` wrote, equal. ``CircuitError`` names the file and what is wrong with it."""
        return _load(cls, Knockout, "knockouts", path)

    def __str__(self) -> str:
        rows = sorted(self.knockouts[1:], key=lambda knockout: -abs(knockout.gap))[:5]
        lines = [
            f"completeness of {_title(self.facts)}; {self.kind} knockouts of {self.facts['level']}s: {len(self.knockouts)}",
            f"  |F(C \\ K) - F(M \\ K)|  mean {_with_interval(self.mean, self.mean_interval)}"
            f"   max {_with_interval(self.max, self.max_interval)}   F(M) {self.clean:.3f}",
        ]
        for knockout in (self.knockouts[0], *rows):
            gap = f"gap {_with_interval(knockout.gap, knockout.interval, sign='+')}"
            lines.append(f"  {knockout.name:<22} model {knockout.model:+.3f}   circuit {knockout.circuit:+.3f}   {gap}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Effect:
    """What one part does in the circuit without ``given`` (its ``K``).

    ``effect`` is how much the metric falls when the part goes too (positive: it helps), with its 95 % bootstrap interval;
    ``score`` its magnitude as a share of ``F(M)``.
    """

    name: str
    given: Names
    effect: float
    interval: tuple[float, float]
    score: float


@dataclass(frozen=True)
class Minimality:
    """The minimality score of each part of a circuit. ``bar``: the score below which a part counts as idle."""

    facts: Mapping[str, Any]
    clean: float
    bar: float
    effects: tuple[Effect, ...]

    @property
    def below(self) -> Names:
        """The parts whose score is under the bar: nothing shows that they belong in the circuit."""
        return tuple(effect.name for effect in self.effects if effect.score < self.bar)

    def save(self, path: str | os.PathLike) -> None:
        """JSON, whole or not at all."""
        _save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Minimality":
        """What ``save`` wrote, equal. ``CircuitError`` names the file and what is wrong with it."""
        return _load(cls, Effect, "effects", path)

    def __str__(self) -> str:
        below = f"{len(self.below)} of {len(self.effects)} {self.facts['level']}s score below {self.bar:.0%} of F(M)"
        lines = [f"minimality of {_title(self.facts)}", f"  {below} ({self.clean:.3f})"]
        for effect in sorted(self.effects, key=lambda effect: effect.score)[:5]:
            given = f"   without {', '.join(effect.given)}" if effect.given else ""
            moved = _with_interval(effect.effect, effect.interval, sign="+")
            lines.append(f"  {effect.name:<20} {effect.score:6.2%}   effect {moved}{given}")
        return "\n".join(lines)


def completeness(
    model: Transformer,
    task: Task,
    circuit: Circuit,
    *,
    ablation: str | Ablation = "resample",
    knockouts: str = "random",
    classes: Classes | PublishedCircuit | None = None,
    level: str = "node",
    n_random: int = 20,
    n_steps: int = 10,
    seed: int = 0,
    progress: bool = False,
) -> Completeness:
    """The gap between circuit and model without the same parts, for several sets of parts.

    ``level="node"``: a part is a head or an MLP whose output the circuit keeps, and goes with all edges that leave it.
    ``"edge"``: a part is an edge of the circuit. ``"random"`` takes ``n_random`` sets, ``"classes"`` those of ``classes``
    (as far as they are in the circuit), ``"greedy"`` adds, up to ``n_steps`` times, the part that widens the gap most.

    The greedy search picks the widest gap *on these prompts*. For a fair number, measure its sets on fresh ones:
    ``classes={"found": found.worst.parts}``. Cost: two circuits a set, and two a part and step for the search.
    """
    runs = Runs.of(model, task, ablation, progress)
    kept = runs.wiring.mask(circuit)
    parts = parts_of(runs.wiring, kept, level)
    whole = np.ones_like(kept)
    clean = float(runs(whole[None]).mean())

    def both(sets: Sequence[Names]) -> tuple[np.ndarray, np.ndarray]:
        return runs.without(whole, parts, sets), runs.without(kept, parts, sets)

    def widths(sets: Sequence[Names]) -> Float[np.ndarray, "set"]:
        in_model, in_circuit = both(sets)
        return np.abs((in_circuit - in_model).mean(1))

    if knockouts == "random":
        named = random_sets(parts, n_random, seed)
    elif knockouts == "classes":
        named = class_sets(runs.wiring, parts, classes, level)
    elif knockouts == "greedy":
        named = {f"+ {found[-1]}": found for found in search(widths, parts, n_steps, ROUNDING * abs(clean))}
    else:
        raise CircuitError(f"knockouts={knockouts!r} is none of {', '.join(_KINDS)}.{nearest(str(knockouts), _KINDS)}")
    named = {"nothing": (), **named}
    in_model, in_circuit = both(list(named.values()))
    drawn = bootstrap_means(in_circuit - in_model, seed=seed)
    rows = zip(named.items(), in_model.mean(1).tolist(), in_circuit.mean(1).tolist(), _pairs(drawn), strict=True)
    found = tuple(Knockout(name, removed, m, c, c - m, ends) for (name, removed), m, c, ends in rows)
    sizes, drawn_sizes = [abs(knockout.gap) for knockout in found], np.abs(drawn)
    mean_interval, max_interval = _pairs(np.stack([drawn_sizes.mean(0), drawn_sizes.max(0)]))
    facts = runs.facts(n_edges=int(kept.sum()), level=level, seed=seed)
    return Completeness(facts, knockouts, clean, float(np.mean(sizes)), mean_interval, max(sizes), max_interval, found)


def minimality(
    model: Transformer,
    task: Task,
    circuit: Circuit,
    *,
    ablation: str | Ablation = "resample",
    sets: Mapping[Node, Iterable[Node | str]] | Mapping[str, Iterable[Node | str]] | str | None = None,
    level: str = "node",
    bar: float = 0.01,
    n_steps: int = 3,
    seed: int = 0,
    progress: bool = False,
) -> Minimality:
    """What each part of the circuit does, once the parts of its ``K`` are gone. Parts are those of ``completeness``.

    ``sets``: the ``K`` of each part (``published.minimality_sets()``); whether it names the part itself makes no
    difference, and parts outside the circuit are left out. Parts without a set, and all parts by default, get the empty
    one. ``"greedy"`` looks for a ``K`` of up to ``n_steps`` parts that brings out the part most, which takes about two
    circuits for each pair of parts and step. ``TaskError`` where ``F(M)`` may be zero: shares of it mean nothing.
    """
    runs = Runs.of(model, task, ablation, progress)
    kept = runs.wiring.mask(circuit)
    parts = parts_of(runs.wiring, kept, level)
    clean = runs(np.ones_like(kept)[None])[0]
    if may_be_zero(clean, seed):
        raise TaskError(
            f"on {task.name!r} the model scores {clean.mean():.4g} {task.metric_name}, which {len(task)} prompts cannot tell "
            "from zero, and minimality is a share of it. Use another metric, or more prompts."
        )
    whole = abs(float(clean.mean()))

    def moved(name: str, sets: Sequence[Names]) -> Float[np.ndarray, "set"]:
        return np.abs((runs.without(kept, parts, sets) - runs.without(kept, parts, [(*K, name) for K in sets])).mean(1))

    given: dict[str, Names] = dict.fromkeys(parts, ())
    if sets == "greedy":
        for name in parts:
            others = [other for other in parts if other != name]
            found = search(lambda sets, name=name: moved(name, sets), others, n_steps, ROUNDING * whole)
            given[name] = found[-1] if found else ()
    elif isinstance(sets, Mapping):
        for part, members in sets.items():
            name = part_name(runs.wiring, part, level)
            if name in parts:
                given[name] = tuple(one for one in inside(runs.wiring, parts, members, level) if one != name)
    elif sets is not None:
        raise CircuitError(f"sets must be a mapping from parts to their K, 'greedy' or None, not {sets!r}.")
    effects = runs.without(kept, parts, list(given.values()))
    effects = effects - runs.without(kept, parts, [(*K, name) for name, K in given.items()])
    rows = zip(given.items(), effects.mean(1).tolist(), _pairs(bootstrap_means(effects, seed=seed)), strict=True)
    found = tuple(Effect(name, K, effect, ends, abs(effect) / whole) for (name, K), effect, ends in rows)
    return Minimality(runs.facts(n_edges=int(kept.sum()), level=level, seed=seed), float(clean.mean()), bar, found)


def _pairs(samples: Float[np.ndarray, "row resample"]) -> list[tuple[float, float]]:
    """The 95 % interval of each row."""
    return [(float(low), float(high)) for low, high in zip(*interval(samples), strict=True)]


def _title(facts: Mapping[str, Any]) -> str:
    size = f"{facts['n_edges']:,} of {facts['n_edges_in_model']:,} edges, {facts['n_prompts']} prompts"
    return f"{facts['task']} on {facts['model']}: {size}, {facts['metric']}, {facts['ablation']}"


def _with_interval(value: float, ends: tuple[float, float], sign: str = "") -> str:
    return f"{value:{sign}.3f} [{ends[0]:{sign}.3f}, {ends[1]:{sign}.3f}]"


def _save(result: "Completeness | Minimality", path: str | os.PathLike) -> None:
    kind = f"mechinterp {type(result).__name__.lower()}"
    write_text_atomically(path, to_document(kind, _VERSION, asdict(result)))


def _load(cls: type[_Result], row: type[Knockout] | type[Effect], rows: str, path: str | os.PathLike) -> _Result:
    document = read_document(path, f"mechinterp {cls.__name__.lower()}", _VERSION, CircuitError)
    facts = {name: _frozen(value) for name, value in document.items() if name not in ("format", "version")}
    try:
        return cls(**{**facts, rows: tuple(row(**{n: _frozen(v) for n, v in one.items()}) for one in facts[rows])})
    except (TypeError, KeyError, AttributeError) as problem:
        raise CircuitError(f"{os.fspath(path)!r} does not hold a usable {cls.__name__}: {problem}") from problem


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
