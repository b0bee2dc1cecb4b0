"""From classes of heads to edges: the rules by which others turned published head lists into edge sets.

Papers name heads and say which class reads which; the edge sets that discovery methods are judged by were derived from
that, class by class, and not measured edge by edge. Each rule here is a function of the classes, so that one can see
which edges somebody found and which ones a rule added. An edge needs a writer that is computed before its reader; the
order of ``Node``s knows that a head feeds the MLP of its own layer, and no head of it.
"""

from collections.abc import Callable, Collection, Iterable, Mapping

from circuits.edges import Edge
from mechinterp.nodes import PORTS, Node

Classes = Mapping[str, tuple[Node, ...]]
ClassEdge = tuple[str, str, str]  # the class that writes (or "input"), the class that reads (or "logits"), the ports
Rule = Callable[[Classes], set[Edge]]

INPUT, LOGITS = Node.input(), Node.logits()
GPT2_LAYERS = 12
GPT2_MLPS = tuple(Node.mlp(layer) for layer in range(GPT2_LAYERS))

IOI_MOVERS = ("negative name mover", "name mover", "backup name mover")

# Fifteen, as in ACDC's code; the last three into the logits.
IOI_CLASS_EDGES: tuple[ClassEdge, ...] = (
    ("input", "previous token", "qkv"),
    ("input", "duplicate token", "qkv"),
    ("input", "S-inhibition", "q"),
    *(("input", mover, "kv") for mover in IOI_MOVERS),
    ("previous token", "induction", "kv"),
    ("induction", "S-inhibition", "kv"),
    ("duplicate token", "S-inhibition", "kv"),
    *(("S-inhibition", mover, "q") for mover in IOI_MOVERS),
    *((mover, "logits", "") for mover in IOI_MOVERS),
)

# Hanna et al. 2024 read the same paper in another way: duplicate-token heads feed induction heads, and these their like.
IOI_EAP_IG_CLASS_EDGES: tuple[ClassEdge, ...] = (
    ("input", "previous token", "qkv"),
    ("input", "duplicate token", "qkv"),
    ("input", "S-inhibition", "qkv"),
    *(("input", mover, "kv") for mover in IOI_MOVERS),
    ("previous token", "induction", "q"),
    ("duplicate token", "induction", "kv"),
    ("induction", "induction", "q"),
    ("induction", "S-inhibition", "kv"),
    *(("S-inhibition", mover, "q") for mover in IOI_MOVERS),
    *((mover, "logits", "") for mover in IOI_MOVERS),
)

# Who reads what, port by port: too small for classes.
DOCSTRING_READERS = {
    "input": "a0.h5.v a1.h2.q a1.h2.k a1.h4.v a2.h0.q a2.h0.k a3.h0.v a3.h6.v",
    "a0.h5": "a1.h2.q a1.h2.k a1.h4.v a2.h0.q a2.h0.k a3.h0.v a3.h6.v",
    "a1.h2": "a3.h0.k a3.h6.k",
    "a1.h4": "a2.h0.v a3.h0.q a3.h6.q",
    "a2.h0": "a3.h0.k a3.h6.k",
    "a3.h0": "logits",
    "a3.h6": "logits",
}


def between(writers: Iterable[Node], readers: Iterable[Node], ports: str = "qkv") -> set[Edge]:
    """Every edge from one of the writers into one of the readers; into these ``ports``, where a reader is a head.

    >>> sorted(between([Node.head(8, 1), Node.mlp(8)], [Node.head(9, 0), Node.mlp(8)], "q"))
    [(Node('a8.h1'), Node('m8')), (Node('a8.h1'), Node('a9.h0.q')), (Node('m8'), Node('a9.h0.q'))]
    """
    readers = [entrance for reader in readers for entrance in _entrances(reader, ports)]
    return {(writer, reader) for writer in writers for reader in readers if writer < reader}


def ioi_acdc(classes: Classes) -> set[Edge]:
    """ACDC's IOI: the fifteen class edges, every edge that touches an MLP, and the input straight into the logits.

    ACDC (Conmy et al. 2023, arXiv:2304.14997) starts from all edges among the 26 heads and all MLPs, drops those that
    join heads, input and logits, and adds the class edges back. Since nobody studied the MLPs, all of them stay.
    """
    heads = [head for members in classes.values() for head in members]
    edges = _by_class(classes, IOI_CLASS_EDGES) | between([INPUT], [LOGITS])
    return edges | between([INPUT, *heads, *GPT2_MLPS], GPT2_MLPS) | between(GPT2_MLPS, [*heads, LOGITS])


def ioi_auto_circuit(classes: Classes, *, mlps_to_logits: bool = True) -> set[Edge]:
    """auto-circuit's IOI (Miller et al. 2024, arXiv:2407.08734): the class edges, and the MLPs between the two classes.

    "Between" is from the first layer that writes to the last layer that reads, and these MLPs also join each other.
    ``mlps_to_logits=False`` is what its code computes without token positions: it takes the token index of END for the
    layer of the logits, and that index is then 0.
    """
    edges = set()
    for source, target, ports in IOI_CLASS_EDGES:
        writers, readers = _members(classes, source), _members(classes, target)
        first = min(_layers(writers), default=0)
        last = max(_layers(readers), default=GPT2_LAYERS if mlps_to_logits else 0)
        mlps = GPT2_MLPS[first:last]
        edges |= between([*writers, *mlps], [*readers, *mlps], ports)
    return edges


def ioi_auto_circuit_m0(classes: Classes) -> set[Edge]:
    """The above without the edges of other MLPs. What ``m0`` writes into other MLPs stays, though nothing reads them."""
    return {edge for edge in ioi_auto_circuit(classes) if GPT2_MLPS[0] in edge or not touches_mlp(edge)}


def ioi_eap_ig(classes: Classes) -> set[Edge]:
    """The IOI edges that Hanna et al. 2024 (arXiv:2403.17806) compare with: heads only, but for one path through m11."""
    movers = [*classes["name mover"], *classes["backup name mover"]]
    early, late = (head for head in movers if head.layer == 9), (head for head in movers if head.layer != 9)
    through_m11 = {(Node.head(9, 7), Node.mlp(11)), (Node.mlp(11), LOGITS)}
    return _by_class(classes, IOI_EAP_IG_CLASS_EDGES) | between(early, late, "q") | through_m11


def greater_than(classes: Classes, *, clean_queries: bool = True) -> set[Edge]:
    """Greater-than, as ACDC has it; without ``clean_queries`` as Hanna et al. 2024 compare with (arXiv:2403.17806).

    In the original circuit the late heads ask their question undisturbed, which as edges would be everything before
    them. ACDC imitates it with the MLPs alone: those below the last late head join each other, and feed the queries.
    """
    into_mlps, early_mlps = classes["early head into MLPs"], classes["early MLP"]
    early = [*classes["early head"], *into_mlps]
    late, late_mlps = classes["late head"], classes["late MLP"]
    edges = between([INPUT], [*early, *early_mlps]) | between([*late, *late_mlps], [LOGITS])
    edges |= between([*into_mlps, *early_mlps], early_mlps) | between([*late, *late_mlps], late_mlps)
    edges |= between([*early, *early_mlps], late)
    if clean_queries:
        before = GPT2_MLPS[: max(_layers(late))]
        edges |= between(before, before) | between(before, late, "q")
    return edges


def docstring(classes: Classes) -> set[Edge]:
    """ACDC's docstring circuit, 24 edges that its authors name one by one; the classes decide nothing."""
    return {
        (Node.parse(writer), Node.parse(reader)) for writer, readers in DOCSTRING_READERS.items() for reader in readers.split()
    }


def touches_mlp(edge: Edge) -> bool:
    return any(end.kind == "mlp" for end in edge)


def _by_class(classes: Classes, class_edges: Iterable[ClassEdge]) -> set[Edge]:
    return set().union(
        *(between(_members(classes, source), _members(classes, target), ports) for source, target, ports in class_edges)
    )


def _members(classes: Classes, name: str) -> Collection[Node]:
    return {"input": (INPUT,), "logits": (LOGITS,)}.get(name) or classes[name]


def _layers(nodes: Iterable[Node]) -> list[int]:
    return [node.layer for node in nodes if node.layer is not None]


def _entrances(reader: Node, ports: str) -> list[Node]:
    return [reader.with_port(port) for port in PORTS if port in ports] if reader.kind == "head" else [reader]
