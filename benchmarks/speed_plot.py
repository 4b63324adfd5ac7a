"""The picture of ``speed.py``: latency over dense, beside the ratio of multiply-adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

NAMES = {
    "uniform": "channels, uniform heads",
    "heads": "whole heads",
    "decoupled": "qk 75 %, vo 25 %",
    "ragged": "channels, ragged heads",
    "four": "four ratios",
    "Torch-Pruning": "Torch-Pruning, uniform",
}
"""What is drawn, from the top; what a call for every head shape takes stands in the tables alone."""
MODELS = {"ast146": "AST-base", "ast1214": "AST-base", "vit": "ViT-B/16", "encoder": "nn.TransformerEncoder"}
OURS, THEIRS = "#3b5b92", "#d9d9d9"
BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}


def draw(cells: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel a setting: bars of latency over dense, a black mark where the multiply-adds would have it."""
    cells = sorted(cells, key=lambda one: (one["mode"], one["dtype"], one["batch"], one["tokens"]))
    shown = [name for name in NAMES if any(name in one["variants"] for one in cells)]
    across = min(2, len(cells))
    down = -(-len(cells) // across)
    figure = Figure((3.2 * across + 1.9, (0.2 * len(shown) + 0.55) * down + 0.9), layout="constrained")
    panels = figure.subplots(down, across, sharey=True, sharex=True, squeeze=False).flatten()
    limit = min(
        2.0, max(one["variants"][name]["latency"] for one in cells for name in shown if name in one["variants"])
    )
    for panel, one in zip(panels, cells, strict=False):
        for place, name in enumerate(reversed(shown)):
            if name not in one["variants"]:
                panel.text(0.02, place, "not possible", va="center", fontsize=8)
                continue
            value = one["variants"][name]
            colour = THEIRS if name == "Torch-Pruning" else OURS
            panel.barh(place, value["latency"], color=colour, edgecolor="black", linewidth=0.6, height=0.72)
            panel.plot([value["macs"]] * 2, [place - 0.42, place + 0.42], color="black", linewidth=2.4)
            x = min(max(value["latency"], value["macs"]) + 0.02, 1.05 * limit)  # a longer bar leaves the panel
            panel.text(x, place, f"{value['latency']:.2f}", va="center", fontsize=8, zorder=3, bbox=BOX)
        panel.axvline(1.0, color="black", linewidth=0.9, linestyle="--")
        panel.set_yticks(range(len(shown)), [NAMES[name] for name in reversed(shown)], fontsize=8.5)
        panel.set_title(_title(one), fontsize=9)
        panel.tick_params(axis="x", labelsize=8)
        panel.set_xlim(0, max(1.2, 1.2 * limit))
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(cells) :]:
        panel.set_visible(False)
    figure.supxlabel("time of a forward pass, as a share of the dense model's", fontsize=9)
    marks = [
        Line2D([], [], color="black", linewidth=2.4, label="share of multiply-adds left"),
        Line2D([], [], color="black", linewidth=0.9, linestyle="--", label="dense"),
    ]
    figure.legend(handles=marks, loc="outside upper center", ncols=2, fontsize=8.5, frameon=False)
    figure.savefig(path, dpi=110)


def _title(one: Mapping[str, Any]) -> str:
    """A setting in words; what is usual goes without saying."""
    how = [word for word, usual in ((one["mode"], "eager"), (one["dtype"], "float32")) if word != usual]
    return ", ".join([MODELS.get(one["model"], one["model"]), f"{one['tokens']:,} tokens, batch {one['batch']}", *how])
