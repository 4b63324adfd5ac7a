"""How fast pruned models run: latency over dense, beside the ratio of multiply-adds, for plans of every kind and peers.

    python benchmarks/speed.py [--models ast146 ast1214 vit encoder] [--batches 1 8] [--plans uniform ragged]
                               [--modes eager compiled graphs] [--device cuda] [--out DIRECTORY]

Half of the attention is removed. Every cell is the median, over interleaved rounds, of a variant's seconds over the
dense model's in the same round. Weights and inputs are random. Ragged plans come from scores whose scale differs from
head to head by a log-normal factor, so that heads keep from a few channels to all. "naive" runs the same plan with a
call of the kernel for every head shape and nothing padded (``attnprune.nn.execution("separate")``). Float32 on a CPU;
bfloat16 and float16 on an NVIDIA GPU, eager, compiled, and compiled into CUDA graphs ("graphs"), timed by CUDA events.
Batches above 1 and compiled models are timed with --few-layers layers, as every layer is alike. Memory is the peak of
what an eager forward pass allocates, over the dense model's. --out writes speed.json, speed.md and speed.png.

    python benchmarks/speed.py --busy 1 --again 5 --models ast146 ast1214 --batches 1 --layers 3

times beside a process that keeps a core busy, five times over; the table then also has the slowest of the five medians.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself

import torch
from _paired import Clock, environment, paired, ratio, table, verdict
from pruning_cost import peer
from torch import Tensor, nn
from transformers import ASTConfig, ASTModel, ViTConfig, ViTModel

import attnprune
from attnprune import AttentionView, Scorer, Scores
from attnprune.cost.counting import count_macs
from attnprune.nn import execution

LIMITS = {"uniform": 1.03, "heads": 1.03, "decoupled": 1.06, "ragged": 1.10, "four": 1.25}
"""On a CPU: latency over dense that a plan may have, over its ratio of multiply-adds."""
GPU_LIMITS = {
    (32, "eager"): 0.82,
    (32, "compiled"): 0.82,
    (32, "graphs"): 0.82,
    (1, "eager"): 1.02,
    (1, "graphs"): 0.92,
}
"""On a GPU of the H200 class, AST-base at 1,214 tokens in bfloat16, by batch and mode: latency over dense."""
GPU_MORE = {"uniform": 0.0, "heads": 0.0, "decoupled": 0.05, "ragged": 0.05, "four": 0.05}
"""What the plans may have above that."""
MODES = ("eager", "compiled", "graphs")


class Varied(Scorer):
    """Random scores, with a factor of ``exp(normal)`` for every head, apart for qk and vo."""

    name = "varied"

    def score(self, model: nn.Module, views: Sequence[AttentionView], **_: Any) -> dict[str, Scores]:
        g = torch.Generator().manual_seed(0)
        found = {}
        for view in views:
            shape = (view.spec.heads, view.spec.qk_dim)
            qk, vo = (torch.rand(shape, generator=g) * torch.randn(shape[0], 1, generator=g).exp() for _ in range(2))
            found[view.name] = Scores(qk, vo, qk.sum(1) + vo.sum(1))
        return found


PLANS: dict[str, tuple[Any, dict[str, Any]]] = {
    "uniform": (0.5, {"scope": "local", "scorer": "magnitude"}),
    "heads": (0.5, {"scope": "local", "granularity": "head", "scorer": "magnitude"}),
    "decoupled": ({"qk": 0.75, "vo": 0.25}, {"scope": "local", "scorer": "magnitude"}),
    "ragged": (0.5, {"heads": "ragged", "scorer": Varied()}),
    "four": ((0.6, 0.3, 0.4, 0.7), {"scope": "local", "scorer": "magnitude"}),
}
NAIVE = ("decoupled", "ragged")
PEER = "Torch-Pruning"


class Setting(NamedTuple):
    """A model without weights of its own yet, and what it reads."""

    build: Callable[[int], nn.Module]
    inputs: Callable[[int], Tensor]
    tokens: int


def _ast(frames: int, tokens: int) -> Setting:
    def build(layers: int) -> nn.Module:
        return ASTModel(ASTConfig(max_length=frames, num_hidden_layers=layers))

    return Setting(build, lambda batch: torch.randn(batch, frames, 128), tokens)


def _encoder(layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


SETTINGS = {
    "ast146": _ast(128, 146),
    "ast1214": _ast(1024, 1214),
    "vit": Setting(
        lambda layers: ViTModel(ViTConfig(num_hidden_layers=layers), add_pooling_layer=False),
        lambda batch: torch.randn(batch, 3, 224, 224),
        197,
    ),
    "encoder": Setting(_encoder, lambda batch: torch.randn(batch, 512, 512), 512),
}


def variants(dense: nn.Module, example: Tensor, plans: Sequence[str]) -> dict[str, nn.Module]:
    """The dense model, pruned in these ways, and by Torch-Pruning where that leaves the embedding alone."""
    found = {"dense": dense}
    for name, (ratios, options) in PLANS.items():
        if name in plans:
            found[name] = copy.deepcopy(dense)
            attnprune.prune_attention(found[name], ratios, progress=False, **options)
    if PEER in plans and not isinstance(dense, nn.TransformerEncoder):
        found[PEER] = copy.deepcopy(dense)
        peer(found[PEER], "local", example)
    return found


def runner(model: nn.Module, x: Tensor, mode: str) -> Callable[[], dict[str, float]]:
    """Runs a forward pass and gives its seconds, on CUDA those between two events of the stream."""
    if mode != "eager":
        options = {"mode": "reduce-overhead"} if mode == "graphs" else {}
        model = torch.compile(model, dynamic=False, fullgraph=True, **options)  # type: ignore[assignment]

    clock = Clock(x.device)

    def run() -> dict[str, float]:
        with torch.no_grad():
            clock.wait()
            start = clock.now()
            model(x)
            return {"forward": clock.seconds([(start, clock.now())])[0]}

    return run


def peak(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass holds at most, beside the weights."""
    with torch.no_grad():
        if x.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(x)
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            model(x)
    held = most = 0
    for event in profile.profiler.kineto_results.events():  # in order of time
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def naive(run: Callable[[], dict[str, float]]) -> Callable[[], dict[str, float]]:
    def separate() -> dict[str, float]:
        with execution("separate"):
            return run()

    return separate


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Processes beside this one, each of which keeps a core busy."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for one in started:
            one.kill()
            one.wait()


def cell(
    setting: Setting, batch: int, mode: str, dtype: torch.dtype, device: str, layers: int, rounds: int,
    plans: Sequence[str], busy: int = 0, again: int = 1,
) -> Any:  # fmt: skip
    """Ratios of latency and of multiply-adds of every variant."""
    torch.manual_seed(0)
    dense, x = setting.build(layers).eval().to(device, dtype), setting.inputs(batch).to(device, dtype)
    models = variants(dense, x[:1], plans)
    macs = {name: count_macs(model, x[:1]) for name, model in models.items()}
    torch._dynamo.reset()
    runs = {name: runner(model, x, mode) for name, model in models.items()}
    if mode != "graphs":
        runs |= {
            f"{name}, naive": naive(runs[name]) for name in NAIVE if name in models
        }  # compiled again, as the layout is another one
    with torch._dynamo.config.patch(recompile_limit=len(runs) + 1):  # they may share code
        found = []
        for _ in range(again):
            with neighbours(busy):
                found.append(paired(runs, rounds, warm_up=2 if mode == "eager" else 4))
    ratios = {name: [ratio(times, name, "dense") for times in found] for name in runs}
    memory = {name: peak(model, x) for name, model in models.items()}
    return {
        name: {
            "latency": median(ratios[name]),
            "most": max(ratios[name]),
            "seconds": median(second for times in found for second in times[name]),
            "macs": macs[name.partition(",")[0]] / macs["dense"],
            "memory": memory[name.partition(",")[0]] / memory["dense"],
        }
        for name in runs
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batches", nargs="+", type=int, help="default: 1 8 on a CPU, 1 32 on a GPU")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: eager on a CPU, all on a GPU")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"),
                        help="default: float32 on a CPU, bfloat16 float16 on a GPU")  # fmt: skip
    parser.add_argument("--plans", nargs="+", default=[*PLANS, PEER], choices=[*PLANS, PEER], help="default: all")
    parser.add_argument("--layers", type=int, default=12, help="of eager models at batch 1 (12)")
    parser.add_argument("--few-layers", type=int, help="elsewhere (default: 3 on a CPU, 12 on a GPU)")
    parser.add_argument("--rounds", type=int, default=0, help="0: by the size of the input")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", type=int, default=0, help="processes beside it that keep a core busy (0)")
    parser.add_argument("--again", type=int, default=1, help="how often all rounds are run (1)")
    parser.add_argument("--json", type=Path, help="write every figure there, beside those of other settings")
    parser.add_argument("--plot", type=Path, help="draw a picture there")
    parser.add_argument("--out", type=Path, help="a directory for speed.json, speed.md and speed.png")
    parser.add_argument("--render", type=Path, help="only print and draw what an earlier run wrote to this file")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    args.batches = args.batches or ([1, 32] if gpu else [1, 8])
    args.modes = args.modes or (list(MODES) if gpu else ["eager"])
    args.dtypes = args.dtypes or (["bfloat16", "float16"] if gpu else ["float32"])
    args.few_layers = args.few_layers or (12 if gpu else 3)
    if args.device == "cpu" and "graphs" in args.modes:
        parser.error("graphs are of a GPU")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        args.json, args.plot = args.out / "speed.json", args.out / "speed.png"
    if args.render:
        found = json.loads(args.render.read_text())
    else:
        found = measure(args)
        if args.json and args.json.exists():  # settings that this run did not time keep their figures
            new = {_key(one) for one in found["cells"]}
            old = json.loads(args.json.read_text())["cells"]
            found["cells"] = [one for one in old if _key(one) not in new] + found["cells"]
    text = "\n\n".join([", ".join(f"{key} {value}" for key, value in found["environment"].items()), markdown(found)])
    print(text)
    if args.out:
        (args.out / "speed.md").write_text(text + "\n")
    if args.json and not args.render:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.plot:
        from speed_plot import draw

        draw(found["cells"], args.plot)


def _key(one: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(one.get(name, 0) for name in ("model", "batch", "mode", "dtype", "device", "busy"))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    env = environment("attnprune", "transformers", "torch-pruning")
    if args.device == "cuda":
        env["gpu"] = torch.cuda.get_device_name()
    cells = []
    for model in args.models:
        for batch in args.batches:
            for mode in args.modes:
                for dtype in args.dtypes:
                    setting = SETTINGS[model]
                    layers = args.layers if batch == 1 and mode == "eager" else args.few_layers
                    few = 25 if batch * setting.tokens < 1000 else 9
                    rounds = args.rounds or (50 if args.device == "cuda" else few)
                    key = {"model": model, "tokens": setting.tokens, "batch": batch, "mode": mode, "layers": layers,
                           "dtype": dtype, "device": args.device, "busy": args.busy}  # fmt: skip
                    ratios = cell(
                        setting, batch, mode, getattr(torch, dtype), args.device, layers, rounds, args.plans,
                        args.busy, args.again,
                    )  # fmt: skip
                    cells.append({**key, "variants": ratios})
                    print(markdown({"cells": cells[-1:]}), flush=True)
    return {"environment": env, "cells": cells}


def markdown(found: dict[str, Any]) -> str:
    """A table: latency over dense, the ratio of multiply-adds, and whether a limit is met."""
    rows = []
    for one in found["cells"]:
        for name, value in one["variants"].items():
            if name == "dense":
                continue
            how = [one["model"], one["tokens"], one["batch"], f"{one['dtype']} {one['mode']}", name]
            memory = "" if "naive" in name else f"{value['memory']:.3f}"
            found_limit = limit(one, name, value["macs"])
            said = "" if found_limit is None else verdict(value["latency"], round(found_limit, 3))
            quotient = f"{value['latency'] / value['macs']:.3f}"
            latency = f"{value['latency']:.3f}"
            if value.get("most", 0) > value["latency"]:
                latency += f" (at most {value['most']:.3f})"
            rows.append([*map(str, how), latency, f"{value['macs']:.3f}", quotient, said, memory])
    header = [
        "model",
        "tokens",
        "batch",
        "how",
        "plan",
        "latency",
        "multiply-adds",
        "their quotient",
        "limit",
        "memory",
    ]
    return table(header, rows)


def limit(one: dict[str, Any], name: str, macs: float) -> float | None:
    """The most that a plan's latency over dense should be in a cell; None where nothing was set."""
    if one.get("device", "cpu") == "cpu":
        return LIMITS[name] * macs if name in LIMITS else None
    base = GPU_LIMITS.get((one["batch"], one["mode"]))
    if base is None or name not in GPU_MORE or (one["model"], one["dtype"]) != ("ast1214", "bfloat16"):
        return None
    return base + GPU_MORE[name]


if __name__ == "__main__":
    main()
