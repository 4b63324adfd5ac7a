"""Where README and documentation state results: every table row and sentence, with the figures that belong there.

A figure that is stated in several places is written here from the same result, so that places cannot disagree.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import recovery_plot
from benchmarks.quality_medians import medians

from .protocols import protocol, protocol_shipped
from .quoting import ROOT, Quote, Row, bare, signed, table
from .timings import timings

sys.path.append(str(ROOT / "benchmarks"))  # after all else: the paper's table is read by the program that renders it

Results = Mapping[str, Any]
PAPER = [f"paper: {scheme}-{scope}-{score}" for scheme in ("EH", "PH") for scope in "LG" for score in ("MAG", "FI")]
GENERATED = ("matrix.rst", "quality.rst")
"""Pages that a program writes whole, from its own results."""
PLAIN = (
    # names, versions, licences, articles
    r"arXiv [\d.]+|/abs/[\d.]+|``[\d.]+ <https|Apache-2\.0|transformers 4\.48 to 4\.57|to torch 2\.11",
    r"(torch|PyTorch|Python|glibc|Torch-Pruning|wav2vec|GLM-|Qwen|kosmos-|espeak-ng)\s*[\d.]+|that runs it, here 3\.11",
    r"(transformers|timm|PEFT|Accelerate|Lightning|Triton)\s*[\d.]+",
    # what others state
    r"46\.4 % of the attention of Whisper|loses 1\.4 points by heads and 5\.8 by channels",
    # what a run is given: sizes, settings, bounds
    r"1\.1 billion|1\.24 million parameters|2\.20 GB in five files|4\.05 GB|0\.66 M parameters, 0\.30 M of them",
    r"by \.1 and \.2 to either side|a move of \.1 makes|with \(\.6, \.3, \.4, \.7\)|1,024 docstrings",
    r"1\.1 times the model \(|1,214 tokens|24,500 a round|with 24,500 clips a round\. EH-L-FI",
    r"Within 0\.3 points at 50|is within 0\.3 points",
    r"1\.03 times the ratio of multiply-adds for uniform plans, 1\.06 for decoupled and 1\.10 for ragged ones",
    r"0\.82 for uniform plans, eager and compiled; batch 1: 0\.92 in CUDA graphs, 1\.02 eager; 0\.05 more",
    r"20,000 steps|49,152 shapes|above 1,048,576|0\.75 leaves a quarter",
    # seen in passing, by no program that keeps it, and said so or with "about"
    r"trained for 8\.5 minutes|about 2\.8 bits per byte|VO alone: 0\.015",
    r"about 0\.6 now, and ragged 2\.1 against 0\.4|differ by noise, up to 0\.03",
    r"0\.65 of cuDNN's time at 32 by 32 channels on an H100, and 0\.56 at 16 by 16",
    r"takes 2\.7 times as long as with 64 of both|takes 0\.15 s \(2\.3 s for|leaves about 0\.8 of its multiply-adds",
)
"""What has a decimal point, or thousands, and is no result."""


def results(folder: Path = ROOT / "benchmarks" / "results") -> dict[str, Any]:
    """What every results file says, by its name."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {name: one.get("result", one) for name, one in found.items()}


def quotes(results: Results) -> list[Quote]:
    """All of them."""
    return [
        *keywords(results), *byte_model(results), *llama(results), *whisper(results), *recovery(results),
        *four_ratios(results), *outer_sides(results), *protocol(results), *protocol_shipped(results), *sweep(results),
        *timings(results),
    ]  # fmt: skip


def removed(*shares: str) -> list[str]:
    """The head of a table by way and share."""
    return ["way", *(f"{share} removed" for share in shares)]


def said(
    found: Mapping[str, Any], shares: Sequence[str], key: str, digits: int, other: str
) -> tuple[list[str], list[str]]:
    """Cells and figures of one way: its change, and where another share went than was asked, which.

    Args:
        found: by share.
        shares: the columns.
        key: of the change.
        digits: of the change.
        other: what is added where another share went, as ``"({}% removed)"``.
    """
    cells, figures = [], []
    for share in shares:
        one = found.get(share)
        cells.append("" if one is None else "{}" if _kept(one, share) else f"{{}} {other}")
        if one is not None:
            figures.append(signed(one[key], digits))
            decimals = 0 if "went" in other else 1
            figures += [] if _kept(one, share) else [f"{100 * one['removed']:.{decimals}f}"]
    return cells, figures


def _kept(one: Mapping[str, Any], share: str) -> bool:
    """Whether what went is what was asked, to within half a per cent."""
    return abs(one["removed"] - float(share[:-1]) / 100) <= 0.005


def keywords(results: Results) -> Iterator[Quote]:
    """The keyword recogniser without fine-tuning."""
    demo, accuracy, latency = results["demo"], results["accuracy_keywords"], results["demo_latency"]
    dense, clips = f"{demo['dense']:.2f}", f"{demo['clips']:,}"
    yield Quote("35 words, {} test clips of voices that it never heard)", clips)
    yield Quote("accuracy, dense {} % (`make demo`", dense)
    for way, found in demo["ways"].items():
        bold = f"**{way}**" if f"**{way}**" in BOLD else way
        cells, figures = [], []
        for share in ("50%", "75%", "85%"):
            if share not in found:
                cells.append("")
                continue
            one = found[share]
            figures += [f"{one['accuracy']:.2f}", signed(one["change"])]
            cells.append("{} ({})" if _kept(one, share) else "{} ({}; {}% removed)")
            figures += [] if _kept(one, share) else [f"{100 * one['removed']:.1f}"]
        figures += [f"{found['50%']['macs']:.3f}", f"{latency['ways'][way]:.2f}"]
        yield Quote(f"| {bold} | {' | '.join(cells)} | {{}} | {{}} |", *figures)
    yield Quote("``examples/keywords`` (dense {} %, {} clips of voices never heard in training)", dense, clips)
    yield Quote("the differences in accuracy are a few clips of {}.", clips)
    shares = ("50%", "75%", "85%")
    rows = [(way, *said(own, shares, "change", 2, "({}% removed)")) for way, own in accuracy["ways"].items()]
    yield table(removed(*shares), rows)


BOLD = ("**rotated: the default with data**", "**rotated, split found, ragged**")
"""Rows of README."""


def byte_model(results: Results) -> Iterator[Quote]:
    """The byte-level language model."""
    found, shares = results["accuracy_bytes"], ("25%", "50%", "75%")
    yield Quote("dense {} bits per byte; bits per byte added", f"{found['dense']:.3f}")
    yield Quote("bits per byte added on files that it never read, dense {}", f"{found['dense']:.3f}")
    trained = found["trained"]
    yield Quote("6 layers, 4 heads of 64, {} training steps", f"{trained['steps']}")
    yield Quote("trained for {} minutes, {} steps, on the text", f"{trained['minutes']}", f"{trained['steps']}")
    ways = found["ways"]
    yield table(removed(*shares), [(way, *said(own, shares, "change", 3, "")) for way, own in ways.items()])
    best = [signed(min(ways[way][share]["change"] for way in PAPER), 3) for share in shares]
    yield Quote("| the best of the paper's ways at each share | {} | {} | {} |", *best)
    for first, way in (
        ("channels by gates, uncompensated", "channels by gates, uncompensated"),
        ("channels by gates, compensated", "channels by gates, compensated"),
        ("rotated: the default with data", "rotated (the default with data)"),
        ("**rotated, split found, ragged**", "rotated, ragged, split found"),
    ):
        yield Quote(f"| {first} | {{}} | {{}} | {{}} |", *(signed(ways[way][share]["change"], 3) for share in shares))


def llama(results: Results) -> Iterator[Quote]:
    """The byte-level Llama, and one of a billion parameters."""
    found, shares = results["llama"], ("25%", "50%", "75%")
    ways = found["ways"]
    yield Quote("bits per byte added on modules that it never read, dense {}".capitalize(), f"{found['dense']:.3f}")
    shown = {way: own for way, own in ways.items() if way != "channels by gates, compensated"}  # too much alike
    rows = [(way, *said(own, shares, "added", 3, "({}% went)")) for way, own in shown.items()]
    yield table(removed(*shares), rows)
    best = [
        min(own["added"] for way in PAPER if (own := ways[way].get(share)) and _kept(own, share)) for share in shares
    ]
    ours = [ways[f"uniform, split {how}"][share]["added"] for how in ("found", "measured") for share in shares]
    yield Quote(
        "), dense {}: at 25, 50 and 75 % the best of the paper's ways {}, {}, {}; uniform, split found {}, {}, {}, "
        "split measured {}, {}, {} (`python benchmarks/llama.py`)",
        f"{found['dense']:.3f}", *(signed(one, 3) for one in (*best, *ours)),
    )  # fmt: skip
    cached = {share: own for share, own in results["llama_generate"].items() if share != "seeds"}
    yield table(
        ["removed", "cached equals uncached", "bytes a token"],
        [(share, ["{}", "{}"], [own["agree"], f"{own['bytes']:,.0f}"]) for share, own in cached.items()],
    )


def whisper(results: Results) -> Iterator[Quote]:
    """The small Whisper."""
    whole, ways = results["whisper"]["dense"], results["whisper"]["ways"]
    dense, beams = whole["greedy"], whole["beams"]
    yield Quote("points against the dense model ({} | {} %)", f"{dense:.2f}", f"{beams:.2f}")
    rows: list[Row] = []
    for way, own in ways.items():
        found = [(signed(one["greedy"]), signed(one["beams"]), f"{100 * one['removed']:.1f}") for one in own.values()]
        rows.append((way, ["{} | {} ({}%)"] * 3, [figure for one in found for figure in one]))
    yield table(removed("25%", "40%", "50%"), rows)
    best = min(ways[way]["40%"]["greedy"] for way in PAPER)
    ours = [ways[way]["40%"]["greedy"] for way in ("rotated: the default with data", "rotated, split found, ragged")]
    yield Quote(
        "(dense {} % of words wrong, voices and phrases that it never heard): with 40 % of encoder, decoder and "
        "cross-attention removed {} % by the default with data, {} % by ragged heads with the split found; by the best "
        "of the paper's ways {} %", f"{dense:.2f}", *(f"{dense + one:.2f}" for one in (*ours, best)),
    )  # fmt: skip

    most = medians(results["quality"], "whisper", 0.75)
    others = min(found for way, found in most.items() if not way.startswith("attnprune"))
    yield Quote(
        "With 75 % removed ragged heads leave {} % wrong, the best of others {} %",
        f"{most['attnprune, ragged, split found']:.2f}", f"{others:.2f}",
    )  # fmt: skip


def recovery(results: Results) -> Iterator[Quote]:
    """Recovery without labels."""
    yield Quote("The shipped keyword recogniser (dense {} %)", f"{results['recovery_keywords']['dense'][0]:.2f}")
    rows: list[Row] = []
    for name, shown in (("recovery_keywords", "the default"), ("recovery_keywords_ragged", "ragged")):
        for share, digits in (("50%", 5), ("75%", 4), ("85%", 4)):
            for first, key in ((f"{share[:-1]} % removed, {shown}", "before"), ("and 100 steps", "after")):
                accuracy, apart = results[name][share][key]
                figures = [f"{accuracy[one]:.2f}" for one in ("median", "least", "most")]
                figures += [bare(apart[one], digits) for one in ("median", "least", "most")]
                rows.append((first, ["{} ({} to {})", "{} ({} to {})"], figures))
    yield table(["way", "accuracy, %", "divergence of answers from dense, nats"], rows)
    theirs, own = recovery_plot.paper(results["paper_table_shipped"]), recovery_plot.ours(results)
    rows = [
        (shown, ["{}", "{}", "{}"], [f"{one.clips:,}", f"{one.seconds:.1f}", signed(one.points)])
        for shown, one in recovery_plot.rows(theirs, own)
    ]
    yield table(["way", "clips", "seconds of one processor", "points from dense"], rows)
    by_way = {(one.way, one.share): one for one in (*theirs, *own)}
    near = (by_way["the default", 50], by_way["ragged", 75])
    words = "at 50 % the default after {} seconds, at 75 % ragged heads after {} seconds"
    yield Quote(words, *(f"{one.seconds:.1f}" for one in near))
    for clips, words in (
        (6125, "with {} clips a round they lose {} to {} points in {} to {} seconds"),
        (24500, "with four times as many, {}, those by Fisher end {} to {} points below after {} to {} seconds"),
    ):
        some = [one for one in theirs if one.clips == recovery_plot.HALF * clips]
        lost, spent = ([getattr(one, key) for one in some] for key in ("points", "seconds"))
        yield Quote(words, f"{clips:,}", f"{-max(lost):.2f}", f"{-min(lost):.2f}",
                    f"{min(spent):,.0f}", f"{max(spent):,.0f}")  # fmt: skip
    lost = [-by_way[way, 85].points for way in ("ragged", "ragged, 100 steps")]
    yield Quote("ragged heads lose {} in closed form, {} after 100 steps", *(f"{one:.2f}" for one in lost))
    rows = []
    for way, shown, share in (
        ("uniform", "the default", "50%"),
        ("ragged", "ragged", "50%"),
        ("ragged", "ragged", "75%"),
    ):
        texts = results["recovery_minilm"][way][share]
        figures = [bare(texts[key][0]["median"], 4) for key in ("before", "after")]
        figures += [f"{texts['steps']}", f"{texts['seconds']:.0f}"]
        rows.append((f"{share[:-1]} % removed, {shown}", ["{}", "{}", "{}, {}"], figures))
    yield table(["way", "closed form", "recovered", "steps, seconds"], rows)
    text = results["recovery_bytes"]
    rows = []
    for way, shown in (("uniform", "the default"), ("ragged", "ragged")):
        own = text[way]["75%"]
        figures = [signed(own[key][0]["median"] - text["dense"][0], 3) for key in ("before", "after")]
        figures += [f"{own['steps']}", f"{own['seconds']:.0f}"]
        rows.append((f"75 % removed, {shown}", ["{}", "{}", "{}, {}"], figures))
    yield table(["way", "closed form", "recovered", "steps, seconds"], rows)


def four_ratios(results: Results) -> Iterator[Quote]:
    """Four ratios of their own."""
    rows: list[Row] = []
    for task in ("keywords", "minilm"):
        for share in ("50%", "75%"):
            own = results[f"four_ratios_{task}"][share]
            equal, best = own["equal"], own["best four"]
            parts = [(f"{one['test']:#.3g}", *([f"{one['accuracy']:.2f}"] if "accuracy" in one else [])) for one in
                     (equal, best)]  # fmt: skip
            cell = "{} ({} %)" if "accuracy" in equal else "{}"
            cells = ["{}%", cell, "{} {} {} {}", cell]
            figures = [f"{100 * equal['removed']:.1f}", *parts[0], *(bare(x, 2) for x in best["ratios"]), *parts[1]]
            rows.append((task, cells, figures))
    yield table(["task", "removed", "equal ratios: loss", "best four found", "its loss"], rows)
    half, most = (results["four_ratios_keywords"][share] for share in ("50%", "75%"))
    apart, outer = ([half[axis][step] for step in ("-0.1", "+0.1")] for axis in ("Q from K", "V from O"))
    later, beyond = ([most[axis][step] for step in ("-0.1", "+0.1")] for axis in ("Q from K", "V from O"))
    yield Quote(
        "the loss {} to {} times that of equal ratios for Q and K, and {} (less from O) to {} times (more from O) for "
        "V and O; at 75 % {} to {}, and {} to {}.",
        bare(min(apart), 2), bare(max(apart), 2), bare(min(outer), 2), f"{max(outer):.0f}",
        bare(min(later), 2), bare(max(later), 2), bare(min(beyond), 2), f"{max(beyond):.1f}",
    )  # fmt: skip


def outer_sides(results: Results) -> Iterator[Quote]:
    """Features beside channels in one budget: the loss over that of channels alone."""
    rows: list[Row] = []
    for share in ("50%", "75%"):
        own = results["outer_sides_keywords"][share]
        over = {outer: bare(one["loss"] / own["0"]["loss"], 2) for outer, one in own.items()}
        rows.append((share, ["{}"] * 4, [over[outer] for outer in ("0.01", "0.04", "0.08", "all")]))
    yield table(["removed", "1 % of it from features", "4 %", "8 %", '``split="all"``'], rows)


def sweep(results: Results) -> Iterator[Quote]:
    """Twelve ways of the keyword recogniser."""
    found = results["sweep_keywords"]
    small, fast = found["smallest"], found["fastest"]
    yield Quote(
        "({} of the parameters) and the fastest", f"{small['params']:.3f}",
    )  # fmt: skip
    yield Quote("({} of the time)", f"{fast['latency']:.3f}")
    yield Quote(
        "the {} test clips, which chose nothing, they score {} and {} %, dense {} %",
        f"{results['demo']['clips']:,}", *(f"{one:.2f}" for one in (small["test"], fast["test"])),
        f"{results['demo']['dense']:.2f}",
    )  # fmt: skip
