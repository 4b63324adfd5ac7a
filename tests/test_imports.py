"""Imports go down only, and importing attnprune loads no framework."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import attnprune

ROOT = Path(attnprune.__file__).parent
LAYERS = (
    ("errors",),
    ("fields", "processes"),
    ("spec",),
    ("ratios",),
    ("folds",),
    ("layer_plan",),
    ("plots",),
    ("scores", "plan", "moments"),
    ("timetable",),
    ("views",),
    ("nn",),
    ("adapters",),
    ("surgery",),
    ("packing",),
    ("passes",),
    ("blocks", "counting", "rounding"),
    ("timing",),
    ("calibration", "distillation", "distributed"),
    ("closed_form",),
    ("scorers",),
    ("allocate",),
    ("knapsack", "latency"),
    ("target", "budgets"),
    ("planning", "asking"),
    ("report", "checkpoint", "scoring", "export"),
    ("api",),
    ("schedules", "observing"),
    ("pruner", "by_hand"),
    ("integrations",),
    ("cli",),
    ("__init__", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FRAMEWORKS = {"transformers", "timm", "peft", "lightning", "accelerate", "matplotlib", "onnx"}

OWN = {"auto": {"transformers"}}  # else the module's own name
WHEN_CALLED = {"plots": {"matplotlib"}, "checkpoint": {"transformers"}, "cli": {"transformers"}}


def imports(path: Path) -> list[tuple[str, bool]]:
    """Absolute names that a file imports at run time, and whether they are inside attnprune."""
    package = ["attnprune", *path.relative_to(ROOT).with_suffix("").parts[:-1]]
    found = []
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, False) for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.module or "", False))
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            tails = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(".".join([*base, tail or ""]), True) for tail in tails]
    return found


def test_imports_go_down_only() -> None:
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        here = RANK[parts[0]]
        for name, own in imports(path):
            own_framework = OWN.get(parts[-1], {parts[-1]}) if parts[0] == "integrations" else set()
            assert name.split(".")[0] not in FRAMEWORKS - WHEN_CALLED.get(parts[0], own_framework), (path, name)
            if not own:
                continue
            target = name.split(".")[1:]
            if target[0] == parts[0] and len(parts) > 1:
                continue  # inside one package
            assert RANK[target[0]] <= here, (path, name)
            assert RANK[target[0]] < here or target[0] != parts[0], (path, name)


def test_siblings_do_not_import_one_another() -> None:
    """In a package of like things, only the shared module is imported."""
    for package, shared in {
        "adapters": {"base"},
        "scorers": {"base", "gradient"},
        "nn": {"attend", "decoupled", "layouts", "packed", "products"},
    }.items():
        for path in (ROOT / package).glob("*.py"):
            if path.stem in ("__init__", "registry"):
                continue
            for name, own in imports(path):
                target = name.split(".")[1:]
                if own and target[0] == package and len(target) > 1:
                    assert target[1] in shared, (path, name)


def test_import_loads_no_framework_and_nothing_that_is_loaded_when_asked_for() -> None:
    """What it costs is measured by benchmarks/import_cost.py."""
    later = {f"attnprune.{name}" for name in attnprune._MODULES}
    code = f"import sys, json, attnprune; print(json.dumps(sorted({FRAMEWORKS | later!r} & sys.modules.keys())))"
    assert json.loads(subprocess.check_output([sys.executable, "-c", code], text=True)) == []
