"""The oldest versions that ``pyproject.toml`` allows, as pip takes them: ``python tests/floors.py > floors.txt``.

Without what only checks, builds or documents the sources. What is named as an argument (``torch==2.13.0``) takes the
place of the floor of that package.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

UNUSED = ("ruff", "mypy", "build", "sphinx", "hatchling")


def floors(text: str) -> dict[str, str]:
    """By package, the oldest version that a ``pyproject.toml`` allows.

    >>> floors('dependencies = ["numpy>=1.24", "torch>=2.4"]')
    {'numpy': '1.24', 'torch': '2.4'}
    """
    return {name: floor for name, floor in re.findall(r'"([\w-]+)>=([\d.]+)"', text) if name not in UNUSED}


if __name__ == "__main__":
    found = floors((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    found.update(dict(argument.split("==") for argument in sys.argv[1:]))
    print("\n".join(f"{name}=={version}" for name, version in found.items()))
