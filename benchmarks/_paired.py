"""What the benchmarks share: timing in turns, ratios within a round, tables, JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from attnprune.cost.latency.timing import Clock, paired, ratio

__all__ = ["Clock", "environment", "median", "paired", "parser", "ratio", "report", "table", "verdict"]


def median(times: Mapping[str, Sequence[float]], name: str) -> float:
    """The median of a function's times."""
    return statistics.median(times[name])


def environment(*packages: str) -> dict[str, Any]:
    """What the numbers depend on: versions, threads, processor, and how busy the machine is."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout
            found[package] = "not installed"
    found["threads"] = torch.get_num_threads()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found["cpu"] = models[0] if models else platform.processor() or platform.machine()
    if hasattr(os, "getloadavg"):
        found["load"] = round(os.getloadavg()[0], 1)
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns padded."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def parser(text: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    found = argparse.ArgumentParser(description=(text or "").partition("\n")[0])
    found.add_argument(
        "--rounds", type=int, default=rounds, help="how often each function is timed (default: %(default)s)"
    )
    found.add_argument(
        "--threads", type=int, default=1, help="of torch; more wait for one another on a busy machine (1)"
    )
    found.add_argument("--json", type=Path, metavar="FILE", help="also write every single time there")
    return found


def report(setting: str, env: Mapping[str, Any], tables: Sequence[str], target: Path | None, result: Any) -> None:
    """Prints the setting, the environment line and the tables; writes JSON if a file is given."""
    described = ", ".join(f"{key} {value}" for key, value in env.items())
    print("\n\n".join([setting, described, *tables]))
    if target is not None:
        target.write_text(json.dumps({"setting": setting, "environment": dict(env), "result": result}, indent=1) + "\n")


def verdict(value: float, limit: float) -> str:
    """Whether a target is met, for a table."""
    return f"at most {limit:g}: {'met' if value <= limit else 'missed'}"
