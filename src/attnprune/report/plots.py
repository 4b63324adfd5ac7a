"""Pictures; needs matplotlib (``pip install attnprune[plot]``), which is imported when one is drawn.

Colours are those of cividis, which run from dark to light alike for every eye and in grey print; where two things stand
side by side, hatches tell them apart too. Figures grow with the model, so that text keeps its size.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import ceil, isfinite, nan
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import OptionError
from ..values.layout import KINDS, Kind, Projection

if TYPE_CHECKING:
    from ..values.plan import Plan
    from ..values.scores import Scores

FLOOR = 1e-6  # shares of energy below this are drawn here
COLOURS = "cividis"
DARK, MIDDLE, LIGHT = "#00224e", "#a69d75", "#fdea45"  # the ends of cividis, and two thirds between
HATCH = "xxxx"
SMALL, MEDIUM, LARGE = 7, 8, 9  # points
ACROSS = (4, 6)  # panels side by side, in pictures with one for every attention: of up to 12, of more
_NAME = {"qk": "Q, K", "vo": "V, O"}
_Path = str | os.PathLike[str] | None
_Cells = list[list[float]]


def kept(plan: Plan, *, path: _Path = None) -> Any:
    """What a plan keeps: qk and vo channels by layer and head, and the share that each layer loses.

    Args:
        plan: a plan, or a report's (:meth:`attnprune.Report.plot` is the same).
        path: also written there; the suffix says in which format (``.png``, ``.svg``, ``.pdf``).

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        OptionError: a plan of no attention.
        ImportError: matplotlib is not installed.
    """
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    from .picture import Picture

    if not plan.layers:
        raise OptionError("plan", "a plan for at least one attention", "none", "make one with make_plan")
    heads = max(layer.spec.kv_heads for layer in plan)
    labels, where = _labels([layer.spec.name for layer in plan])
    wide, high = _cell(heads, 4.0, 0.2, 0.42), _cell(len(plan), 4.0, 0.17, 0.42)
    side = max(wide * heads, 1.5)
    tall = max(high * len(plan), 1.0)
    figure = Picture((2 * side + 3.9 + _margin(labels), tall + 2.0), layout="constrained")
    *maps, bars = figure.subplots(1, 3, sharey=True, width_ratios=[side, side, 2.2])
    most = max(dim for layer in plan for kind in KINDS for dim in layer.spec.dims(kind))
    gone = any(layer.heads for layer in plan)
    word = "key head" if any(layer.spec.heads > layer.spec.kv_heads for layer in plan) else "head"
    for panel, kind in zip(maps, KINDS, strict=True):
        cells: _Cells = [
            [len(layer.kept(kind, key)) if key in layer.kept_keys else nan for key in range(layer.spec.kv_heads)]
            for layer in plan
        ]
        image = _heat(panel, cells, labels, word, side, vmin=0, vmax=most)
        for row, layer in enumerate(plan):
            for key in set(range(layer.spec.kv_heads)) - set(layer.kept_keys):
                _cross(panel, row, key)
        if wide >= 0.26:
            _write(panel, image, cells)
        panel.set_title(f"{kind} channels kept", fontsize=MEDIUM)
    maps[0].set_ylabel("layer", fontsize=MEDIUM)
    scale = figure.colorbar(image, ax=maps, pad=0.01, fraction=0.15 / side, aspect=tall / 0.15, label="channels kept")
    scale.locator = MaxNLocator(8, integer=True)
    _small(scale)
    shown = []
    styles: dict[Kind, dict[str, Any]] = {"qk": {"facecolor": DARK}, "vo": {"facecolor": LIGHT, "hatch": "////"}}
    bases: tuple[tuple[Kind, float, Projection], ...] = (("qk", -0.2, "q"), ("vo", 0.2, "v"))
    for kind, shift, p in bases:
        style = styles[kind]
        rows = [row + shift for row in range(len(plan))]
        shares = [100 * layer.fraction(p) for layer in plan]
        bars.barh(rows, shares, height=0.38, edgecolor=DARK, linewidth=0.4, **style)
        total = 100 * plan.fraction(p)
        bars.axvline(total, color="0.35", linewidth=1.1, linestyle="-" if kind == "qk" else ":", zorder=0)
        line = "solid" if kind == "qk" else "dotted"
        shown.append(Patch(edgecolor=DARK, label=f"{_NAME[kind]} ({line} line: all layers, {total:.1f}%)", **style))
    bars.set_xlim(0, 100)
    _bare(bars)
    bars.set_title("weights removed", fontsize=MEDIUM)
    bars.set_xlabel("% of the layer's", fontsize=MEDIUM)
    if gone:
        shown.append(Patch(facecolor="white", edgecolor="0.55", hatch=HATCH, label="head removed"))
    figure.legend(handles=shown, loc="outside lower center", ncols=len(shown), fontsize=MEDIUM, frameon=False)
    before, after = (sum(spec.parameters for spec in specs) for specs in (plan.specs, plan.after))
    _title(figure, f"Attention parameters: {before:,} → {after:,} (x {after / before:.3f})", where)
    return _saved(figure, path)


def scores(by_name: Mapping[str, Scores], *, path: _Path = None) -> Any:
    """Importance by layer and head: the mean score of a head's qk channels, of its vo channels, and of the head.

    One scale of colours serves qk and vo, so that they can be compared; heads have their own. It is logarithmic where
    scores are positive and span a factor of 10 or more.

    Args:
        by_name: what :func:`attnprune.score_attention` gave, or a scorer.
        path: also written there.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        OptionError: no scores.
        ImportError: matplotlib is not installed.
    """
    from .picture import Picture

    if not by_name:
        raise OptionError("scores", "scores of at least one attention", "none", "pass what score_attention gave")
    labels, where = _labels(list(by_name))
    heads = max(len(one.head) for one in by_name.values())
    wide, high = _cell(heads, 3.2, 0.2, 0.42), _cell(len(by_name), 4.0, 0.17, 0.42)
    side = max(wide * heads, 1.7)
    figure = Picture((3 * side + 1.1 + _margin(labels), max(high * len(by_name), 1.0) + 1.9), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    rows: dict[str, _Cells] = {
        f"{kind} channels, mean": [[_mean(row) for row in one.of(kind).tolist()] for one in by_name.values()]
        for kind in KINDS
    }
    rows["whole heads"] = [one.head.tolist() for one in by_name.values()]
    *pair, whole = rows.values()
    norms = [_norm([*pair[0], *pair[1]])] * 2 + [_norm(whole)]
    images = [
        _heat(panel, cells, labels, "head", side, norm=norm)
        for panel, cells, norm in zip(panels, rows.values(), norms, strict=True)
    ]
    for panel, what in zip(panels, rows, strict=True):
        panel.set_title(what, fontsize=MEDIUM)
    _scale(figure, panels[:2], images[0], "importance of a channel")
    _scale(figure, panels[2:], images[2], "importance of a head")
    panels[0].set_ylabel("layer", fontsize=MEDIUM)
    _title(figure, "Importance by layer and head: the lowest goes first", where)
    return _saved(figure, path)


def channels(scores: Scores, *, name: str = "", path: _Path = None) -> Any:
    """Importance of every channel of one attention: a row per head, one scale of colours for qk and vo.

    Args:
        scores: those of one attention (:meth:`attnprune.Scores.plot` is the same).
        name: the attention's, for the title.
        path: also written there.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from .picture import Picture

    keys = len(scores.qk)
    labels = [str(key) for key in range(keys)]
    wholes = scores.head.view(keys, -1).sum(1) if len(scores.head) % keys == 0 else scores.head[:0]
    sides = [max(_cell(scores.of(kind).shape[1], 3.6, 0.05, 0.42) * scores.of(kind).shape[1], 1.7) for kind in KINDS]
    high = _cell(len(labels), 3.2, 0.17, 0.42)
    figure = Picture((sum(sides) + 2.6, max(high * len(labels), 1.0) + 1.9), layout="constrained")
    *maps, bars = figure.subplots(1, 3, sharey=True, width_ratios=[*sides, 1.4])
    cells = {kind: scores.of(kind).tolist() for kind in KINDS}
    norm = _norm([*cells["qk"], *cells["vo"]])
    for panel, kind, side in zip(maps, KINDS, sides, strict=True):
        image = _heat(panel, cells[kind], labels, "channel", side, norm=norm)
        panel.set_title(f"{kind} channels", fontsize=MEDIUM)
    _scale(figure, maps, image, "importance of a channel")
    maps[0].set_ylabel("head" if keys == len(scores.head) else "key head", fontsize=MEDIUM)
    bars.barh(range(len(wholes)), wholes.tolist(), height=0.7, color=DARK)
    bars.set_title("whole heads", fontsize=MEDIUM)
    bars.set_xlabel("importance", fontsize=MEDIUM)
    _bare(bars)
    bars.locator_params(axis="x", nbins=3)
    _title(figure, "Importance by channel: the lowest goes first", name)
    return _saved(figure, path)


def energy(
    curves: Mapping[str, Mapping[Kind, Sequence[Tensor]]], *, target_error: float | None = None, path: _Path = None
) -> Any:
    """Energy lost by rank: a panel per attention, a line per head, solid for qk and dashed for vo.

    Args:
        curves: what :func:`attnprune.energy_curves` gave.
        target_error: draws a line at this share.
        path: also written there.

    Returns:
        The ``matplotlib.figure.Figure``; of 12 layers it fits a page.

    Raises:
        OptionError: no curves.
        ImportError: matplotlib is not installed.
    """
    from matplotlib.lines import Line2D

    from .picture import Picture

    if not curves:
        raise OptionError("curves", "curves of at least one attention", "none", "pass what energy_curves gave")
    labels, where = _labels(list(curves))
    columns = ACROSS[1] if len(curves) > 12 else 3 if len(curves) in (3, 5, 6, 9) else min(len(curves), ACROSS[0])
    rows = ceil(len(curves) / columns)
    figure = Picture((max(0.8 + 2.1 * columns, 5.0), 1.2 + 1.7 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    styles: dict[Kind, dict[str, Any]] = {"qk": {"color": DARK}, "vo": {"color": MIDDLE, "linestyle": (0, (4, 1.2))}}
    for panel, label, by_kind in zip(grid, labels, curves.values(), strict=False):
        for kind in KINDS:
            _curves(panel, by_kind[kind], styles[kind])
        if target_error is not None:
            panel.axhline(target_error, color="0.35", linewidth=1.0, linestyle=":")
        panel.set_title(label if "." in label else f"layer {label}", fontsize=MEDIUM)
    for empty in grid[len(curves) :]:
        empty.remove()
    for place, panel in enumerate(grid[: len(curves)]):
        if place + columns >= len(curves):  # the foot of a column
            panel.tick_params(labelbottom=True)
            panel.set_xlabel("directions kept", fontsize=MEDIUM)
        if place % columns == 0:
            panel.set_ylabel("energy lost", fontsize=MEDIUM)
    told: dict[Kind, str] = {"qk": "of the logits, when qk loses directions", "vo": "of the output, when vo does"}
    shown = [Line2D([], [], label=told[kind], **styles[kind]) for kind in KINDS]
    if target_error is not None:
        shown.append(Line2D([], [], color="0.35", linestyle=":", label=f"target_error={target_error:g}"))
    figure.legend(handles=shown, loc="outside lower center", ncols=2, fontsize=MEDIUM, frameon=False)
    _title(figure, "Energy lost by rank, a line for each head", where)
    return _saved(figure, path)


def _curves(panel: Any, curves: Sequence[Tensor], style: Mapping[str, Any]) -> None:
    for curve in curves:
        panel.semilogy(range(len(curve)), curve.clamp_min(FLOOR).tolist(), linewidth=0.9, **style)
    panel.set_ylim(FLOOR, 1.5)
    panel.set_xlim(0)
    panel.grid(color="0.9", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=SMALL)


def _heat(panel: Any, cells: _Cells, labels: Sequence[str], across: str, side: float, **scale: Any) -> Any:
    """A grid of cells, ``side`` inches wide, a row per label; places that are not finite stay white."""
    columns = max(len(row) for row in cells)
    wide = side / columns
    full = [[value if isfinite(value) else nan for value in row] + [nan] * (columns - len(row)) for row in cells]
    image = panel.imshow(full, aspect="auto", cmap=COLOURS, interpolation="nearest", **scale)
    if wide >= 0.09:
        panel.set_xticks([edge - 0.5 for edge in range(1, columns)], minor=True)
    panel.set_yticks([edge - 0.5 for edge in range(1, len(cells))], minor=True)
    panel.grid(which="minor", color="white", linewidth=0.8)
    step = next(step for step in (1, 2, 4, 8, 16, 32) if step * wide >= 0.19 or step == 32)
    panel.set_xticks(range(0, columns, step))
    panel.set_yticks(range(len(labels)), labels)
    panel.tick_params(which="both", length=0, labelsize=SMALL)
    panel.set_xlabel(across, fontsize=MEDIUM)
    panel.spines[:].set_visible(False)
    return image


def _write(panel: Any, image: Any, cells: _Cells) -> None:
    """The number of every cell, dark on light and light on dark."""
    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            if isfinite(value):
                light = image.norm(value) > 0.5
                panel.text(
                    column, row, f"{value:.0f}", ha="center", va="center", fontsize=SMALL,
                    color="black" if light else "white",
                )  # fmt: skip


def _cross(panel: Any, row: int, column: int) -> None:
    from matplotlib.patches import Rectangle

    place = (column - 0.46, row - 0.46)
    panel.add_patch(Rectangle(place, 0.92, 0.92, facecolor="white", edgecolor="0.55", hatch=HATCH, linewidth=0))


def _norm(cells: _Cells) -> Any:
    """Logarithmic where scores span a factor of 10 or more."""
    from matplotlib.colors import LogNorm, Normalize

    found = [value for row in cells for value in row if isfinite(value)] or [0.0]
    low, high = min(found), max(found)
    return LogNorm(low, high) if low > 0 and high >= 10 * low else Normalize(low, high)


def _bare(bars: Any) -> None:
    """Bars beside a heat map: its rows need no ticks."""
    bars.tick_params(labelsize=SMALL, length=2)
    bars.tick_params(axis="y", which="both", length=0)
    bars.spines[["top", "right"]].set_visible(False)


def _title(figure: Any, title: str, where: str) -> None:
    """What is shown, and below it of which modules."""
    room = int(figure.get_figwidth() * 12)
    figure.suptitle(f"{title}\n{_short(where, room)}" if where else title, fontsize=LARGE)


def _scale(figure: Any, panels: Any, image: Any, what: str) -> None:
    """A colour bar below panels, with three numbers: few enough for any scale and width."""
    from matplotlib.colors import LogNorm

    told = f"{what} (log scale)" if isinstance(image.norm, LogNorm) else what
    bar = figure.colorbar(image, ax=list(panels), location="bottom", pad=0.02, fraction=0.06, aspect=22 * len(panels))
    places = [float(image.norm.inverse(share)) for share in (0.1, 0.5, 0.9)]
    bar.set_ticks(places, labels=[f"{place:.2g}" for place in places])
    bar.minorticks_off()
    bar.set_label(told, fontsize=MEDIUM)
    _small(bar)


def _small(scale: Any) -> None:
    """A colour bar's text in the size of the rest."""
    scale.ax.tick_params(labelsize=SMALL, length=2)
    scale.ax.yaxis.label.set_size(MEDIUM)
    scale.outline.set_visible(False)


def _mean(row: Sequence[float]) -> float:
    real = [value for value in row if isfinite(value)]
    return sum(real) / len(real) if real else nan


def _cell(count: int, room: float, least: float, most: float) -> float:
    """The side of a cell in inches, if there are ``count`` of them."""
    return min(max(room / count, least), most)


def _labels(names: Sequence[str]) -> tuple[list[str], str]:
    """What tells the names apart, and what they have in common.

    >>> _labels(["encoder.layers.0.attention", "encoder.layers.1.attention"])
    (['0', '1'], 'encoder.layers.*.attention')
    """
    parts = [name.split(".") for name in names]
    shortest = min(map(len, parts))
    if len(parts) == 1:
        return [_short(names[0], 36) or "(model)"], ""
    start = next((i for i in range(shortest) if len({part[i] for part in parts}) > 1), shortest - 1)
    ends = range(1, shortest - start + 1)
    stop = next((i - 1 for i in ends if len({part[-i] for part in parts}) > 1), shortest - start)
    middle = [".".join(part[start : len(part) - stop]) for part in parts]
    common = ".".join([*parts[0][:start], "*", *parts[0][len(parts[0]) - stop :]])
    return [_short(one, 36) or "(model)" for one in middle], common if common != "*" else ""


def _margin(labels: Sequence[str]) -> float:
    """Inches that labels take."""
    return 0.3 + 0.055 * max(map(len, labels))


def _short(name: str, room: int) -> str:
    """The end of a long name."""
    return name if len(name) <= room else "…" + name[1 - room :]


def _saved(figure: Any, path: _Path) -> Any:
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
