"""The documentation names everything public, and nothing that is not there."""

import inspect
import re
import runpy
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import attnprune

DOCS = Path(__file__).parents[1] / "docs"
MODULES = {
    "attnprune": attnprune,
    **{f"attnprune.{name}": getattr(attnprune, name) for name in ("adapters", "scorers", "errors", "nn", "surgery")},
}
NAMES = [(public, name) for public, module in MODULES.items() for name in module.__all__]
ROLE = re.compile(r":(?:class|func|meth|attr|exc|data):`(?:[^`<]*<)?~?([\w.]+)>?`")


def _id(pair):
    return ".".join(pair)


def _exists(path):
    """Whether a dotted path below attnprune names something; dataclass fields count, though classes lack them."""
    found = attnprune
    for part in path.split(".")[1:]:
        if part in getattr(found, "__dataclass_fields__", {}) or part in getattr(found, "__annotations__", {}):
            return True
        if hasattr(found, "__path__") and find_spec(f"{found.__name__}.{part}") is not None:
            found = import_module(f"{found.__name__}.{part}")  # integrations are imported when asked for
            continue
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


@pytest.mark.parametrize("pair", NAMES, ids=_id)
def test_public_name_is_in_the_reference(pair):
    text = (DOCS / "reference" / "api.rst").read_text()
    assert re.search(rf"\b{re.escape(_id(pair))}\b", text), f"docs/reference/api.rst lacks {_id(pair)}"


@pytest.mark.parametrize("pair", NAMES, ids=_id)
def test_public_name_has_a_docstring(pair):
    found = getattr(MODULES[pair[0]], pair[1])
    if inspect.isclass(found) or inspect.isfunction(found) or inspect.ismodule(found):
        # a class without a docstring of its own would inherit its base's
        assert (found.__dict__.get("__doc__") or "").strip() if inspect.isclass(found) else found.__doc__.strip()


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.rst")), ids=lambda page: page.relative_to(DOCS).as_posix())
def test_references_exist(page):
    paths = {path for path in ROLE.findall(page.read_text()) if path.split(".")[0] == "attnprune"}
    assert not {path for path in paths if not _exists(path)}


def test_errors_that_are_documented_exist():
    text = "\n".join(page.read_text() for page in DOCS.rglob("*.rst"))
    named = set(re.findall(r"attnprune\.errors\.(\w+)", text))
    assert named
    assert named <= set(vars(attnprune.errors))


def test_every_error_is_in_the_table_of_what_is_refused():
    text = (DOCS / "explanation" / "laws.rst").read_text()
    missing = [name for name in attnprune.errors.__all__ if f"attnprune.errors.{name}`" not in text]
    assert not missing


def test_the_table_of_errors_names_their_built_in_bases():
    text = (DOCS / "explanation" / "laws.rst").read_text()
    rows = re.findall(r"\* - :class:`~attnprune\.errors\.(\w+)`\n     - ``(\w+)``", text)
    assert len(rows) == len(attnprune.errors.__all__) - 1  # all but the base of all
    for name, base in rows:
        assert issubclass(getattr(attnprune.errors, name), getattr(__import__("builtins"), base)), name


def test_the_drawing_of_the_house_shows_the_code_as_it_is():
    assert runpy.run_path(str(DOCS / "house.py"))["drawn"]() == (DOCS / "_static" / "house.svg").read_text()


def test_files_that_the_documentation_names_exist():
    table = (DOCS / "explanation" / "concepts.rst").read_text().partition("Where is it?")[2].partition("Three ways")[0]
    files = re.findall(r"``([\w/]+(?:\.py|/))``", table)
    assert len(files) > 20
    assert not [file for file in files if not (Path(attnprune.__file__).parent / file).exists()]
