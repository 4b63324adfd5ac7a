"""Accuracy against seconds: ours beside the paper's rounds of LoRA, on the shipped keyword recogniser.

    python benchmarks/recovery_plot.py    # writes docs/_static/recovery.png, from results/paper_table_shipped.json,
                                          # recovery_keywords.json and recovery_keywords_ragged.json

Seconds are of one processor, from the dense model to the one that was measured: calibration, pruning, and all training.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HALF = 7
"""The paper's round that has removed one half."""
CLIPS = 512
"""Unlabelled clips that ours reads."""
VARIANTS = [f"{scheme}-{scope}-{score}" for score in ("FI", "MAG") for scheme in ("PH", "EH") for scope in "GL"]
OURS = {"recovery_keywords": "the default", "recovery_keywords_ragged": "ragged"}
"""By results file."""


class Point(NamedTuple):
    """What a way needed and lost; medians over seeds."""

    way: str
    share: int
    """Per cent of attention that went."""
    clips: int
    """Read, those read again counted again."""
    seconds: float
    points: float
    """Accuracy less the dense model's, in points."""


def paper(results: dict[str, Any]) -> list[Point]:
    """The paper's variants at one half, with as many clips a round as were tried."""
    found, dense = [], results["dense"]["test"]
    for more, clips in (("", 6125), ("; more clips", 24500)):
        for name in VARIANTS:
            runs = list(results["runs"].get(name + more, {}).values())
            rounds = [[one for one in records if one["step"] <= HALF] for records in runs]
            if rounds:
                seconds = statistics.median(sum(one["cpu"] for one in records) for records in rounds)
                accuracy = statistics.median(records[-1]["test"] for records in rounds)
                found.append(Point(f"{name}, {clips:,} clips a round", 50, HALF * clips, seconds, accuracy - dense))
    return found


def ours(results: dict[str, Any]) -> list[Point]:
    """Closed form alone, and with 100 steps of recovery."""
    found = []
    for kind, shown in OURS.items():
        dense = results[kind]["dense"][0]
        for share in ("50%", "75%", "85%"):
            own = results[kind][share]
            spent, each = own["of a processor"], 16 * own["steps"]
            before, after = (own[key][0]["median"] - dense for key in ("before", "after"))
            percent = int(share[:-1])
            found.append(Point(shown, percent, CLIPS, spent["pruning"], before))
            found.append(Point(f"{shown}, {own['steps']} steps", percent, CLIPS + each, sum(spent.values()), after))
    return found


def load() -> tuple[list[Point], list[Point]]:
    """The paper's and ours."""
    found = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in ("paper_table_shipped", *OURS)}
    return paper(found["paper_table_shipped"]), ours({name: found[name]["result"] for name in OURS})


def rows(theirs: list[Point], own: list[Point]) -> list[tuple[str, Point]]:
    """What the table of the documentation says of each, shares and then seconds rising."""
    named = [(f"{one.share} %: {one.way}", one) for one in theirs]
    named += [(f"{one.share} %: **attnprune**, {one.way}", one) for one in own]
    return sorted(named, key=lambda pair: (pair[1].share, pair[1].seconds))


def picture(theirs: list[Point], own: list[Point]) -> Figure:
    """Points from the dense model against seconds."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(8.4, 4.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.axhspan(-0.3, 0.6, color="#eef4ee", zorder=0)
    axes.axhline(0, color="#222222", lw=0.8, ls=":")
    for marker, clips in (("v", 6125), ("^", 24500)):
        some = [one for one in theirs if one.clips == HALF * clips]
        label = f"the paper's variants, 50 %, {clips:,} clips a round"
        x, y = [one.seconds for one in some], [one.points for one in some]
        axes.scatter(x, y, s=42, color="#6a1b9a", marker=marker, label=label, alpha=0.8)
    for share, color in ((50, "#2e7d32"), (75, "#1565c0"), (85, "#ef6c00")):
        for kind in OURS.values():
            line = [one for one in own if one.share == share and one.way.startswith(kind)]
            style = "-" if kind == "the default" else "--"
            label = f"attnprune, {kind}, {share} %: closed form, then 100 steps"
            x, y = [one.seconds for one in line], [one.points for one in line]
            axes.plot(x, y, style, color=color, marker="o", ms=5, lw=1.8, label=label if line else None)
    axes.set(xscale="log", xlabel="seconds of one processor", ylabel="accuracy less the dense model's, points")
    axes.set_ylim(-11, 0.6)
    axes.set_xticks([3, 10, 30, 100, 300, 1000], ["3", "10", "30", "100", "300", "1,000"])
    axes.set_title("Accuracy against seconds; in the band less than 0.3 points are lost", loc="left", fontsize=12)
    axes.legend(frameon=False, fontsize=9, loc="lower left", handlelength=3.2)
    return figure


def main() -> None:
    picture(*load()).savefig(ROOT / "docs" / "_static" / "recovery.png")


if __name__ == "__main__":
    main()
