"""Runs notebooks top to bottom from their .py and stores what they show in their .ipynb: `python notebooks/execute.py 01`.

1. The .py (jupytext, percent format) is the notebook; outputs stand in the .ipynb of the same name.
2. Each runs in a fresh kernel of this interpreter, offline, on one thread, in an empty folder that is thrown away.
3. What changes from run to run, ids and times, is left out, so that an unchanged notebook makes an unchanged file.
"""

import argparse
import os
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
_SECONDS_A_CELL = 300
_LONG = 500  # characters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", help="how their names begin: 01 04; default: all")
    parser.add_argument("--out", type=Path, default=HERE, help="the folder for the .ipynb; default: beside the .py")
    asked = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    chosen = [source for source in sources() if not asked.which or source.name.startswith(tuple(asked.which))]
    if not chosen:
        parser.error(f"there is no notebook {' or '.join(asked.which)}; there are {', '.join(s.stem for s in sources())}.")
    for source in chosen:
        target = asked.out / f"{source.stem}.ipynb"
        write(run(source), target)
        print(f"{source.name} -> {target.name}, {target.stat().st_size / 1e6:.1f} MB")


def sources() -> list[Path]:
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def run(source: Path):
    """The notebook of a .py with its outputs. ``CellExecutionError`` shows the cell that failed and why."""
    import jupytext
    from nbclient import NotebookClient

    notebook = jupytext.read(source)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"timeout": _SECONDS_A_CELL, "kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
        settings["store_widget_state"] = False
        NotebookClient(notebook, resources={"metadata": {"path": folder}}, **settings).execute()
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{source.stem}-{number}"
        if cell["cell_type"] == "code":
            cell["outputs"] = [output for output in cell["outputs"] if not _is_progress(output)]
            for output in cell["outputs"]:
                _drop_long_text(output.get("data", {}))
    language = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python", "pygments_lexer": "ipython3"}
    notebook.metadata["language_info"] = language
    return notebook


def _is_progress(output) -> bool:
    """A progress bar: a widget that is gone when the kernel is, or what a bar writes to stderr."""
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {}) or output.get("name") == "stderr"


def _drop_long_text(shown: dict[str, str]) -> None:
    """A page of numbers behind a table or picture is read by nobody and changes with everything."""
    if len(shown) > 1 and len(shown.get("text/plain", "")) > _LONG:
        del shown["text/plain"]


def write(notebook, target: Path) -> None:
    """Whole or not at all."""
    import nbformat

    beside = target.with_suffix(".part")
    nbformat.write(notebook, beside)
    beside.replace(target)


if __name__ == "__main__":
    main()
