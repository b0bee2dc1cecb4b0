"""Public names that are imported when first used (PEP 562), so that ``import mechinterp`` does not wait for torch.

What a package offers stands once, in its ``__init__.pyi``: plain imports, which editors and type checkers read, and which
we read too.
"""

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazy_face(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` for the package at ``file``, from the imports in the stub beside it.

    >>> import mechinterp
    >>> mechinterp.Node.parse("m4")
    Node('m4')
    """
    homes = _homes(Path(file).with_suffix(".pyi"))

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if homes[name] == package:  # `from mechinterp import tasks`: a module of its own
            return importlib.import_module(f"{package}.{name}")
        value = getattr(importlib.import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return find, lambda: sorted({*vars(sys.modules[package]), *homes}), sorted(homes)


def _homes(stub: Path) -> dict[str, str]:
    """name -> module, of every ``from module import name as name`` in a stub."""
    imports = [node for node in ast.parse(stub.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
    return {name.name: node.module or "" for node in imports for name in node.names}
