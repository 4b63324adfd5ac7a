"""Twelve ways of pruning side by side on the keyword recogniser, and whether the one that wins keeps its promise.

Every way takes a quarter, half and three quarters of the attention, calibrated on shipped training clips. Accuracy on
the validation clips chooses; the best within half a point of dense is then judged on the test clips, which chose
nothing. Three minutes on one idle core.

    python examples/sweep_keywords.py [--resume rows.json] [--plot sweep.png] [--table sweep.json]
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import attnprune

sys.path.insert(0, str(Path(__file__).resolve().parent))
from keywords import data

WAYS: tuple[Any, ...] = (
    "default",
    "accurate",
    "fast",
    {"name": "rotated, local", "scope": "local"},
    *(f"paper:{scheme}-{scope}-{score}" for scheme in ("PH", "EH") for scope in "GL" for score in ("FI", "MAG")),
)
RATIOS = (0.25, 0.5, 0.75)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", type=int, default=len(WAYS), help="only the first so many ways (12)")
    parser.add_argument("--samples", type=int, default=512, help="training clips to calibrate on (512)")
    parser.add_argument("--clips", type=int, default=None, help="validation and test clips to judge by (all)")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each row is timed (2)")
    parser.add_argument("--resume", help="a file that keeps finished rows")
    parser.add_argument("--plot", help="a file for the picture")
    parser.add_argument("--table", help="a file for the table, as JSON")
    args = parser.parse_args()

    model = data.load_model()
    x, y, _ = data.load_split("train")
    chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[: args.samples]
    calibration = [{"input_values": x[some], "labels": y[some]} for some in chosen.split(32)]
    seen, unseen = (tuple(part[: args.clips] for part in data.load_split(name)[:2]) for name in ("validation", "test"))

    def accuracy(found: nn.Module) -> float:
        return data.accuracy(found, *seen)

    start = time.perf_counter()
    ways = WAYS[: args.ways]
    table = attnprune.sweep(model, accuracy, RATIOS, ways, data=calibration, seconds=args.seconds, resume=args.resume)
    minutes = (time.perf_counter() - start) / 60
    print(f"{table}\n{len(ways)} ways at {len(RATIOS)} ratios in {minutes:.1f} minutes\n")
    if args.plot:
        table.plot(args.plot)
    if args.table:
        Path(args.table).write_text(table.to_json())
    dense = data.accuracy(model, *unseen)
    print(f"on {len(unseen[1])} test clips that chose nothing: dense {dense:.2f} %")
    for by in ("params", "latency") if args.seconds else ("params",):
        best = table.best(within=0.5, by=by)
        pruned = copy.deepcopy(model)
        if best is not table.dense:
            attnprune.prune_attention(pruned, best.ratio, data=calibration, progress=False, **table.ways[best.way])
        found, left = data.accuracy(pruned, *unseen), (best.size(by) or 0.0) / (table.dense.size(by) or 1.0)
        print(f"best by {by}: {best.way}, {best.ratio:.0%} removed: x {left:.3f}, {found:.2f} % ({found - dense:+.2f})")


if __name__ == "__main__":
    main()
