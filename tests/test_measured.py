"""Splits that are found by measuring: what each layer loses alone, and which plan loses least."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attnprune import AttentionPruner, Plan, Scorer, find_attention, make_plan, masked, prune_attention
from attnprune.calibration.distance import Distance
from attnprune.errors import DataError, OptionError
from attnprune.planning.measured import rescaled
from attnprune.values.scores import Scores

from .selection import examples

LOUD = 1e6
"""What makes scores of a layer higher than those of all others."""


class Boast(Scorer):
    """Scores by weights; those of one layer say nothing beside the others'."""

    def __init__(self, layer: str) -> None:
        self.layer = layer

    name = "boast"

    def score(self, model: nn.Module, views: Any, **evidence: Any) -> dict[str, Scores]:
        generator = torch.Generator().manual_seed(0)

        def some(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, dtype=torch.float64)

        found = {}
        for view in views:
            spec, loud = view.spec, LOUD if view.name == self.layer else 1.0
            qk, vo = some(spec.kv_heads, spec.qk_dim), some(spec.kv_heads, spec.vo_dim)
            found[view.name] = Scores(loud * qk, loud * vo, some(spec.heads))
        return found


def encoder() -> tuple[nn.TransformerEncoder, list[Tensor]]:
    """Two layers, the first of which hardly matters."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for parameter in model.layers[1].self_attn.parameters():  # type: ignore[union-attr]
        parameter.data = torch.randn(parameter.shape) * 0.4
    model.layers[0].self_attn.out_proj.weight.data *= 0.01  # type: ignore[union-attr]
    return model, [torch.randn(8, 6, 32) for _ in range(2)]


def lost(model: nn.Module, plan: Plan, data: list[Tensor]) -> float:
    """The square of the difference that a plan makes, by itself; no code of the library but masks."""
    with torch.no_grad():
        before = torch.cat([model(x) for x in data])
        with masked(model, plan):
            after = torch.cat([model(x) for x in data])
    return float((before - after).square().sum())


@pytest.mark.parametrize("heads", ["uniform", "ragged"])
@pytest.mark.parametrize("options", [{"qkvo_ratios": 0.5}, {"target_params": 0.85}], ids=str)
def test_scores_of_layers_that_do_not_compare_are_seen(heads: str, options: dict[str, Any]) -> None:
    model, data = encoder()
    options = {**options, "heads": heads, "scorer": Boast("layers.0.self_attn"), "progress": False}
    before = copy.deepcopy(model.state_dict())
    blind = make_plan(model, **options, split="auto", data=data)
    plan = make_plan(model.train(), **options, split="measured", data=data)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    assert lost(model, plan, data) < 0.5 * lost(model, blind, data)
    first, second = (sum(one.spec.weights(p) - one.after.weights(p) for p in "qkvo") for one in plan)  # type: ignore[misc]
    assert first > 2 * second
    assert plan == make_plan(model, **options, split="measured", data=iter(data))
    assert plan.asked is not None
    assert plan.asked.split == "measured"
    assert Plan.from_json(plan.to_json()) == plan
    report = prune_attention(model, **options, split="measured", data=data)
    if "qkvo_ratios" in options:
        assert abs(sum(report.achieved.values()) / 4 - 0.5) < 0.03


def test_with_data_it_loses_no_more_than_the_split_found_by_scores() -> None:
    """By its own measure, on the data that it looks at."""
    model, data = encoder()
    dense = Distance(model, data)
    for ratio in (0.5, 0.8):
        found = {}
        for split in ("auto", "measured"):
            with masked(model, make_plan(model, ratio, split=split, data=data, progress=False)):
                found[split] = dense()
        assert found["measured"] <= found["auto"] * (1 + 1e-6)


def test_a_pruner_measures_too() -> None:
    model, data = encoder()
    pruner = AttentionPruner(model, 0.5, steps=2, split="measured", data=data, progress=False)
    while not pruner.done:
        pruner.step()
    assert abs(sum(pruner.report.achieved.values()) / 4 - 0.5) < 0.05  # type: ignore[union-attr]
    assert find_attention(model)[0].layout.qk < find_attention(model)[1].layout.qk


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, OptionError),
        ({"data": [torch.zeros(1, 3, 32)], "granularity": "head"}, OptionError),
        ({"data": [torch.zeros(1, 3, 32)], "qkvo_ratios": None, "target_error": 0.1}, OptionError),
        ({"data": [torch.randn(2, 3, 32)], "loss_fn": lambda model, x: model.layers[1](x).sum()}, DataError),
        ({"data": [torch.randn(2, 3, 32)], "output_fn": lambda output: output * float("nan")}, DataError),
    ],
    ids=["no data", "heads", "an error asked for", "a part of the model", "not finite"],
)
def test_what_cannot_be_measured_is_said_before_anything_changes(options: dict[str, Any], error: type) -> None:
    model, _ = encoder()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error):
        prune_attention(model, **{"qkvo_ratios": 0.5, "split": "measured", "progress": False, **options})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tokens_that_a_mask_leaves_out_do_not_count() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertForMaskedLM(config).eval()
    ids, mask = torch.randint(1, 20, (2, 6)), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    padded = [{"input_ids": ids, "attention_mask": mask}]
    distance = Distance(model, padded)
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight[4:].normal_()
        before = model(**padded[0]).logits
    first = Distance(model, [{"input_ids": ids[:1], "attention_mask": mask[:1]}])
    assert distance() > 0
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight[4:].normal_()
        assert not torch.equal(model(**padded[0]).logits, before)
    assert first() < 1e-9  # nobody attends to the tokens that changed, and they do not count


@settings(max_examples=examples(200))
@given(
    costs=st.lists(st.floats(0, 1e3), min_size=1, max_size=12).map(sorted),
    seen=st.lists(st.floats(0, 1e3), min_size=1, max_size=12).map(sorted),
)
def test_costs_rise_and_add_up(costs: list[float], seen: list[float]) -> None:
    places = range(1, min(len(costs), len(seen)) + 1)
    points = {place: seen[place - 1] for place in places}
    found = rescaled(costs, points)
    assert len(found) == len(costs)
    assert all(low <= high for low, high in pairwise(found))
    assert all(cost >= 0 for cost in found)
    whole = places[-1]
    if len(costs) == whole and sum(costs) > 1e-6:
        assert sum(found) >= points[whole] * (1 - 1e-6)


def test_between_points_the_scores_say_how_it_rises() -> None:
    assert rescaled([1.0, 3.0, 4.0], {3: 16.0}) == pytest.approx([2.0, 6.0, 8.0])
    assert rescaled([1.0, 1.0, 1.0], {1: 3.0, 3: 3.0}) == pytest.approx([1.0, 1.0, 1.0])  # what falls shares its mean
    assert rescaled([0.0, 0.0], {1: 5.0, 2: 9.0}) == [0.0, 0.0]


def test_of_outputs_that_take_much_memory_some_tokens_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Linear(8, 50), [torch.randn(2, 64, 8), torch.randn(2, 64, 8)]
    whole = Distance(model, x)
    monkeypatch.setattr("attnprune.calibration.distance.ROOM", whole.size // 4)
    some = Distance(model, x)
    assert some.size <= whole.size // 4
    with torch.no_grad():
        model.weight.mul_(1.1)
    assert some() == pytest.approx(whole(), rel=0.3)
    assert some() != whole()
