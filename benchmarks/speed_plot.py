"""The picture of ``speed.py``: latency over dense, beside the ratio of multiply-adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

ORDER = ("uniform", "heads", "decoupled", "ragged", "four", "decoupled, naive", "ragged, naive", "Torch-Pruning")
BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
STYLE = {"naive": ("#bcbcbc", "////"), "Torch-Pruning": ("#ffffff", "....")}


def draw(cells: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel a setting: bars of latency over dense, a black mark where the multiply-adds would have it."""
    across = min(4, len(cells))
    down = -(-len(cells) // across)
    figure = Figure((3.0 * across + 1.6, 2.5 * down + 0.5), layout="constrained")
    panels = figure.subplots(down, across, sharey=True, sharex=True, squeeze=False).flatten()
    limit = min(2.0, max(v["latency"] for c in cells for v in c["variants"].values()) * 1.12)
    for panel, one in zip(panels, cells, strict=False):
        for place, name in enumerate(reversed(ORDER)):
            if name not in one["variants"]:
                panel.text(0.02, place, "not possible", va="center", fontsize=7)
                continue
            value = one["variants"][name]
            colour, hatch = STYLE.get(name.partition(", ")[2] or name, ("#3b5b92", ""))
            panel.barh(place, value["latency"], color=colour, hatch=hatch, edgecolor="black", linewidth=0.6, height=0.7)
            panel.plot([value["macs"]] * 2, [place - 0.42, place + 0.42], color="black", linewidth=2.2)
            x = min(value["latency"] + 0.02, 0.86 * limit)  # a longer bar leaves the panel
            panel.text(x, place, f"{value['latency']:.2f}", va="center", fontsize=7, zorder=3, bbox=BOX)
        panel.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
        panel.set_yticks(range(len(ORDER)), list(reversed(ORDER)), fontsize=8)
        panel.set_title(f"{one['model']}: {one['tokens']} tokens, batch {one['batch']}, {_how(one)}", fontsize=8)
        panel.tick_params(axis="x", labelsize=7)
        panel.set_xlim(0, limit)
    for panel in panels[len(cells) :]:
        panel.set_visible(False)
    figure.supxlabel("latency over dense (bars; dashed: dense) and ratio of multiply-adds (black marks)", fontsize=8)
    figure.savefig(path, dpi=80)


def _how(one: Mapping[str, Any]) -> str:
    return one["mode"] if one["dtype"] == "float32" else f"{one['mode']}, {one['dtype']}"
