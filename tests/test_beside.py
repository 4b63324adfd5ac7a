"""``split="all"``: features share one budget with channels, where they lose less."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnprune import AttentionPruner, Plan, calibrate, errors, find_attention, make_plan, prune_attention


def redundant() -> tuple[nn.Module, list[Tensor], Tensor]:
    """An encoder whose inputs lie in four dimensions of 32, so that features tell one another; data, and others."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    basis = torch.randn(4, 32)
    data = [torch.randn(16, 10, 4) @ basis for _ in range(6)]
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), data, torch.randn(64, 10, 4) @ basis


def test_features_share_a_budget_with_channels_where_they_lose_less() -> None:
    dense, data, held = redundant()
    losses, models = {}, {}
    with torch.no_grad():
        expected = dense(held)
    for split in ("auto", "all"):
        model = copy.deepcopy(dense)
        report = prune_attention(model, 0.75, data=data, split=split, heads="ragged", progress=False)
        assert report.attention_parameters[1] == pytest.approx(0.25 * report.attention_parameters[0], rel=0.05)
        assert f"{split} split" in str(report)
        assert report.asked == {"qkvo": 0.75}
        with torch.no_grad():
            losses[split] = float((model(held) - expected).square().mean())
        models[split] = report.plan
    assert not any(any(layer.features) for layer in models["auto"])
    assert all(any(layer.features) for layer in models["all"])
    assert losses["all"] < 0.8 * losses["auto"]
    assert Plan.from_json(models["all"].to_json()) == models["all"]
    few = make_plan(dense, 0.25, data=data, split="all", heads="ragged", progress=False)
    assert not any(any(layer.features) for layer in few)  # channels lose less
    stepped = make_plan(dense, 0.75, data=data, split="all", heads="ragged", round_to=2, progress=False)
    assert all(spec.width(p) % 2 == 0 for spec in stepped.after for p in "qkv")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scope": "local"}, 'scope with split="all": expected "global"'),
        ({"granularity": "head"}, 'granularity with split="all": expected "channel"'),
        ({"match_dims": True}, 'match_dims with split="all": expected False'),
        ({"scorer": "magnitude"}, 'split="all": expected data'),
        ({"data": None}, 'split="all": expected data'),
        ({"compensate": False}, 'split="all": expected data'),
    ],
    ids=str,
)
def test_what_features_cannot_share_is_refused(options: dict[str, Any], words: str) -> None:
    dense, data, _ = redundant()
    with pytest.raises(errors.OptionError, match=re.escape(words)):
        make_plan(dense, 0.5, **{"data": data, "split": "all", **options})


def test_a_pruner_a_calibration_and_layers_in_turn_take_features_too() -> None:
    dense, data, _ = redundant()
    options: dict[str, Any] = {"split": "all", "heads": "ragged", "data": data, "progress": False}
    pruner = AttentionPruner(copy.deepcopy(dense), 0.75, steps=1, **options)
    report = pruner.step()
    assert any(any(spec.left_out) for spec in find_attention(pruner.model))
    before, after = report.attention_parameters
    assert before == sum(spec.parameters for spec in find_attention(dense))
    assert after == pytest.approx(0.25 * before, rel=0.05)
    turns = make_plan(dense, 0.75, sequential=True, **options)
    assert any(any(layer.features) for layer in turns)
    assert all(layer.refit for layer in turns if any(layer.features))
    told = calibrate(dense, data, reads=True, progress=False)
    assert any(any(layer.features) for layer in make_plan(dense, 0.75, calibration=told, **options))
    with pytest.raises(errors.CalibrationError, match="reads=True"):
        make_plan(dense, 0.75, calibration=calibrate(dense, data, progress=False), **options)
