"""How fast pruned AST layers run beside dense ones: uniform, decoupled (qk unlike vo) and ragged plans of half.

    python benchmarks/decoupled_latency.py [--layers 4] [--rounds 12]

Prints latency over dense, the median of paired runs: as it is, and with a call per head shape and no padding (the naive
decoupled forward).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ASTConfig, ASTForAudioClassification

import attnprune
from attnprune.nn import execution

PLANS: tuple[tuple[str, Any, dict[str, Any]], ...] = (
    ("uniform", 0.5, {"scope": "local"}),
    ("decoupled", {"qk": 0.75, "vo": 0.25}, {"scope": "local"}),
    ("ragged", 0.5, {"heads": "ragged", "scorer": "random"}),
)


def seconds(model: nn.Module, x: Tensor, naive: bool = False) -> float:
    with execution("separate") if naive else nullcontext():
        start = time.perf_counter()
        model(x)
        return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(2)
    for frames, tokens in ((128, 146), (1024, 1214)):
        torch.manual_seed(0)
        config = ASTConfig(max_length=frames, num_hidden_layers=args.layers, num_labels=35)
        dense, x = ASTForAudioClassification(config).eval(), torch.randn(1, frames, 128)
        for name, ratios, options in PLANS:
            model = copy.deepcopy(dense)
            report = attnprune.prune_attention(model, ratios, example_inputs=x, **options)
            rounds = [(seconds(dense, x), seconds(model, x), seconds(model, x, True)) for _ in range(args.rounds + 2)]
            ours, naive = (statistics.median(one[i] / one[0] for one in rounds[2:]) for i in (1, 2))
            macs = report.macs[1] / report.macs[0] if report.macs else 1.0
            print(f"{tokens:>5} tokens, {name:<10} {ours:.3f} of dense; naive {naive:.3f}; multiply-adds {macs:.3f}")


if __name__ == "__main__":
    main()
