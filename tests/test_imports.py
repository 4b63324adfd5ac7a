"""Imports go down only, and importing attnprune loads no framework."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import attnprune

ROOT = Path(attnprune.__file__).parent
ROOMS = (
    "errors",
    "bars",
    "checks",
    "values",
    "nn",
    "families",
    "surgery",
    "calibration",
    "cost",
    "planning",
    "recovery",
    "report",
    "checkpoint",
    "api",
    "by_hand",
    "studies",
    "training",
    "integrations",
    "cli",
    "testing",
    "__main__",
)
RANK = {name: rank for rank, name in enumerate(ROOMS)}
FRAMEWORKS = {"transformers", "huggingface_hub", "timm", "peft", "lightning", "accelerate", "matplotlib", "onnx"}

OWN = {"auto": {"transformers"}}  # else the module's own name
WHEN_CALLED = {"report": {"matplotlib"}, "checkpoint": {"transformers", "huggingface_hub"}, "cli": {"transformers"}}


def module_of(path: Path) -> str:
    """The dotted name of a file below the package; a room's own name for its __init__."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """What a file imports, in functions and for types too: names of other packages, and files of attnprune."""
    package = ["attnprune", *path.relative_to(ROOT).parts[:-1]]
    others, own = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            others.add(node.module or "")
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*package[1 : len(package) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                own.add(inner if inner in FILES else base)
    return others, own


ARROWS = {name: imports(path) for name, path in FILES.items()}


def test_arrows_between_rooms_go_down_only() -> None:
    for name, (_, own) in ARROWS.items():
        here, *_ = name.split(".")
        for target in own if here != "__init__" else ():
            there, *_ = target.split(".")
            assert RANK[there] < RANK[here] or there == here, f"{name} imports {target}"


def test_no_circle_among_files() -> None:
    """Also none of imports in functions, or for types alone."""
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a circle: {' -> '.join([*trail[trail.index(name) :], name])}"
        if name not in done:
            for target in sorted(ARROWS[name][1]):
                walk(target, (*trail, name))
            done.add(name)

    for name in FILES:
        if name != "__init__":  # the public names, for editors alone
            walk(name, ())


def test_frameworks_are_imported_where_they_belong() -> None:
    for name, (others, _) in ARROWS.items():
        parts = name.split(".")
        allowed = OWN.get(parts[-1], {parts[-1]}) if parts[0] == "integrations" else WHEN_CALLED.get(parts[0], set())
        found = {other.split(".")[0] for other in others} & FRAMEWORKS
        assert found <= allowed, f"{name} imports {found - allowed}"


def test_siblings_do_not_import_one_another() -> None:
    """In a room of like things, only the shared file is imported."""
    for room, shared in {
        "planning.scorers": {"base", "gradient", "feature_gates"},
        "families.hf": {"forward", "staged"},
        "families.mha": {"forward"},
        "families.timm": {"forward"},
    }.items():
        for name, (_, own) in ARROWS.items():
            for target in own if name.startswith(f"{room}.") else ():
                if target.startswith(f"{room}."):
                    assert target.removeprefix(f"{room}.") in shared, f"{name} imports {target}"


def test_rooms_are_small() -> None:
    for name, path in FILES.items():
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{name} has {lines} lines: which two nouns live there?"


def test_nothing_is_loaded_before_it_is_needed() -> None:
    """By the import, whose cost is measured by benchmarks/import_cost.py; and by planning and surgery."""
    heavy = FRAMEWORKS | {
        "torch_pruning",
        "torch._dynamo",
        "attnprune.api",
        "attnprune.report.plots",
        "attnprune.planning",
    }
    code = (
        f"import sys, attnprune; assert not {heavy!r} & sys.modules.keys(), {heavy!r} & sys.modules.keys();"
        "import torch; x, model = torch.randn(3, 2, 8), torch.nn.MultiheadAttention(8, 2);"
        "attnprune.prune_attention(model, 0.5, heads='ragged'); model(x, x, x);"
        "assert not {'torch._dynamo', 'torch_pruning'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_words_that_need_no_model_import_no_torch() -> None:
    """Version, help, wrong usage and a directory that is not there; benchmarks/import_cost.py times it."""
    words = [["--version"], ["prune", "--help"], ["prun"], ["prune", ".", "--qkvo", ".1", ".2", "-o", "x"]]
    code = (
        "import sys; from attnprune.cli import main\n"
        f"for words in {words!r}:\n"
        "    try: main(words)\n"
        "    except SystemExit as stop: print(stop.code, file=sys.stderr)\n"
        "print(main(['inspect', 'no such directory']), file=sys.stderr)\n"
        "assert not {'torch', 'numpy', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert [line for line in done.stderr.splitlines() if line.isdecimal()] == ["0", "0", "2", "2", "1"]
    assert "expected 1 or 4 numbers, found 2" in done.stderr
