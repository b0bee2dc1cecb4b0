"""What pages take from elsewhere, so that nothing is said twice: a line ``{{ ... }}`` is replaced by

* ``{{ mechinterp --help }}``: what the program and each of its commands say of themselves;
* ``{{ circuits.export.FORMATS }}``: a table of the formats of circuits;
* ``{{ README.md: Heading }}``: that section of a file of the repository, without its heading;
* ``{{ benchmarks/results/codes.md }}``: the whole file.

Links are written so that they work in the repository; here they are made to lead to the same thing in the documentation.
"""

import os
import re
from pathlib import Path
from typing import Any

import typer
from sphinx.application import Sphinx
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 78  # of a terminal, and of the column of text
_LINE = re.compile(r"^\{\{ (.+?)(?:: (.+?))? \}\}$", re.MULTILINE)
_CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s]+)")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", insert)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def insert(app: Sphinx, page: str, source: list[str]) -> None:
    """Replace the lines ``{{ ... }}`` of a page, and lead all links to pages, pictures and results."""
    if page.startswith("notebooks/"):
        return
    text = with_links(source[0], (ROOT / "docs" / page).parent)
    source[0] = _LINE.sub(lambda found: inserted(found[1], found[2]), text)


def inserted(what: str, heading: str | None = None) -> str:
    """The text that a line ``{{ what: heading }}`` stands for."""
    if what == "mechinterp --help":
        return "\n\n".join(help_section(words) for words in [(), *commands()])
    if what == "circuits.export.FORMATS":
        return table_of_formats()
    file = ROOT / what
    text = file.read_text(encoding="utf-8")
    return with_links(text if heading is None else section(text, heading), file.parent)


def section(text: str, heading: str) -> str:
    """What stands under ``## heading``. ``LookupError`` if nothing does."""
    for block in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, body = block.partition("\n")
        if title == heading:
            return body
    raise LookupError(f"there is no section {heading!r}")


def with_links(text: str, folder: Path) -> str:
    """Relative links of a text that lies in ``folder``, as links from the root of the documentation; code stays as it is."""
    around_code = _CODE.split(text)
    around_code[::2] = [_LINK.sub(lambda found: _led(found[1], folder), words) for words in around_code[::2]]
    return "".join(around_code)


def table_of_formats() -> str:
    """Name, suffix, and whether what was written can be read back."""
    from circuits.export import FORMATS

    rows = [f"| `{name}` | `{one.suffix}` | {'yes' if one.read else 'for looking'} |" for name, one in FORMATS.items()]
    return "\n".join(["| format | suffix | read back |", "| --- | --- | --- |", *rows])


def commands() -> list[tuple[str, ...]]:
    """The words of every command: ``("discover",)``, ..., ``("sae", "train")``."""
    from mechinterp.cli import app

    return _below(typer.main.get_command(app), ())


def help_section(words: tuple[str, ...]) -> str:
    """``--help`` of a command, under its name; of the program itself without words."""
    from mechinterp.cli import app

    shown = CliRunner().invoke(app, [*words, "--help"], prog_name="mechinterp", terminal_width=WIDTH).output.strip("\n")
    heading = f"## {' '.join(words)}\n\n" if words else ""
    return f"{heading}```text\n{shown}\n```"


def _below(command: Any, words: tuple[str, ...]) -> list[tuple[str, ...]]:
    children = getattr(command, "commands", None)
    if children is None:
        return [words]
    return [found for name, child in children.items() for found in _below(child, (*words, name))]


def _led(link: str, folder: Path) -> str:
    path, hash_, anchor = link.partition("#")
    inside = os.path.relpath(folder / path, ROOT)
    for there, here in (("docs/", "/"), ("benchmarks/results/", "/results/")):
        if inside.startswith(there):
            return f"{here}{inside.removeprefix(there)}{hash_}{anchor}"
    return link
