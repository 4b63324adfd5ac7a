"""The documentation names everything public, and nothing that is not there."""

import inspect
import re
import runpy
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import pytest

import attnprune

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REFERENCE = "\n".join(page.read_text() for page in sorted((DOCS / "reference").glob("*.rst")))
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
    assert re.search(rf"\b{re.escape(_id(pair))}\b", REFERENCE), f"docs/reference lacks {_id(pair)}"


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


def test_troubleshooting_is_by_the_names_of_all_errors():
    text = (DOCS / "how_to" / "troubleshooting.rst").read_text()
    headings = re.findall(r"^(\w+(?:Error|Warning))\n-+$", text, re.MULTILINE)
    assert headings == [*sorted(set(attnprune.errors.__all__) - {"AttnPruneError"}), "AttnPruneWarning"]
    bases = re.findall(r"^:class:`~attnprune\.errors\.(\w+)`, an? ``(\w+)``:", text, re.MULTILINE)
    assert [name for name, _ in bases] == headings
    for name, base in bases:
        assert issubclass(getattr(attnprune.errors, name), getattr(__import__("builtins"), base)), name


def test_types_of_arguments_are_what_the_code_says():
    text = (DOCS / "reference" / "types.rst").read_text()
    entries = re.findall(r"^\.\. py:type:: (\S+)\n   :canonical: (.+)$", text, re.MULTILINE)
    assert len(entries) > 20
    for path, said in entries:
        assert _exists(path), path
        if said.startswith("Literal["):
            module, _, name = path.rpartition(".")
            assert get_args(getattr(import_module(module), name)) == get_args(eval(said, {"Literal": Literal})), path


NAMING = [
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml"),
    *(f"{folder}/**/*.{ext}" for folder in ("src", "examples", "benchmarks", "docs") for ext in ("py", "rst", "md")),
]


def test_files_of_the_documentation_that_are_named_exist():
    """In the README, in docstrings, everywhere: what looks like a path below docs is one."""
    places = [path for pattern in NAMING for path in ROOT.glob(pattern) if "_build" not in path.parts]
    named = {
        (str(place.relative_to(ROOT)), path)
        for place in places
        for path in re.findall(
            r"(?<![\w/.-])docs/[\w/]+\.(?:rst|md|py|svg|png|csv|json|ipynb)", place.read_text("utf-8")
        )
    }
    assert len(named) > 20
    assert not [(place, path) for place, path in sorted(named) if not (ROOT / path).exists()]


def test_the_drawing_of_the_house_shows_the_code_as_it_is():
    assert runpy.run_path(str(DOCS / "house.py"))["drawn"]() == (DOCS / "_static" / "house.svg").read_text()


def test_files_that_the_documentation_names_exist():
    table = (DOCS / "explanation" / "house.rst").read_text().partition("\nWhere is it?\n")[2]
    files = re.findall(r"``([\w/]+(?:\.py|/))``", table)
    assert len(files) > 20
    assert not [file for file in files if not (Path(attnprune.__file__).parent / file).exists()]


def test_links_that_lead_nowhere_are_found(tmp_path):
    broken = runpy.run_path(str(DOCS / "links.py"))["broken"]
    (tmp_path / "how to").mkdir()
    page = tmp_path / "how to" / "page.html"
    page.write_text(
        '<a href="../index.html#here">x</a><a href="https://nowhere.invalid">x</a><a href="#">x</a><p id="top">'
    )
    index = tmp_path / "index.html"
    index.write_text('<p id="here"><a href="how%20to/page.html#top">x</a><img src="picture.png"><a href="#here">x</a>')
    assert broken(tmp_path) == [("index.html", "picture.png")]
    (tmp_path / "picture.png").touch()
    assert broken(tmp_path) == []
    page.write_text('<a href="../index.html#there">x</a><a href="gone.html">x</a><a href="#top">x</a>')
    assert broken(tmp_path) == [
        ("how to/page.html", "../index.html#there"),
        ("how to/page.html", "gone.html"),
        ("how to/page.html", "#top"),
        ("index.html", "how%20to/page.html#top"),
    ]
