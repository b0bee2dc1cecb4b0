"""Scores: one number for each edge (or each writer), with the method, the unit and the settings that it came from.

Everywhere a score says **how much the metric falls if this item is cut**: positive helps, negative hurts. Circuits take
the largest magnitudes, unless asked for the largest values (``signed=True``).
"""

import json
import os
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from circuits.graph import Circuit
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError
from mechinterp.files import read_document, to_document, write_text_atomically
from mechinterp.nodes import Node

_KIND, _VERSION = "mechinterp scores", 1


@dataclass(frozen=True, eq=False)
class Scores:
    """One finite number an item, in ``unit``. Values are copied, as float64, and cannot be written to.

    ``per_prompt`` keeps every prompt's own score, for bootstrap intervals. ``items``: "edge" (in wiring order) or
    "node" (one a writer). ``settings`` are the keywords of the method and must survive JSON.

    Raises ``CircuitError`` for a wrong length and for values that are not finite.

    >>> wiring = Wiring(n_layers=1, n_heads=1)
    >>> scores = Scores(wiring, np.arange(wiring.n_edges) - 4.0, method="eap", unit="logit_diff", model="toy", task="t")
    >>> scores.strongest(2)
    [('input->a0.h0.q', -4.0), ('input->a0.h0.k', -3.0)]
    >>> scores.top(2, signed=True).edges_kept
    [(Node('a0.h0'), Node('logits')), (Node('m0'), Node('logits'))]
    """

    wiring: Wiring
    values: Float[np.ndarray, "item"]
    _: KW_ONLY
    method: str
    unit: str
    model: str
    task: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    per_prompt: Float[np.ndarray, "prompt item"] | None = None
    items: Literal["edge", "node"] = "edge"

    def __post_init__(self):
        if self.items not in ("edge", "node"):
            raise CircuitError(f"items must be 'edge' or 'node', not {self.items!r}.")
        object.__setattr__(self, "values", self._checked("values", self.values, n_axes=1))
        if self.per_prompt is not None:
            object.__setattr__(self, "per_prompt", self._checked("per_prompt", self.per_prompt, n_axes=2))
        object.__setattr__(self, "settings", dict(self.settings))
        try:
            _settings_text(self.settings)
        except (TypeError, ValueError) as problem:
            raise CircuitError(f"settings must be plain JSON values, to be saved with the scores: {problem}.") from None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def names(self) -> tuple[str, ...]:
        """What ``values`` counts: edges ``m4->a9.h6.q`` in wiring order, or writers ``a9.h6``."""
        return self.wiring.edge_names if self.items == "edge" else tuple(map(str, self.wiring.writers))

    @property
    def nodes(self) -> Float[np.ndarray, "writer"]:
        """One score a writer: node scores as they are; edge scores summed, with their signs, over a writer's edges.

        For attribution patching the two agree: the edges out of a node add up to the attribution of its output.
        """
        if self.items == "node":
            return self.values
        return np.bincount(self.wiring.edge_writer, weights=self.values, minlength=len(self.wiring.writers))

    def order(self, signed: bool = False) -> Int[np.ndarray, "item"]:
        """Indices of all items, best first: by magnitude, or by value if ``signed``. Ties stay in wiring order."""
        return np.argsort(-self._key(signed), kind="stable")

    def strongest(self, n: int = 10, signed: bool = False) -> list[tuple[str, float]]:
        """Names and values of the ``n`` best items (all of them, if there are fewer)."""
        return [(self.names[item], float(self.values[item])) for item in self.order(signed)[:n]]

    def top(self, n: int, *, signed: bool = False) -> Circuit:
        """The circuit of the ``n`` best edges.

        Ties at the cut are broken by wiring order; ``circuit.graph["ties_at_cut"]`` counts the edges left out that
        score exactly as the last one kept. ``CircuitError`` unless 1 <= n <= number of edges.
        """
        self._check_edges()
        if not 1 <= n <= len(self):
            remedy = f"ask for 1 to {len(self)}" if len(self) else "this model has none"
            raise CircuitError(f"A circuit of {n} edges cannot be cut out of {len(self)} scored edges: {remedy}.")
        order, key = self.order(signed), self._key(signed)
        mask = np.zeros(len(self), dtype=bool)
        mask[order[:n]] = True
        ties = int((key[order[n:]] == key[order[n - 1]]).sum())
        return self._circuit(mask, signed, ties_at_cut=ties)

    def above(self, threshold: float, *, signed: bool = False) -> Circuit:
        """The circuit of the edges whose magnitude (value if ``signed``) is at least ``threshold``; it may be empty.

        At least, not more than: ACDC removes an edge when its effect is *below* its threshold.
        """
        self._check_edges()
        if not np.isfinite(threshold) or (threshold < 0 and not signed):
            raise CircuitError(
                f"The threshold {threshold} keeps nothing out: magnitudes are finite and not negative. "
                "Give a number of at least 0, or signed=True to compare values."
            )
        return self._circuit(self._key(signed) >= threshold, signed, threshold=float(threshold))

    def components(self) -> dict[Node, float]:
        """How strong each head and MLP is, strongest first: the sum of ``|score|`` over the edges that *leave* it.

        In the scores' unit. What enters a part is not counted, or each edge would count twice. Unlike ``nodes`` this
        does not cancel: a head that helps one reader and hurts another is strong. For node scores, ``|score|`` itself.
        """
        sums = np.abs(self.values)
        if self.items == "edge":
            sums = np.bincount(self.wiring.edge_writer, weights=sums, minlength=len(self.wiring.writers))
        ranked = np.argsort(-sums, kind="stable").tolist()
        return {self.wiring.writers[w]: float(sums[w]) for w in ranked if self.wiring.writers[w].kind != "input"}

    def save(self, path: str | os.PathLike) -> None:
        """JSON, values by name; whole or not at all. ``per_prompt`` costs about 20 bytes a number."""
        facts = {name: getattr(self, name) for name in ("method", "unit", "model", "task", "items")}
        content = {"wiring": self.wiring.facts, **facts, "settings": self.settings}
        content["values"] = dict(zip(self.names, self.values.tolist(), strict=True))
        if self.per_prompt is not None:
            content["per_prompt"] = self.per_prompt.tolist()
        write_text_atomically(path, to_document(_KIND, _VERSION, content))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Scores":
        """What ``save`` wrote, equal. ``CircuitError`` names the file and what is wrong with it."""
        document = read_document(path, _KIND, _VERSION, CircuitError)
        try:
            scores = cls(**_fields(document))
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            what = f"it lacks {problem}" if isinstance(problem, KeyError) else problem
            raise CircuitError(f"{os.fspath(path)!r} does not hold usable scores: {what}") from problem
        if list(document["values"]) != list(scores.names):
            raise CircuitError(f"{os.fspath(path)!r} does not name the {scores.items}s of its wiring in their order.")
        return scores

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Scores):
            return NotImplemented
        facts = ("wiring", "method", "unit", "model", "task", "settings", "items")
        return (
            all(getattr(self, name) == getattr(other, name) for name in facts)
            and np.array_equal(self.values, other.values)
            and _equal_or_absent(self.per_prompt, other.per_prompt)
        )

    def __repr__(self) -> str:
        what = f"{self.task!r} on {self.model!r} by {self.method!r}"
        return f"Scores({what}: {len(self):,} {self.items}s in {self.unit})"

    def _key(self, signed: bool) -> Float[np.ndarray, "item"]:
        return self.values if signed else np.abs(self.values)

    def _circuit(self, mask: np.ndarray, signed: bool, **facts: Any) -> Circuit:
        settings = _settings_text(self.settings) if self.settings else None
        made = {"model": self.model, "task": self.task, "method": self.method, "unit": self.unit, "settings": settings}
        return self.wiring.circuit(mask, self.values, **made, signed=signed, **facts)

    def _check_edges(self) -> None:
        if self.items != "edge":
            raise CircuitError(
                "Circuits are cut out of edge scores, and these are node scores. Read them with strongest() or nodes."
            )

    def _checked(self, name: str, values: Any, n_axes: int) -> Float[np.ndarray, "..."]:
        values = np.array(values, dtype=np.float64)
        n_items = self.wiring.n_edges if self.items == "edge" else len(self.wiring.writers)
        if values.ndim != n_axes or values.shape[-1] != n_items:
            wanted = f"({n_items},)" if n_axes == 1 else f"(n_prompts, {n_items})"
            raise CircuitError(f"{name} must have one number a {self.items}, shape {wanted}, not {values.shape}.")
        if n_bad := int((~np.isfinite(values)).sum()):
            raise CircuitError(
                f"{n_bad:,} of {values.size:,} numbers in {name} are not finite, so they cannot be ranked. Look for "
                "overflow in half precision (load the model in float32) or a metric that divides by zero."
            )
        values.setflags(write=False)
        return values


def _equal_or_absent(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is other if one is None or other is None else np.array_equal(one, other)


def _settings_text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, allow_nan=False)


def _fields(document: dict[str, Any]) -> dict[str, Any]:
    texts = ("method", "unit", "model", "task", "items")
    if wrong := [name for name in texts if not isinstance(document[name], str)]:
        raise CircuitError(f"{wrong[0]} must be text, not {document[wrong[0]]!r}.")
    fields = {name: document[name] for name in (*texts, "settings")}
    fields |= {"wiring": Wiring(**document["wiring"]), "values": np.array(list(document["values"].values()), float)}
    return fields | ({"per_prompt": np.array(document["per_prompt"], float)} if "per_prompt" in document else {})
