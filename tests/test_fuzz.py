"""Two hundred of the cases that ``make fuzz`` runs by the thousand, in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_broken_directories_and_killed_saves() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "tests.fuzz_files", "--cases", "200", "--kills", "10", "--seed", "1"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout + told.stderr[-2000:]
    assert "200 cases" in told.stdout
