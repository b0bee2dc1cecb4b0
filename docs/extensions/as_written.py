"""Docstrings and signatures as they stand in the source.

A signature is read from the source, so that ``Float[Tensor, "batch pos d_model"]`` and the names of our own types stay what
the author wrote (Python would show what they stand for). Names of public things in it become links. Docstrings are ours, in
plain words with a little reStructuredText: what that language asks beyond ours is added here.
"""

import ast
import importlib
import inspect
import re
import textwrap
from itertools import pairwise
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

FACES = ("mechinterp", "circuits", "saes")
_LITERAL = re.compile(r"(``[^`]+``)(\w?)")  # ``Node``s: reStructuredText wants something between the two
_NOT_NAMES = ("Float", "Int", "Bool", "Shaped", "Literal")  # what stands in their brackets in quotation marks is no name


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-signature", signature_as_written)
    app.connect("autodoc-process-docstring", docstring_as_meant)
    app.connect("missing-reference", link_to_public_name)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def signature_as_written(app: Sphinx, what: str, name: str, thing: Any, options, signature, returns):
    """``(arguments, return annotation)`` from the source; what has no signature of its own gets none."""
    if what == "class":
        return _of_class(thing), None
    if what not in ("function", "method") or not inspect.isroutine(thing):
        return None
    function = _parsed(thing)
    if not isinstance(function, ast.FunctionDef):
        return None
    return _arguments(function, bound=what == "method"), _annotation(function.returns)


def docstring_as_meant(app: Sphinx, what: str, name: str, thing: Any, options, lines: list[str]) -> None:
    """Let what is indented be code, and set apart what is glued together."""
    text = _LITERAL.sub(lambda found: found[1] + (f"\\ {found[2]}" if found[2] else ""), "\n".join(lines))
    blocks = re.split(r"\n{2,}", text)
    begins = [_is_indented(block) and not _continues(before) for before, block in pairwise(["", *blocks])]
    lines[:] = "\n\n".join(_code(block) if code else block for code, block in zip(begins, blocks, strict=True)).split("\n")


def link_to_public_name(app: Sphinx, env, node: pending_xref, contnode: nodes.Element) -> nodes.Element | None:
    """``Transformer`` in an annotation leads to ``mechinterp.Transformer``, whichever package it stands in."""
    last = node.get("reftarget", "").rpartition(".")[2]
    domain = env.get_domain("py")
    for full in (f"{face}.{last}" for face in FACES):
        if node.get("refdomain") == "py" and full in domain.objects:
            found = domain.objects[full]
            return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, contnode, full)
    return None


def public_names(face: str) -> list[str]:
    """The names that a face offers."""
    return list(importlib.import_module(face).__all__)


def _of_class(thing: type) -> str:
    """The fields of a dataclass, or what its own ``__init__`` takes."""
    body = getattr(_parsed(thing), "body", [])
    for entry in body:
        if isinstance(entry, ast.FunctionDef) and entry.name == "__init__":
            return _arguments(entry, bound=True)
    if "__dataclass_params__" not in vars(thing):
        return ""
    return f"({', '.join(_field(entry) for entry in body if _is_field(entry))})"


def _is_field(entry: ast.AST) -> bool:
    return isinstance(entry, ast.AnnAssign) and not ast.unparse(entry.annotation).startswith("ClassVar")


def _field(entry: ast.AnnAssign) -> str:
    if ast.unparse(entry.annotation) == "KW_ONLY":
        return "*"
    default = "" if entry.value is None else f" = {_default(entry.value)}"
    return f"{ast.unparse(entry.target)}: {_annotation(entry.annotation)}{default}"


def _default(value: ast.expr) -> str:
    """A default; ``{}`` for ``field(default_factory=dict)``."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in value.keywords}
        return {"dict": "{}", "list": "[]"}.get(given.get("default_factory", ""), given.get("default", "..."))
    return ast.unparse(value)


def _arguments(function: ast.FunctionDef, *, bound: bool) -> str:
    """The argument list, without ``self`` or ``cls`` where the function is bound."""
    is_static = any(ast.unparse(decorator) == "staticmethod" for decorator in function.decorator_list)
    if bound and not is_static and function.args.args:
        del function.args.args[0]
    for argument in ast.walk(function.args):
        if isinstance(argument, ast.arg) and argument.annotation:
            argument.annotation = _Unquoted().visit(argument.annotation)
    return f"({ast.unparse(function.args)})"


def _annotation(annotation: ast.expr | None) -> str:
    return ast.unparse(_Unquoted().visit(annotation)) if annotation else ""


class _Unquoted(ast.NodeTransformer):
    """``"Circuit"``, quoted because it is not known yet where it stands, is the name ``Circuit``."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        return node if ast.unparse(node.value).rpartition(".")[2] in _NOT_NAMES else self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.parse(node.value, mode="eval").body if isinstance(node.value, str) else node


def _parsed(thing: Any) -> ast.stmt | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None


def _is_indented(block: str) -> bool:
    lines = [line for line in block.split("\n") if line.strip()]
    return (
        bool(lines) and all(line.startswith("    ") for line in lines) and not lines[0].lstrip().startswith((">>>", "*", "-"))
    )


def _continues(before: str) -> bool:
    """Whether what is indented after this block is code already."""
    return _is_indented(before) or before.rstrip().endswith("::")


def _code(block: str) -> str:
    return f".. code-block:: python\n\n{block}"
