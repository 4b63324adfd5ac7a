"""Pictures show what the values say, and nothing in them overlaps or is cut off."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from attnprune import (
    AttentionSpec,
    Plan,
    Ratios,
    Rules,
    Scores,
    allocate,
    calibrate,
    energy_curves,
    find_attention,
    make_plan,
    prune_attention,
    score_attention,
)
from attnprune.errors import CalibrationError, OptionError
from attnprune.report import plots
from attnprune.values.layer_plan import make_layer
from attnprune.values.layout import KINDS

from .conformance import fresh
from .test_calibrate import batches

GALLERY = Path(__file__).parents[1] / "docs" / "_static" / "gallery"
SHAPES = {"small": (2, 4, 8), "one": (1, 4, 8), "base": (12, 12, 64), "deep": (48, 25, 64)}
NAME = "audio_spectrogram_transformer.encoder.layers.{}.attention"


def specs(layers: int, heads: int, dim: int) -> list[AttentionSpec]:
    return [AttentionSpec.of(NAME.format(i), heads=heads, head_dim=dim, d_model=heads * dim) for i in range(layers)]


def plan(shape: str, heads_too: bool = True) -> Plan:
    """A ragged plan of random numbers."""
    chance = random.Random(0)
    layers = []
    for spec in specs(*SHAPES[shape]):
        gone = {head for head in range(1, spec.heads) if heads_too and chance.random() < 0.2}
        removed: Any = {
            kind: tuple(tuple(chance.sample(range(dim), chance.randrange(dim))) for dim in spec.dims(kind))
            for kind in KINDS
        }
        layers.append(make_layer(spec, gone, removed))
    return Plan(tuple(layers))


def scores(shape: str, spread: float = 3) -> dict[str, Scores]:
    generator = torch.Generator().manual_seed(0)

    def positive(*size: int) -> torch.Tensor:
        return (spread * torch.randn(size, generator=generator)).exp()

    return {
        spec.name: Scores(positive(spec.heads, spec.qk_dim), positive(spec.heads, spec.vo_dim), positive(spec.heads))
        for spec in specs(*SHAPES[shape])
    }


def check_readable(figure: Any) -> None:
    """No text is smaller than 7 points, cut off, or in the way of another."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for panel in figure.axes:
        for axis in (panel.xaxis, panel.yaxis):
            ends = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            inside = [tick for tick in ticks if ends[0] <= tick.get_loc() <= ends[1]]
            texts += [axis.label, *(label for tick in inside for label in (tick.label1, tick.label2))]
        texts += [panel.title, *panel.texts]
    boxes = []
    for text in texts:
        if text.get_visible() and text.get_text():
            assert text.get_fontsize() >= plots.SMALL, text
            boxes.append((text, text.get_window_extent(renderer).extents.tolist()))
    left, bottom, right, top = figure.bbox.extents.tolist()
    for text, (x0, y0, x1, y1) in boxes:
        assert left - 1 <= x0 <= x1 <= right + 1, text
        assert bottom - 1 <= y0 <= y1 <= top + 1, text
    boxes.sort(key=lambda one: one[1][1])
    for place, (one, (x0, y0, x1, y1)) in enumerate(boxes):
        for other, (other_x0, other_y0, other_x1, other_y1) in boxes[place + 1 :]:
            if other_y0 >= y1:
                break  # and so are all that follow
            across = min(x1, other_x1) - max(x0, other_x0)
            assert across <= 0.5 or min(y1, other_y1) - max(y0, other_y0) <= 1.5, (one, other)


@pytest.mark.covering(1)
@pytest.mark.parametrize("shape", ["small", "one", "base"])
@pytest.mark.parametrize("picture", ["kept", "scores", "channels", "energy"])
def test_every_picture_is_readable(picture: str, shape: str) -> None:
    check_readable(draw(picture, shape))


@pytest.mark.parametrize("spread", [0.0, pytest.param(0.05, marks=pytest.mark.long), 0.8])
def test_scales_of_any_width_are_readable(spread: float) -> None:
    by_name = scores("small", spread)
    check_readable(plots.scores(by_name))
    check_readable(next(iter(by_name.values())).plot())


@pytest.mark.long
@pytest.mark.parametrize("picture", ["kept", "scores"])
def test_pictures_of_deep_models_are_readable(picture: str) -> None:
    check_readable(draw(picture, "deep"))


def draw(picture: str, shape: str) -> Any:
    if picture == "kept":
        return plots.kept(plan(shape))
    by_name = scores(shape)
    if picture == "scores":
        return plots.scores(by_name)
    if picture == "channels":
        name = next(iter(by_name))
        return by_name[name].plot(name=name)
    layers, heads, dim = SHAPES[shape]
    curve = torch.linspace(1, 0, dim + 1)
    return plots.energy({spec.name: {kind: [curve] * heads for kind in KINDS} for spec in specs(layers, heads, dim)})


def test_kept_says_what_the_plan_does() -> None:
    asked = plan("base")
    figure = plots.kept(asked)
    qk, vo, bars, _ = figure.axes
    for panel, kind in ((qk, "qk"), (vo, "vo")):
        cells = panel.images[0].get_array().filled(-1)
        written = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in panel.texts}
        for row, layer in enumerate(asked):
            assert [head for head in range(12) if cells[row, head] == -1] == list(layer.heads)
            for head, dim in zip(layer.kept_heads, layer.after.dims(kind), strict=True):
                assert cells[row, head] == dim
                assert written[row, head] == str(dim)
        assert len(panel.patches) == sum(len(layer.heads) for layer in asked)
        assert len(written) == sum(len(layer.kept_heads) for layer in asked)
    lengths = [bar.get_width() for bar in bars.patches]
    expected = [100 * layer.fraction(p) for p in "qv" for layer in asked]
    torch.testing.assert_close(torch.tensor(lengths).double(), torch.tensor(expected).double())
    assert f"{100 * asked.fraction('q'):.1f}%" in figure.legends[0].get_texts()[0].get_text()
    assert f"{sum(spec.parameters for spec in asked.after):,}" in figure._suptitle.get_text()
    assert [tick.get_text() for tick in qk.get_yticklabels()] == [str(i) for i in range(12)]


def test_scores_are_means_and_those_that_are_missing_stay_out() -> None:
    qk = torch.tensor([[1.0, 3.0], [5.0, torch.inf]])
    one = Scores(qk, torch.ones(2, 3), torch.tensor([-1.0, 2.0]))
    figure = plots.scores({"a.0": one, "a.1": one})
    assert figure.axes[0].images[0].get_array().tolist() == [[2, 5], [2, 5]]
    assert figure.axes[2].images[0].get_array().tolist() == [[-1, 2], [-1, 2]]
    assert {figure.axes[place].images[0].get_clim() for place in (0, 1)} == {(1, 5)}  # one scale for qk and vo
    assert [bar.get_xlabel() for bar in figure.axes[3:]] == ["importance of a channel", "importance of a head"]
    channels = one.plot()
    assert {panel.images[0].get_clim() for panel in channels.axes[:2]} == {(1, 5)}
    assert channels.axes[0].images[0].get_array().tolist() == [[1, 3], [5, None]]
    assert [bar.get_width() for bar in channels.axes[2].patches] == [-1, 2]
    FigureCanvasAgg(channels).draw()


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_report_draws_itself_into_a_file(suffix: str, tmp_path: Path) -> None:
    report = prune_attention(fresh("ViT", 0), 0.5)
    report.plot(tmp_path / f"report.{suffix}")
    start = (tmp_path / f"report.{suffix}").read_bytes()[:5]
    assert start == {"png": b"\x89PNG\r", "svg": b"<?xml", "pdf": b"%PDF-"}[suffix]


def test_grey_print_keeps_the_order_of_colours() -> None:
    from matplotlib import colormaps

    rgb = torch.tensor(colormaps[plots.COLOURS](range(256)))[:, :3]
    grey = rgb @ torch.tensor([0.299, 0.587, 0.114], dtype=rgb.dtype)
    assert bool((grey.diff() > -1e-3).all())
    assert grey[-1] - grey[0] > 0.6


@pytest.mark.parametrize(
    ("names", "labels", "common"),
    [
        (["encoder.layers.0.attention", "encoder.layers.1.attention"], ["0", "1"], "encoder.layers.*.attention"),
        (["a.self_attn", "b.0.self_attn"], ["a", "b.0"], "*.self_attn"),
        (["0", "1"], ["0", "1"], ""),
        ([""], ["(model)"], ""),
        (["x.y"], ["x.y"], ""),
        (["", "cross"], ["(model)", "cross"], ""),
        (["a.b", "a.b.c"], ["b", "b.c"], "a.*"),
    ],
)
def test_labels_tell_names_apart(names: list[str], labels: list[str], common: str) -> None:
    assert plots._labels(names) == (labels, common)


@pytest.mark.parametrize("scorer", ["magnitude", "gate", "random", "auto"])
def test_score_attention_gives_what_make_plan_goes_by(scorer: str) -> None:
    model = fresh("ViT", 0)
    rules = Rules(heads="ragged", split="auto")
    found = score_attention(model, scorer, basis="channels", split="auto", data=batches("ViT", 0, range(3)), seed=3)
    by_hand = allocate(find_attention(model), found, Ratios.parse(0.5), rules)
    plan = make_plan(model, 0.5, heads="ragged", split="auto", scorer=scorer, basis="channels", seed=3,
                     data=batches("ViT", 0, range(3)))  # fmt: skip
    assert [(one.qk, one.vo) for one in by_hand] == [(one.qk, one.vo) for one in plan]


def test_scores_of_rotated_heads_fall_with_energy() -> None:
    model = fresh("ViT", 0)
    found = score_attention(model, data=batches("ViT", 0, range(3)), include="*.0.*")
    assert len(found) == 1
    kept = make_plan(model, 0.5, data=batches("ViT", 0, range(3)), include="*.0.*").layers[0]
    one = found[kept.spec.name]
    for head in range(kept.spec.heads):
        gone = set(kept.qk[head])
        assert max(one.qk[head, list(gone)]) <= min(one.qk[head, [c for c in range(6) if c not in gone]])


@pytest.mark.parametrize("basis", ["rotated", "channels"])
def test_energy_curves_fall_from_one_to_zero(basis: str) -> None:
    model = fresh("ViT", 0)
    calibration = calibrate(model, batches("ViT", 0, range(3)), progress=False)
    for given in (None, calibration):
        for by_kind in energy_curves(model, given, basis=basis).values():
            for curve in (*by_kind["qk"], *by_kind["vo"]):
                assert (float(curve[0]), float(curve[-1]), len(curve)) == (1.0, 0.0, 7)
                assert bool((curve.diff() <= 0).all())


def test_a_panel_per_attention_and_a_line_per_kind_and_head(tmp_path: Path) -> None:
    curves = energy_curves(fresh("ViT", 0))
    figure = plots.energy(curves, target_error=0.01, path=tmp_path / "energy.png")
    assert len(figure.axes) == len(curves)
    assert all(len(panel.lines) == 2 * 4 + 1 for panel in figure.axes)
    name = next(iter(curves))
    for kind, place in (("qk", 2), ("vo", 4 + 2)):
        drawn = torch.tensor(figure.axes[0].lines[place].get_ydata())
        assert torch.allclose(drawn, curves[name][kind][2].clamp_min(plots.FLOOR))
    assert (tmp_path / "energy.png").stat().st_size > 10_000


def test_refusals() -> None:
    model = fresh("ViT", 0)
    with pytest.raises(OptionError, match="curves"):
        plots.energy({})
    with pytest.raises(OptionError, match="plan"):
        plots.kept(Plan(()))
    with pytest.raises(OptionError, match="scores"):
        plots.scores({})
    with pytest.raises(OptionError, match="basis"):
        energy_curves(model, basis="eigen")
    with pytest.raises(OptionError, match="split"):
        score_attention(model, split="maybe")  # type: ignore[arg-type]
    other = calibrate(fresh("ViT", 1), batches("ViT", 1, range(1)), progress=False)
    with pytest.raises(CalibrationError):
        energy_curves(model, other)
    with pytest.raises(CalibrationError):
        score_attention(model, calibration=other)


def test_the_gallery_is_small_and_complete() -> None:
    page = (GALLERY.parents[1] / "how_to" / "gallery.rst").read_text()
    shown = {line.split("gallery/")[1] for line in page.splitlines() if line.startswith(".. figure::")}
    assert shown == {path.name for path in GALLERY.iterdir()}
    assert all(path.stat().st_size < 60_000 for path in GALLERY.iterdir())
