"""The documentation: its code runs and prints what it says, it builds without a warning, and every public name is in it."""

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FACES = ("mechinterp", "circuits", "saes")
SOURCES = sorted(page for page in DOCS.rglob("*.md") if "notebooks" not in page.parts)
PAGES = [page for page in SOURCES if "```python" in page.read_text(encoding="utf-8")]
BLOCK = re.compile(r"^```(\S+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "README.md"], ids=name_of)
def test_the_code_of_a_page_runs_from_top_to_bottom_and_prints_what_is_shown(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names, printed = {}, ""
    for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(text, str(page), "exec"), names)
            printed = capsys.readouterr().out
        elif language == "output":
            assert_shows_the_same(printed, text)


def assert_shows_the_same(printed: str, shown: str) -> None:
    """The same words, and numbers within what another processor may round differently."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split()
    both = ([float(found.replace(",", "")) for found in NUMBER.findall(text)] for text in (printed, shown))
    for ours, theirs in zip(*both, strict=True):
        assert ours == pytest.approx(theirs, rel=0.02, abs=0.02), f"{printed}\nis not what is shown:\n{shown}"


@pytest.mark.parametrize("page", SOURCES, ids=name_of)
def test_links_lead_to_files_of_the_repository(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert [link for link in LINK.findall(text) if not (page.parent / link).exists()] == []


def test_every_picture_is_in_the_gallery():
    shown = LINK.findall((DOCS / "gallery.md").read_text(encoding="utf-8"))
    assert {picture.name for picture in DOCS.glob("*.png")} <= set(shown)


def test_every_measurement_is_a_page():
    assert {path.name for path in (ROOT / "benchmarks" / "results").glob("*.md")} == {
        path.name for path in (DOCS / "results").glob("*.md") if path.name != "index.md"
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The documentation as HTML, from a build in which every warning is an error and every reference must be found."""
    missing = [name for name in ("sphinx", "myst_nb", "furo", "sphinx_copybutton") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} are not installed: pip install 'mechinterp-toolkit[docs]'")
    folder = tmp_path_factory.mktemp("docs")
    strictly = ["-W", "--keep-going", "-n", "-q", "-d", str(folder / "doctrees")]
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-b", "html", *strictly, str(DOCS), str(folder / "html")],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder / "html"


def test_it_builds_without_a_warning_and_has_every_page(built):
    pages = [page for page in SOURCES if page.name != "README.md"] + sorted((ROOT / "notebooks").glob("*.ipynb"))
    names = [page.relative_to(DOCS if page.is_relative_to(DOCS) else ROOT).with_suffix(".html") for page in pages]
    assert [str(name) for name in names if not (built / name).is_file()] == []


@pytest.mark.parametrize("face", FACES)
def test_every_public_name_is_in_the_reference(built, face):
    text = (built / "api" / f"{face}.html").read_text(encoding="utf-8")
    public = importlib.import_module(face).__all__
    assert [name for name in public if f'id="{face}.{name}"' not in text and f'id="module-{face}.{name}"' not in text] == []


def test_signatures_are_as_written(built):
    text = re.sub(r"<[^>]+>", "", (built / "api" / "mechinterp.html").read_text(encoding="utf-8"))
    assert "tokens: Int[Tensor, 'batch pos']" in text
    assert "jaxtyping." not in text
    assert "``" not in text


def test_every_command_is_shown_with_its_help(built):
    text = (built / "cli.html").read_text(encoding="utf-8")
    for command in ("discover", "compare", "reuse", "repair", "decompose", "sae train", "sae frontier"):
        assert f"Usage: mechinterp {command} [OPTIONS]" in text


def test_nothing_is_left_to_be_inserted(built):
    assert [page.name for page in built.rglob("*.html") if "<p>{{ " in page.read_text(encoding="utf-8")] == []
