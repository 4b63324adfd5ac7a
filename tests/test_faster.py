"""``granularity="auto"`` and ``preset="fast"``: what is faster here by measurement, and never a slower model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import attnprune
from attnprune.cost.latency.multiples import Share
from attnprune.errors import LatencyError, OptionError
from attnprune.planning import faster
from attnprune.values.request import Request


def encoder(heads: int = 4) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, heads, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


X = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))


class Machine:
    """A machine on which channels and heads take so much of the dense model's time."""

    def __init__(self, patch: pytest.MonkeyPatch, channels: float, heads: float, last: float = 0.0) -> None:
        self.times, self.last, self.seen = {"channel": channels, "head": heads}, last, list[str]()
        patch.setattr(faster, "_time", self)
        patch.setattr(faster, "measure_multiples", self.multiples)

    @staticmethod
    def multiples(*_: Any) -> dict[int, Share]:
        """Heads of 16: even numbers of channels are faster."""
        return {1: Share(1.2, 0.0), 2: Share(1.0, 0.0), 4: Share(1.0, 0.0)}

    def __call__(self, model: Any, views: Any, plan: attnprune.Plan, inputs: Any, seconds: float = 0.0) -> float:
        assert torch.equal(inputs, X)
        layers = plan.layers
        gone = "head" if layers[0].heads else "channel"
        assert all(layer.qk == layers[0].qk for layer in layers) or len(self.seen) == 2, "the same from every layer"
        self.seen.append(gone)
        return self.last if len(self.seen) > 2 and self.last else self.times[gone]


@pytest.mark.parametrize(
    ("channels", "heads", "wanted"),
    [(0.9, 0.7, "head"), (0.7, 0.9, "channel"), (0.80, 0.79, "channel"), (1.1, 0.9, "head")],
    ids=["heads gain", "channels gain", "alike", "channels are slower"],
)
@pytest.mark.parametrize("ratio", [0.5, {"qk": 0.25, "vo": 0.5}], ids=str)
def test_what_is_faster_goes(
    channels: float, heads: float, wanted: str, ratio: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, channels, heads)
    plan = attnprune.make_plan(encoder(), ratio, preset="fast", example_inputs=X)
    assert plan.asked is not None
    assert plan.asked.granularity == wanted
    assert machine.seen == ["channel", "head", wanted], "both, and what came of it"
    assert plan.asked.round_to == (1 if wanted == "head" else 2), "whole heads are not rounded"
    again = attnprune.make_plan(encoder(), ratio, preset="fast", granularity=wanted, example_inputs=X)
    assert plan == again, "as if it had been said"


def test_a_slower_plan_is_never_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    for times in ((1.2, 1.1), (0.9, 0.9, 1.01)):
        Machine(monkeypatch, *times)
        model = encoder()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(LatencyError, match=r'granularity="auto".*faster than the dense model.*x 1\.'):
            attnprune.prune_attention(model, 0.5, preset="fast", example_inputs=X)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert not attnprune.find_attention(model)[0].ragged


def test_one_head_leaves_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 0.9, 0.1)
    plan = attnprune.make_plan(encoder(1), 0.5, granularity="auto", example_inputs=X)
    assert plan.asked is not None
    assert plan.asked.granularity == "channel"
    assert machine.seen == ["channel", "channel"]


def test_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 0.9, 0.5)
    plan = attnprune.make_plan(encoder(), target_params=0.8, granularity="auto", example_inputs=X)
    assert plan.asked is not None
    assert plan.asked.granularity == "head"
    assert len(machine.seen) == 3
    request = Request.parse(target_latency=0.9, granularity="auto", example_inputs=X)
    assert faster.by_time(encoder(), [], request).rules.granularity == "joint"


def test_it_is_measured_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faster, "SECONDS", 0.5)
    model = encoder()
    try:
        report = attnprune.prune_attention(model, 0.5, granularity="auto", example_inputs=X)
    except LatencyError:  # so few tokens that it may be
        assert attnprune.find_attention(model)[0].heads == 4
    else:
        assert report.plan.asked is not None
        assert report.plan.asked.granularity in ("channel", "head")


def test_where_nothing_is_measured() -> None:
    x = {"example_inputs": X}
    rules = Request.parse(0.5, preset="fast", **x).rules
    assert (rules.granularity, rules.round_to, rules.match_dims) == ("auto", "auto", True)
    for given in ({}, {**x, "measure": False}, {**x, "target_error": 0.1}, {**x, "granularity": "channel"}):
        ratio = None if "target_error" in given else 0.5
        assert Request.parse(ratio, preset="fast", **given).rules.granularity == "channel"
    with pytest.raises(OptionError, match=r'granularity="auto": expected example_inputs'):
        Request.parse(0.5, granularity="auto")
    with pytest.raises(OptionError, match='"channel" or "head"'):
        Request.parse(0.5, granularity="auto", stock=True, **x)
    with pytest.raises(OptionError, match="the same where a run is resumed"):
        attnprune.AttentionPruner(encoder(), 0.5, granularity="auto", example_inputs=X)
    pruner = attnprune.AttentionPruner(encoder(), 0.5, preset="fast", example_inputs=X)
    assert pruner.request.rules.granularity == "channel"
    with pytest.raises(OptionError, match="head, channel or joint"):
        attnprune.latency.measure(encoder(), X, granularity="auto", cache=False)
