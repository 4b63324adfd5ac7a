"""Executes the notebooks of this folder and keeps their outputs in them: ``make notebooks``.

    python examples/notebooks/execute.py [NAME.ipynb ...]

Left out of what is kept: progress bars, what goes to stderr, and when a cell ran.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
WIDGET = "application/vnd.jupyter.widget-view+json"


def execute(path: Path) -> None:
    """Runs all cells in a new kernel, in the notebook's folder; where a cell raises, this does, and writes nothing."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=1800, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(path.parent)}})  # fmt: skip
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            noise = [one.get("name") == "stderr" or WIDGET in one.get("data", {}) for one in cell.outputs]
            cell.outputs = [one for one, bad in zip(cell.outputs, noise, strict=True) if not bad]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, path)


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded
    for path in [HERE / name for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        began = time.monotonic()
        execute(path)
        print(f"{path.name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
