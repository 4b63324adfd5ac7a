"""The main job on real input: take attention out of a keyword recogniser, in several ways, without any fine-tuning.

Loads the shipped Audio Spectrogram Transformer (35 spoken words, voices that it never heard in training), removes half,
three quarters and 85 % of its attention parameters, and prints for each way the accuracy; for half also the parameters,
the multiply-adds and the measured latency. Calibration uses shipped training clips; the test clips only measure.

    python examples/demo.py
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import attnprune

sys.path.insert(0, str(Path(__file__).resolve().parent))
from keywords import data

LETTER = {"basis": "channels", "compensate": False}  # removal as it stands
PAPER = [f"{scheme}-{scope}-{score}" for scheme in ("EH", "PH") for scope in "LG" for score in ("MAG", "FI")]
WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("random channels", {"scorer": "random", "scope": "local", **LETTER}),
    *((f"paper: {name}", {"preset": f"paper:{name}"}) for name in PAPER),
    ("ragged channels, one budget, Fisher per sample", {"heads": "ragged", "split": "auto", **LETTER}),
    ("the same by gates, refitted", {"heads": "ragged", "split": "auto", "basis": "channels"}),
    ("rotated: the default with data", {}),
    ("rotated, local", {"scope": "local"}),
    ("rotated, split found", {"split": "auto"}),
    ("rotated, split found, ragged", {"split": "auto", "heads": "ragged"}),
)
RATIOS = (0.5, 0.75, 0.85)


def batches(features: Tensor, labels: Tensor, size: int = 32) -> list[dict[str, Tensor]]:
    """Mappings that the model takes as they are: features (size, 96, 64), labels (size,)."""
    return [{"input_values": x, "labels": y} for x, y in zip(features.split(size), labels.split(size), strict=True)]


@torch.inference_mode()
def latencies(dense: nn.Module, pruned: nn.Module, clip: Tensor, rounds: int) -> tuple[float, float]:
    """Milliseconds of one forward pass over one clip: medians of runs taken in turn."""
    times: dict[str, list[float]] = {"dense": [], "pruned": []}
    for i in range(rounds + 5):
        for name, model in (("dense", dense), ("pruned", pruned)):
            start = time.perf_counter()
            model(input_values=clip)
            if i >= 5:
                times[name].append(1e3 * (time.perf_counter() - start))
    return statistics.median(times["dense"]), statistics.median(times["pruned"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="timed forward passes of each model (40); 0: none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    args = parser.parse_args()

    dense = data.load_model()
    features, labels, _ = data.load_split("test")
    x, y, _ = data.load_split("train")
    chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:512]
    calibration = batches(x[chosen], y[chosen])
    before = data.accuracy(dense, features, labels)
    specs = attnprune.find_attention(dense)
    print(f"{len(specs)} attention modules, each {specs[0].describe()}; {len(labels)} test clips of unheard voices")
    print(f"dense accuracy {before:.2f} %; a share of Q, K, V and O is removed, no fine-tuning")
    print("paper's ways: EH heads, PH channels; L local, G global; MAG magnitude, FI Fisher")
    print("where another share of attention's weights went than was asked, it stands behind the change\n")
    header = f"{'accuracy, and change':<48}" + "".join(f"{f'{ratio:.0%} removed':>22}" for ratio in RATIOS)
    header += f"{'| at 50%: MACs':>16}{'latency':>16}{'ratio':>7}"
    print(header, "-" * len(header), sep="\n")
    found: dict[str, Any] = {"dense": before, "clips": len(labels), "ways": {}}
    for name, options in WAYS:
        given = None if "MAG" in name or "random" in name else calibration
        line, cost, figures = f"{name:<48}", "", found["ways"].setdefault(name, {})
        for ratio in RATIOS:
            if "EH" in name and ratio > 1 - 1 / specs[0].heads:
                line += f"{'-':>22}"  # one head of every layer has to stay
                continue
            model = copy.deepcopy(dense)
            report = attnprune.prune_attention(
                model, ratio, data=given, example_inputs={"input_values": features[:1]}, progress=False, **options
            )
            after = data.accuracy(model, features, labels)
            share = statistics.mean(report.achieved.values())
            other = f" {share:.1%}" if abs(share - ratio) > 0.005 else ""
            line += f"{f'{after:.2f} ({after - before:+.2f}){other}':>22}"
            macs = report.macs[1] / report.macs[0] if report.macs else 1.0
            figures[f"{ratio:.0%}"] = {"accuracy": after, "change": after - before, "removed": share, "macs": macs}
            if ratio == RATIOS[0]:
                cost = f"{macs:>16.3f}"
            if ratio == RATIOS[0] and args.rounds:
                slow, fast = latencies(dense, model, features[:1], args.rounds)
                cost += f"{slow:>7.2f} ->{fast:>5.2f}ms{fast / slow:>7.2f}"
        print(line + cost, flush=True)
    if args.json:
        args.json.write_text(json.dumps({"seeds": [0], **found}, indent=1) + "\n")
    print(f"\nthe report of the last way, as print(report) shows it:\n\n{report}")


if __name__ == "__main__":
    main()
