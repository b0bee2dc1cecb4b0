"""An attribution graph as the pages of circuit-tracer and Neuronpedia want it: ids, numbers and labels of every node.

The format is Neuronpedia's ``graph-schema.json``. It was made for features of transcoders; its ``feature_type`` is free
text, and ours are "attention head", "mlp", "embedding" and "logit" (and "attention latent", "attention error", "neuron" for
circuits of those). What the schema does not say and the pages do:

* The label of the logit must hold ``(p=0.620)``, and its token between the first two double quotes, or the page throws.
* One number, Cantor's pairing of layer and index, tells the parts of a layer apart; an MLP counts as head ``n_heads``.
* Features that stand in more than two thirds of the prompt's columns are deleted, so a prompt needs two tokens.
* A graph whose highest layer is 0 is "No layer found": a one-layer model's layer is shown as layer 1.
* ``node_threshold`` hides nodes without asking, so it is left out; ``influence`` is filled for who sets it by hand.
* "cross layer transcoder" makes the page fetch descriptions from a server. None of our types does.
* Everything stays readable by circuit-tracer's own stricter reader: ``feature`` an int, ``layer`` a string.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import fsum
from typing import Any

from circuits.attribution_links import Links, Place, Term
from circuits.edges import counted
from mechinterp.nodes import Node

_TYPES = {
    "head": "attention head",
    "mlp": "mlp",
    "neuron": "neuron",
    "latent": "attention latent",
    "error": "attention error",
    "input": "embedding",
    "logits": "logit",
}
PINNED = 8  # of the strongest heads and MLPs, drawn as the subgraph when the page opens


@dataclass(frozen=True)
class Columns:
    """The prompt above the graph. ``ids`` are the tokens' in the vocabulary; the answer's stands in the logit's id.

    ``probability`` of the answer, from 0 to 1; None where no model was asked, which the page shows as 0.
    """

    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    text: str
    answer: str = "?"
    answer_id: int = 0
    probability: float | None = None


@dataclass(frozen=True)
class Sheet:
    """All that a document is made of. ``labels`` say more than the part's name; ``alone`` are places without links."""

    columns: Columns
    links: Links
    facts: Mapping[str, Any]
    slug: str
    description: str
    labels: Mapping[Place, str] = field(default_factory=dict)
    attributes: Mapping[Node, Mapping[str, Any]] = field(default_factory=dict)
    alone: frozenset[Place] = frozenset()

    def document(self) -> dict[str, Any]:
        """The whole file, as it goes into JSON."""
        shares, places = self.links.shares(), sorted(self.links.places | self.alone, key=lambda place: (place[0], place[1]))
        ids = {place: self._id(*place) for place in places}
        strongest = sorted(shares, key=lambda place: (shares[place], place[0], place[1]))
        pinned = [ids[place] for place in strongest if place[0].layer is not None][:PINNED]
        logits = [ids[place] for place in places if place[0].kind == "logits"]
        return {
            "metadata": self._metadata(),
            "qParams": {"pinnedIds": pinned + logits, "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
            "nodes": [self._node(place, ids[place], shares.get(place, 1.0)) for place in places],
            "links": [
                {
                    "source": ids[source],
                    "target": ids[target],
                    "weight": self.links.weight((source, target)),
                    "edges": by_reader(terms),
                }
                for (source, target), terms in self.links.terms.items()
            ],
        }

    def _metadata(self) -> dict[str, Any]:
        hidden = {"n_edges": self.links.n_hidden, "strength": self.links.hidden, "shown_strength": self.links.shown}
        left_out = ""
        if self.links.n_hidden:
            share = self.links.hidden / (self.links.hidden + self.links.shown)
            parts = counted(self.links.n_hidden, "weaker part")
            left_out = f" Left out: {parts} of edges, {100 * share:.2g} % of the sum of magnitudes."
        shifted = " Layer 0 is shown as layer 1." if self._shift else ""
        return {
            "slug": plain(self.slug),
            "scan": plain(str(self.facts.get("model", "unknown"))),
            "transcoder_list": [],
            "prompt_tokens": list(self.columns.tokens),
            "prompt": self.columns.text,
            "schema_version": 1,
            "info": {"description": self.description + left_out + shifted, "generator": {"name": "mechinterp-toolkit"}},
            "mechinterp": {"facts": dict(self.facts), "hidden": hidden},
        }

    def _node(self, place: Place, node_id: str, influence: float) -> dict[str, Any]:
        part, column = place
        is_logit = part.kind == "logits"
        kept = dict(self.attributes.get(part, {}))
        return {
            "node_id": node_id,
            "feature": self._feature(part, column),
            "layer": self._layer(part),
            "ctx_idx": column,
            "feature_type": _TYPES[part.kind],
            "jsNodeId": node_id,  # pages pin by either, so both are one
            "clerp": self._label(place),
            "token_prob": (self.columns.probability or 0.0) if is_logit else 0.0,
            "is_target_logit": is_logit,
            "run_idx": 0,
            "reverse_ctx_idx": 0,
            "influence": influence,
            "activation": None,
            "part": str(part),
            **({"attributes": kept} if kept else {}),
        }

    def _label(self, place: Place) -> str:
        part, column = place
        if part.kind == "logits":
            return f'Output "{quotable(self.columns.answer)}" (p={self.columns.probability or 0.0:.3f})'
        if part.kind == "input":
            return f'Emb: "{quotable(self.columns.tokens[column])}"'
        said = self.labels.get(place)
        return f"{part}: {said}" if said else str(part)

    def _id(self, part: Node, column: int) -> str:
        if part.kind == "input":
            return f"E_{self.columns.ids[column]}_{column}"
        if part.kind == "logits":
            return f"{self._layer(part)}_{self.columns.answer_id}_{column}"
        index = {"mlp": "mlp", "neuron": f"n{part.index}", "latent": f"f{part.index}", "error": "error"}.get(part.kind)
        at = "" if part.pos is None or part.pos == column else f"_{part.pos}"
        return f"{self._layer(part)}_{index or part.index}_{column}{at}"

    def _feature(self, part: Node, column: int) -> int:
        """A head's is that of its index; MLP, error, latents and neurons follow behind the heads, none twice."""
        if part.kind in ("input", "logits"):
            return column if part.kind == "input" else self.columns.answer_id
        behind = {"mlp": 0, "error": 1, "latent": 2 + 2 * (part.index or 0), "neuron": 3 + 2 * (part.index or 0)}
        index = part.index or 0 if part.kind == "head" else self._n_heads + behind[part.kind]
        return cantor(int(self._layer(part)), index)

    def _layer(self, part: Node) -> str:
        if part.kind == "input":
            return "E"
        return str((self._n_layers + 1 if part.layer is None else part.layer) + self._shift)

    @cached_property
    def _shift(self) -> int:
        return int({part.layer for part in self._parts if part.layer is not None} == {0})

    @cached_property
    def _n_layers(self) -> int:
        highest = max((part.layer + 1 for part in self._parts if part.layer is not None), default=0)
        return int(self.facts.get("n_layers", highest))

    @cached_property
    def _n_heads(self) -> int:
        heads = (part.index for part in self._parts if part.kind == "head")
        return int(self.facts.get("n_heads", max((index + 1 for index in heads if index is not None), default=0)))

    @cached_property
    def _parts(self) -> set[Node]:
        return {part for part, _ in self.links.places | self.alone}


def by_reader(terms: Sequence[Term]) -> dict[str, float | None]:
    """A link's weight by the port (or part) that reads it; None where nothing is scored.

    >>> by_reader([Term((Node.mlp(0), 2), (Node.head(1, 6), 3), Node.head(1, 6, "k"), 0.5)])
    {'a1.h6.k': 0.5}
    """
    weights: dict[str, list[float]] = {str(term.reader): [] for term in terms}
    for term in terms:
        weights[str(term.reader)] += [] if term.weight is None else [term.weight]
    return {reader: fsum(some) if some else None for reader, some in weights.items()}


def cantor(layer: int, index: int) -> int:
    """Cantor's pairing: a number for every pair, as circuit-tracer numbers its features.

    >>> cantor(9, 6)
    126
    """
    return (layer + index) * (layer + index + 1) // 2 + index


def plain(name: str) -> str:
    """Letters, digits, ``_``, ``.`` and ``-``, which is all that slugs and models may hold.

    >>> plain("ioi on my model")
    'ioi-on-my-model'
    """
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-") or "circuit"


def quotable(token: str) -> str:
    """Without double quotes, since pages read what stands between the first two."""
    return token.replace('"', "'")
