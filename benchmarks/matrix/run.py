"""Fills in the matrix: every family in a process of its own, resumable.

python -m benchmarks.matrix.run                    # what is missing in benchmarks/results/matrix.json, then the page
python -m benchmarks.matrix.run --only 'llama*' timm:Swin --cells channels cache
python -m benchmarks.matrix.run --out elsewhere.json --seconds 60
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import attnprune

from .cells import CELLS, NOTHING, Case, found_in, short
from .hosts import hosts, warm
from .running import Host, gap, outputs, usable

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "matrix.json"
PACKAGES = ("torch", "transformers", "timm", "torchvision", "diffusers", "x-transformers", "open_clip_torch")
Row = dict[str, Any]
SURVEY = ("attention", "prunable", "run", "skipped", "silent", "seen", "single")
"""What is found before anything is pruned."""


def digest(installed: Mapping[str, str]) -> str:
    """Of the code that is measured and what is installed; rows of another one are filled in anew."""
    found = hashlib.sha256(json.dumps(installed).encode())
    for path in sorted(Path(attnprune.__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:8]


def versions() -> dict[str, str]:
    """Of what is installed."""
    found = {"python": platform.python_version(), "attnprune": attnprune.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def filled(host: Host, cells: Sequence[str], known: Row, send: Any) -> None:
    """Fills in the cells of a row, sending what is new as soon as it is there."""
    send({"name": host.name, "source": host.source, **host.about})
    for dtype in (torch.float32, torch.float64):  # of tensors that a model makes of its own
        torch.set_default_dtype(dtype)
        try:
            model = host.make()
            given = host.inputs(model)
            usable(model, given)
            expected = outputs(model, given)
            if gap(outputs(model, given), expected) > 0:
                raise ValueError("outputs that differ from call to call")
            break
        except Exception as error:
            reason = short(error)
    else:
        send({"unusable": reason})
        return
    send({"inputs": sorted(given) if isinstance(given, dict) else len(given)})
    case = Case(host, given, expected)
    try:
        known = {**known, **found_in(case)}
    except Exception as error:
        send({"failed": f"survey: {short(error)}"})
        return
    send({key: known[key] for key in SURVEY})
    for name in cells if known["prunable"] else ():
        try:
            send(CELLS[name](case))
        except Exception as error:
            send({name: short(error)})


def _child(host: Host, cells: Sequence[str], known: Row, pipe: Connection) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    try:
        filled(host, cells, known, pipe.send)
    except BaseException:
        pipe.send({"failed": traceback.format_exc().strip().splitlines()[-1][:200]})
    pipe.close()


def one_row(host: Host, cells: Sequence[str], known: Row, seconds: float) -> Row:
    """A row, of a process that has so many seconds."""
    context = multiprocessing.get_context("fork")  # what is imported here is imported once
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(host, cells, known, theirs), daemon=True)
    start = time.monotonic()
    process.start()
    theirs.close()
    row: Row = dict(known)
    left = True
    while left:
        wait = seconds - (time.monotonic() - start)
        try:
            if wait <= 0 or not mine.poll(wait):
                break
            row.update(mine.recv())
        except EOFError:
            left = False
    late = left
    if late:
        process.kill()
    process.join()
    if "attention" not in row and "unusable" not in row:
        row.setdefault("failed", f"more than {seconds:g} seconds" if late else f"process ended by {process.exitcode}")
    if row.get("prunable"):
        why = f"more than {seconds:g} seconds" if late else f"process ended by {process.exitcode}"
        row.update({name: why for name in cells if name not in row})
    row["seconds"] = round(time.monotonic() - start, 1)
    return row


def read(path: Path) -> dict[str, Any]:
    """What was found so far."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {"rows": {}}


def write(path: Path, result: dict[str, Any]) -> None:
    """One row a line, so that differences can be read."""
    rows = result["rows"]
    head = {key: value for key, value in result.items() if key != "rows"}
    body = ",\n".join(f"{json.dumps(key)}: {json.dumps(rows[key])}" for key in sorted(rows))
    draft = path.with_suffix(".draft")
    draft.write_text(f'{{"about": {json.dumps(head["about"])},\n"rows": {{\n{body}\n}}}}\n', "utf-8")
    draft.replace(path)


def wanted(every: Iterable[Host], patterns: Sequence[str]) -> list[Host]:
    """Families whose name, or source and name, match."""
    return [
        host
        for host in every
        if not patterns
        or any(fnmatchcase(name, one) for one in patterns for name in (host.name, f"{host.source}:{host.name}"))
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], metavar="PATTERN", help="families of these names alone")
    parser.add_argument("--cells", nargs="*", choices=list(CELLS), default=list(CELLS), help="these cells alone")
    parser.add_argument("--seconds", type=float, default=300, help="that a family may take (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help="the results, also those so far")
    parser.add_argument("--again", action="store_true", help="also what is there of the same code and versions")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    about = {"code": digest(versions()), "versions": versions(), "date": date.today().isoformat()}
    result = read(args.out)
    result["about"] = about
    every = wanted(hosts(), args.only)
    warm({host.source for host in every})
    for number, host in enumerate(every):
        key = f"{host.source}:{host.name}"
        row = result["rows"].get(key, {})
        if args.again or row.get("code") != about["code"]:
            row = {}
        cells = [name for name in args.cells if name not in row]
        if ("attention" in row and (not cells or not row["prunable"])) or "unusable" in row or "failed" in row:
            continue
        result["rows"][key] = row = {**one_row(host, cells, row, args.seconds), "code": about["code"]}
        write(args.out, result)
        print(f"{number + 1}/{len(every)} {key}: {summary(row)}", flush=True)


def summary(row: Row) -> str:
    """A row in a line."""
    if "attention" not in row:
        return str(row.get("unusable") or row.get("failed"))
    bad = [
        f"{name}: {row[name]}" for name in CELLS if name in row and not str(row[name]).startswith(("passed", NOTHING))
    ]
    return f"{row['prunable']}/{row['attention']} {row.get('ways', '')} {row['seconds']} s {'; '.join(bad)[:300]}"


if __name__ == "__main__":
    sys.exit(main())
