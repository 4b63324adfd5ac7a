"""Configuration of the documentation: ``sphinx-build -W --keep-going -b html docs docs/_build/html``."""

import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from sphinx.util.inspect import TypeAliasForwardRef

from attnprune import __version__

HERE = Path(__file__).resolve().parent
for notebook in (HERE.parent / "examples" / "notebooks").glob("*.ipynb"):  # pages, with the outputs stored in them
    shutil.copy(notebook, HERE / "tutorials")

project = "attnprune"
author = "The attnprune authors"
copyright = "the attnprune authors"
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "myst_nb",
]
exclude_patterns = ["_build", "README.md"]
root_doc = "index"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
autodoc_type_aliases = {  # names stay names, and link to reference/types.rst
    path.rpartition(".")[2]: path
    for path in re.findall(
        r"^\.\. py:type:: (\S+)", (Path(__file__).parent / "reference" / "types.rst").read_text(), re.MULTILINE
    )
}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
add_module_names = True

# Names of attnprune must resolve; those of torch and the standard library have nothing to resolve to here.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!attnprune).*")]

html_theme = "furo"
html_title = f"attnprune {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False

nb_execution_mode = "off"  # make notebooks executes them
nb_render_markdown_format = "gfm"  # of outputs: tables

# Copied are the lines that one types, without prompts, and not what they print.
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True


# A number within bounds is a number.
autodoc_type_aliases |= dict.fromkeys(["Size", "fields.Size", "Count", "Bytes"], "int")
autodoc_type_aliases |= dict.fromkeys(["Positive", "fields.Positive", "From0"], "float")

# Inside a union Sphinx shows such a name as the object that stands for it.
TypeAliasForwardRef.__repr__ = lambda alias: alias.name


def setup(app):
    # Napoleon takes words before a colon in an attribute's docstring for its type; here they are words.
    written = {}

    def keep(app, what, name, obj, options, lines):
        if what in ("attribute", "property"):
            written[name] = list(lines)

    def put_back(app, what, name, obj, options, lines):
        lines[:] = written.pop(name, lines)

    # From source to documentation viewcode knows one path of a module; where its names have several, it leads nowhere.
    def lead_back(app, page, template, context, doctree):
        if not page.startswith("_modules/attnprune"):
            return
        known = {anchor for *_, anchor, _ in app.env.domains["py"].get_objects()}

        def mended(match):
            parts = match[2].split(".")
            ends = ["." + ".".join(parts[first:]) for first in range(1, len(parts))]
            like = (path for end in ends for path in sorted(known) if path.endswith(end))
            return match[1] + (match[2] if match[2] in known else next(like, match[2]))

        context["body"] = re.sub(r'(class="viewcode-back" href="[^"#]*#)([\w.]+)', mended, context["body"])

    app.connect("html-page-context", lead_back)
    app.connect("autodoc-process-docstring", keep, priority=100)
    app.connect("autodoc-process-docstring", put_back, priority=900)
