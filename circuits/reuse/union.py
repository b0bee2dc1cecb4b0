"""The union of several tasks' circuits: one graph, in which every node and edge says whose it is."""

from collections.abc import Mapping
from typing import Any

import networkx as nx

from circuits.edges import SHAPE, Edge, is_residual, residual_edges, shape_of
from circuits.graph import Circuit
from mechinterp.errors import CircuitError


def union_graph(circuits: Mapping[str, Circuit]) -> Circuit:
    """Every node and edge of any of the circuits, to be saved, drawn and searched like any circuit.

    Nodes and edges carry ``tasks``, the names of the circuits that hold them, joined by commas (text, so that it survives
    every format: ``tasks_of`` reads it), and ``n_tasks``. An edge's score on a task is ``weight.NAME``, in that task's unit.
    As units differ, ``weight`` is the largest, in magnitude, of the scores as shares of their task's largest one.

    ``CircuitError`` for no circuits, for circuits of differently shaped models, and for a name with a comma.

    >>> ioi, colors = Circuit(task="ioi"), Circuit(task="colors")
    >>> ioi.keep("input", "a0.h1.v", weight=2.0)
    >>> ioi.keep("a0.h1", "logits", weight=-1.0)
    >>> colors.keep("a0.h1", "logits", weight=0.3)
    >>> union = union_graph({"ioi": ioi, "colors": colors})
    >>> [(str(writer), str(reader), facts["tasks"]) for writer, reader, facts in union.edges(data=True) if "weight" in facts]
    [('input', 'a0.h1.v', 'ioi'), ('a0.h1', 'logits', 'ioi,colors')]
    """
    _check(circuits)
    union = Circuit(**_facts_in_common(circuits))
    nodes = sorted({node for circuit in circuits.values() for node in circuit.nodes})
    union.add_nodes_from((node, _whose([name for name, one in circuits.items() if node in one])) for node in nodes)
    union.add_edges_from(edge for circuit in circuits.values() for edge in circuit.edges)
    largest = {name: _largest(circuit) for name, circuit in circuits.items()}
    for edge in union.edges:
        holders = [name for name, one in circuits.items() if one.has_edge(*edge)]
        union.edges[edge].update(_whose(holders), **_weights(edge, {name: circuits[name] for name in holders}, largest))
    return union


def tasks_of(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Whose a node or an edge of a union graph is, given its attributes: ``tasks_of(union.nodes[node])``."""
    return tuple(facts["tasks"].split(","))


def shared_by(union: Circuit, *tasks: str) -> Circuit:
    """The part of a union graph that all of these tasks use; of no names, that which all tasks of the graph use."""
    known = tuple(union.graph["tasks"].split(","))
    wanted = set(tasks or known)
    if strangers := wanted.difference(known):
        raise CircuitError(f"{sorted(strangers)[0]!r} is no task of this graph, which joins {', '.join(known)}.")
    shared = Circuit(**union.graph)
    for writer, reader in residual_edges(union):
        if wanted <= set(tasks_of(union.edges[writer, reader])):
            shared.keep(writer, reader)
    # A key that is left without a head was tied anew to its whole group: here it stays with the heads that it had.
    unknown = set(shared.edges) - set(union.edges)
    shared.remove_edges_from(unknown)
    shared.remove_nodes_from([head for _, head in unknown if not shared.degree(head)])
    for node in shared.nodes:
        shared.nodes[node].update(union.nodes[node])
    for edge in shared.edges:
        shared.edges[edge].update(union.edges[edge])
    return shared


def _whose(names: list[str]) -> dict[str, Any]:
    return {"tasks": ",".join(names), "n_tasks": len(names)}


def _weights(edge: Edge, circuits: Mapping[str, Circuit], largest: Mapping[str, float]) -> dict[str, float]:
    own = {name: one.edges[edge]["weight"] for name, one in circuits.items() if "weight" in one.edges[edge]}
    if not own:
        return {}
    shares = [weight / largest[name] if largest[name] else 0.0 for name, weight in own.items()]
    return {"weight": max(shares, key=abs)} | {f"weight.{name}": weight for name, weight in own.items()}


def _largest(circuit: nx.DiGraph) -> float:
    scores = [facts.get("weight", 0.0) for writer, reader, facts in circuit.edges(data=True) if is_residual(writer, reader)]
    return max(map(abs, scores), default=0.0)


def _facts_in_common(circuits: Mapping[str, Circuit]) -> dict[str, Any]:
    """What all circuits say alike, under the names of all tasks."""
    first, *others = (circuit.graph for circuit in circuits.values())
    alike = (*SHAPE, "n_edges_in_model", "model", "method")
    facts = {name: first[name] for name in alike if name in first and all(one.get(name) == first[name] for one in others)}
    joined = ",".join(circuits)
    return facts | {"task": joined.replace(",", ", "), "tasks": joined, "unit": "share of each task's largest score"}


def _check(circuits: Mapping[str, Circuit]) -> None:
    if not circuits:
        raise CircuitError("there is no circuit to join. Give at least one, by the name of its task.")
    if wrong := [name for name in circuits if "," in name or not name]:
        raise CircuitError(f"{wrong[0]!r} cannot name a task in a graph, where commas stand between names. Rename it.")
    (first_name, first), *others = circuits.items()
    for name, circuit in others:
        for fact in (*SHAPE, "model"):
            one, other = ({**of.graph, **shape_of(of.graph)}.get(fact) for of in (first, circuit))
            if None not in (one, other) and one != other:
                raise CircuitError(
                    f"{first_name!r} has {fact}={one!r} and {name!r} {fact}={other!r}: join circuits of one model."
                )
