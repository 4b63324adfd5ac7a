"""What freezing saves: pruned models as they are and frozen, over the dense model; and what one layer's calls cost.

    python benchmarks/frozen.py [--threads 1] [--rounds 60] [--settings keywords ast146 ast1214] [--json FILE]

``keywords`` is the shipped keyword recogniser (46 tokens), pruned by half with calibration on its training clips:
uniform (``scope="local"``), the default (channels decoupled by layer), and ragged with the split found. ``ast146`` and
``ast1214`` are AST-base with random weights and three layers, pruned as in ``speed.py``. Batch 1, inference mode;
latencies are medians, over interleaved rounds, of a variant's seconds over the dense model's in the same round.

The second table is of one layer's attention on three tokens, where hardly anything but Python and the calls of PyTorch
costs: microseconds, and the operations that the profiler saw Python call that compute or move something.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself

import torch
from _paired import environment, median, paired, parser, ratio, report, table, verdict
from speed import PLANS, SETTINGS
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import ASTConfig, ASTModel

import attnprune

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

WAYS: dict[str, dict[str, Any]] = {
    "uniform": {"scope": "local"},
    "default": {},
    "ragged": {"split": "auto", "heads": "ragged"},
}
LIMITS = {"default, frozen": 0.92, "ragged, frozen": 1.0}
"""Of the keyword recogniser."""
LOOKS = {"view", "transpose", "t", "split_with_sizes", "split", "unsqueeze", "select", "slice", "expand", "mT", "empty",
         "new_empty"}  # fmt: skip
"""Operations that look at a tensor in another way, or make room for one."""


def keywords() -> tuple[nn.Module, Tensor, dict[str, nn.Module]]:
    """The keyword recogniser, a clip, and what half of its attention leaves."""
    from keywords import data

    dense = data.load_model().eval()
    clip, (x, y, _) = data.load_split("test")[0][:1], data.load_split("train")
    batches = [{"input_values": a, "labels": b} for a, b in zip(x[:128].split(32), y[:128].split(32), strict=True)]
    pruned = {name: copy.deepcopy(dense) for name in WAYS}
    for name, model in pruned.items():
        attnprune.prune_attention(model, 0.5, data=batches, progress=False, **WAYS[name])
    return dense, clip, pruned


def ast(name: str, layers: int = 3) -> tuple[nn.Module, Tensor, dict[str, nn.Module]]:
    """AST-base, an input, and it pruned in the ways of ``speed.py``."""
    torch.manual_seed(0)
    dense, x = SETTINGS[name].build(layers).eval(), SETTINGS[name].inputs(1)
    pruned = {plan: copy.deepcopy(dense) for plan in PLANS}
    for plan, model in pruned.items():
        ratios, options = PLANS[plan]
        attnprune.prune_attention(model, ratios, progress=False, **options)
    return dense, x, pruned


def variants(dense: nn.Module, pruned: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Dense, and everything as it is and frozen."""
    found = {"dense": dense}
    for name, model in {"dense": dense, **pruned}.items():
        found[name] = model
        found[f"{name}, frozen"] = copy.deepcopy(model)
        attnprune.freeze(found[f"{name}, frozen"])
    return found


def twice(model: nn.Module, x: Tensor) -> Callable[[], dict[str, float]]:
    """Two passes; the second, with warm caches, counts."""
    from attnprune.cost.latency.timing import Clock

    clock = Clock()

    def run() -> dict[str, float]:
        with torch.inference_mode():
            model(x)
            start = clock.now()
            model(x)
            return {"forward": clock.seconds([(start, clock.now())])[0]}

    return run


def latencies(name: str, rounds: int) -> tuple[str, Any]:
    """A table of one setting, and the times."""
    dense, x, pruned = keywords() if name == "keywords" else ast(name)
    models = variants(dense, pruned)
    with torch.inference_mode():
        for key, model in models.items():
            if key.endswith(", frozen"):
                expected, found = (one(x)[0] for one in (models[key.removesuffix(", frozen")], model))
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    times = paired({key: twice(model, x) for key, model in models.items()}, rounds, warm_up=3)
    rows = []
    for key in models:
        value = ratio(times, key, "dense")
        limit = verdict(value, LIMITS[key]) if name == "keywords" and key in LIMITS else ""
        rows.append([name, key, f"{1e3 * median(times, key):.2f}", f"{value:.3f}", limit])
    return table(["setting", "model", "milliseconds", "over dense", "limit"], rows), times


def operations(run: Callable[[], Any]) -> int:
    """How many operations Python calls that compute or move something."""
    with torch.inference_mode():
        run()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            run()
    count = 0
    for one in seen.events():
        name = one.name.removeprefix("aten::")
        moves = any(child.name in ("aten::copy_", "aten::clone") for child in one.cpu_children)
        if one.cpu_parent is None and name != one.name and name not in LOOKS:
            count += name not in ("reshape", "flatten", "contiguous") or moves
    return count


def host(rounds: int) -> tuple[str, Any]:
    """A table of what one layer's attention costs the host."""
    config = ASTConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=6, intermediate_size=32,
                       max_length=24, num_mel_bins=24)  # fmt: skip
    dense, x = ASTModel(config).eval(), torch.randn(1, 3, 48)
    pruned = {plan: copy.deepcopy(dense) for plan in PLANS if plan != "heads"}
    for plan, model in pruned.items():
        ratios, options = PLANS[plan]
        attnprune.prune_attention(model, ratios, progress=False, **options)
    [spec] = attnprune.find_attention(dense)
    layers = {key: model.get_submodule(spec.name) for key, model in variants(dense, pruned).items()}
    times = paired({key: twice(layer, x) for key, layer in layers.items()}, rounds, warm_up=20)
    rows = [
        [key, f"{1e6 * median(times, key):.0f}", f"{ratio(times, key, 'dense'):.3f}",
         str(operations(lambda layer=layer: layer(x)))]
        for key, layer in layers.items()
    ]  # fmt: skip
    return table(["one layer, 3 tokens", "microseconds", "over dense", "operations"], rows), times


def main() -> None:
    options = parser(__doc__, rounds=60)
    options.add_argument("--settings", nargs="+", default=["keywords", "ast146", "ast1214"],
                         choices=["keywords", "ast146", "ast1214"])  # fmt: skip
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    env = environment("attnprune", "transformers")
    found = {name: latencies(name, args.rounds if name != "ast1214" else max(5, args.rounds // 6))
             for name in args.settings}  # fmt: skip
    found["host"] = host(5 * args.rounds)
    result = {name: times for name, (_, times) in found.items()}
    report("Frozen models, over dense, batch 1", env, [text for text, _ in found.values()], args.json, result)


if __name__ == "__main__":
    main()
