"""Pictures of what is lost for what is saved, by way (:func:`pareto`) and by layer (:func:`sensitivity`)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from .plots import COLOURS, DARK, LARGE, LIGHT, MEDIUM, SMALL, _labels, _margin, _title

if TYPE_CHECKING:
    from .rows import Row, Saved

MARKS = "osD^vP*XhdpH<>8"
LINES = ("-", "--", "-.", ":")
PANELS: tuple[tuple[Saved, str], ...] = (
    ("params", "parameters of the model"), ("latency", "latency, measured"), ("macs", "multiply-adds"),
)  # fmt: skip


def pareto(
    dense: Row,
    rows: Sequence[Row],
    fronts: Mapping[Saved, Sequence[Row]],
    *,
    higher_is_better: bool = True,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """The score against what is left of parameters, and of latency (where that was not measured, of multiply-adds).

    A line for every way, through its ratios; behind them the rows that no other row beats.

    Args:
        dense: the model as it is.
        rows: what was tried; :meth:`attnprune.Sweep.plot` draws those of a table.
        fronts: by column, the rows that no other row beats (:meth:`attnprune.Sweep.pareto`).
        higher_is_better: whether a higher score is a better one.
        path: also written there; the suffix says in which format (``.png``, ``.svg``, ``.pdf``).

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        OptionError: no row has figures.
        ImportError: matplotlib is not installed.
    """
    from matplotlib import colormaps

    from .picture import Picture

    names = list(dict.fromkeys(row.way for row in rows if row.score is not None))
    if not names:
        raise OptionError("rows", "a row with a score", "none", "see the errors in its rows")
    shown = [panel for panel in PANELS if dense.size(panel[0]) is not None][:2]
    columns = max(1, min(4, int(3.6 * len(shown) / (0.09 * max(map(len, names)) + 0.5))))
    lines = -(-(len(names) + 1) // columns)
    figure = Picture((3.6 * len(shown) + 0.6, 3.5 + 0.17 * lines), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, (by, title) in zip(panels, shown, strict=True):
        base = dense.size(by) or 1.0
        best = [(100 * (row.size(by) or 0.0) / base, row.score) for row in fronts[by]]
        panel.plot(*zip(*best, strict=True), color="0.85", linewidth=7, solid_capstyle="round", zorder=0)
        for number, name in enumerate(names):
            own = [row for row in rows if row.way == name and row.score is not None and row.size(by) is not None]
            panel.plot(
                [100 * (row.size(by) or 0.0) / base for row in own], [row.score for row in own],
                color=colormaps[COLOURS](0.9 * number / max(len(names) - 1, 1)), label=name, linewidth=1.1,
                marker=MARKS[number % len(MARKS)], markersize=4.5, linestyle=LINES[number % len(LINES)],
                markeredgecolor="white", markeredgewidth=0.4,
            )  # fmt: skip
        panel.plot([100], [dense.score], color="black", marker="*", markersize=9, linestyle="", label="dense")
        panel.axhline(dense.score, color="0.4", linewidth=0.8, linestyle=":", zorder=0)
        panel.set_xlabel(f"{title}, % of dense", fontsize=MEDIUM)
        panel.grid(color="0.93", linewidth=0.6, zorder=-1)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=SMALL)
    better = "higher" if higher_is_better else "lower"
    panels[0].set_ylabel(f"score ({better} is better)", fontsize=MEDIUM)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=MEDIUM, frameon=False)
    figure.suptitle("What is lost for what is saved; the grey band joins what nothing beats", fontsize=LARGE)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def sensitivity(
    rows: Mapping[str, Sequence[float]],
    parts: Sequence[str],
    *,
    unit: str,
    title: str,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """What each attention costs alone: a row for each, a bar for each part.

    Args:
        rows: by the attention's name, what each part costs; :meth:`attnprune.Sensitivity.plot` draws its own.
        parts: their names.
        unit: of the costs.
        title: of the picture.
        path: also written there; the suffix says in which format (``.png``, ``.svg``, ``.pdf``).

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        OptionError: no costs.
        ImportError: matplotlib is not installed.
    """
    from .picture import Picture

    if not rows:
        raise OptionError("sensitivity", "costs of at least one attention", "none", "pass what sensitivity gave")
    labels, where = _labels(list(rows))
    count = len(parts)
    figure = Picture((5.2 + _margin(labels), 1.5 + max(0.14 * count + 0.08, 0.2) * len(labels)), layout="constrained")
    panel = figure.subplots()
    styles: tuple[dict[str, Any], ...] = (
        {"facecolor": "0.75"},
        {"facecolor": DARK},
        {"facecolor": LIGHT, "hatch": "////"},
    )
    for number, (part, column) in enumerate(zip(parts, zip(*rows.values(), strict=True), strict=True)):
        places = [row + 0.8 * ((number + 0.5) / count - 0.5) for row in range(len(labels))]
        style: dict[str, Any] = (
            styles[number] if count <= 3 else {"facecolor": f"{0.15 + 0.7 * number / (count - 1):.2f}"}
        )
        panel.barh(places, column, height=0.72 / count, edgecolor=DARK, linewidth=0.4, label=part, **style)
    panel.set_yticks(range(len(labels)), labels)
    panel.invert_yaxis()
    panel.axvline(0, color="0.3", linewidth=0.8)
    panel.set_ylabel("layer", fontsize=MEDIUM)
    panel.set_xlabel(unit, fontsize=MEDIUM)
    panel.grid(axis="x", color="0.93", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=SMALL)
    figure.legend(loc="outside lower center", ncols=count, fontsize=MEDIUM, frameon=False)
    _title(figure, title, where)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
