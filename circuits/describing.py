"""A circuit in words: sentences by rules from its graph, its facts and a report, which say nothing that these do not say.

Parts, how they are joined, what the scores share out, how faithful it was found to be, and what is *not* known. What a part
means is never said.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import networkx as nx
import numpy as np

from circuits.edges import Edge, by_magnitude, counted, edge_name, residual_edges, wholes
from circuits.export import size_in_words
from mechinterp.describing import listed
from mechinterp.errors import CircuitError
from mechinterp.nodes import Node

_PORTS = {"q": "query", "k": "key", "v": "value"}


@runtime_checkable
class Measured(Protocol):
    """What was measured of a circuit: see ``Report``."""

    @property
    def model(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def n_edges(self) -> int: ...
    @property
    def facts(self) -> dict[str, Any]: ...


def describe_circuit(circuit: nx.DiGraph, report: Measured | None = None, n: int = 5) -> str:
    """A paragraph each: what it is, its parts, its edges, its faithfulness, and what is not known. Lists stop at ``n``.

    Faithfulness is that of ``report``, else that of the circuit's facts (``circuit.graph.update(report.facts)``).
    ``CircuitError`` for a report of another number of edges, model or task.
    """
    facts = dict(circuit.graph)
    if report is not None:
        _check_same(circuit, report)
        facts |= report.facts
    edges = by_magnitude(circuit)
    if not edges:
        return f"{_opening(circuit, facts)} It keeps no edge, so there is nothing to describe."
    parts = [_opening(circuit, facts), _parts(circuit, n), _edges(circuit, edges, n), _paths(circuit, edges)]
    return "\n\n".join([*parts, _faithfulness(facts), _unknown(facts)])


def _check_same(circuit: nx.DiGraph, report: Measured) -> None:
    mine = {"edges": len(residual_edges(circuit)), "model": circuit.graph.get("model"), "task": circuit.graph.get("task")}
    theirs = {"edges": report.n_edges, "model": report.model, "task": report.task}
    if wrong := [name for name, value in mine.items() if value is not None and value != theirs[name]]:
        told = "; ".join(f"{name}: {mine[name]!r} here, {theirs[name]!r} in the report" for name in wrong)
        raise CircuitError(f"this report is of another circuit ({told}). Give the report that evaluate made of this one.")


def _opening(circuit: nx.DiGraph, facts: Mapping[str, Any]) -> str:
    of = "".join(f" {word} {facts[name]}" for word, name in (("of", "model"), ("for the task", "task")) if facts.get(name))
    text = f"This is a circuit{of}: {size_in_words(circuit)}."
    if facts.get("method"):
        unit = f", scores in {facts['unit']}" if facts.get("unit") else ""
        text += f" Its edges come from the method {facts['method']}{unit}{_selection(facts)}."
    if facts.get("ties_at_cut"):
        ties = counted(facts["ties_at_cut"], "item")
        text += f" Left out are {ties} that score exactly as the last one kept: which of them is in was decided by order alone."
    return text


def _selection(facts: Mapping[str, Any]) -> str:
    """How scores became a circuit, as far as ``Scores`` wrote it down."""
    by = "value" if facts.get("signed") else "magnitude"
    if facts.get("selection") == "named":
        return ", among parts that were named"
    if facts.get("selection") == "greedy":
        return f", taken by {by} from the logits upstream"
    if "threshold" in facts:
        return f", kept from a {by} of {facts['threshold']:.3g} on"
    return f", ranked by {by}" if "signed" in facts else ""


def _parts(circuit: nx.DiGraph, n: int) -> str:
    written: dict[Node, float] = {}
    scored = False
    for writer, _, weight in circuit.edges(data="weight"):
        if writer.port is None and writer.kind != "input":
            written[writer] = written.get(writer, 0.0) + abs(weight or 0.0)
            scored |= weight is not None
    if not written:
        return "No head or MLP writes one of its edges: what it keeps comes from the input."
    if not scored:
        return f"The parts that write: {listed([str(part) for part in sorted(written)], n, 'writing parts')}."
    ranked = sorted(written, key=lambda part: (-written[part], part))
    names = [f"{part} ({written[part]:.3g})" for part in ranked]
    return f"Strongest parts, by the sum of |score| over the kept edges that each writes: {listed(names, n, 'writing parts')}."


def _edges(circuit: nx.DiGraph, edges: list[Edge], n: int) -> str:
    weights = np.array([circuit.edges[edge].get("weight", np.nan) for edge in edges])
    read = f"The edges are read {_ports(edges)}."
    if np.isnan(weights).all():
        names = [_edge(circuit, edge, None) for edge in edges]
        return f"{read} None has a score, so none can be called strong: {listed(names, n, 'edges')}."
    names = [_edge(circuit, edge, float(weight)) for edge, weight in zip(edges, weights, strict=True)]
    known = weights[~np.isnan(weights)]
    size = np.abs(known).sum()
    text = f"Strongest edges: {listed(names, n, 'edges')}. {read}"
    if size:
        k = min(n, len(known))
        strongest = f"{k} strongest edges hold" if k > 1 else "strongest edge holds"
        text += f" The {strongest} {np.abs(known[:k]).sum() / size:.0%} of the circuit's sum of |score|, which is {size:.3g}."
    above, below = (int((known * sign > 0).sum()) for sign in (1, -1))
    return f"{text} {counted(above, 'score')} above zero, {below:,} below."


def _ports(edges: list[Edge]) -> str:
    counts = {word: sum(reader.port == port for _, reader in edges) for port, word in _PORTS.items()}
    counts |= {"an MLP": sum(reader.kind == "mlp" for _, reader in edges)}
    counts |= {"the logits": sum(reader.kind == "logits" for _, reader in edges)}
    counts |= {"a neuron": sum(reader.kind == "neuron" for _, reader in edges)}
    counts |= {"a latent or an error": sum(reader.kind in ("latent", "error") for _, reader in edges)}
    words = {name: f"as a {name}" if name in _PORTS.values() else f"by {name}" for name in counts}
    told = [f"{count:,} {words[name]}" for name, count in counts.items() if count]
    return listed(told, len(told), "ways")


def _edge(circuit: nx.DiGraph, edge: Edge, weight: float | None) -> str:
    """An edge with its score; of a key or value that heads share also who reads it."""
    heads = wholes(circuit, edge[1])
    shared = f", shared by {' '.join(map(str, heads))}" if edge[1].kind == "group" and heads[0].kind == "head" else ""
    score = "" if weight is None or np.isnan(weight) else f" ({weight:+.3g}{shared})"
    return edge_name(*edge) + (score or (f" ({shared[2:]})" if shared else ""))


def _paths(circuit: nx.DiGraph, edges: list[Edge]) -> str:
    """The path whose weakest edge is strongest, and how many edges lie on no path."""
    starts, ends = ([node for node in circuit.nodes if node.kind == kind] for kind in ("input", "logits"))
    reached = set(starts).union(*(nx.descendants(circuit, node) for node in starts))
    reaching = set(ends).union(*(nx.ancestors(circuit, node) for node in ends))
    idle = sum(not (writer in reached and reader in reaching) for writer, reader in edges)
    if idle == len(edges):
        return "No path leads from the input to the logits through its edges."
    aside = "Every edge lies on a path from the input to the logits."
    if idle:
        aside = f"{counted(idle, 'edge')} {'lies' if idle == 1 else 'lie'} on no path from the input to the logits."
    if not any("weight" in circuit.edges[edge] for edge in edges):
        return aside
    path, weakest = _widest(circuit, edges)
    told = "has no score" if weakest is None else f"has |score| {weakest:.3g}"
    return f"The path whose weakest edge is strongest runs {' -> '.join(map(str, path))}; that edge {told}. {aside}"


def _widest(circuit: nx.DiGraph, edges: list[Edge]) -> tuple[list[Node], float | None]:
    """By halving: the fewest of the strongest edges that hold a path. Ports are left out of what is told."""
    none, all_of_them = 0, len(edges)
    while all_of_them - none > 1:
        middle = (none + all_of_them) // 2
        none, all_of_them = (none, middle) if _path(circuit, edges[:middle]) else (middle, all_of_them)
    path = [node for node in _path(circuit, edges[:all_of_them]) if node.port is None]
    weight = circuit.edges[edges[all_of_them - 1]].get("weight")
    return path, None if weight is None else abs(weight)


def _path(circuit: nx.DiGraph, edges: list[Edge]) -> list[Node]:
    """The shortest path from the input to the logits along these edges, or nothing."""
    some: Any = nx.DiGraph([*edges, *(edge for edge in circuit.edges if edge[0].port is not None)])
    starts, ends = ([node for node in some if node.kind == kind] for kind in ("input", "logits"))
    some.add_edges_from([("start", node) for node in starts] + [(node, "end") for node in ends])
    if not starts or not ends or not nx.has_path(some, "start", "end"):
        return []
    return nx.shortest_path(some, "start", "end")[1:-1]


def _faithfulness(facts: Mapping[str, Any]) -> str:
    if "faithfulness" not in facts:
        return "How faithful it is was not measured, or not written down here: evaluate(model, task, circuit) measures it."
    text = f"Its faithfulness was measured as {facts['faithfulness']:.3g}"
    if {"faithfulness_low", "faithfulness_high"} <= {*facts}:
        text += f" (95 % interval over prompts {facts['faithfulness_low']:.3g} to {facts['faithfulness_high']:.3g})"
    text += ": the share that is left, with all other edges cut, of what the whole model has over no edges at all."
    if "ablation" in facts:
        corruption = f" (corruption: {facts['corruption']})" if "corruption" in facts else ""
        text += f" The ablation was {facts['ablation']}{corruption}."
    if {"metric", "n_prompts", "metric_model", "metric_circuit", "metric_no_edges"} <= {*facts}:
        whole, circuit, empty = (f"{facts[name]:.3g}" for name in ("metric_model", "metric_circuit", "metric_no_edges"))
        text += f" The mean {facts['metric']} of {counted(facts['n_prompts'], 'prompt')} is {whole} for the whole model, "
        text += f"{circuit} for the circuit and {empty} with every edge cut."
    if "complement" in facts:
        text += f" All other edges without these reach a faithfulness of {facts['complement']:.3g}."
    if {"n_random", "beats_random", "best_random"} <= {*facts}:
        text += f" Of {counted(facts['n_random'], 'random circuit')} of the same size {facts['beats_random']:.0%} were less "
        text += f"faithful, and the best reached {facts['best_random']:.3g}."
    return text


def _unknown(facts: Mapping[str, Any]) -> str:
    gaps = ["what any part means or computes", "whether other edges would do as well", "how other prompts behave"]
    if "faithfulness" in facts:
        gaps.append("how faithful it is under another metric, corruption or ablation")
        if "ablation" not in facts:
            gaps.append("under which ablation its faithfulness was measured")
        if "n_random" not in facts:
            gaps.append("whether random circuits of this size are as faithful")
    if "n_edges_in_model" not in facts:
        gaps.append("how many edges the model has")
    return f"Not known from these numbers: {listed(gaps, len(gaps), 'gaps')}."
