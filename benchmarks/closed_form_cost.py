"""What calibration, plan and surgery cost beside plain forward passes over the same clips; AST-base, 146 tokens.

    python benchmarks/closed_form_cost.py [--clips 512] [--repeats 1]

Prints, for each way of asking, the time as a multiple of the forward passes, in one run side by side, and by how much
the peak of resident memory rose above what the model and its forward passes (and the ways before it) take.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import ASTConfig, ASTForAudioClassification

import attnprune

WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("rotated (the default with data)", {}),
    ('rotated, split="auto", ragged', {"split": "auto", "heads": "ragged"}),
    ("channels, refitted", {"basis": "channels"}),
)


def seconds(run: Callable[..., Any], *args: Any, **options: Any) -> float:
    start = time.perf_counter()
    run(*args, **options)
    return time.perf_counter() - start


def peak() -> float:
    """Peak resident memory so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = ASTForAudioClassification(ASTConfig(max_length=128, num_labels=35)).eval()
    data = [{"input_values": torch.randn(args.batch, 128, 128)} for _ in range(args.clips // args.batch)]

    @torch.no_grad()
    def plain() -> None:
        for batch in data:
            model(**batch)

    spare = copy.deepcopy(model)  # what is pruned; the copy is not part of the method
    with torch.no_grad():
        model(**data[0])
    print(f"{len(data) * args.batch} clips of 146 tokens in batches of {args.batch}, {torch.get_num_threads()} threads")
    for name, options in WAYS:
        ratios, extra, rest = [], [], 0.0
        for _ in range(args.repeats):
            forward = seconds(plain)
            spare.load_state_dict(model.state_dict())
            before = peak()
            whole = seconds(attnprune.prune_attention, spare, 0.5, data=data, progress=False, **options)
            extra.append(peak() - before)
            ratios.append(whole / forward)
            rest = max(rest, whole - 1.3 * forward)
            spare = copy.deepcopy(model)
        print(
            f"{name:<36} {statistics.median(ratios):5.2f} x the forward passes ({forward:.1f} s); "
            f"{rest:+.1f} s to 1.3 times; peak memory +{max(extra):.0f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
