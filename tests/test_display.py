"""What a notebook shows of our values: tables, and pictures once, without pyplot and its backends."""

from __future__ import annotations

import re
import sys

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import attnprune
from attnprune import AttentionSpec, Plan, Report, Scores
from attnprune.values.layer_plan import LayerPlan

SPEC = AttentionSpec.of("<attn>", heads=2, head_dim=4, d_model=8)
PLAN = Plan((LayerPlan(SPEC, qk=((0,), (2, 3))), LayerPlan(AttentionSpec.of("b", heads=2, head_dim=4, d_model=8))))


def cells(page: str) -> list[list[str]]:
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]


def layers(count: int = 2) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 16, batch_first=True)
    return nn.TransformerEncoder(layer, count, enable_nested_tensor=False).eval()


def test_a_plan_is_a_table_of_what_goes() -> None:
    head, first, second, total = cells(PLAN._repr_html_())
    assert head == ["attention", "heads", "qk", "vo", "q", "k", "v", "o"]
    assert first == ["&lt;attn&gt;", "2", "4 -&gt; 2..3", "4", "-37.5%", "-37.5%", "-0.0%", "-0.0%"]
    assert second == ["b", "2", "4", "4", *["-0.0%"] * 4]
    assert total == ["removes", "", "", "", "-18.8%", "-18.8%", "-0.0%", "-0.0%"]
    before, after = (sum(spec.parameters for spec in specs) for specs in (PLAN.specs, PLAN.after))
    assert f"attention parameters: {before:,} -&gt; {after:,} (x {after / before:.3f})" in PLAN._repr_html_()


def test_a_plan_says_what_was_asked_and_how() -> None:
    model = layers()
    plan = attnprune.make_plan(model, (0.5, 0.5, 0.25, 0.25), scope="local")
    assert cells(plan._repr_html_())[-1] == ["asked", "", "", "", "-50.0%", "-50.0%", "-25.0%", "-25.0%"]
    assert "how: channel, local, uniform heads, magnitude, fixed split" in plan._repr_html_()
    split = attnprune.make_plan(model, 0.5, split="auto", scorer="random")._repr_html_()
    assert cells(split)[-1][0] == "removes"
    assert "asked: -50.0% of q, k, v and o together, wherever it costs least" in split
    costs = attnprune.make_plan(model, target_params=0.9)._repr_html_()
    assert "budget: model parameters x 0.900, counted x 0." in costs


def test_a_plan_of_nothing_is_shown() -> None:
    assert cells(Plan(())._repr_html_())[-1] == ["removes", "", "", "", *["-0.0%"] * 4]


def test_a_report_is_its_plan_and_more() -> None:
    model = layers()
    report = attnprune.prune_attention(model, 0.5, example_inputs=torch.randn(1, 5, 16))
    ours, theirs = cells(report._repr_html_()), cells(report.plan._repr_html_())
    assert [row[1:] for row in ours] == [row[1:] for row in theirs]
    assert ours[-2][0] == "achieved"
    assert "multiply-adds: " in report._repr_html_()


def test_scores_are_a_table_of_heads() -> None:
    qk = torch.tensor([[1.0, 2, 6], [0.5, 0.25, torch.inf]])  # the second head has two channels
    head, first, second = cells(Scores(qk, torch.ones(2, 4), torch.tensor([3.0, 1234.5]))._repr_html_())
    three = [f"{kind} channels, {what}" for kind in ("qk", "vo") for what in ("least", "mean", "most")]
    assert head == ["head", *three, "whole head"]
    assert first == ["0", "1", "3", "6", "1", "1", "1", "3"]
    assert second == ["1", "0.25", "0.375", "0.5", "1", "1", "1", "1.23e+03"]
    head, *rows = cells(Scores(torch.ones(2, 4), torch.ones(2, 4), torch.arange(4.0))._repr_html_())
    assert (head[0], head[-1], [row[-1] for row in rows]) == ("key head", "its heads", ["0, 1", "2, 3"])


def test_scores_are_one_line_where_many_are_shown() -> None:
    found = attnprune.score_attention(layers(), "magnitude")
    for one in found.values():
        assert re.fullmatch(
            r"Scores\(qk: 4 x 4 from \S+ to \S+; vo: 4 x 4 from \S+ to \S+; head: 4 from .*\)", repr(one)
        )
    blank = Scores(torch.full((1, 2), torch.nan), torch.ones(1, 0), torch.ones(3))
    assert repr(blank) == "Scores(qk: 1 x 2; vo: 1 x 0; head: 3 from 1 to 1)"
    assert cells(blank._repr_html_())[1] == ["0", *["-"] * 6, "1, 1, 1"]


@pytest.fixture(scope="module")
def report() -> Report:
    return attnprune.prune_attention(layers(1), 0.5)


def test_a_picture_is_what_its_cell_returns(report: Report) -> None:
    formatters = pytest.importorskip("IPython.core.formatters")
    data, _ = formatters.DisplayFormatter().format(report.plot())
    assert data.keys() == {"text/plain", "image/png"}
    assert data["image/png"].startswith(b"\x89PNG")
    page, _ = formatters.DisplayFormatter().format(report.plan)
    assert "<table>" in page["text/html"]


def test_where_pyplot_draws_inline_the_picture_is_still_one(report: Report) -> None:
    formatters, pylab = (pytest.importorskip(f"IPython.core.{name}") for name in ("formatters", "pylabtools"))
    display = formatters.DisplayFormatter()
    png = display.formatters["image/png"]
    png.for_type(Figure, lambda figure: pylab.print_figure(figure, "png"))  # as matplotlib_inline does
    data, _ = display.format(report.plot())
    assert data.keys() == {"text/plain", "image/png"}


def test_no_backend_is_chosen_and_pyplot_stays_out(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    before = matplotlib.get_backend(auto_select=False)
    figure = report.plot()
    assert isinstance(figure, Figure)
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
    assert "matplotlib.pyplot" not in sys.modules
    assert matplotlib.get_backend(auto_select=False) == before
