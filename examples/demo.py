"""The main job on real input: take half of the attention out of a keyword recogniser, in several ways.

Loads the shipped Audio Spectrogram Transformer (35 spoken words, voices that it never heard in training), prunes half
of its attention parameters without any fine-tuning, and prints for each way the accuracy, the parameters, the
multiply-adds and the measured latency. Scores come from the shipped training clips; the test clips only measure.

    python examples/demo.py
"""

from __future__ import annotations

import argparse
import copy
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

WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("paper: heads, local, magnitude (EH-L-MAG)", {"granularity": "head", "scope": "local", "scorer": "magnitude"}),
    ("paper: heads, global, Fisher (EH-G-FI)", {"granularity": "head", "scope": "global", "scorer": "fisher"}),
    ("paper: channels, local, magnitude (PH-L-MAG)", {"scope": "local", "scorer": "magnitude"}),
    ("paper: channels, global, Fisher (PH-G-FI)", {"scope": "global", "scorer": "fisher"}),
    ("channels, global, Taylor", {"scorer": "taylor"}),
    ("channels, global, Fisher per sample", {"scorer": "auto"}),
    ("ragged heads, Fisher per sample", {"scorer": "auto", "heads": "ragged"}),
    ("heads and channels together, Fisher per sample", {"scorer": "auto", "granularity": "joint"}),
    ("ragged, qk and vo share one budget", {"scorer": "auto", "heads": "ragged", "split": "auto"}),
    ("random channels", {"scorer": "random", "scope": "local"}),
)


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
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the attention weights to remove (0.5)")
    parser.add_argument("--rounds", type=int, default=60, help="timed forward passes of each model (60)")
    args = parser.parse_args()

    dense = data.load_model()
    features, labels, _ = data.load_split("test")
    calibration = batches(*data.load_split("train")[:2])
    before = data.accuracy(dense, features, labels)
    specs = attnprune.find_attention(dense)
    print(f"{len(specs)} attention modules, each {specs[0].describe()}; {len(labels)} test clips of unheard voices")
    print(f"dense accuracy {before:.2f} %; removing {args.ratio:.0%} of Q, K, V and O, no fine-tuning\n")
    header = f"{'way':<48}{'accuracy':>10}{'change':>9}{'attention':>11}{'MACs':>8}{'latency':>16}{'ratio':>7}"
    print(header, "-" * len(header), sep="\n")
    for name, options in WAYS:
        model = copy.deepcopy(dense)
        given = calibration if options["scorer"] not in ("magnitude", "random") else None
        report = attnprune.prune_attention(
            model, args.ratio, data=given, example_inputs={"input_values": features[:1]}, progress=False, **options
        )
        after = data.accuracy(model, features, labels)
        whole, part = report.attention_parameters
        macs = report.macs[1] / report.macs[0] if report.macs else 1.0
        slow, fast = latencies(dense, model, features[:1], args.rounds)
        print(
            f"{name:<48}{after:>8.2f} %{after - before:>+9.2f}{part / whole:>10.1%}{macs:>8.3f}"
            f"{slow:>7.2f} ->{fast:>5.2f}ms{fast / slow:>7.2f}"
        )
    print(f"\nthe report of the last way, as print(report) shows it:\n\n{report}")


if __name__ == "__main__":
    main()
