"""Published circuits as values: who found which heads, reading what, at which positions, and under which ablation.

The circuits themselves stand in ``published.py``, and in ``class_edges.py`` the rules that make edges of heads. A list
is what one method found under one ablation, and quite other circuits do as well: agreement with it is a sanity check,
to be printed below faithfulness and never instead of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float

from circuits.class_edges import INPUT, LOGITS, Rule, touches_mlp
from circuits.graph import Circuit
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError, nearest
from mechinterp.nodes import Node


@dataclass(frozen=True)
class Citation:
    """Who published it, and ``where`` to look in the paper or the code. ``arxiv=None``: it is no arXiv paper."""

    authors: str
    year: int
    arxiv: str | None
    where: str

    def __str__(self) -> str:
        return f"{self.authors} {self.year}" + (f" (arXiv:{self.arxiv})" if self.arxiv else "")


@dataclass(frozen=True)
class PublishedCircuit:
    """The heads and MLPs that a source names, by class, and the edges if it (or ``edges_citation``) gives any.

    ``classes`` hold heads and MLPs in order of importance, where the source gives one. ``positions``: where a class
    acts, in the position names of our tasks; a class that is not in it was published without. ``ablation``: what
    replaced everything outside when the circuit was found. ``notes``: where sources disagree or slip.

    Raises ``CircuitError`` for a part that the model lacks, that is named twice, and for positions of no class.

    >>> from circuits.published import PUBLISHED
    >>> ioi = PUBLISHED["ioi"]
    >>> ioi
    PublishedCircuit('ioi': 'ioi' on 'gpt2', 26 heads, Wang et al. 2022 (arXiv:2211.00593))
    >>> ioi.heads("name mover"), ioi.positions["name mover"]
    ((Node('a9.h9'), Node('a10.h0'), Node('a9.h6')), ('END',))
    >>> ioi.circuit()
    Circuit('ioi' on 'gpt2': 963 of 32,491 edges, 26 heads, 12 MLPs)
    """

    name: str
    model: str
    wiring: Wiring
    task: str
    citation: Citation
    classes: Mapping[str, tuple[Node, ...]]
    ablation: str
    positions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rule: Rule | None = None
    edges_citation: Citation | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "classes", dict(self.classes))
        object.__setattr__(self, "positions", dict(self.positions))
        parts = [part for members in self.classes.values() for part in members]
        if missing := [str(part) for part in parts if part not in self.wiring.writers]:
            raise CircuitError(f"{self.name!r} names {missing[0]!r}, which {self.model!r} ({self.wiring}) lacks.")
        if twice := [str(part) for part in dict.fromkeys(parts) if parts.count(part) > 1]:
            raise CircuitError(f"{self.name!r} names {twice[0]!r} twice. Give each part one class.")
        if unknown := set(self.positions) - set(self.classes):
            raise CircuitError(f"{self.name!r} has positions for {sorted(unknown)}; its classes are {list(self.classes)}.")

    def heads(self, class_name: str | None = None) -> tuple[Node, ...]:
        """The heads of one class, or of all, in published order. ``CircuitError`` for a class that is not there."""
        return tuple(part for part in self._parts(class_name) if part.kind == "head")

    def mlps(self, class_name: str | None = None) -> tuple[Node, ...]:
        """The MLPs that are *named*. Where none is, they were not judged, and usually all kept."""
        return tuple(part for part in self._parts(class_name) if part.kind == "mlp")

    @property
    def edges(self) -> Circuit | None:
        """``circuit()``, or ``None`` where only heads are published."""
        return self.circuit() if self.rule else None

    @property
    def n_direct_edges(self) -> int:
        """What ACDC counts on top of residual edges: one from each port that reads anything into its own head."""
        return sum(node.port is not None for node in self.circuit().nodes)

    def circuit(self, include_mlps: bool = True) -> Circuit:
        """The published edges. ``CircuitError`` where only heads are published.

        ``include_mlps=False`` leaves out what touches an MLP, and the edge from input to logits: rules keep that one
        along with the MLPs, as a part of the model that nobody looked into.
        """
        if self.rule is None:
            raise CircuitError(
                f"Only heads are published for {self.name!r}. Judge heads by head_truth(), or run node_circuit(), which "
                "keeps every edge but those that leave other heads."
            )
        edges = self.rule(self.classes)
        if not include_mlps:
            edges = {edge for edge in edges if edge != (INPUT, LOGITS) and not touches_mlp(edge)}
        kept = np.zeros(self.wiring.n_edges, dtype=bool)
        kept[[self.wiring.index(*edge) for edge in edges]] = True
        return self._circuit(kept, self.edges_citation or self.citation)

    def node_circuit(self) -> Circuit:
        """Every edge of the model but those that leave a head outside: what ablating all other *heads* runs.

        Wang et al.'s faithfulness is of this kind, though at the circuit's own positions only. All that input and MLPs
        write stays, also into heads outside, so the number of edges says nothing.
        """
        named = set(self.heads())
        writes = np.array([writer.kind != "head" or writer in named for writer in self.wiring.writers])
        return self._circuit(writes[self.wiring.edge_writer], self.citation)

    def edge_truth(self, include_mlps: bool = True) -> Bool[np.ndarray, "edge"]:
        """Which edges are published, in wiring order, to judge ``Scores.values``; errors as in ``circuit``."""
        return self.wiring.mask(self.circuit(include_mlps))

    def node_truth(self) -> Bool[np.ndarray, "writer"]:
        """Which writers are named, in wiring order, to judge ``Scores.nodes``; the input never is."""
        named = set(self._parts())
        return np.array([writer in named for writer in self.wiring.writers])

    def head_truth(self) -> Bool[np.ndarray, "head"]:
        """Which heads are named, layer by layer, to judge ``heads_of(wiring, scores.nodes)``.

        Where a source names no MLPs this is the fair question: an MLP that nobody judged is no negative.
        """
        return heads_of(self.wiring, self.node_truth())

    def __repr__(self) -> str:
        what = f"{self.task!r} on {self.model!r}, {len(self.heads())} heads, {self.citation}"
        return f"PublishedCircuit({self.name!r}: {what})"

    def _parts(self, class_name: str | None = None) -> tuple[Node, ...]:
        if class_name is None:
            return tuple(part for members in self.classes.values() for part in members)
        if class_name not in self.classes:
            known = ", ".join(self.classes)
            raise CircuitError(f"{self.name!r} has no class {class_name!r}; it has {known}.{nearest(class_name, self.classes)}")
        return self.classes[class_name]

    def _circuit(self, kept: Bool[np.ndarray, "edge"], source: Citation) -> Circuit:
        return self.wiring.circuit(kept, model=self.model, task=self.task, method="published", source=str(source))


def heads_of(
    wiring: Wiring, per_writer: Bool[np.ndarray, "writer"] | Float[np.ndarray, "writer"]
) -> Bool[np.ndarray, "head"] | Float[np.ndarray, "head"]:
    """Only the heads among values that have one entry a writer; layer by layer.

    >>> heads_of(Wiring(n_layers=1, n_heads=2), np.array([9.0, 0.25, 0.5, 9.0]))
    array([0.25, 0.5 ])
    """
    if np.shape(per_writer) != (len(wiring.writers),):
        raise CircuitError(f"There must be one value a writer, {len(wiring.writers)}, not {np.shape(per_writer)}.")
    return per_writer[[writer.kind == "head" for writer in wiring.writers]]
