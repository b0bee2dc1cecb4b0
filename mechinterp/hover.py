"""plotly, where a picture is to answer the mouse: imported when asked for, and missed with a remedy."""

import importlib
from typing import Any

from mechinterp.errors import MechinterpError


def plotly() -> tuple[Any, Any]:
    """``plotly.graph_objects`` and ``plotly.subplots``. ``MechinterpError`` says how to install them."""
    try:
        return importlib.import_module("plotly.graph_objects"), importlib.import_module("plotly.subplots")
    except ImportError as problem:
        raise MechinterpError(
            f"interactive=True needs plotly, which cannot be imported ({problem}). "
            "pip install 'mechinterp-toolkit[notebook]', or leave interactive=False for a matplotlib figure."
        ) from None
