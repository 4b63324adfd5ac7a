"""Our attention kernel on a GPU: right or not, beside PyTorch's kernels, and in whole models, in under four minutes.

    python benchmarks/kernel.py --device cuda [--seconds 60] [--parts checks table models] [--json FILE]
    TRITON_INTERPRET=1 python benchmarks/kernel.py --device cpu --parts checks      # its logic, by the interpreter

*checks*: random heads, masks, strides and dtypes against float64, in outputs that were poisoned, for ``--seconds``; the
error allowed is twice that of PyTorch's own operations in the same dtype. *table*: microseconds of a call, medians of
paired rounds by CUDA events, for each of PyTorch's backends that takes the shape, flex attention (compiled) and ours,
beside the least that the hardware allows: exponentials at the rate of its unit, products at the peak that a large
product reaches. *models*: AST-base in
bfloat16 (12 layers, 1,214 tokens at batch 32 and 1, 146 tokens at batch 32), half of the attention removed as in
``speed.py`` (dims in multiples of 8), over dense: as pruned, frozen, and frozen by our kernel. Every part prints as
soon as it is done, so that a run that is cut short leaves what it had.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _paired import environment, median, paired, ratio, table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnprune
from attnprune.nn import execution
from attnprune.nn.kernels import heads_attention
from attnprune.nn.kernels.operator import available, vendors
from attnprune.nn.kernels.table import table_of
from attnprune.values.layout import HeadLayout

DIMS = (1, 3, 8, 13, 16, 20, 24, 32, 33, 40, 48, 64, 72, 96, 128)
SHAPES = (  # batch, heads, tokens, qk, vo
    (32, 12, 1214, 64, 64),
    (32, 12, 1214, 32, 32),
    (32, 12, 1214, 16, 48),
    (32, 12, 1214, 16, 16),
    (32, 6, 1214, 64, 64),
    (1, 12, 1214, 32, 32),
    (32, 12, 146, 64, 64),
    (32, 12, 146, 32, 32),
)
LIMITS = {(32, 32): 0.70, (16, 16): 0.60}
"""Of cuDNN's time, by qk and vo dim, at batch 32 and 1,214 tokens."""
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def checks(device: str, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Random calls until time is up: how many, and what was wrong."""
    rng, stop = random.Random(seed), time.monotonic() + seconds
    forward = import_module("attnprune.nn.kernels.forward")
    count, worst, wrong = 0, 0.0, []
    longest = 300 if device == "cuda" else 40
    while time.monotonic() < stop:
        kinds = [(rng.choice(DIMS), rng.choice(DIMS), rng.randint(1, 3)) for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.5:
            kinds = [kinds[0]] * len(kinds)
        layout = HeadLayout(*map(tuple, zip(*kinds, strict=True)))
        batch, queries, keys = rng.randint(1, 2), rng.randint(1, longest), rng.randint(1, longest)
        dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16])
        pads = [rng.randint(0, 5) for _ in range(3)]
        q, k, v = (
            torch.randn(batch, length, layout.channels(p) + pad, device=device, dtype=dtype)[..., pad:]
            for p, length, pad in zip("qkv", (queries, keys, keys), pads, strict=True)
        )
        mask = rng.choice([None, "bool", "added"])
        shape = (rng.choice([1, batch]), rng.choice([1, layout.heads]), rng.choice([1, queries]), keys)
        if mask is not None:
            mask = torch.randn(shape, device=device).to(dtype) if mask == "added" else torch.rand(shape) < 0.5
            mask = mask.to(device)
        rest = (rng.random() < 0.4, 0.3, rng.choice([0, 0, 5, 90]), rng.choice([0.0, 0.0, 3.0]))
        room = torch.full((batch + 1, queries + 3, layout.channels("o") + 9), torch.nan, device=device, dtype=dtype)
        out = room[1:, 2 : 2 + queries, 4 : 4 + layout.channels("o")]
        exact_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
        exact = vendors(q.double(), k.double(), v.double(), layout, exact_mask, *rest).nan_to_num()
        theirs = vendors(q, k, v, layout, mask, *rest).nan_to_num()
        causal, scale, window, softcap = rest
        forward.launch(q, k, v, out, table_of(layout), mask, causal, scale, window, softcap)
        error = (out - exact).abs().max().item()
        allowed = 2 * (theirs - exact).abs().max().item() + 8 * torch.finfo(dtype).eps * max(1, exact.abs().max())
        outside = int(room.isnan().sum()) == room.numel() - out.numel()
        count, worst = count + 1, max(worst, error / float(allowed))
        if not error <= allowed or not outside:
            wrong.append(f"{layout} {batch} x {queries} x {keys} {dtype} {shape} {rest}: {error:.2g}, {outside}")
    return {"calls": count, "worst share of what is allowed": round(worst, 3), "wrong": wrong}


def packed(batch: int, heads: int, tokens: int, qk: int, vo: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V as slices of one product, bfloat16."""
    sizes = [heads * qk, heads * qk, heads * vo]
    product = torch.randn(batch, tokens, sum(sizes), device=device, dtype=torch.bfloat16)
    q, k, v = product.split(sizes, -1)
    return q, k, v


EXPONENTIALS = 16
"""That a multiprocessor of Volta to Hopper makes in a cycle (CUDA C++ programming guide, arithmetic instructions)."""


def peak() -> float:
    """Multiply-adds a second of a large product in bfloat16."""
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    times = paired({"product": repeated(lambda: x @ x)}, 5, 2, torch.device("cuda"))
    return 10 * 8192**3 / median(times, "product")


def least(shape: tuple[int, ...], multiply_adds: float, exponentials: float) -> float:
    """Seconds that a call takes at least: its exponentials or its products, at these rates a second.

    >>> least((1, 2, 1000, 64, 64), multiply_adds=256e6, exponentials=1e6)
    2.0
    """
    batch, heads, tokens, qk, vo = shape
    pairs = batch * heads * tokens**2
    return max(pairs / exponentials, pairs * (qk + vo) / multiply_adds)


def exponential_rate() -> float:
    """Exponentials a second of the whole device, at the clock that it may reach."""
    found = torch.cuda.get_device_properties(0)
    return EXPONENTIALS * found.multi_processor_count * 1e3 * float(getattr(found, "clock_rate", 1_755_000))


def flex(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any] | None:
    """Flex attention, compiled; None where it does not take the shape."""
    from torch.nn.attention.flex_attention import flex_attention

    call = partial(torch.compile(flex_attention, dynamic=False), q, k, v, scale=0.3)
    try:
        call()
    except (RuntimeError, ValueError, NotImplementedError):
        return None
    return call


def apart(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def calls(shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """By name, what takes this shape."""
    batch, heads, tokens, qk, vo = shape
    q, k, v = packed(batch, heads, tokens, qk, vo, "cuda")
    layout = HeadLayout((qk,) * heads, (vo,) * heads)
    split = [apart(x, heads) for x in (q, k, v)]
    found: dict[str, Callable[[], Any]] = {}
    for name, backend in BACKENDS.items():

        def theirs(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*split, scale=0.3)

        try:
            theirs()
        except RuntimeError:
            continue
        found[name] = theirs
    if (compiled := flex(*split)) is not None:
        found["flex"] = compiled
    found["ours"] = lambda: heads_attention(q, k, v, layout, scale=0.3)
    return found


def repeated(run: Callable[[], Any], times: int = 10) -> Callable[[], Any]:
    def several() -> None:
        for _ in range(times):
            run()

    return several


def kernel_table(rounds: int) -> tuple[str, Any]:
    """Microseconds of a call."""
    names = (*BACKENDS, "flex", "ours")
    header = ["batch x heads x tokens, qk x vo", *names, "hardware", "over cuDNN", "limit"]
    rows, result, rates = [], {}, (peak(), exponential_rate())
    for shape in SHAPES:
        runs = calls(shape)
        with torch.no_grad():
            times = paired({name: repeated(run) for name, run in runs.items()}, rounds, 3, torch.device("cuda"))
        cells = [f"{1e5 * median(times, name):.0f}" if name in times else "" for name in names]
        cells.append(f"{1e6 * least(shape, *rates):.0f}")
        share = ratio(times, "ours", "cuDNN") if "cuDNN" in times else float("nan")
        limit = LIMITS.get(shape[3:]) if shape[:3] == SHAPES[0][:3] else None
        batch, heads, tokens, qk, vo = shape
        rows.append([f"{batch} x {heads} x {tokens:,}, {qk} x {vo}", *cells, f"{share:.2f}", str(limit or "")])
        result[str(shape)] = times
    return table(header, rows), result


def models(rounds: int, stop: float) -> tuple[str, Any]:
    """AST-base over dense."""
    from speed import PLANS, SETTINGS

    rows, result = [], {}
    for name, batch in (("ast1214", 32), ("ast1214", 1), ("ast146", 32)):
        if time.monotonic() > stop:
            break
        torch.manual_seed(0)
        dense = SETTINGS[name].build(12).eval()
        x = SETTINGS[name].inputs(batch).to("cuda", torch.bfloat16)
        runs: dict[str, Callable[[], Any]] = {}
        for plan in ("dense", "uniform", "decoupled", "ragged"):
            model = copy.deepcopy(dense)
            if plan != "dense":
                ratios, options = PLANS[plan]
                attnprune.prune_attention(model, ratios, progress=False, round_to=8, **options)
            model = model.to("cuda", torch.bfloat16)
            frozen = copy.deepcopy(model)
            attnprune.freeze(frozen)
            runs[plan] = partial(model, x)
            runs[f"{plan}, frozen"] = partial(frozen, x)
            runs[f"{plan}, frozen, kernel"] = partial(by_kernel, frozen, x)
        with torch.inference_mode():
            times = paired(runs, rounds, 2, torch.device("cuda"))
        rows += [[name, str(batch), key, f"{1e3 * median(times, key):.2f}", f"{ratio(times, key, 'dense'):.3f}"]
                 for key in runs]  # fmt: skip
        result[f"{name}, {batch}"] = times
    return table(["model", "batch", "plan", "milliseconds", "over dense"], rows), result


def by_kernel(model: torch.nn.Module, x: Tensor) -> Any:
    with execution("kernel"):
        return model(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=60, help="of checks (60)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--parts", nargs="+", default=["checks", "table", "models"],
                        choices=("checks", "table", "models"))  # fmt: skip
    parser.add_argument("--json", type=Path, help="also write every single time there")
    args = parser.parse_args()
    if not available(torch.device(args.device)):
        parser.error(f"our kernel does not run on {args.device}: is Triton installed (on a CPU: TRITON_INTERPRET=1)?")
    if args.device == "cpu" and args.parts != ["checks"]:
        parser.error("on a CPU there is nothing to time: --parts checks")
    started, result = time.monotonic(), {"environment": environment("attnprune", "triton", "transformers")}
    if args.device == "cuda":
        result["environment"]["gpu"] = torch.cuda.get_device_name()
    print(result["environment"], flush=True)
    for part in args.parts:
        if part == "checks":
            result[part] = checks(args.device, args.seconds)
            print(result[part], flush=True)
        else:
            text, result[part] = kernel_table(args.rounds) if part == "table" else models(args.rounds, started + 170)
            print(text, flush=True)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    if "checks" in result and result["checks"]["wrong"]:
        raise SystemExit("wrong results, above")


if __name__ == "__main__":
    main()
