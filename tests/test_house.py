"""Imports run down the house: circuits stands on saes, saes on mechinterp, and the command line on top of all."""

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent
STAND_ON_SAES = {  # of circuits: the methods that read latents, and what is built of these
    "circuits.code_meanings",
    "circuits.discovery.code_scores",
    "circuits.coding",
    "circuits.discovery.code_edges",
    "circuits.discovery.codes",
    "circuits.discovery.latents",
    "circuits.discovery.paper_codes",
    "circuits.discovery.probes",
    "circuits.latent_graph",
    "circuits.latent_layers",
    "circuits.latent_replacement",
}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("mechinterp", "saes", "circuits")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imported(module: str, *, inside_functions: bool) -> Iterator[str]:
    """Our modules that ``module`` imports; ``if TYPE_CHECKING`` counts, as it hides a knot and does not untie it."""
    todo = [ast.parse(FILES[module].read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; write the whole name"
            for name in node.names:
                home = f"{node.module}.{name.name}" if f"{node.module}.{name.name}" in FILES else node.module
                yield from [home] if home in FILES else []
        elif inside_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            todo.extend(ast.iter_child_nodes(node))


def is_roof(module: str) -> bool:
    return module.startswith("mechinterp.cli")


@pytest.mark.parametrize("module", FILES)
def test_imports_run_down(module):
    floor = module.split(".")[0]
    above = {"mechinterp": {"saes", "circuits"}, "saes": {"circuits"}, "circuits": {"saes"}}[floor]
    if module in STAND_ON_SAES:
        above = set()
    looks_up = {name for name in imported(module, inside_functions=not is_roof(module)) if name.split(".")[0] in above}
    assert not looks_up, f"{module} imports {sorted(looks_up)}, which lies above it"


@pytest.mark.parametrize("module", FILES)
def test_nothing_opens_onto_the_roof(module):
    if not is_roof(module):
        assert not [name for name in imported(module, inside_functions=True) if is_roof(name)]


def test_there_are_no_circles():
    graph = nx.DiGraph((module, name) for module in FILES for name in imported(module, inside_functions=False))
    assert not list(nx.simple_cycles(graph))
