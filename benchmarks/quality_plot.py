"""Pictures of what ``quality.py`` measured: the curves of the README, and all ways on all models.

python benchmarks/quality_plot.py    # writes hero.png and quality.png in docs/_static
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from quality import OURS, RESULTS, WAYS, load

mpl.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
STATIC = Path(__file__).resolve().parents[1] / "docs" / "_static"
INK, GREY, PALE, BLUE, GREEN = "#222222", "#8a8a8a", "#c9c9c9", "#1565c0", "#2e7d32"
BOLD = {"attnprune, ragged, split found": (BLUE, "attnprune, ragged"), "attnprune, the default": (GREEN, "default")}
TITLES = {"keywords": "Keywords, spectrogram transformer", "llama": "Bytes, Llama", "minilm": "Texts, MiniLM encoder"}
TITLES["whisper"] = "Phrases, Whisper"

Points = dict[float, float]


def curves(found: dict[str, Any], name: str, place: int = 0) -> dict[str, Points]:
    """By way, the median by share asked for; without those where units were too coarse for it."""
    values: dict[str, dict[float, list[float]]] = {}
    for one in found["runs"]:
        if one["task"] == name and not one["steps"] and one["measured"] and abs(one["removed"] - one["ratio"]) < 0.03:
            values.setdefault(one["way"], {}).setdefault(one["ratio"], []).append(one["measured"][place])
    return {
        way: {ratio: statistics.median(points[ratio]) for ratio in sorted(points)} for way, points in values.items()
    }


def best_of(lines: dict[str, Points], chosen: list[str]) -> Points:
    """The most that any of some ways reaches."""
    best: Points = {}
    for way in chosen:
        for ratio, value in lines.get(way, {}).items():
            best[ratio] = max(value, best.get(ratio, value))
    return {ratio: best[ratio] for ratio in sorted(best)}


def hero(found: dict[str, Any]) -> Figure:
    """Accuracy against attention removed, without fine-tuning, of the keyword recogniser."""
    lines, dense = curves(found, "keywords"), found["dense"]["keywords"][0]
    figure = Figure(figsize=(8.4, 4.2), dpi=160, layout="constrained")
    axes = figure.subplots()
    axes.axhline(dense, color=INK, lw=0.8, ls=":")
    axes.annotate(f"dense {dense:.1f} %", (2, dense), (0, 4), textcoords="offset points", color=INK, fontsize=10)
    labels: list[tuple[float, float, str, str]] = []

    def draw(points: Points, color: str, width: float, label: str = "") -> None:
        x, y = [0.0, *(100 * r for r in points)], [dense, *points.values()]
        axes.plot(x, y, color=color, lw=width, marker="o" if label else None, ms=4, zorder=3 if label else 1)
        if label:
            labels.append((x[-1], y[-1], label, color))

    for way in WAYS:
        if way not in OURS and way in lines:
            draw(lines[way], PALE, 0.9)
    rivals = [way for way in WAYS if not way.startswith(("paper", "Torch-Pruning", "attnprune"))]
    paper = [way for way in WAYS if way.startswith("paper")]
    pruning = [way for way in WAYS if way.startswith("Torch-Pruning")]
    draw(best_of(lines, rivals), "#ef6c00", 1.8, "best of seven other methods")
    draw(best_of(lines, paper), "#6a1b9a", 1.8, "best of the paper's eight")
    draw(best_of(lines, pruning), GREY, 1.8, "Torch-Pruning (coupled)")
    for way, (color, label) in BOLD.items():
        draw(lines[way], color, 2.6, label)
    last = 1e9
    for x, y, label, color in sorted(labels, key=lambda one: -one[1]):
        last = min(y, last - 4.5)  # labels apart from one another
        axes.annotate(label, (x, y), (90, last), color=color, va="center", fontsize=10.5, annotation_clip=False)
    axes.set(xlim=(0, 88), ylim=(0, 100), xlabel="attention parameters removed, %", ylabel="accuracy, %")
    axes.set_title("A keyword recogniser pruned without any fine-tuning", loc="left", fontsize=12)
    figure.get_layout_engine().set(rect=(0, 0, 1, 1))  # type: ignore[union-attr]
    return figure


def every(found: dict[str, Any]) -> Figure:
    """All ways on all models, a dot for a share."""
    names = [name for name in TITLES if name in found["dense"]]
    figure = Figure(figsize=(2.5 * len(names) + 2.9, 7.2), dpi=130, layout="constrained")
    rows = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    ways = WAYS[::-1]
    for place, (name, axes) in enumerate(zip(names, rows, strict=True)):
        lines = curves(found, name)
        marks = {0.5: "o", 0.75: "D"}
        for row, way in enumerate(ways):
            for ratio, value in lines.get(way, {}).items():
                if ratio in marks:
                    axes.scatter(value, row, s=34, color=BLUE if way in OURS else INK, marker=marks[ratio], zorder=3)
        dense = found["dense"][name][0]
        axes.axvline(dense, color=INK, lw=0.8, ls=":")
        title = TITLES[name].replace(", ", "\n", 1)
        axes.set_title(f"{title}\ndense {dense:.3g}", loc="left", fontsize=11)
        axes.set_xlabel(found["units"][name][0])
        axes.grid(axis="y", color="#eeeeee")
        if place == 0:
            axes.set_yticks(range(len(ways)), ways)
    figure.suptitle("circle: 50 % of attention removed; diamond: 75 %", x=0.01, ha="left", fontsize=11)
    return figure


def main() -> None:
    found = load()
    if not RESULTS.exists():
        raise SystemExit("measure first: python benchmarks/quality.py keywords")
    hero(found).savefig(STATIC / "hero.png")
    every(found).savefig(STATIC / "quality.png")


if __name__ == "__main__":
    main()
