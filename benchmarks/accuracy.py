"""What pruning costs in accuracy, without any fine-tuning: the paper's ways and the closed forms, side by side.

    python benchmarks/accuracy.py keywords
    python benchmarks/byte_lm.py WORKDIR && python benchmarks/accuracy.py bytes --workdir WORKDIR

``keywords`` is the shipped Audio Spectrogram Transformer (accuracy on voices never heard in training); ``bytes`` is the
byte-level language model that ``byte_lm.py`` trains (bits per byte on files never read in training). Calibration
samples come from the training split, a new one for every seed; nothing was tuned on the test split (choices were made
by looking at ``--split validation``). Figures are medians over seeds of the change against the dense model.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import attnprune

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "examples")]

Options = dict[str, Any]
LETTER = {"basis": "channels", "compensate": False}
FREE = {"split": "auto", "heads": "ragged"}
PAPER = [f"{scheme}-{scope}-{score}" for scheme in ("EH", "PH") for scope in "LG" for score in ("MAG", "FI")]
WAYS: tuple[tuple[str, Options], ...] = (
    *((f"paper: {name}", {"preset": f"paper:{name}"}) for name in PAPER),
    ("channels by gates, uncompensated", {"scorer": "gate", **LETTER, **FREE}),
    ("channels by gates, compensated", {"scorer": "gate", "compensate": True, **FREE}),
    ("rotated, local", {"scope": "local"}),
    ("rotated (the default with data)", {}),
    ("rotated, uniform, split found", {"split": "auto"}),
    ("rotated, ragged, split found", {**FREE}),
    ("rotated, uniform, split measured", {"split": "measured"}),
    ("rotated, ragged, split measured", {"split": "measured", "heads": "ragged"}),
    ("rotated, ragged, split found, sequential", {"sequential": True, **FREE}),
)


class Task(NamedTuple):
    """A model, how good it is, and what to calibrate it with."""

    model: nn.Module
    quality: Callable[[nn.Module], float]
    sample: Callable[[int], list[Any]]
    unit: str
    ratios: tuple[float, ...]


def keywords(split: str, count: int, workdir: Path | None) -> Task:
    from keywords import data

    x, y, _ = data.load_split("train")
    xs, ys, _ = data.load_split(split)

    def sample(seed: int) -> list[Any]:
        chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[: count or 512]
        pairs = zip(x[chosen].split(32), y[chosen].split(32), strict=True)
        return [{"input_values": features, "labels": labels} for features, labels in pairs]

    return Task(data.load_model(), lambda m: data.accuracy(m, xs, ys), sample, "% accuracy", (0.5, 0.75, 0.85))


def byte_language_model(split: str, count: int, workdir: Path | None) -> Task:
    from _tasks import byte_language_model

    found = byte_language_model(split, workdir, count or 256)
    return Task(found.model, lambda m: found.measure(m)[0], found.sample, "bits per byte", (0.25, 0.5, 0.75))


TASKS = {"keywords": keywords, "bytes": byte_language_model}


def change(task: Task, dense: float, data: list[Any], ratio: float, options: Options) -> tuple[float, float]:
    """Quality after pruning minus the dense model's, and the share of attention's weights that went."""
    model = copy.deepcopy(task.model)
    report = attnprune.prune_attention(model, ratio, data=data, progress=False, **options)
    return task.quality(model) - dense, statistics.mean(report.achieved.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--split", default="test", choices=("test", "validation"))
    parser.add_argument("--seeds", type=int, default=3, help="calibration samples per way (3)")
    parser.add_argument("--count", type=int, default=0, help="clips (512) or pieces of text (256) to calibrate with")
    parser.add_argument("--workdir", type=Path, default=None, help="holds byte_lm.safetensors")
    parser.add_argument("--only", default="", help="only the ways whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    torch.manual_seed(0)
    task = TASKS[args.task](args.split, args.count, args.workdir)
    dense = task.quality(task.model)
    samples = [task.sample(seed) for seed in range(args.seeds)]
    print(f"{args.task}, {args.split} split: dense {dense:.3f} {task.unit}; {args.seeds} calibration samples")
    print("(where another share of attention's weights went than was asked, it stands behind the change)")
    head = f"{'way':<42}" + "".join(f"{f'{ratio:.0%} removed':>16}" for ratio in task.ratios) + f"{'seconds':>10}"
    print(head, "-" * len(head), sep="\n")
    figures: dict[str, Any] = {"dense": dense, "seeds": list(range(args.seeds)), "ways": {}}
    for name, options in WAYS:
        if args.only not in name:
            continue
        start, cells, own = time.perf_counter(), [], figures["ways"].setdefault(name, {})
        for ratio in task.ratios:
            if "EH" in name and ratio > 1 - 1 / attnprune.find_attention(task.model)[0].heads:
                cells.append(f"{'-':>16}")  # one head of every layer has to stay
                continue
            used = samples[:1] if "MAG" in name else samples
            found, shares = zip(*(change(task, dense, data, ratio, options) for data in used), strict=True)
            other = f" {shares[0]:.1%}" if abs(shares[0] - ratio) > 0.005 else ""
            cells.append(f"{f'{statistics.median(found):+.3f}{other}':>16}")
            own[f"{ratio:.0%}"] = {"change": statistics.median(found), "removed": shares[0], "each": found}
        print(f"{name:<42}{''.join(cells)}{time.perf_counter() - start:>10.0f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
