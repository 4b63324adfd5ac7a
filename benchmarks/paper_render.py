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
COLUMNS = {2: 20, 4: 30, 7: 50, 9: 60, 14: 75}
"""Rounds of 9.4 % that are read, and the paper's column (per cent of attention removed) nearest to each."""
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


def distance(results: Mapping[str, Any], name: str, step: int) -> str:
    """Points above (or below) dense, and the range over seeds."""
    cell, dense = read(results["runs"].get(name, {}), step), results["dense"]["test"]
    if cell is None:
        return ""
    spread = f" ({cell.low - dense:+.2f} to {cell.high - dense:+.2f})" if cell.count > 1 else ""
    return f"{cell.median - dense:+.2f}{spread}"


def rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Accuracy by column, then the distance from dense at 50 % and 75 %, and the paper's at 50 %."""
    columns = [f"{column} %" for column in COLUMNS.values()]
    header = ["way", "seeds", *columns, "50 %: vs dense", "75 %", "50 %: vs dense, tuned", "50 %: the paper"]
    tuned = read(results["runs"].get("dense", {}), 7)
    body = []
    for name, runs in results["runs"].items():
        cells = [read(runs, step) for step in COLUMNS]
        theirs = f"{PAPER[name][4] - PAPER_DENSE:+.2f}" if name in PAPER else ""
        found = ["" if cell is None else f"{cell.median:.2f}" for cell in cells]
        half = cells[list(COLUMNS).index(7)]
        against = f"{half.median - tuned.median:+.2f}" if half and tuned and name != "dense" else ""
        body.append(
            [name, str(len(runs)), *found, distance(results, name, 7), distance(results, name, 14), against, theirs]
        )
    return header, body


def claims(results: Mapping[str, Any]) -> list[str]:
    """What was to be reached, and what was: points against the dense model as it is shipped, medians over seeds."""
    runs, lines = results["runs"], []
    for name in (name for name in PAPER if name.endswith("FI") and read(runs.get(name, {}), 7)):
        gap = read(runs[name], 7).median - results["dense"]["test"]  # type: ignore[union-attr]
        lines.append(f"{name}, 50 %: {gap:+.2f}; less than 1 point below dense: {'yes' if gap > -1 else 'no'}")
    for step, allowed in ((7, 0.1), (14, 0.5)):
        losses = {name: read(found, step, "loss") for name, found in runs.items() if name.startswith("rotated")}
        best = min((spread.median, name) for name, spread in losses.items() if spread)[1]  # by validation, not test
        gap = read(runs[best], step).median - results["dense"]["test"]  # type: ignore[union-attr]
        met = "yes" if gap >= -allowed else "no"
        lines.append(
            f"ours (least validation loss: {best}), {COLUMNS[step]} %: {gap:+.2f}; at most {allowed} below: {met}"
        )
    return lines


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Points lost against the share removed: the paper's curves, its variants here, and ours."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from PIL import Image

    cividis = [colormaps["cividis"](value) for value in (0.0, 0.4, 0.75)]
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True)
    colours = {"FI": cividis[0], "MAG": cividis[2]}
    for name, values in PAPER.items():
        panels[0].plot([10, 20, 30, 40, 50, 60], [v - PAPER_DENSE for v in values], **_style(name, colours))
    for name, runs in results["runs"].items():
        if name in PAPER:
            panels[1].plot(*_curve(results, runs), **_style(name, colours))
    ours = dict(zip(("rotated", "rotated, free", "rotated, joint"), cividis, strict=True))
    for name, runs in results["runs"].items():
        base, _, how = name.partition("; ")
        if base in ours:
            dash = {"no recovery": ":", "LoRA": "-", "full, distilled": "--"}[how]
            panels[2].plot(*_curve(results, runs), dash, color=ours[base], marker="os^"[list(ours).index(base)],
                           markersize=3.5, linewidth=1.2, label=name)  # fmt: skip
    titles = (
        f"the paper: AST-base, SpeechCommands\n(dense {PAPER_DENSE:.2f} %)",
        f"its protocol here: keyword AST\n(dense {results['dense']['test']:.2f} %)",
        "ours on the keyword AST\n(scale of its own)",
    )
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=8.5)
        panel.axhline(0, color="0.3", linewidth=0.8)
        if panel is not panels[2]:  # the paper's claim
            panel.axhline(-1, color="0.3", linewidth=0.8, linestyle=(0, (1, 2)))
        panel.set_xlabel("attention weights removed, %", fontsize=8)
        panel.grid(color="0.92", linewidth=0.6)
        panel.tick_params(labelsize=7.5)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=6.2, frameon=False, loc="lower left")
    panels[0].set_ylabel("accuracy against dense, points", fontsize=8)
    with io.BytesIO() as file:
        figure.savefig(file, dpi=110)
        Image.open(file).convert("RGB").quantize(64).save(path, optimize=True)  # a third of the size


def _curve(results: Mapping[str, Any], runs: Mapping[str, list[dict[str, Any]]]) -> tuple[list[float], list[float]]:
    """Shares that were removed, in per cent, and medians of the distance from dense."""
    shares = [read(runs, step, "removed") for step in COLUMNS]
    cells = [read(runs, step) for step in COLUMNS]
    x = [100 * share.median for share in shares if share]
    return x, [cell.median - results["dense"]["test"] for cell in cells if cell]


def _style(name: str, colours: Mapping[str, str]) -> dict[str, Any]:
    scheme, scope, score = name.split("-")
    return {
        "color": colours[score], "linestyle": "-" if scope == "G" else "--", "marker": "o" if scheme == "PH" else "s",
        "markersize": 3.5, "linewidth": 1.2, "markerfacecolor": colours[score] if scheme == "PH" else "white",
        "label": name,
    }  # fmt: skip


def render(results: Mapping[str, Any], out: Path = ROOT) -> str:
    """Writes the Markdown table, the table of the documentation and the plot; returns the Markdown."""
    header, body = rows(results)
    markdown = "\n".join([table(header, body), "", *(f"- {line}" for line in claims(results))])
    (out / "benchmarks" / "results").mkdir(parents=True, exist_ok=True)
    (out / "docs" / "_static").mkdir(parents=True, exist_ok=True)
    (out / "benchmarks" / "results" / "paper_table.md").write_text(markdown + "\n")
    with (out / "docs" / "_static" / "paper_table.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *body])
    plot(results, out / "docs" / "_static" / "paper_table.png")
    return markdown
