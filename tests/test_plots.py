"""Pictures show what the curves say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attnprune import calibrate, energy_curves, plots
from attnprune.errors import CalibrationError, OptionError

from .conformance import fresh
from .test_calibrate import batches


@pytest.mark.parametrize("basis", ["rotated", "channels"])
def test_energy_curves_fall_from_one_to_zero(basis: str) -> None:
    model = fresh("ViT", 0)
    calibration = calibrate(model, batches("ViT", 0, range(3)), progress=False)
    for given in (None, calibration):
        for by_kind in energy_curves(model, given, basis=basis).values():
            for curve in (*by_kind["qk"], *by_kind["vo"]):
                assert (float(curve[0]), float(curve[-1]), len(curve)) == (1.0, 0.0, 7)
                assert bool((curve.diff() <= 0).all())


def test_a_panel_per_kind_and_attention_a_line_per_head(tmp_path: Path) -> None:
    curves = energy_curves(fresh("ViT", 0))
    figure = plots.energy(curves, target_error=0.01)
    assert len(figure.axes) == 2 * len(curves)
    assert all(len(panel.lines) == 4 + 1 for panel in figure.axes)
    qk = figure.axes[0].lines[2]
    name = next(iter(curves))
    assert torch.allclose(torch.tensor(qk.get_ydata()), curves[name]["qk"][2].clamp_min(plots.FLOOR))
    figure.savefig(tmp_path / "energy.png")
    assert (tmp_path / "energy.png").stat().st_size > 10_000


def test_refusals() -> None:
    model = fresh("ViT", 0)
    with pytest.raises(OptionError, match="curves"):
        plots.energy({})
    with pytest.raises(OptionError, match="basis"):
        energy_curves(model, basis="eigen")
    other = calibrate(fresh("ViT", 2), batches("ViT", 2, range(1)), progress=False)
    with pytest.raises(CalibrationError):
        energy_curves(model, other)
