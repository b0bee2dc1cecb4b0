"""A circuit as Mermaid text, which Markdown pages of code hosts and many note-taking programs draw by themselves.

Ports are folded into their head, layers are boxes from the bottom up. An arrow says by which ports its reader reads and
what the edges score together; it is dashed where that is negative. Pages refuse text with many edges, so only the strongest
are written, and the title counts them all.
"""

from pathlib import Path

import networkx as nx

from circuits.edges import counted, fold_ports
from mechinterp.nodes import Node

MOST = 400  # Mermaid draws at most 500 edges, unless the page that shows it allows more
_SHAPES = {"mlp": '{{"?"}}', "input": '(["?"])', "logits": '(["?"])', "latent": '(["?"])', "error": '(["?"])'}


def write_mermaid(circuit: nx.DiGraph, path: Path) -> None:
    """Mermaid text of the ``MOST`` strongest pairs of parts; the whole circuit if it has no more."""
    path.write_text(mermaid(circuit), encoding="utf-8", newline="\n")


def mermaid(circuit: nx.DiGraph, most: int = MOST) -> str:
    """The text, whose first lines are its title.

    >>> circuit = nx.DiGraph([(Node.mlp(0), Node.head(1, 6, "q"), {"weight": -0.5}), (Node.head(1, 6, "q"), Node.head(1, 6))])
    >>> print(mermaid(circuit).partition("flowchart")[2])
     BT
      subgraph layer0 ["layer 0"]
        m0{{"m0"}}
      end
      subgraph layer1 ["layer 1"]
        a1_h6["a1.h6"]
      end
      m0 -. "q -0.5" .-> a1_h6
    <BLANKLINE>
    """
    folded = fold_ports(circuit)
    pairs = sorted(folded.edges, key=lambda pair: (-folded.edges[pair].get("strength", 0.0), pair))[:most]
    parts = sorted({part for pair in pairs for part in pair} | {part for part in folded if not folded.degree(part)})
    lines = ["---", f"title: {_title(circuit, len(pairs), folded.number_of_edges())}", "---", "flowchart BT"]
    lines += [f"  {_shape(part)}" for part in parts if part.layer is None]
    for layer in sorted({part.layer for part in parts if part.layer is not None}):
        lines.append(f'  subgraph layer{layer} ["layer {layer}"]')
        lines += [f"    {_shape(part)}" for part in parts if part.layer == layer]
        lines.append("  end")
    lines += [f"  {_arrow(writer, reader, folded.edges[writer, reader])}" for writer, reader in sorted(pairs)]
    return "\n".join([*lines, ""])


def _title(circuit: nx.DiGraph, n_shown: int, n_pairs: int) -> str:
    """A line of YAML: quoted, so that nothing in a name can end it."""
    about = " on ".join(str(circuit.graph[fact]) for fact in ("task", "model") if fact in circuit.graph) or "circuit"
    shown = counted(n_pairs, "arrow") if n_shown == n_pairs else f"the {n_shown:,} strongest of {counted(n_pairs, 'arrow')}"
    return "'" + f"{about}: {shown}".replace("'", "''").replace("\n", " ") + "'"


def _name(part: Node) -> str:
    """Letters, digits and underscores: a dot or an ``@`` would be read as syntax."""
    return str(part).replace(".", "_").replace("@", "_at_")


def _shape(part: Node) -> str:
    return _name(part) + _SHAPES.get(part.kind, '["?"]').replace("?", str(part))


def _arrow(writer: Node, reader: Node, pair: dict) -> str:
    weight = pair.get("weight")
    label = " ".join([pair["ports"], *([] if weight is None else [f"{weight:+.3g}"])]).strip()
    if weight is not None and weight < 0:
        return f'{_name(writer)} -. "{label}" .-> {_name(reader)}'
    return f'{_name(writer)} -- "{label}" --> {_name(reader)}' if label else f"{_name(writer)} --> {_name(reader)}"
