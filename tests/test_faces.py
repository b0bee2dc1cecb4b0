"""The public names: complete, resolvable, and cheap to import."""

import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest

FACES = ("mechinterp", "circuits", "mechinterp.tasks", "mechinterp.models", "circuits.discovery", "saes")
HEAVY = ("torch", "transformer_lens", "transformers", "sae_lens", "matplotlib", "numpy")


@pytest.mark.parametrize("package", FACES)
def test_every_public_name_resolves(package):
    face = importlib.import_module(package)
    for name in getattr(face, "__all__", ()):
        assert getattr(face, name) is not None
        assert name in dir(face)


@pytest.mark.parametrize("package", FACES)
def test_no_module_hides_a_public_name(package):
    """Once ``circuits.x`` is imported, ``from circuits import x`` gives the module and no longer the function."""
    face = importlib.import_module(package)
    public = [name for name in getattr(face, "__all__", ()) if not isinstance(getattr(face, name), ModuleType)]
    assert [name for name in public if importlib.util.find_spec(f"{package}.{name}")] == []


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'circuits' has no attribute 'discoverr'"):
        importlib.import_module("circuits").discoverr  # noqa: B018


@pytest.mark.parametrize(
    "statement", ["import mechinterp", "import circuits", "import saes", "import circuits; circuits.Circuit"]
)
def test_importing_loads_nothing_heavy(statement):
    assert heavy_after(statement, HEAVY if ";" not in statement else HEAVY[:4]) == []


def test_help_loads_nothing_heavy():
    help_shown = "import sys; sys.argv = ['mechinterp', 'discover', '--help']\nfrom mechinterp.cli import main\n"
    assert heavy_after(f"{help_shown}try:\n  main()\nexcept SystemExit:\n  pass", HEAVY) == []


def heavy_after(statement: str, heavy: tuple[str, ...]) -> list[str]:
    """Which of the ``heavy`` modules a fresh interpreter has loaded after ``statement``."""
    code = f"import sys\n{statement}\nprint('loaded:', *(m for m in {heavy!r} if m in sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return shown.stdout.splitlines()[-1].split()[1:]
