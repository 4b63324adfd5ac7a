"""Budgets of latency on AST-base: what was promised, what is measured afterwards, and what it costs in output error.

    python benchmarks/latency_budget.py [--target 0.8] [--frames 128 1024] [--seconds 45] [--threads 2]

For every length the time of attention in a grid of shapes is measured, ``target_latency`` makes a plan of it, and the
pruned model is timed against the dense one in turns. Beside it stands the uniform plan of equal latency: the largest
dim that, kept by every head of every layer in qk and vo, is predicted to meet the target too. Loss is the relative
error of the logits on inputs that no plan has seen (random weights, random inputs, batch 1).
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from _paired import environment, table
from torch import Tensor, nn
from transformers import ASTConfig, ASTForAudioClassification

import attnprune
from attnprune.cost.latency.measuring import measure


@torch.no_grad()
def error(model: nn.Module, dense: nn.Module, inputs: list[Tensor]) -> float:
    """Norm of the difference of the logits over the norm of the dense ones' deviations from their mean."""
    ours, theirs = (torch.cat([one(x).logits for x in inputs]) for one in (model, dense))
    return float((ours - theirs).norm() / (theirs - theirs.mean(0)).norm())


def uniform_dim(timed: attnprune.LatencyTable, specs: tuple[attnprune.AttentionSpec, ...], target: float) -> int:
    """The largest dim of all heads that is predicted to meet the target."""
    for dim in range(specs[0].qk_dim, 0, -1):
        dims = [[dim] * spec.heads for spec in specs]
        after = [spec.keep(range(spec.heads), row, row) for spec, row in zip(specs, dims, strict=True)]
        if timed.predict(after) <= target:
            return dim
    raise SystemExit("no uniform plan meets the target")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=0.8)
    parser.add_argument("--frames", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--seconds", type=float, default=45.0, help="how long to measure shapes (default: 45)")
    parser.add_argument("--samples", type=int, default=4, help="inputs to plan with, and as many to judge by")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(", ".join(f"{key} {value}" for key, value in environment("attnprune", "transformers").items()))
    rows = []
    for frames in args.frames:
        torch.manual_seed(0)
        config = ASTConfig(max_length=frames, num_hidden_layers=args.layers, num_labels=35)
        dense = ASTForAudioClassification(config).eval()
        data, unseen = ([torch.randn(1, frames, 128) for _ in range(args.samples)] for _ in range(2))
        start = time.perf_counter()
        timed = measure(dense, data[0], seconds=args.seconds, cache=False)
        took = time.perf_counter() - start
        specs = attnprune.find_attention(dense)
        dim = uniform_dim(timed, specs, args.target)
        plans = {
            "budget": (None, {"target_latency": args.target, "latency": timed}),
            f"uniform, {dim} of {specs[0].qk_dim}": (1 - dim / specs[0].qk_dim, {"scope": "local"}),
        }
        for name, (ratios, options) in plans.items():
            model = copy.deepcopy(dense)
            report = attnprune.prune_attention(
                model, ratios, data=data, example_inputs=data[0], measure=True, progress=False, **options
            )
            assert report.latency is not None
            assert report.macs is not None
            promised, found = timed.predict(report.plan), report.latency.ratio
            tokens = (frames - 16) // 10 * 12 + 14
            rows.append([
                str(tokens), name, f"{promised:.3f}", f"{found:.3f}", f"{found / args.target - 1:+.1%}",
                f"{report.macs[1] / report.macs[0]:.3f}", f"{error(model, dense, unseen):.4f}",
                "/".join(f"{one.qk_dim}:{one.vo_dim}" for one in report.plan.after),
            ])  # fmt: skip
        print(f"{frames} frames: {timed.rounds} rounds in {took:.0f} s, dense {timed.seconds * 1000:.0f} ms, "
              f"all but attention {timed.rest:.3f}", flush=True)  # fmt: skip
    head = ["tokens", "plan", "promised", "measured", "off target", "multiply-adds", "error", "qk:vo per layer"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
