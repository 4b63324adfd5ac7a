"""Multiples that a device likes, and heads that keep as many qk as vo channels."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import attnprune
from attnprune import AttentionSpec, Ratios, Rules, Scores, allocate, errors, make_plan
from attnprune.cost.latency import multiples, timing
from attnprune.cost.latency.multiples import around
from attnprune.cost.rounding import liked_multiple, rounding
from attnprune.planning import faster

CPU = torch.device("cpu")


def spec(name: str = "a", heads: int = 2, dim: int = 8, **facts: Any) -> AttentionSpec:
    return AttentionSpec.of(name, heads=heads, head_dim=dim, d_model=8, **facts)


def scores(one: AttentionSpec, seed: int) -> Scores:
    draw = torch.Generator().manual_seed(seed)
    return Scores(
        torch.rand(one.heads, one.qk_dim, generator=draw),
        torch.rand(one.heads, one.vo_dim, generator=draw),
        torch.rand(one.heads, generator=draw),
    )


# multiples


@pytest.mark.parametrize(("capability", "multiple"), [("AVX512", 16), ("AVX2", 8), ("DEFAULT", 8)])
def test_a_cpu_likes_its_vectors(monkeypatch: pytest.MonkeyPatch, capability: str, multiple: int) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert liked_multiple(CPU, torch.float32) == multiple


def test_other_devices() -> None:
    found = [liked_multiple(torch.device("cuda"), dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)]
    assert found == [8, 8, 4]
    assert liked_multiple(torch.device("mps"), torch.float16) == 8


@pytest.mark.parametrize(("dim", "step"), [(64, 16), (80, 16), (48, 8), (32, 8), (16, 4), (6, 1), (1, 1)])
def test_small_heads_are_rounded_finer(monkeypatch: pytest.MonkeyPatch, dim: int, step: int) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert rounding([spec(dim=128), spec(dim=dim)], CPU, torch.float32) == step


def test_auto_is_resolved_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(128, 4, 16, batch_first=True), 3, enable_nested_tensor=False
    )
    report = attnprune.prune_attention(model, 0.4, round_to="auto")
    assert report.plan.asked is not None
    assert report.plan.asked.round_to == 8
    assert "rounded to 8" in str(report)
    assert all(dim % 8 == 0 for one in report.plan.after for dim in (*one.qk_dims, *one.vo_dims))
    for p, asked in (report.asked or {}).items():  # less than one unit off: 8 channels of every head of a layer
        assert abs(report.achieved[p] - asked) < 8 / 32 / 3
    assert '"round_to":8' in report.plan.to_json()


class Device:
    """Time passes only where Q, K or V runs: by the channels of a head, more where it does not like these."""

    def __init__(self, patch: pytest.MonkeyPatch, likes: int, gain: float = 0.5, noise: float = 0.0) -> None:
        self.now, self.draw = 0.0, random.Random(0)
        self.likes, self.gain, self.noise = likes, gain, noise
        patch.setattr(timing, "FAST", 0.0)
        patch.setattr(timing, "perf_counter", lambda: self.now)
        patch.setattr(faster, "MULTIPLES", 1e9)  # a slow machine gives up no sooner

    def watch(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.in_features == module.out_features:
                module.register_forward_hook(self.tick)
        return model

    def tick(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        dim = output.shape[-1] / 2  # of two heads
        more = self.gain if dim % self.likes else 0.0
        self.now += dim * (1 + more) * (1 + self.noise * self.draw.random())


def two_heads(**facts: Any) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**{**sizes, "image_size": 8, "patch_size": 4, **facts})
    return ViTModel(config, add_pooling_layer=False).eval()


IMAGES = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize("options", [{}, {"match_dims": True}, {"target_params": 0.8}], ids=str)
@pytest.mark.parametrize("likes", [1, 2, 8, 16])
def test_what_is_measured_to_be_liked(likes: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Device(monkeypatch, likes).watch(two_heads())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ratio = None if "target_params" in options else 0.4
    plan = make_plan(model, ratio, round_to="auto", example_inputs=IMAGES, progress=False, **options)
    assert plan.asked is not None
    assert plan.asked.round_to == likes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    again = make_plan(two_heads(), ratio, round_to=likes, example_inputs=IMAGES, progress=False, **options)
    assert plan == again, "as if it had been said"


@pytest.mark.parametrize(("gain", "wanted"), [(0.02, 1), (0.2, 8)])
def test_a_small_gain_is_not_worth_a_coarser_multiple(
    gain: float, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Device(monkeypatch, 8, gain).watch(two_heads())
    plan = make_plan(model, 0.5, round_to="auto", example_inputs=IMAGES, progress=False)
    assert plan.asked is not None
    assert plan.asked.round_to == wanted


def test_where_times_vary_the_kind_of_device_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiples, "ROUNDS", (5, 6))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for noise, wanted in ((0.001, 2), (5.0, 16)):
        with pytest.MonkeyPatch.context() as patch:
            model = Device(patch, 2, noise=noise).watch(two_heads())
            plan = make_plan(model, 0.5, round_to="auto", example_inputs=IMAGES, progress=False)
        assert plan.asked is not None
        assert plan.asked.round_to == wanted


def test_what_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(faster, "measure_multiples", never)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    model, inputs = two_heads(), {"example_inputs": IMAGES}
    few: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1}  # heads of 4
    for one, options, wanted in (
        (model, {}, 16),
        (model, {**inputs, "measure": False}, 16),
        (model, {**inputs, "granularity": "head"}, 1),
        (model, {**inputs, "qkvo_ratios": 0.0}, 16),
        (two_heads(**few), inputs, 1),
    ):
        plan = make_plan(one, **{"qkvo_ratios": 0.5, "round_to": "auto", **options})
        assert plan.asked is not None
        assert plan.asked.round_to == wanted, options
    with pytest.raises(AssertionError):
        make_plan(two_heads(), 0.5, round_to="auto", **inputs)


@given(
    st.lists(st.integers(16, 40), min_size=1, max_size=3),
    st.sampled_from([{"qk": 0.5, "vo": 0.5}, {"qk": 0.13, "vo": 0.9}, {"qk": 1, "vo": 0.3}]),
    st.booleans(),
    st.booleans(),
)
def test_shapes_that_are_measured_keep_as_many_channels_in_all(
    dims: list[int], kept: Any, ragged: bool, rotary: bool
) -> None:
    facts: dict[str, Any] = {"rotary": "half", "rotary_dims": tuple(dim // 2 * 2 for dim in dims)} if rotary else {}
    whole = AttentionSpec.of("a", heads=len(dims), head_dim=64, d_model=8)
    one = replace(whole, qk_dims=tuple(dims), vo_dims=tuple(dims), **facts)
    totals = set()
    for multiple in (1, 2, 4):
        two = [around(one, multiple, 4, kept, turn, ragged).after for turn in (0, 1)]
        totals.add(tuple(sum(sum(side.dims(kind)) for side in two) for kind in ("qk", "vo")))
        for kind in ("qk", "vo"):
            by = max(multiple, 2) if kind == "qk" and rotary else multiple
            for side in two:
                assert all(dim % by == 0 or dim == dims[i] for i, dim in enumerate(side.dims(kind)))
            if kept[kind] < 1 and by < 4:
                assert all(a != b for a, b in zip(two[0].dims(kind), two[1].dims(kind), strict=True))
                assert all(dim % (2 * by) for dim in two[0].dims(kind)), "odd multiples"
    assert len(totals) == 1


def test_a_pruner_keeps_the_multiple_of_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    model = nn.MultiheadAttention(64, 2)
    pruner = attnprune.AttentionPruner(model, 0.75, steps=2, round_to="auto", scorer="magnitude")
    steps = [pruner.step().layers[0].after.qk_dims for _ in range(2)]
    assert steps == [(16, 16), (8, 8)]
    assert pruner.plan.asked is not None
    assert pruner.plan.asked.round_to == 8


def test_auto_does_not_round_whole_heads() -> None:
    plan = make_plan(nn.MultiheadAttention(96, 6), 0.5, granularity="head", round_to="auto")
    assert plan.asked is not None
    assert plan.asked.round_to == 1
    assert plan[""].after.heads == 3


def test_other_words_are_refused() -> None:
    with pytest.raises(errors.OptionError, match="auto"):
        make_plan(nn.MultiheadAttention(16, 4), 0.5, round_to="best")  # type: ignore[arg-type]


# matched dims


@settings(max_examples=30)
@given(
    st.integers(0, 99),
    st.lists(st.sampled_from([4, 6, 8]), min_size=1, max_size=3),
    st.floats(0, 0.7),
    st.sampled_from(["global", "local"]),
    st.sampled_from(["uniform", "ragged"]),
    st.sampled_from(["channel", "joint"]),
    st.sampled_from(["fixed", "auto"]),
    st.sampled_from([1, 2]),
)
def test_matched_dims_are_equal_and_within_one_unit(
    seed: int, dims: list[int], ratio: float, scope: Any, heads: Any, granularity: Any, split: Any, step: int
) -> None:
    specs = [spec(f"layer.{i}", dim=dim) for i, dim in enumerate(dims)]
    rules = Rules(granularity, scope, heads, split, step, match_dims=True)
    given_scores = {one.name: scores(one, seed + i) for i, one in enumerate(specs)}
    plan = allocate(specs, given_scores, Ratios.parse(ratio), rules)
    for layer in plan:
        assert layer.after.qk_dims == layer.after.vo_dims
        assert all(dim % step == 0 or dim in layer.spec.qk_dims for dim in layer.after.qk_dims)
        for kind in ("qk", "vo"):
            for head in layer.kept_heads:  # the cheapest went
                row = given_scores[layer.spec.name].of(kind)[head, : layer.spec.dims(kind)[head]].tolist()
                gone = layer.removed(kind)[head]
                assert sorted(row[c] for c in gone) == sorted(row)[: len(gone)]
    group = [plan.layers] if scope == "global" else [(layer,) for layer in plan]
    for layers in group:
        total = sum(layer.spec.parameters for layer in layers)
        unit = max(step * layer.spec.heads * 32 for layer in layers)
        freed = sum(layer.spec.weights(p) - layer.after.weights(p) for layer in layers for p in ("q", "k", "v", "o"))
        assert abs(freed - ratio * sum(layer.spec.weights(p) for layer in layers for p in "qkvo")) < unit <= total


def test_matched_dims_keep_the_host_class() -> None:
    from transformers import ViTConfig, ViTModel
    from transformers.models.vit.modeling_vit import ViTAttention

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=16, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    classes = {}
    for match in (False, True):
        model = ViTModel(config)
        report = attnprune.prune_attention(model, 0.55, scorer="random", match_dims=match)
        classes[match] = {type(model.get_submodule(layer.spec.name)) is ViTAttention for layer in report.layers}
        assert len({layer.after.qk_dim for layer in report.layers}) > 1, "layers still compete"
    assert classes[True] == {True}
    assert False in classes[False]
    assert "matched dims" in str(report)


def test_matched_dims_with_a_target_error() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(32, 4)
    apart = make_plan(model, target_error=0.3)[""].after
    plan = make_plan(model, target_error=0.3, match_dims=True)
    assert apart.qk_dim != apart.vo_dim
    assert plan[""].after.qk_dims == plan[""].after.vo_dims == (max(apart.qk_dim, apart.vo_dim),) * 4
    assert plan.asked is not None
    assert plan.asked.match_dims


def test_what_matched_dims_refuse() -> None:
    model = nn.MultiheadAttention(32, 4)
    make_plan(model, {"qk": 0.5, "vo": 0.2}, match_dims=True, split="auto")
    with pytest.raises(errors.OptionError, match="True or False"):
        make_plan(model, 0.5, match_dims="yes")  # type: ignore[arg-type]
    attnprune.prune_attention(model, {"qk": 0.5})
    for options in ({"qkvo_ratios": 0.5}, {"target_error": 0.1}):
        with pytest.raises(errors.OptionError, match="as many qk as vo channels in every head"):
            make_plan(model, match_dims=True, **options)  # type: ignore[arg-type]
