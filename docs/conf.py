"""Configuration of the documentation: ``sphinx-build -W --keep-going -b html docs docs/_build/html``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from attnprune import __version__

project = "attnprune"
author = "The attnprune authors"
copyright = "the attnprune authors"
version = release = __version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
root_doc = "index"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
add_module_names = True

# Names of attnprune must resolve; those of torch and the standard library have nothing to resolve to here.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!attnprune).*")]

html_theme = "alabaster"
html_static_path = ["_static"]
html_theme_options = {
    "description": "Structural pruning of attention: heads and channels of Q, K, V and O",
    "fixed_sidebar": True,
    "page_width": "1200px",
    "body_max_width": "930px",
    "sidebar_width": "230px",
    "code_font_size": "13px",
}
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False


def setup(app):
    # Napoleon takes words before a colon in an attribute's docstring for its type; here they are words.
    written = {}

    def keep(app, what, name, obj, options, lines):
        if what in ("attribute", "property"):
            written[name] = list(lines)

    def put_back(app, what, name, obj, options, lines):
        lines[:] = written.pop(name, lines)

    app.connect("autodoc-process-docstring", keep, priority=100)
    app.connect("autodoc-process-docstring", put_back, priority=900)
