"""Where README and documentation state times, latencies and memory; none of them is measured by ``make figures``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .quoting import Quote, table

Results = Mapping[str, Any]
SETTINGS = {
    "AST-base, 146": "ast146", "ViT-B/16, 197": "vit", "nn.TransformerEncoder, 512": "encoder",
    "AST-base, 1,214": "ast1214",
}  # fmt: skip
BEFORE = {"speed": "came out at twice these.", "speed_compiled": "every plan is faster than dense too:"}
"""What stands before the tables, whose first cells are alike."""
PLANS = ("uniform", "heads", "decoupled", "ragged")
NAIVE = ("decoupled, naive", "ragged, naive")


def timings(results: Results) -> Iterator[Quote]:
    """All of them."""
    yield from speed(results)
    yield from busy(results)
    yield from frozen(results)
    yield from budgets(results)
    yield from pruning(results)
    yield from memory(results)


def cell(results: Results, name: str, model: str, batch: int) -> Mapping[str, Any]:
    """What ``speed.py`` measured of one model at one batch size: by plan, over dense."""
    found = [one for one in results[name]["cells"] if (one["model"], one["batch"]) == (model, batch)]
    assert len(found) == 1, (name, model, batch)
    return found[0]["variants"]  # type: ignore[no-any-return]


def speed(results: Results) -> Iterator[Quote]:
    """Latency of pruned models."""
    head = [
        "multiply-adds",
        "uniform",
        "heads",
        "qk 75 %, vo 25 %",
        "ragged",
        'the last two, ``"separate"``',
        "Torch-Pruning",
    ]
    for name in ("speed", "speed_compiled"):
        cells = {f"{said}; {batch}": cell(results, name, model, batch) for batch in (1, 8) for said, model in
                 SETTINGS.items()}  # fmt: skip
        rows = [_row(first, own) for first, own in cells.items()]
        yield table(["model, tokens; batch", *head], rows, after=BEFORE[name])
    cells = {f"{batch}": cell(results, "speed_h200", "ast1214", batch) for batch in (1, 32)}
    yield table(["eager, batch", *head], [_row(first, own) for first, own in cells.items()])
    long, gpu = cell(results, "speed", "ast1214", 1), cell(results, "speed_h200", "ast1214", 32)
    on_cpu = [long[plan]["latency"] for plan in PLANS]
    channels = [gpu[plan]["latency"] for plan in PLANS if plan != "heads"]
    yield Quote(
        "{} to {} of its latency at 1,214 tokens, for {} of its multiply-adds",
        f"{min(on_cpu):.2f}", f"{max(on_cpu):.2f}", f"{long['uniform']['macs']:.3f}",
    )  # fmt: skip
    yield Quote(
        "{} of dense on an H200 at batch 32, channels {} to {}",
        f"{gpu['heads']['latency']:.2f}", f"{min(channels):.2f}", f"{max(channels):.2f}",
    )  # fmt: skip
    graphs, again = results["speed_graphs_h200"], results["speed_encoder_again"]
    yield Quote(
        "uniform plans take {} and ragged ones {} of dense at batch 1",
        f"{graphs['uniform']:.3f}",
        f"{graphs['ragged']:.3f}",
    )
    yield Quote("with 12 layers, gave {}, {}, {} and {}", *(f"{again[plan]:.3f}" for plan in PLANS))
    four = results["speed_four_ratios"]
    yield Quote(
        "take {} of dense at 146 tokens and {} at 1,214, batch 1, on 2 cores; equal ratios {} and {}",
        *(f"{four[plan][at]:.2f}".removeprefix("0") for plan in ("four", "uniform") for at in ("ast146", "ast1214")),
    )  # fmt: skip


def busy(results: Results) -> Iterator[Quote]:
    """Latency over dense beside a busy neighbour: the median of five runs, and the most."""
    at = {one["model"]: one["variants"] for one in results["speed_busy"]["cells"]}
    for model, first in (("ast146", "* - AST-base, 146"), ("ast1214", "* - AST-base, 1,214")):
        own = at[model]
        figures = [f"{own['uniform']['macs']:.3f}"]
        for plan in (*PLANS, *NAIVE):
            figures += [f"{own[plan]['latency']:.3f}", f"{own[plan]['most']:.3f}"]
        yield Quote(f"{first} - {{}}" + " - {} ({})" * 4 + " - {} ({}), {} ({})", *figures)


def _row(first: str, variants: Mapping[str, Any]) -> tuple[str, list[str], list[str]]:
    figures = [f"{variants['uniform']['macs']:.3f}", *(f"{variants[plan]['latency']:.3f}" for plan in PLANS)]
    figures += [f"{variants[plan]['latency']:.3f}" for plan in NAIVE]
    other = variants.get("Torch-Pruning")
    figures += [f"{other['latency']:.3f}"] if other else []
    return first, ["{}"] * 5 + ["{}, {}", "{}" if other else "\N{EN DASH}"], figures


RAGGED = (
    "ragged channels, one budget, Fisher per sample", "the same by gates, refitted", "rotated, split found, ragged",
)  # fmt: skip
"""Ways of the demo whose heads keep different numbers of channels."""


def frozen(results: Results) -> Iterator[Quote]:
    """Frozen models, over dense: two runs."""
    found, demo = results["frozen"], results["demo_latency"]
    for state in ("as pruned", "frozen"):
        figures = [f"{one:.3f}" for way in ("uniform", "default", "ragged") for one in found[state][way]]
        yield Quote(f"* - {state}" + " - {}, {}" * 3, *figures)
    both = [*found["frozen"]["default"], *found["frozen"]["ragged"]]
    yield Quote("({} to {} for the default and for ragged heads", f"{min(both):.2f}", f"{max(both):.2f}")
    layer = found["one layer"]
    yield Quote(
        "decoupled {} of dense as pruned and {} frozen, ragged {} and {} (the first run)",
        *(f"{layer[way][state]:.2f}" for way in ("decoupled", "ragged") for state in ("as pruned", "frozen")),
    )  # fmt: skip
    narrow, own = results["ragged_by_width"], [demo["ways"][way] for way in RAGGED]
    yield Quote(
        "({} to {} of dense for the keyword recogniser by ``make demo``; {} for an encoder of width 256, {} for one of "
        "512)",
        *(f"{one:.2f}" for one in (min(own), max(own), narrow["256"], narrow["512"])),
    )  # fmt: skip
    assert set(demo["ways"]) == set(results["demo"]["ways"])


def budgets(results: Results) -> Iterator[Quote]:
    """Budgets of latency: promised, measured, error."""
    found = results["latency_budget"]
    for tokens, first in (("146", "* - 146"), ("1214", "* - 1,214")):
        budget, uniform = found[tokens]["budget"], found[tokens]["uniform"]
        figures = [[f"{one[key]:.3f}" for key in ("promised", "measured", "error")] for one in (budget, uniform)]
        yield Quote(
            f"{first} - ``target_latency=0.8`` - {{}} - {{}} - {{}} * - - {uniform['channels']} of 64 qk and vo "
            "channels everywhere - {} - {} - {}", *figures[0], *figures[1],
        )  # fmt: skip
    short, long = ([f"{one:.3f}" for one in found[tokens]["runs"]] for tokens in ("146", "1214"))
    yield Quote("Six runs of that program gave {}, {}, {}, {}, {} and {} at 146 tokens", *short)
    yield Quote("four gave {}, {}, {} and {} at 1,214", *long)
    others = found["other plans"]
    yield Quote("with an error of {}, and one a better one at 1,214, of {}", *(f"{one:.3f}" for one in others))
    busy = found["busy"]
    yield Quote("a plan that promised {} measured {}", f"{busy['promised']:.3f}", f"{busy['measured']:.3f}")


def pruning(results: Results) -> Iterator[Quote]:
    """What pruning takes."""
    cost, scoring, closed = results["pruning_cost"], results["scoring_cost"], results["closed_form_cost"]
    large = results["large_llama"]
    yield Quote(
        "(86 M parameters, magnitude, one thread): {} s; Torch-Pruning's coupled equivalent: {} s, of which {} s "
        "without building its graph",
        f"{cost['attnprune']:.3f}", f"{cost['Torch-Pruning']:.2f}", f"{cost['without its graph']:.3f}",
    )  # fmt: skip
    yield Quote(
        "Taylor, Fisher or Fisher per sample: {}, {} and {} of a plain forward and backward pass",
        *(f"{scoring[key]:.2f}" for key in ("taylor", "fisher", "fisher per sample")),
    )  # fmt: skip
    times, megabytes, auto = f"{closed['default']:.2f}", f"{closed['megabytes']}", f"{closed['split found']:.2f}"
    yield Quote(
        "surgery together: {} times the plain forward passes over 512 calibration clips in batches of 2, and {} MB "
        "above the model; {} times with `split=\"auto\"`", times, megabytes, auto,
    )  # fmt: skip
    yield Quote(
        "{} times the plain forward passes over these clips, and a peak of {} MB above the model; {} times with "
        "``split=\"auto\"``, which takes gradients over all of them; {} times with ``basis=\"channels\"``",
        times, megabytes, auto, f"{closed['channels']:.2f}",
    )  # fmt: skip
    inside, shards = large["in memory"], large["from shards"]
    yield Quote(
        "plan and apply by magnitude take {} s and {} to {} times the model's memory, and from its shards {} s and {} "
        "GB",
        f"{inside['plan'] + inside['apply']:.1f}", *(f"{one:.2f}" for one in inside["over the model"]),
        f"{shards['plan'] + shards['apply']:.0f}", f"{shards['peak'] / 1000:.1f}",
    )  # fmt: skip
    yield Quote(
        "* - in memory - {} s - {} s - {} to {} times the model's own in eight runs (the process, libraries included: "
        "{} MB before, at the peak {} to {} MB)",
        f"{inside['plan']:.1f}", f"{inside['apply']:.1f}", *(f"{one:.2f}" for one in inside["over the model"]),
        f"{inside['before']:,}", *(f"{one:,}" for one in inside["peak"]),
    )  # fmt: skip
    yield Quote(
        "* - from shards - {} s - {} s - {} MB at the peak, of it {} MB libraries",
        f"{shards['plan']:.1f}", f"{shards['apply']:.1f}", f"{shards['peak']}", f"{shards['libraries']}",
    )  # fmt: skip


def memory(results: Results) -> Iterator[Quote]:
    """Peak memory of scoring and calibration, in MB."""
    found = results["scoring_memory"]
    columns = ("looser bound", "stricter bound", "gates", "whole plan", "plain passes")
    for first, own in found["cells"].items():
        yield Quote(f"* - {first}" + " - {}" * len(columns), *(f"{own[key]:,}" for key in columns))
    at_four, long = found["cells"]["146, 4; default"], found["cells"]["1,214, 1; default"]
    rest = found["others at 1,214, 1; default"]
    yield Quote(
        "the plan misses the stricter bound at batch 4 ({} of {} MB) and both at 1,214 tokens ({} of {} and {} MB), "
        "where gates miss both too ({}) and Taylor and Fisher per batch the stricter ({} and {})",
        f"{at_four['whole plan']:,}", f"{at_four['stricter bound']:,}", f"{long['whole plan']:,}",
        f"{long['looser bound']:,}", f"{long['stricter bound']:,}", f"{long['gates']:,}",
        f"{rest['taylor']:,}", f"{rest['fisher']:,}",
    )  # fmt: skip
