"""Notebooks run top to bottom, read well unrun, and use what is public."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
FACES = {"mechinterp", "circuits", "saes", "mechinterp.tasks"}
DOCUMENTED = {"mechinterp.models.compiled", "mechinterp.models.tracr", "circuits.export"}
OURS = ("mechinterp", "circuits", "saes")
MACHINE_PATHS = re.compile(r"(?<![\w./:])/(?:home|root|work|Users|tmp|usr|opt|mnt|private/var|workspace)/|[A-Z]:\\Users")
named = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def read(path: Path):
    return pytest.importorskip("jupytext").read(path)


def cells(notebook) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source.rstrip()) for cell in notebook.cells]


def code(source: Path) -> ast.Module:
    """All code of a notebook, without its magics."""
    lines = [line for kind, text in cells(read(source)) if kind == "code" for line in text.splitlines()]
    return ast.parse("\n".join(line for line in lines if not line.startswith("%")))


def shown(source: Path) -> list[dict]:
    """The outputs kept in the .ipynb."""
    kept = read(source.with_suffix(".ipynb")).cells
    return [output for cell in kept if cell.cell_type == "code" for output in cell.outputs]


def test_there_are_notebooks_with_numbers_without_gaps():
    assert [source.stem[:2] for source in SOURCES] == [f"{n + 1:02}" for n in range(len(SOURCES))] != []


@named
def test_both_files_hold_the_same_cells(source):
    assert cells(read(source)) == cells(read(source.with_suffix(".ipynb"))), "run notebooks/execute.py and keep both files"


@named
def test_it_runs_top_to_bottom(source, tmp_path):
    """In a fresh kernel, from the .py, in an empty folder, by the script that keeps the outputs."""
    run = [sys.executable, str(FOLDER / "execute.py"), source.stem, "--out", str(tmp_path)]
    finished = subprocess.run(run, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert [file.name for file in tmp_path.iterdir()] == [f"{source.stem}.ipynb"]


@named
def test_it_reads_well_unrun(source):
    """Every code cell was run in order, nothing failed, and the results are there."""
    notebook = read(source.with_suffix(".ipynb"))
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    outputs = shown(source)
    assert len(outputs) >= len(counts) / 2
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(output.get("name") != "stderr" for output in outputs)


@named
def test_outputs_name_no_place_on_a_machine(source):
    for output in shown(source):
        texts = [output.get("text", ""), *(str(v) for kind, v in output.get("data", {}).items() if "image/png" not in kind)]
        found = [match for text in texts for match in MACHINE_PATHS.findall(text)]
        assert not found, f"{found[0]} stands in an output"


@named
def test_it_begins_with_a_title_and_ends_with_words(source):
    own = cells(read(source))
    assert own[0][0] == "markdown"
    assert own[0][1].startswith(f"# {int(source.stem[:2])}. ")
    assert own[-1][0] == "markdown"


@named
def test_it_uses_public_names_only(source):
    tree, modules = code(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            ours = [alias for alias in node.names if alias.name.split(".")[0] in OURS]
            assert {alias.name for alias in ours} <= FACES
            modules |= {alias.asname or alias.name: alias.name for alias in ours}
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            assert node.module in FACES | DOCUMENTED
            for alias in node.names:
                assert is_public(node.module, alias.name), f"{node.module}.{alias.name} is not public"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            is_private = node.attr.startswith("_") and not node.attr.endswith("__")
            assert not is_private, f".{node.attr} is nobody's business"
            if isinstance(node.value, ast.Name) and node.value.id in modules:
                assert is_public(modules[node.value.id], node.attr), f"{modules[node.value.id]}.{node.attr} is not public"


def is_public(module: str, name: str) -> bool:
    """In the list of a face; of a documented module, anything without an underscore."""
    if name.startswith("_"):
        return False
    found = importlib.import_module(module)
    return name in getattr(found, "__all__", vars(found))


@named
def test_it_defines_nothing_that_the_library_should(source):
    assert not [node.name for node in ast.walk(code(source)) if isinstance(node, ast.ClassDef)]
