"""A circuit as one HTML file to look around in: open it from disk, send it to somebody, keep it.

    view(circuit)                                    # in the browser
    view(circuit, model, task, path="ioi.html")      # with attention patterns and logits, into a file
    mechinterp view ioi.json                         # the same from the command line

The file holds its style, its script and its data. A Content-Security-Policy in it forbids whatever else there could be: no
network, and no script but its own, by hash.
"""

import base64
import hashlib
import html
import json
import os
import re
import tempfile
import webbrowser
from importlib import resources
from pathlib import Path
from typing import Any

import networkx as nx

from circuits.viewer_data import viewer_data
from mechinterp.errors import CircuitError
from mechinterp.files import write_text_atomically

# One subject each, joined into one scope.
_SCRIPTS = ("tools", "circuit", "drawing", "canvas", "picture", "attention", "card", "table", "controls", "toolbar")
_SCRIPTS += ("pointing", "viewer")


def view(
    circuit: nx.DiGraph,
    model: Any = None,
    task: Any = None,
    path: str | os.PathLike | None = None,
    *,
    n_prompts: int = 4,
    open_page: bool | None = None,
) -> Path:
    """Write the viewer of a circuit to ``path`` and return it; without a path, to a temporary file that is opened.

    Layers upwards from the input to the logits, edges filtered by score, sign, path and position, a click on a part leaves
    what leads to it and from it. With ``model`` and ``task`` cards of heads show attention on ``n_prompts`` prompts, where
    they look, and what they write towards the answer. ``open_page``: in the browser; None: if there is no path.

    ``CircuitError`` for a model without a task, a task without a model, or parts that the model lacks. Without a model no
    torch is loaded. About 200 bytes an edge; a second for 5,000 edges.
    """
    evidence = evidence_of(circuit, model, task, n_prompts)
    written = Path(tempfile.mkdtemp(prefix="circuit-")) / "circuit.html" if path is None else Path(path)
    write_text_atomically(written, page(viewer_data(circuit, evidence)))
    opens = path is None if open_page is None else open_page
    if opens:
        webbrowser.open(written.resolve().as_uri())
    return written


def evidence_of(circuit: nx.DiGraph, model: Any, task: Any, n_prompts: int) -> dict[str, Any] | None:
    """What the cards of heads show, or None without a model."""
    if (model is None) != (task is None):
        given, missing = ("model", "task") if task is None else ("task", "model")
        raise CircuitError(f"a {given} without a {missing} shows no attention. Give view(circuit, model, task), or neither.")
    if model is None:
        return None
    if n_prompts < 1:
        raise CircuitError(f"n_prompts={n_prompts} shows no prompt. Ask for at least 1, or give no model.")
    from circuits.viewer_evidence import record_evidence  # torch

    return record_evidence(model, task, circuit, n_prompts)


def write_page(circuit: nx.DiGraph, path: Path) -> None:
    """The viewer without evidence, for ``circuit.save("ioi.html")``."""
    view(circuit, path=path, open_page=False)


def page(data: dict[str, Any]) -> str:
    """The whole HTML file. The same data give the same bytes."""
    start = 'show(document.getElementById("viewer"), JSON.parse(document.getElementById("data").textContent));'
    parts = {"title": html.escape(data["title"]), "data": _json(data), "css": asset("viewer.css")}
    parts["js"] = f"{script()}\n{start}\n"
    parts |= {f"{name}_hash": _hash(parts[name]) for name in ("css", "js")}
    # One pass, so that what is put in is not searched for names again.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], asset("viewer.html"))


def script() -> str:
    """The viewer's script, which defines ``show(root, data)``: all its files, as one."""
    return "\n".join(asset(f"{name}.js") for name in _SCRIPTS)


def asset(name: str) -> str:
    """A file of the viewer: its style, its page, or a part of its script."""
    return (resources.files("circuits") / "assets" / name).read_text(encoding="utf-8")


def _json(data: dict[str, Any]) -> str:
    """JSON that cannot close the script element around it, whatever a token says."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
