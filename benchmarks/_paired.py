"""What the benchmarks share: interleaved timing, ratios within a round, tables, JSON."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Times = dict[str, list[float]]


def paired(functions: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> Times:
    """Seconds per round of every function, run interleaved so that a busy machine slows all of them alike.

    The order rotates from round to round; garbage is collected before every call and never during one.

    Args:
        functions: by name. One that returns a mapping of seconds has timed its own steps (and left its preparations
            out); its times are then named ``name: step``, beside ``name``, their sum.
        rounds: how often each function is timed.
        warm_up: rounds before that, which do not count.
    """
    names, times = list(functions), Times()
    gc.collect()
    gc.freeze()  # what is there now is not looked at again and again
    for number in range(-warm_up, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            gc.disable()
            try:
                start = time.perf_counter()
                result = functions[name]()
                seconds = time.perf_counter() - start
            finally:
                gc.enable()
            steps = dict(result) if isinstance(result, Mapping) else {}
            found = {name: sum(steps.values()) if steps else seconds}
            found |= {f"{name}: {step}": value for step, value in steps.items()}
            if number >= 0:
                for key, value in found.items():
                    times.setdefault(key, []).append(value)
    gc.unfreeze()
    return times


def ratio(times: Mapping[str, Sequence[float]], a: str, b: str) -> float:
    """How many times longer ``a`` takes than ``b``: the median of the ratios within each round."""
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))


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
