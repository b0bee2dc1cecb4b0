"""The viewer in a notebook, through anywidget: the same script and style as the HTML file.

widget = explore(circuit, model, task)   # last line of a cell
widget.selected                          # the part that was clicked, "" for none; may be set
"""

from typing import Any

import networkx as nx

from circuits.viewer import asset, evidence_of, script
from circuits.viewer_data import viewer_data
from mechinterp.errors import CircuitError


def explore(circuit: nx.DiGraph, model: Any = None, task: Any = None, *, n_prompts: int = 4) -> Any:
    """A widget that shows a circuit; arguments as of ``view``. ``widget.selected`` is the name of the isolated part.

    Works in Jupyter, VS Code and Colab. ``CircuitError`` without the extra ``notebook``, which brings anywidget.
    """
    try:
        import anywidget
        import traitlets
    except ImportError as problem:
        raise CircuitError(
            f"the viewer in a notebook needs {problem.name}: pip install 'mechinterp-toolkit[notebook]'. Without it, "
            "circuits.view(circuit, path='circuit.html') writes the same viewer into a file."
        ) from None

    class CircuitWidget(anywidget.AnyWidget):
        _esm = f"{script()}\n{asset('widget.js')}"
        _css = asset("viewer.css")
        data = traitlets.Dict().tag(sync=True)
        selected = traitlets.Unicode("").tag(sync=True)

    return CircuitWidget(data=viewer_data(circuit, evidence_of(circuit, model, task, n_prompts)))
