"""Faithfulness against size: one ranking, cut at ten places, and the areas that MIB reports of it.

MIB (Mueller et al. 2025, arXiv:2504.13151) cuts a ranking at 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50 and 100 % of all edges.
*CPR* is the area under faithfulness over the fraction kept and *CMD* the area between it and 1, both by trapezoids on the
linear axis, so that everything up to 2 % weighs 1.9 % and the step from half to all weighs half. A circuit that is always
perfect has CMD 0 and CPR 0.999. CPR has no ceiling and rewards parts that help too much: never read it without CMD.
MIB takes CPR from the largest values (``signed``) and CMD from the largest magnitudes; swapping them changes both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from tqdm.auto import tqdm

from circuits.ablation import Ablation
from circuits.ends import Ends
from circuits.scores import Scores
from circuits.statistics import bootstrap_interval, ratio_of_means
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError
from mechinterp.models.transformer import Transformer
from mechinterp.tasks.base import Task

SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # MIB's grid, as shares of all items


@dataclass(frozen=True)
class Curve:
    """Faithfulness at each share of all items, with its 95 % bootstrap interval over prompts.

    ``n_items`` is what was asked for (edges, or heads and MLPs) and ``n_edges`` the edges that the circuit then has.
    ``signed``: the largest values were taken rather than the largest magnitudes.
    """

    n_edges: tuple[int, ...]
    faithfulness: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    shares: tuple[float, ...] = ()
    n_items: tuple[int, ...] = ()
    items: str = "edge"
    signed: bool = False

    @classmethod
    def from_plain(cls, facts: Mapping[str, Any]) -> "Curve":
        """From what ``asdict`` and JSON made of one. ``TypeError`` for something else."""
        plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
        return cls(**plain)

    @property
    def cpr(self) -> float:
        """Area under faithfulness, over the shares that were measured."""
        return _area(self.shares, self.faithfulness)

    @property
    def cmd(self) -> float:
        """Area between faithfulness and 1, over the shares that were measured; 0 is best."""
        return _area(self.shares, [abs(1 - f) for f in self.faithfulness])

    def smallest(self, at_least: float) -> int | None:
        """The smallest measured number of edges that reaches ``at_least`` (larger ones may fall below it again); or None."""
        return next((n for n, f in zip(self.n_edges, self.faithfulness, strict=True) if f >= at_least), None)


def faithfulness_curve(
    model: Transformer,
    task: Task,
    scores: Scores,
    *,
    ablation: str | Ablation = "resample",
    sizes: Sequence[float] = SIZES,
    signed: bool = False,
    greedy: bool = False,
    seed: int = 0,
    progress: bool = False,
    ends: Ends | None = None,
) -> Curve:
    """The curve of one ranking. ``greedy`` cuts from the logits upstream; ``ends`` are those of an earlier curve.

    Cost: one clean and one corrupted forward, and one forward with cut edges for each size that is neither empty nor
    everything, all sizes stacked; small models, where two sizes are the same number of edges, run it once.
    """
    ends, cuts = ends or Ends.of(model, task, ablation), Cuts.of(scores, model, sizes, signed=signed, greedy=greedy)
    with tqdm(total=len(cuts.masks), desc="curve", unit="circuit", disable=not progress) as bar:
        return cuts.curve(ends.gained(cuts.masks, bar), ends.whole, seed)


@dataclass(frozen=True)
class Cuts:
    """The circuits of a curve: which edges each share of the items keeps."""

    scores: Scores
    sizes: tuple[float, ...]
    signed: bool
    counts: tuple[int, ...]
    masks: Bool[np.ndarray, "size edge"]

    @classmethod
    def of(
        cls, scores: Scores, model: Transformer, sizes: Sequence[float], *, signed: bool = False, greedy: bool = False
    ) -> "Cuts":
        """MIB's ``int(share * n)`` items, but at least one. ``CircuitError`` for foreign scores and sizes that are none."""
        _check(scores, Wiring.of(model.config), sizes)
        counts = tuple(max(1, int(share * scores.n_selectable)) for share in sizes)
        return cls(scores, tuple(sizes), signed, counts, scores.masks(counts, signed=signed, greedy=greedy))

    def curve(self, gained: Float[np.ndarray, "size prompt"], whole: Float[np.ndarray, "prompt"], seed: int) -> Curve:
        """From what each circuit gains over the empty one, and what the whole model does."""
        low, high = bootstrap_interval(gained, whole, seed=seed)
        return Curve(
            n_edges=tuple(self.masks.sum(1).tolist()),
            faithfulness=tuple(ratio_of_means(gained, whole).tolist()),
            low=tuple(low.tolist()),
            high=tuple(high.tolist()),
            shares=tuple(map(float, self.sizes)),
            n_items=self.counts,
            items=self.scores.items,
            signed=self.signed,
        )


def _check(scores: Scores, wiring: Wiring, sizes: Sequence[float]) -> None:
    if scores.items not in ("edge", "node") or scores.wiring != wiring:
        raise CircuitError(
            f"these are {scores.items} scores of a model of {_size(scores.wiring)}. "
            f"Give edge or node scores of the model in hand, of {_size(wiring)}."
        )
    if bad := [share for share in sizes if not 0 < share <= 1]:
        raise CircuitError(f"{bad[0]} is no share of the edges. Give sizes above 0 and up to 1, such as 0.02.")


def _size(wiring: Wiring) -> str:
    return f"{wiring.n_edges:,} edges and {len(wiring.writers)} writers"


def _area(shares: Sequence[float], heights: Sequence[float]) -> float:
    widths, edges = np.diff(shares), np.asarray(heights)
    return float((widths * (edges[1:] + edges[:-1]) / 2).sum())
