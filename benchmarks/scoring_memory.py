"""Peak memory of scoring and calibration on AST-base, each in a process of its own.

    python benchmarks/scoring_memory.py [--tokens 146] [--batch 1] [--batches 3] [--allocator default returning]

Two bounds, each 1.1 times the model and the gradients of its attention weights, plus the activations of one batch. The
looser takes for activations what a plain forward pass that keeps its graph takes beside the model, with attention
weights that require gradients; the stricter the peak of a plain forward and backward pass less model and gradients,
although some activations are gone by the time the last gradients are there.

Peaks are resident memory over that of the process with all imports and no model, after the same task on a tiny model
(so that code, which is loaded when it first runs, does not count; Linux; the peak is reset after the model is built),
of the greatest of --runs processes. glibc keeps much of what is freed in its heap, and where it aligns blocks, as
PyTorch has it do, glibc 2.36 does not put one where another of its size was; with the "returning" allocator blocks of
256 kB and more go back to the system when they are freed (MALLOC_MMAP_THRESHOLD_), so that peaks are what was in use.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from _paired import environment, table
from torch import Tensor, nn
from transformers import ASTConfig, ASTForAudioClassification

import attnprune
from attnprune.calibration import bases as closed_form
from attnprune.calibration import taps as calibration
from attnprune.planning import decide as planning  # imported here, so that they count as imports
from attnprune.planning import scorers

MB = 1e6
assert closed_form
assert planning


def status(key: str) -> int:
    """A memory figure of this process in bytes: ``VmRSS`` now, ``VmHWM`` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def plain(model: nn.Module, batches: list[tuple[Tensor, Tensor]], backward: bool = True) -> None:
    """Forward (and backward) passes with gradients of the attention weights alone, which add up over the batches."""
    chosen = {id(p) for name, p in model.named_parameters() if ".attention." in name}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    for x, y in batches:
        loss = nn.functional.cross_entropy(model(x).logits, y)
        if backward:
            loss.backward()


def score(scorer: Any, model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    views = attnprune.adapters.find_views(model)
    scorer.score(model, views, data=batches, progress=False)


def pruned(model: nn.Module, batches: list[tuple[Tensor, Tensor]], **options: Any) -> None:
    attnprune.make_plan(model, 0.5, data=batches, progress=False, **options)


GRAPH, BOTH = "forward, graph kept", "forward and backward"
TASKS: dict[str, Any] = {
    GRAPH: lambda model, batches: plain(model, batches[:1], backward=False),
    BOTH: lambda model, batches: plain(model, batches[:1]),
    "forward and backward, all batches": plain,
    "magnitude": lambda model, batches: score(scorers.Magnitude(), model, batches),
    "Taylor": lambda model, batches: score(scorers.Taylor(), model, batches),
    "Fisher": lambda model, batches: score(scorers.Fisher(), model, batches),
    "Fisher, per sample": lambda model, batches: score(scorers.Fisher(per_sample=True), model, batches),
    "gates": lambda model, batches: score(scorers.Gate(), model, batches),
    "calibrate": lambda model, batches: calibration.calibrate(model, batches, across_heads=False, progress=False),
    "calibrate, across heads": lambda model, batches: calibration.calibrate(model, batches, progress=False),
    "whole plan, rotated and refitted": pruned,
}


def child(task: str, frames: int, batch: int, batches: int) -> None:
    """Prints peak, model and gradient bytes of one task."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tiny = ASTConfig(max_length=26, num_labels=35, hidden_size=96, num_attention_heads=2, num_hidden_layers=2)
    TASKS[task](ASTForAudioClassification(tiny).eval(), [(torch.randn(2, 26, 128), torch.arange(2))] * 2)
    runtime = status("VmRSS")
    model = ASTForAudioClassification(ASTConfig(max_length=frames, num_labels=35)).eval()
    data = [(torch.randn(batch, frames, 128), torch.arange(batch) % 35) for _ in range(batches)]
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    grads = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if ".attention." in name)
    Path("/proc/self/clear_refs").write_text("5")
    TASKS[task](model, data)
    print(json.dumps({"peak": status("VmHWM") - runtime, "model": size, "gradients": grads}))


def run(task: str, args: argparse.Namespace, allocator: str) -> dict[str, int]:
    """The greatest of some processes."""
    command = [sys.executable, __file__, "--task", task, "--tokens", args.tokens, "--batch", args.batch, "--batches",
               args.batches]  # fmt: skip
    env = os.environ | ({"MALLOC_MMAP_THRESHOLD_": str(1 << 18)} if allocator == "returning" else {})
    runs = [
        subprocess.run([*map(str, command)], check=True, capture_output=True, text=True, env=env)
        for _ in range(args.runs)
    ]
    return max((json.loads(one.stdout) for one in runs), key=lambda one: one["peak"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=146, help="12 a column of 10 frames, and 2 (146, or 1214)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--allocator", nargs="+", default=["default"], choices=("default", "returning"))
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        child(args.task, 6 + (args.tokens - 2) // 12 * 10, args.batch, args.batches)
        return
    print(", ".join(f"{key} {value}" for key, value in environment("attnprune", "transformers").items()))
    for allocator in args.allocator:
        found = {task: run(task, args, allocator) for task in TASKS}
        model, grads = found[GRAPH]["model"], found[GRAPH]["gradients"]
        activations = (found[GRAPH]["peak"] - model, found[BOTH]["peak"] - model - grads)
        bounds = [1.1 * (model + grads) + one for one in activations]
        rows = [[task, f"{one['peak'] / MB:.0f}", *(held(one["peak"], bound) for bound in bounds)]
                for task, one in found.items()]  # fmt: skip
        print(
            f"\n{args.tokens} tokens, batch {args.batch}, {allocator} allocator: model {model / MB:.0f} MB, gradients "
            f"of attention {grads / MB:.0f} MB, activations {activations[0] / MB:.0f} or {activations[1] / MB:.0f} MB"
        )
        heads = [f"of {name}, {bound / MB:.0f}" for name, bound in zip(("looser", "stricter"), bounds, strict=True)]
        print(table(["task", "peak, MB", *heads], rows), flush=True)


def held(peak: int, bound: float) -> str:
    """The share of a bound that is taken, and whether that is too much."""
    return f"{peak / bound:.2f} {'met' if peak <= bound else 'missed'}"


if __name__ == "__main__":
    main()
