"""From a ranking to a circuit: which edges are in, given one number an item and how many may stay.

* ``strongest``: the n best items, wherever they are. Some may hang in the air; ``Circuit.pruned`` drops those.
* ``greedy``: from the logits upstream, the best edge whose reader is already in. Connected to the logits by construction,
  though perhaps not to the input. EAP-IG's second way of cutting, here with one heap.
* nodes: the edges among the kept parts. The input is no part that could be lost, so it always stays and is not counted.
"""

import heapq

import numpy as np
from jaxtyping import Bool, Float, Int

from circuits.wiring import Wiring


def best_first(key: Float[np.ndarray, "item"]) -> Int[np.ndarray, "item"]:
    """Indices from the largest key down; ties stay in wiring order."""
    return np.argsort(-key, kind="stable")


def strongest(key: Float[np.ndarray, "item"], n: int) -> Bool[np.ndarray, "item"]:
    """The ``n`` items of the largest keys."""
    kept = np.zeros(len(key), dtype=bool)
    kept[best_first(key)[:n]] = True
    return kept


def greedy(wiring: Wiring, key: Float[np.ndarray, "edge"], n: int) -> Bool[np.ndarray, "edge"]:
    """Up to ``n`` edges, each the best of those whose reader is in when it is taken. O(E log E)."""
    kept = np.zeros(wiring.n_edges, dtype=bool)
    is_open = kept.copy()
    reached = np.zeros(len(wiring.writers), dtype=bool)
    heap: list[tuple[float, int]] = []

    def open_up(edges: Int[np.ndarray, "some_edge"]) -> None:
        edges = edges[~is_open[edges]]  # heads may share a key, whose edges are there once
        is_open[edges] = True
        for edge in edges.tolist():
            heapq.heappush(heap, (-float(key[edge]), edge))

    open_up(wiring.edges_into[-1])
    for _ in range(n):
        edge = heapq.heappop(heap)[1]  # the heap never runs dry: there are n more edges, and all parts lead to the logits
        kept[edge] = True
        writer = int(wiring.edge_writer[edge])
        if not reached[writer]:
            reached[writer] = True
            open_up(wiring.edges_into[writer])
    return kept


def among(wiring: Wiring, nodes: Bool[np.ndarray, "writer"]) -> Bool[np.ndarray, "edge"]:
    """The edges whose writer and reader are both among ``nodes``; input and logits always are.

    A key or value that heads share is read as soon as one of them is there.
    """
    inside = np.append(nodes, True)  # the logits
    inside[0] = True  # the input
    readers = np.any(wiring.reads[inside], axis=0)
    return inside[wiring.edge_writer] & readers[wiring.edge_reader]
