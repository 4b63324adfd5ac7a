"""Whether a test fails where the code is wrong: ``make mutations``.

``tests/data/mutations.json`` holds small faults, one at a time: a file below ``src/attnprune``, what stands there, what
would be wrong, and the tests that have to see it. Each is put into a copy of the library and these tests are run on it;
what they let pass is printed, and so is what no longer stands in its file.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
JOBS = int(os.environ.get("JOBS", "2"))


class Mutation(NamedTuple):
    """A fault of one place."""

    name: str
    file: str
    """Below ``src/attnprune``."""
    old: str
    """Stands there once."""
    new: str
    tests: list[str]
    """Names of tests, as for pytest."""


def known() -> list[Mutation]:
    """All of them."""
    return [Mutation(**one) for one in json.loads((ROOT / "tests/data/mutations.json").read_text())]


def outcome(mutation: Mutation) -> str:
    """What becomes of a mutation; empty if it is caught."""
    text = (ROOT / "src/attnprune" / mutation.file).read_text()
    if text.count(mutation.old) != 1:
        return "no longer stands in its file"
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "src", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        (Path(folder) / "attnprune" / mutation.file).write_text(text.replace(mutation.old, mutation.new))
        found = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation.tests],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
    return {0: "SURVIVED", 1: ""}.get(found.returncode, found.stdout[-300:] + found.stderr[-300:])


def main(words: list[str]) -> int:
    """Tries those whose name or file holds one of the words, or all; how many were not caught."""
    chosen = [one for one in known() if not words or any(word in f"{one.name} {one.file}" for word in words)]
    missed = 0
    with ThreadPoolExecutor(JOBS) as pool:
        for one, found in zip(chosen, pool.map(outcome, chosen), strict=True):
            missed += bool(found)
            if found:
                print(f"{one.file}: {one.name}: {found}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} mutations are caught")
    return missed


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
