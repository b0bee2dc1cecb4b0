"""Scores: one number for each edge (or part), with the method, the unit and the settings that it came from.

A score says **how much the metric falls if this item is cut**: positive helps, negative hurts. Methods that watch and cut
nothing (``discovery.WATCHING``: codes, probes, divergence) say what an item tells instead, in the ``unit`` that they name.
Circuits take the largest magnitudes, unless asked for the largest values (``signed=True``).
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from circuits import selection
from circuits.effects import panels_of
from circuits.graph import Circuit
from circuits.items import Items, count_of, names_of
from circuits.scores_html import scores_html
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError, UnknownNode, nearest
from mechinterp.files import array_from_text, array_to_text, read_document, to_document, write_text_atomically
from mechinterp.nodes import Node

_KIND, _VERSION = "mechinterp scores", 2


@dataclass(frozen=True, eq=False)
class Scores:
    """One finite number an item, in ``unit``. Values are copied, as float64, and cannot be written to.

    ``items``: "edge" (in wiring order), "node" (one a writer), "port" (q of each head, k and v of each head or group, in the
    wiring's order of readers), "neuron" (an MLP's hidden units, layer by layer) or "latent" (an autoencoder's latents and its
    error, layer by layer; ``settings["latents"]`` says how many latents each layer has). ``per_prompt`` holds every prompt's
    own scores, for intervals and stability; ``by_span`` splits the values by named position, and the spans sum to the values.
    ``settings`` are the keywords of the method and must survive JSON. ``settings["judged"] = ["head"]`` says that a
    method scores heads alone: what it did not judge it cannot cut, so circuits keep all MLPs as they keep the input.

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
    by_span: Mapping[str, Float[np.ndarray, "item"]] | None = None
    items: Items = "edge"

    def __post_init__(self):
        if self.items not in get_args(Items):
            raise CircuitError(f"items must be one of {', '.join(map(repr, get_args(Items)))}, not {self.items!r}.")
        object.__setattr__(self, "values", self._checked("values", np.array(self.values, dtype=np.float64)))
        if self.per_prompt is not None:
            object.__setattr__(self, "per_prompt", self._checked("per_prompt", np.array(self.per_prompt), n_axes=2))
        if self.by_span is not None:
            spans = {name: self._checked(name, np.array(of, dtype=np.float64)) for name, of in self.by_span.items()}
            object.__setattr__(self, "by_span", spans)
        object.__setattr__(self, "settings", dict(self.settings))
        try:
            _settings_text(self.settings)
        except (TypeError, ValueError) as problem:
            raise CircuitError(f"settings must be plain JSON values, to be saved with the scores: {problem}.") from None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def names(self) -> tuple[str, ...]:
        """What ``values`` counts: edges ``m4->a9.h6.q``, writers ``a9.h6``, ports ``a9.h6.q``, neurons ``m4.n17`` or latents
        ``f5.1234``, each layer's followed by ``f5.error``."""
        return names_of(self.items, self.wiring, self.settings, len(self))

    @property
    def nodes(self) -> Float[np.ndarray, "writer"]:
        """One score a writer: node scores as they are; edge scores summed, with their signs, over a writer's edges.

        For attribution patching the two agree: the edges out of a node add up to the attribution of its output.
        """
        if self.items == "edge":
            return np.bincount(self.wiring.edge_writer, weights=self.values, minlength=len(self.wiring.writers))
        self._check_items("edge", "node")
        return self.values

    def order(self, signed: bool = False) -> Int[np.ndarray, "item"]:
        """Indices of all items, best first: by magnitude, or by value if ``signed``. Ties stay in wiring order."""
        return selection.best_first(self._key(signed))

    def strongest(self, n: int = 10, signed: bool = False) -> list[tuple[str, float]]:
        """Names and values of the ``n`` best items (all of them, if there are fewer)."""
        names = self.names
        return [(names[item], float(self.values[item])) for item in self.order(signed)[:n]]

    def top(self, n: int, *, signed: bool = False) -> Circuit:
        """The circuit of the ``n`` best edges; of node scores, the edges among the ``n`` best heads and MLPs (and what was
        not judged).

        Ties at the cut are broken by wiring order; ``circuit.graph["ties_at_cut"]`` counts the items left out that
        score exactly as the last one kept. ``CircuitError`` unless 1 <= n <= the number of edges (of heads and MLPs).
        """
        mask = self.masks([n], signed=signed)[0]
        key = np.sort(self._selectable(signed))[::-1]
        ties = int((key[n:] == key[n - 1]).sum())
        return self._circuit(mask, signed, ties_at_cut=ties)

    def among(self, parts: Node | str | Iterable[Node | str]) -> Circuit:
        """The circuit of the edges among these heads and MLPs, and all that was not judged: a method's own choice of parts.

        ``CircuitError`` for edge scores, ``UnknownNode`` for what is no head or MLP that was judged.
        """
        self._check_items("node")
        open_to_choice = {str(self.wiring.writers[w]): w for w in np.flatnonzero(self._judged)}
        kept = ~self._judged
        for name in map(str, [parts] if isinstance(parts, Node | str) else parts):
            if name not in open_to_choice:
                raise UnknownNode(f"{name!r} is not among the parts that were scored.{nearest(name, open_to_choice)}")
            kept[open_to_choice[name]] = True
        return self._circuit(selection.among(self.wiring, kept), signed=False, selection="named")

    def greedy(self, n: int, *, signed: bool = False) -> Circuit:
        """The circuit of ``n`` edges taken from the logits upstream: each time the best edge whose reader is in.

        Every edge then has a way to the logits, though perhaps none from the input (see ``Circuit.pruned``). Scores
        that compare only within a reader (information flow) are cut this way. Errors as in ``top``.
        """
        self._check_items("edge")
        self._check_counts([n], len(self))
        return self._circuit(selection.greedy(self.wiring, self._key(signed), n), signed, selection="greedy")

    def above(self, threshold: float, *, signed: bool = False) -> Circuit:
        """The circuit of the edges whose magnitude (value if ``signed``) is at least ``threshold``; it may be empty.

        At least, not more than: ACDC removes an edge when its effect is *below* its threshold.
        """
        self._check_items("edge")
        if not np.isfinite(threshold) or (threshold < 0 and not signed):
            raise CircuitError(
                f"The threshold {threshold} keeps nothing out: magnitudes are finite and not negative. "
                "Give a number of at least 0, or signed=True to compare values."
            )
        return self._circuit(self._key(signed) >= threshold, signed, threshold=float(threshold))

    def masks(self, counts: Sequence[int], *, signed: bool = False, greedy: bool = False) -> Bool[np.ndarray, "size edge"]:
        """Which edges the circuits of these many edges (node scores: heads and MLPs) keep, without making the graphs.

        Row by row what ``top(n)`` keeps, or ``greedy(n)``; errors as there.
        """
        self._check_items("edge", "node")
        key = self._selectable(signed)
        self._check_counts(counts, len(key))
        if self.items == "node":
            kept = np.repeat(~self._judged[None], len(counts), 0)
            kept[:, self._judged] = [selection.strongest(key, n) for n in counts]
            return np.stack([selection.among(self.wiring, nodes) for nodes in kept])
        choose = selection.greedy if greedy else lambda _, key, n: selection.strongest(key, n)
        return np.stack([choose(self.wiring, key, n) for n in counts])

    def components(self) -> dict[Node, float]:
        """How strong each head and MLP is, strongest first: the sum of ``|score|`` over the edges that *leave* it.

        In the scores' unit. What enters a part is not counted, or each edge would count twice, and what heads share oftener.
        Unlike ``nodes`` this does not cancel: a head that helps one reader and hurts another is strong. For node scores,
        ``|score|`` itself.
        """
        self._check_items("edge", "node")
        sums = np.abs(self.values)
        if self.items == "edge":
            sums = np.bincount(self.wiring.edge_writer, weights=sums, minlength=len(self.wiring.writers))
        ranked = np.argsort(-sums, kind="stable").tolist()
        return {self.wiring.writers[w]: float(sums[w]) for w in ranked if self.wiring.writers[w].kind != "input"}

    def save(self, path: str | os.PathLike) -> None:
        """JSON, values by name; whole or not at all. ``per_prompt`` is packed, and costs 5 bytes a number."""
        facts = {name: getattr(self, name) for name in ("method", "unit", "model", "task", "items")}
        content = {"wiring": self.wiring.facts, **facts, "settings": self.settings}
        content["values"] = dict(zip(self.names, self.values.tolist(), strict=True))
        if self.per_prompt is not None:
            content["per_prompt"] = array_to_text(self.per_prompt)
        if self.by_span is not None:
            content["by_span"] = {name: array_to_text(values) for name, values in self.by_span.items()}
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
            and list(self.by_span or ()) == list(other.by_span or ())
            and all(np.array_equal(of, (other.by_span or {})[name]) for name, of in (self.by_span or {}).items())
        )

    def __repr__(self) -> str:
        what = f"{self.task!r} on {self.model!r} by {self.method!r}"
        return f"Scores({what}: {len(self):,} {self.items}s in {self.unit})"

    def _repr_html_(self) -> str:
        panels = panels_of(self.wiring, self.items, self.values, self.settings)
        return scores_html(repr(self), panels, self.strongest(12), self.unit, is_summed=self.items == "edge")

    def _key(self, signed: bool) -> Float[np.ndarray, "item"]:
        return self.values if signed else np.abs(self.values)

    def _circuit(self, mask: np.ndarray, signed: bool, **facts: Any) -> Circuit:
        settings = _settings_text(self.settings) if self.settings else None
        made = {"model": self.model, "task": self.task, "method": self.method, "unit": self.unit, "settings": settings}
        weights = self.values if self.items == "edge" else None
        return self.wiring.circuit(mask, weights, **made, signed=signed, **facts)

    @property
    def n_selectable(self) -> int:
        """How many items circuits choose among: all edges, or the heads and MLPs that were judged."""
        return int(self._judged.sum()) if self.items == "node" else len(self)

    @property
    def _judged(self) -> Bool[np.ndarray, "writer"]:
        """Of node scores, which writers can be cut: not the input, nor MLPs where only heads were judged."""
        kinds = self.settings.get("judged", ["head", "mlp"])
        return np.array([writer.kind != "input" and writer.kind in kinds for writer in self.wiring.writers])

    def _selectable(self, signed: bool) -> Float[np.ndarray, "item"]:
        """The keys of what ``top`` chooses among."""
        key = self._key(signed)
        return key[self._judged] if self.items == "node" else key

    def _check_items(self, *allowed: str) -> None:
        if self.items not in allowed:
            raise CircuitError(
                f"This asks for {' or '.join(allowed)} scores, and these are {self.items} scores. Read them with "
                "strongest(), or score with a method of the other kind."
            )

    def _check_counts(self, counts: Sequence[int], available: int) -> None:
        for n in counts:
            if not 1 <= n <= available:
                remedy = f"ask for 1 to {available}" if available else "this model has none"
                raise CircuitError(f"A circuit of {n} {self.items}s cannot be cut out of {available} scored ones: {remedy}.")

    def _checked(self, name: str, values: np.ndarray, n_axes: int = 1) -> Float[np.ndarray, "..."]:
        n_items = count_of(self.items, self.wiring, self.settings, values.shape[-1] if values.ndim else 0)
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
    if "per_prompt" in document:
        fields["per_prompt"] = array_from_text(document["per_prompt"])
    if "by_span" in document:
        fields["by_span"] = {name: array_from_text(values) for name, values in document["by_span"].items()}
    return fields
