"""Faults at every line of every public verb, over several families. It takes hours; it goes on where it was stopped.

nice -n 10 python -m tests.every_line --out faults.jsonl [--verbs ...] [--families ...] [--share 1]
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch

from .faults import FAULTS, Call
from .verbs import ALIKE, NAMES, UNFIT, VERBS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="one line of JSON for every verb of every family")
    parser.add_argument("--verbs", nargs="+", default=[*VERBS], choices=[*VERBS])
    parser.add_argument("--families", nargs="+", default=[*NAMES], choices=[*NAMES])
    parser.add_argument("--share", type=int, default=1, help="every which line; 1: all")
    parser.add_argument("--again", type=int, default=1, help="every which of the lines that another family passed")
    parser.add_argument("--turns", choices=["one", "both"], default="one", help="of a line passed more than once")
    parser.add_argument("--kinds", type=int, default=1, choices=range(1, 1 + len(FAULTS)), help="of faults at each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    known = {(one["verb"], one["family"]) for one in done}
    passed: dict[str, set[Any]] = defaultdict(set)
    for verb, name in itertools.product(args.verbs, args.families):
        if (verb, name) in UNFIT or (verb in ALIKE and name != NAMES[0]):
            continue
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            call = Call(VERBS[verb](name, Path(folder)))
            if (verb, name) in known:
                passed[verb] |= {*call.passed}
                continue
            points = [
                point
                for number, point in enumerate(call.points(args.share, args.turns, args.kinds))
                if point.place not in passed[verb] or number % args.again == 0
            ]
            passed[verb] |= {*call.passed}
            problems = [found for point in points if (found := call.problem(point))]
        seconds = round(time.monotonic() - begun, 1)
        one = {"verb": verb, "family": name, "points": len(points), "seconds": seconds, "problems": problems}
        with args.out.open("a") as file:
            file.write(json.dumps(one) + "\n")
        print(f"{verb}, {name}: {len(problems)} of {len(points)} points, {seconds} s", flush=True)
    total = Counter({"points": 0, "problems": 0})
    for one in (json.loads(line) for line in args.out.read_text().splitlines()):
        total.update({"points": one["points"], "problems": len(one["problems"])})
    print(dict(total))


if __name__ == "__main__":
    main()
