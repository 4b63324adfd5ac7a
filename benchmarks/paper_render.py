"""The table and the plot of ``paper_table.py``, from its results file, beside the paper's own figures."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from _paired import table

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = {1: 10, 2: 20, 4: 30, 5: 40, 7: 50, 9: 60, 14: 75}
"""Rounds of 9.4 % that are read, and the paper's column (per cent of attention removed) nearest to each."""
LATER = 8
"""A round that removes no head where the one before removed one half of them; read where a run ends with it."""
ALIKE = ("more clips", "84,843 clips", "all weights")
"""Ends of the names of ways whose recovery is another; dense is trained alike."""
PAPER_DENSE = 98.15
PAPER: dict[str, tuple[float, ...]] = {  # arXiv 2509.26207v2: AST-base, SpeechCommands; 10, 20, 30, 40, 50, 60 %
    "PH-G-FI": (98.15, 97.88, 97.76, 97.96, 97.92, 97.71),
    "PH-G-MAG": (97.86, 97.87, 97.75, 97.44, 97.07, 96.54),
    "PH-L-FI": (97.90, 98.05, 97.92, 97.58, 97.59, 97.55),
    "PH-L-MAG": (97.65, 97.33, 97.91, 97.77, 97.66, 97.49),
    "EH-G-FI": (98.02, 97.92, 98.12, 98.12, 97.78, 97.58),
    "EH-G-MAG": (97.86, 97.74, 97.91, 97.74, 97.63, 96.52),
    "EH-L-FI": (98.14, 98.12, 97.69, 97.77, 97.86, 97.52),
    "EH-L-MAG": (98.13, 98.12, 97.91, 97.87, 97.53, 97.12),
}


class Spread(NamedTuple):
    """Over seeds: how many there are, and the median, least and greatest value."""

    count: int
    median: float
    low: float
    high: float


def read(runs: Mapping[str, list[dict[str, Any]]], step: int, key: str = "test") -> Spread | None:
    """One cell, or None where no seed has it."""
    found = [record[key] for records in runs.values() for record in records if record["step"] == step]
    return Spread(len(found), statistics.median(found), min(found), max(found)) if found else None


def accuracies(results: Mapping[str, Any], name: str, *, new: bool = False) -> dict[str, dict[int, float]]:
    """Test accuracy by seed and step, on the shipped clips or on new ones."""
    if new:
        found = results.get("new clips", {"runs": {}})["runs"].get(name, {})
        return {seed: {int(step): value for step, value in steps.items()} for seed, steps in found.items()}
    runs = results["runs"].get(name, {})
    return {seed: {record["step"]: record["test"] for record in records} for seed, records in runs.items()}


def distance(
    results: Mapping[str, Any], name: str, step: int, *, tuned: bool = False, new: bool = False
) -> Spread | None:
    """Points above (or below) dense: as shipped, or as fine-tuned by the same rounds of the same seed."""
    alike = next((f"dense; {end}" for end in ALIKE if name.endswith(end)), "dense")
    reference = accuracies(results, alike, new=new)
    shipped = results.get("new clips", {}).get("dense") if new else results["dense"]["test"]
    found = []
    for seed, steps in accuracies(results, name, new=new).items():
        here, there = steps.get(step), reference.get(seed, {}).get(step) if tuned else shipped
        if here is not None and there is not None:
            found.append(here - there)
    return Spread(len(found), statistics.median(found), min(found), max(found)) if found else None


def words(spread: Spread | None) -> str:
    """The median, and the range over seeds."""
    if spread is None:
        return ""
    median, low, high = (round(value, 2) + 0.0 for value in spread[1:])  # no -0.00
    return f"{median:+.2f}" + (f" ({low:+.2f} to {high:+.2f})" if spread.count > 1 else "")


def rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Accuracy by share removed, then distances from dense in points, and the paper's own."""
    shares = [f"{column} % removed" for column in COLUMNS.values()]
    header = ["way", "seeds", *shares, "at 50 %, from dense as shipped", "at 50 %, from dense fine-tuned",
              "at 50 %, the paper's, from its dense", "at 75 %, from dense as shipped"]  # fmt: skip
    if new := results.get("new clips"):
        header += [f"at {share} %, {new['clips']:,} new clips, from dense as shipped" for share in (50, 75)]
    body = []
    for name, runs in results["runs"].items():
        cells = [read(runs, step) for step in COLUMNS]
        found = ["" if cell is None else f"{cell.median:.2f}" for cell in cells]
        tuned = "" if name.startswith("dense") else words(distance(results, name, 7, tuned=True))
        theirs = PAPER.get(name.partition("; ")[0])
        claimed = f"{theirs[4] - PAPER_DENSE:+.2f}" if theirs else ""
        gaps = [words(distance(results, name, 7)), tuned, claimed, words(distance(results, name, 14))]
        if new:
            gaps += [words(distance(results, name, step, new=True)) for step in (7, 14)]
        body.append([name, str(len(runs)), *found, *gaps])
    return header, body


def best(results: Mapping[str, Any], step: int) -> str:
    """Which of our ways has the least validation loss (median over seeds); empty where none was run."""
    runs = results["runs"]
    losses = {name: read(found, step, "loss") for name, found in runs.items() if name.startswith("rotated")}
    return min(((spread.median, name) for name, spread in losses.items() if spread), default=(0.0, ""))[1]


def claims(results: Mapping[str, Any]) -> list[str]:
    """What was to be reached, and what was: points against the dense model, medians over seeds."""
    lines = []
    for name in (name + suffix for suffix in ("", *(f"; {end}" for end in ("distilled", *ALIKE))) for name in PAPER):
        claimed = PAPER[name.partition("; ")[0]][4] - PAPER_DENSE
        for step, label in ((7, "50 %"), (LATER, "50 %, a round later")):
            gap, tuned = distance(results, name, step), distance(results, name, step, tuned=True)
            if gap and tuned:
                beside = f"{tuned.median:+.2f} from dense fine-tuned; the paper's {claimed:+.2f}"
                met = "yes" if round(gap.median, 3) > -1 else "no"  # records are rounded; 14 clips are 1 point
                said = f"{name}, {label}: {gap.median:+.2f} ({beside}); less than 1 point below dense: {met}"
                lines.append(said + elsewhere(results, name, step))
    for step, allowed in ((7, 0.1), (14, 0.5)):
        name = best(results, step)  # by validation, not test
        if name and (gap := distance(results, name, step)):
            met = f"at most {allowed} below: {'yes' if round(gap.median, 3) >= -allowed else 'no'}"
            said = f"ours (least validation loss: {name}), {COLUMNS[step]} %: {words(Spread(1, *gap[1:]))}; {met}"
            lines.append(said + elsewhere(results, name, step))
    return lines


def elsewhere(results: Mapping[str, Any], name: str, step: int) -> str:
    """The same distance on the new clips, as the end of a line."""
    gap = distance(results, name, step, new=True)
    return f"; on {results['new clips']['clips']:,} new clips {words(Spread(1, *gap[1:]))}" if gap else ""


TITLES = {
    "PH-G-FI": "channels of each head, layers compete",
    "PH-L-FI": "channels of each head, each layer alike",
    "EH-G-FI": "whole heads, layers compete",
    "EH-L-FI": "whole heads, each layer alike",
}
"""The paper's variants by Fisher information, in words."""
SHOWN = {
    "rotated; no recovery": "the default, nothing trained",
    "rotated, free; no recovery": "rotated, split found, ragged; nothing trained",
    "rotated, free; more clips": "rotated, split found, ragged; 24,500 clips",
    "rotated, free; LoRA": "rotated, split found, ragged; 6,125 clips",
    "rotated; LoRA": "the default, 6,125 clips a round",
}
"""Ways of ours, in words."""


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Points from dense against the share removed, a panel a variant: the paper's, its protocol here, and ours.

    Variants by magnitude stand in the table alone.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MultipleLocator
    from PIL import Image

    dark, middle, light = (colormaps["cividis"](value) for value in (0.0, 0.45, 0.8))  # apart in grey too
    ours = best(results, 7)
    figure = Figure(figsize=(8.0, 6.6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for panel, (name, title) in zip(panels.flat, TITLES.items(), strict=True):
        panel.axhline(0, color="0.3", linewidth=0.8)
        panel.axhline(-1, color="0.3", linewidth=0.8, linestyle=(0, (1, 2)))  # the paper's claim
        theirs = [value - PAPER_DENSE for value in PAPER[name]]
        panel.plot([10, 20, 30, 40, 50, 60], theirs, "--s", color=middle, markersize=4.5, linewidth=1.4,
                   markerfacecolor="white", label="the paper, on AST-base")  # fmt: skip
        for label, way, colour, mark in (
            ("its protocol here, 6,125 clips a round", name, dark, "-o"),
            ("24,500 clips a round", f"{name}; more clips", dark, "-.v"),
            ("84,843 clips a round, as the paper has", f"{name}; 84,843 clips", dark, ":P"),
            (f"ours: {SHOWN.get(ours, ours)}", ours, light, "-^"),
        ):
            x, y, low, high = _curve(results, way)
            if not x:
                continue
            panel.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            panel.plot(x, y, mark, color=colour, markersize=4.5, linewidth=1.4, label=label)
        panel.set_title(f"{name}: {title}", fontsize=9.5)
        panel.grid(color="0.92", linewidth=0.6)
        panel.tick_params(labelsize=8.5)
        panel.xaxis.set_major_locator(MultipleLocator(10))
        panel.spines[["top", "right"]].set_visible(False)
        if name != "EH-L-FI":  # which falls five times as far
            panel.set_ylim(-4, 1)
    figure.supxlabel("attention weights removed, %", fontsize=9.5)
    figure.supylabel("accuracy, points from the dense model", fontsize=9.5)
    handles, labels = panels[1, 1].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=9, frameon=False, loc="outside upper center", ncols=2)
    with io.BytesIO() as file:
        figure.savefig(file, dpi=110)
        Image.open(file).convert("RGB").quantize(64).save(path, optimize=True)  # a third of the size


def _curve(results: Mapping[str, Any], name: str) -> tuple[list[float], ...]:
    """Shares that were removed, in per cent; medians, least and greatest of the distance from dense."""
    runs = results["runs"].get(name, {})
    found = [(read(runs, step, "removed"), distance(results, name, step)) for step in sorted({*COLUMNS, LATER})]
    pairs = [(share, gap) for share, gap in found if share and gap]
    x = [100 * share.median for share, _ in pairs]
    return x, [gap.median for _, gap in pairs], [gap.low for _, gap in pairs], [gap.high for _, gap in pairs]


def render(results: Mapping[str, Any], name: str, out: Path = ROOT) -> str:
    """Writes the Markdown table, the table of the documentation and the plot, of this name; returns the Markdown."""
    header, body = rows(results)
    markdown = "\n".join([table(header, body), "", *(f"- {line}" for line in claims(results))])
    (out / "benchmarks" / "results").mkdir(parents=True, exist_ok=True)
    (out / "docs" / "_static").mkdir(parents=True, exist_ok=True)
    (out / "benchmarks" / "results" / f"{name}.md").write_text(markdown + "\n")
    with (out / "docs" / "_static" / f"{name}.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *body])
    plot(results, out / "docs" / "_static" / f"{name}.png")
    return markdown
