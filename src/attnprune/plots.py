"""Pictures; needs matplotlib (``pip install attnprune[plot]``), which is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .errors import OptionError
from .spec import KINDS, Kind

FLOOR = 1e-6  # shares of energy below this are drawn here


def energy(curves: Mapping[str, Mapping[Kind, Sequence[Tensor]]], *, target_error: float | None = None) -> Any:
    """Energy lost by rank: a row of panels per kind, a panel per attention, a line per head.

    Args:
        curves: what :func:`attnprune.energy_curves` gave.
        target_error: draws a line at this share.

    Returns:
        The ``matplotlib.figure.Figure``; save it with ``figure.savefig(path)``.

    Raises:
        OptionError: no curves.
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    if not curves:
        raise OptionError("curves", "curves of at least one attention", "none", "pass what energy_curves gave")
    columns = len(curves)
    figure = Figure(figsize=(1.2 + 2.1 * columns, 4.6), layout="constrained")
    axes = figure.subplots(2, columns, sharey=True, squeeze=False)
    for row, kind in zip(axes, KINDS, strict=True):
        for panel, (name, by_kind) in zip(row, curves.items(), strict=True):
            for curve in by_kind[kind]:
                kept = range(len(curve))
                panel.semilogy(kept, curve.clamp_min(FLOOR).tolist(), linewidth=0.9, alpha=0.8)
            if target_error is not None:
                panel.axhline(target_error, color="0.4", linewidth=0.8, linestyle="--")
            panel.set_ylim(FLOOR, 1.5)
            panel.set_xlim(0)
            panel.grid(color="0.9", linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
            if kind == "qk":
                panel.set_title(_short(name), fontsize=8)
            else:
                panel.set_xlabel("directions kept", fontsize=8)
            panel.tick_params(labelsize=7)
        row[0].set_ylabel("logits lost (qk)" if kind == "qk" else "output lost (vo)", fontsize=8)
    figure.suptitle("Share of energy lost by rank, a line per head", fontsize=9)
    return figure


def _short(name: str) -> str:
    """The end of a long name."""
    return name if len(name) <= 26 else "…" + name[-25:]
