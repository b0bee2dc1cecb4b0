"""How the documentation is built: pages in Markdown, the reference from docstrings, notebooks as they were left."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "extensions"), str(HERE.parent)]

project = "mechinterp-toolkit"
author = copyright = "mechinterp-toolkit contributors"
version = release = version_of("mechinterp-toolkit")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton", "as_written", "inserted"]
exclude_patterns = ["README.md", "notebooks/*.md", "_build"]
nitpicky = True
# Annotations name more than is public (`Float`, `Tensor`, our own small types). What is public is linked, the rest is text.
nitpick_ignore_regex = [("py:class", ".*")]

myst_enable_extensions = ["colon_fence"]  # no formulas: they would be set by a script from elsewhere
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "__new__, __init__"}
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "mechinterp-toolkit"
html_static_path = ["_static"]
html_css_files = ["beside.css"]
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False
