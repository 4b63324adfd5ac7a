"""The plan as a file: bytes that stay readable, hostile bytes that are refused, and the laws of ``then``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnprune import AttentionSpec, LayerPlan, Plan, Ratios
from attnprune.errors import PlanFormatError, PlanMismatchError
from attnprune.values.asked import Asked
from attnprune.values.budget import Budget
from attnprune.values.channel_maps import ChannelMaps

from .selection import ALL

DATA = Path(__file__).parent / "data"
GOLDEN, GOLDEN_2, GOLDEN_1 = (DATA / f"plan_v{version}.json" for version in (3, 2, 1))
DIGEST = "47836c8c69be5eb21825898f5a639ae88d2c36bf26aff7485ec42843e0f1e942"


def numbers(*shape: int) -> Tensor:
    """Numbers that float32 holds exactly."""
    return (torch.arange(math.prod(shape)) - 3.0).reshape(shape) / 8


def golden_plan() -> Plan:
    """The plan of version 2 with a budget and matched dims."""
    plan = golden_plan_2()
    assert plan.asked is not None
    return replace(plan, asked=replace(plan.asked, match_dims=True, budget=Budget("macs", 0.75, 0.74609375)))


def golden_plan_2() -> Plan:
    """The plan of version 1, and a layer whose heads are rotated."""
    plan = golden_plan_1()
    spec = AttentionSpec.of("encoder.turned", heads=2, head_dim=2, d_model=4)
    maps = ChannelMaps((numbers(1, 2),), (numbers(1, 2),), (numbers(1, 2),), numbers(4, 1), numbers(4))
    rotated = LayerPlan(spec, (1,), qk=((1,), ()), vo=((0,), ()), fold=maps)
    assert plan.asked is not None
    asked = replace(plan.asked, basis="rotated", compensate="yes", target_error=0.125)
    return Plan((*plan.layers, rotated), asked)


def golden_plan_1() -> Plan:
    """Four layers: the same number of channels from every head, other numbers, whole heads, nothing."""
    uniform = AttentionSpec.of("encoder.layers.0.attention", heads=2, head_dim=4, d_model=8, scale=0.5)
    ragged = AttentionSpec(
        "encoder.layers.1.attention",
        d_model=8,
        qk_dims=(4, 3, 2),
        vo_dims=(2, 5, 4),
        scale=0.35355339059327373,
        q_in=8,
        k_in=6,
        v_in=7,
        bias=(True, False, True, False),
        bias_kv=True,
    )
    packed = AttentionSpec.of("decoder.été", heads=4, head_dim=2, d_model=8, bias=(False,) * 4, fused=True)
    idle = AttentionSpec.of("", heads=1, head_dim=1, d_model=1)
    asked = Asked(Ratios(0.25, 0.25, 0.1, 0.1), "joint", "local", "ragged", "fisher", "auto", round_to=2)
    layers = (
        LayerPlan(uniform, qk=((0,), (3,)), vo=((1, 2), (0, 3))),
        LayerPlan(ragged, (1,), qk=((0, 2), (), (1,)), vo=((), (), (0, 1, 3))),
        LayerPlan(packed, (0, 3)),
        LayerPlan(idle),
    )
    return Plan(layers, asked)


@st.composite
def layer_plans(draw: st.DrawFn, spec: AttentionSpec) -> LayerPlan:
    """Any valid plan for a spec."""
    heads = draw(st.sets(st.integers(0, spec.heads - 1), max_size=spec.heads - 1))
    removed = {}
    for kind in ("qk", "vo"):
        removed[kind] = tuple(
            () if head in heads else tuple(sorted(draw(st.sets(st.integers(0, dim - 1), max_size=dim - 1))))
            for head, dim in enumerate(spec.dims(kind))
        )
    return LayerPlan(spec, tuple(sorted(heads)), removed["qk"], removed["vo"])


@st.composite
def specs(draw: st.DrawFn, name: str) -> AttentionSpec:
    """Any small spec, ragged ones too."""
    heads, sizes = draw(st.integers(1, 4)), st.integers(1, 5)
    dims = [tuple(draw(sizes) for _ in range(heads)) for _ in range(2)]
    widths = [draw(sizes) for _ in range(3)]
    scale = draw(st.one_of(st.floats(1e-3, 1e3), st.integers(1, 9)))
    bias = draw(st.tuples(*[st.booleans()] * 4))
    flags = {"bias": bias, "bias_kv": draw(st.booleans()), "fused": draw(st.booleans())}
    return AttentionSpec(name, draw(sizes), dims[0], dims[1], scale, *widths, **flags)


names = st.lists(st.text(max_size=6), max_size=3, unique=True)
shares = st.floats(0, 1, exclude_max=True)
open_shares = st.floats(0, 1, exclude_min=True, exclude_max=True)
budgets = st.none() | st.builds(
    Budget, st.sampled_from(["latency", "macs", "params"]), open_shares, st.none() | st.floats(1e-3, 2)
)
requests = st.none() | st.builds(
    Asked,
    st.builds(Ratios, shares, shares, shares, shares),
    st.sampled_from(["head", "channel", "joint"]),
    match_dims=st.booleans(),
    budget=budgets,
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan."""
    return Plan(tuple(draw(layer_plans(draw(specs(name)))) for name in draw(names)), draw(requests))


@st.composite
def chains(draw: st.DrawFn) -> list[Plan]:
    """Three plans, each for what the one before leaves; each may leave out layers."""
    now = [draw(specs(name)) for name in ("a", "b")]
    chain = []
    for _ in range(3):
        layers = tuple(draw(layer_plans(spec)) for spec in now)
        chosen = tuple(layer for layer in layers if draw(st.booleans()))
        chain.append(Plan(chosen, draw(requests)))
        after = {layer.spec.name: layer.after for layer in chosen}
        now = [after.get(spec.name, spec) for spec in now]
    return chain


# the golden file


def test_golden_reads_as_the_plan_it_was_written_from() -> None:
    assert Plan.from_json(GOLDEN.read_bytes()) == golden_plan()
    assert Plan.from_json(GOLDEN.read_text("utf-8")) == golden_plan()


def test_golden_bytes_and_digest_have_not_changed() -> None:
    plan = golden_plan()
    assert plan.to_json().encode() == GOLDEN.read_bytes()
    assert plan.digest == DIGEST
    assert Plan.from_json(GOLDEN.read_bytes()).digest == DIGEST


def test_golden_of_version_1_reads_as_the_plan_it_was_written_from() -> None:
    assert Plan.from_json(GOLDEN_1.read_bytes()) == golden_plan_1()
    raw = json.loads(GOLDEN_1.read_text("utf-8"))
    assert raw["version"] == 1
    for broken in ({"layers": 3}, {"layers": [1]}, {"asked": 3}, {"layers": [{}]}, {"asked": {}}):
        refused(json.dumps({**raw, **broken}))


def test_golden_of_version_2_reads_as_the_plan_it_was_written_from() -> None:
    assert Plan.from_json(GOLDEN_2.read_bytes()) == golden_plan_2()
    raw = json.loads(GOLDEN_2.read_text("utf-8"))
    assert raw["version"] == 2
    for broken in ({"layers": 3}, {"asked": 3}, {"asked": {}}):
        refused(json.dumps({**raw, **broken}))


def test_golden_has_every_kind_of_removal() -> None:
    uniform, ragged, heads, idle, rotated = golden_plan()
    assert (rotated.after.qk_dims, rotated.after.vo_dims, rotated.after.heads) == ((1,), (1,), 1)
    assert rotated.fold is not None
    assert (uniform.after.qk_dims, uniform.after.vo_dims) == ((3, 3), (2, 2))
    assert (ragged.after.qk_dims, ragged.after.vo_dims) == ((2, 1), (2, 1))
    assert heads.after.heads == 2
    assert idle.empty


# round trip


@settings(derandomize=True, deadline=None, max_examples=50)
@given(plans())
def test_round_trip(plan: Plan) -> None:
    text = plan.to_json()
    back = Plan.from_json(text)
    assert back == plan
    assert hash(back) == hash(plan)
    assert back.to_json() == text
    assert back.digest == plan.digest
    assert Plan.from_json(text.encode()) == plan


def test_equal_plans_have_equal_bytes() -> None:
    # 1 equals 1.0 and -0.0 equals 0.0, so the plans are equal, and so must be what they write
    def plan(scale: float, ratio: float) -> Plan:
        spec = AttentionSpec.of("a", heads=1, head_dim=1, d_model=1, scale=scale)
        return Plan((LayerPlan(spec),), Asked(Ratios(ratio, ratio, 0, 0)))

    assert plan(1, -0.0) == plan(1.0, 0.0)
    assert plan(1, 0.0).to_json() == plan(1.0, 0.0).to_json()
    assert plan(1.0, -0.0).to_json() == plan(1.0, 0.0).to_json()


def test_plans_are_values() -> None:
    first, second = golden_plan(), golden_plan()
    assert first is not second
    assert first == second
    assert len({first, second}) == 1
    other = Plan(first.layers[:-1], first.asked)
    assert other != first
    assert other.digest != first.digest
    assert len({first, other, Plan(first.layers)}) == 3
    with pytest.raises(AttributeError):
        first.layers = ()  # type: ignore[misc]


def test_a_plan_without_layers_removes_nothing() -> None:
    assert Plan(()).empty
    assert Plan(()).fraction("q") == 0.0
    assert Plan.from_json(Plan(()).to_json()) == Plan(())


# malformed files

SOUP: list[Any] = [None, True, 0.5, -1, 10**30, "x", "", [], {}, [[]], float("nan"), float("inf")]


def wrong_values(value: Any) -> list[Any]:
    """Values that no field can take where a good file has ``value``."""
    if isinstance(value, bool):
        return [each for each in [*SOUP, 0, 1, "true"] if not isinstance(each, bool)]
    if isinstance(value, int):
        return [*SOUP, float(value), str(value), 2**20 + 1, -(10**30), 10**4000]
    if isinstance(value, float):
        return [each for each in [*SOUP, 10**400, str(value)] if each not in (0.5, 10**30)]
    if isinstance(value, str):
        return [each for each in SOUP if not isinstance(each, str)]
    if isinstance(value, list):
        return [*(each for each in SOUP if not isinstance(each, list)), [*value, None], [*value, -1], [*value, {}]]
    return [*(each for each in SOUP if each is not None), [value]]


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every node of a JSON value."""
    yield path
    if isinstance(node, (dict, list)):
        for key in node if isinstance(node, dict) else range(len(node)):
            yield from places(node[key], (*path, key))


def at(node: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        node = node[key]
    return node


def put(node: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at one place."""
    if not path:
        return value
    copied = deepcopy(node)
    at(copied, path[:-1])[path[-1]] = value
    return copied


TREE = json.loads(GOLDEN.read_text("utf-8"))
PLACES = sorted(places(TREE), key=str)
ASKED = [("asked", "target_error"), ("asked", "budget"), ("asked", "budget", "promised")]
NULLABLE = {(), ("asked",), *ASKED, ("layers", 4, "fold")}


def refused(text: str | bytes) -> PlanFormatError:
    """Reads a file that must be refused."""
    with pytest.raises(PlanFormatError) as caught:
        Plan.from_json(text)
    error = caught.value
    assert type(error) is PlanFormatError
    assert isinstance(error, ValueError)
    assert all((error.where, error.expected, error.found, error.remedy))
    assert len(str(error)) < 1000, "a hostile file must not fill the log"
    return error


def test_wrong_values_everywhere() -> None:
    """In ``make test`` every other value of each place, the others in the next."""
    count = 0
    for number, path in enumerate(PLACES):
        for wrong in [*wrong_values(at(TREE, path))][slice(None) if ALL else slice(number % 2, None, 2)]:
            if wrong is None and path in NULLABLE:
                continue
            text = json.dumps(put(TREE, path, wrong))
            try:
                refused(text)
            except BaseException as error:
                raise AssertionError(f"{'.'.join(map(str, path))} = {str(wrong)[:40]}") from error
            count += 1
    assert count > (1000 if ALL else 500)


@pytest.mark.parametrize("key", ["scale"])
@pytest.mark.parametrize("value", [0, 0.0, -0.5, -(10**30)])
def test_a_softmax_scale_is_positive(key: str, value: float) -> None:
    refused(json.dumps(put(TREE, ("layers", 0, "spec", key), value)))


def test_missing_extra_and_double_keys() -> None:
    text = GOLDEN.read_text("utf-8")
    mappings = [path for path in PLACES if isinstance(at(TREE, path), dict)]
    assert len(mappings) == 1 + 3 + 5 * 2 + 1
    for path in mappings:
        node = at(TREE, path)
        for key in node:
            refused(json.dumps(put(TREE, path, {k: v for k, v in node.items() if k != key})))
            refused(json.dumps(put(TREE, path, {**{k: v for k, v in node.items() if k != key}, key.upper(): 1})))
            good = json.dumps(node, separators=(",", ":"), sort_keys=True)
            assert text.count(good) >= 1
            twice = "{" + json.dumps(key) + ":" + json.dumps(node[key]) + "," + good[1:]
            refused(text.replace(good, twice, 1))
        refused(json.dumps(put(TREE, path, {**node, "extra": 1})))
        refused(json.dumps(put(TREE, path, {**node, "": None})))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 7),
        (("version",), 0),
        (("format",), "attnprune.Plan"),
        (("asked", "ratios", "q"), 1.0),
        (("asked", "round_to"), 0),
        (("asked", "budget", "resource"), "joules"),
        (("asked", "budget", "share"), 1.0),
        (("asked", "budget", "promised"), 0.0),
        (("layers", 0, "heads"), [0, 1]),
        (("layers", 0, "heads"), [1, 0]),
        (("layers", 0, "heads"), [0]),  # the head's channels are listed too
        (("layers", 2, "heads"), [0, 0]),
        (("layers", 2, "heads"), [4]),
        (("layers", 0, "qk"), [[0]]),
        (("layers", 0, "qk"), []),
        (("layers", 0, "qk", 0), [0, 1, 2, 3]),
        (("layers", 0, "qk", 0), [4]),
        (("layers", 0, "qk", 0), [2, 1]),
        (("layers", 0, "spec", "qk_dims"), [4]),
        (("layers", 0, "spec", "qk_dims"), [4, 0]),
        (("layers", 0, "spec", "qk_dims"), []),
        (("layers", 0, "spec", "qk_dims"), [2**20, 2**20]),
        (("layers", 0, "spec", "bias"), [True, True, True]),
        (("layers", 0, "spec", "d_model"), 0),
        (("layers", 0, "spec", "name"), "encoder.layers.1.attention"),  # two layers of one name
        (("layers", 4, "fold", "dtype"), "float16"),
        (("layers", 4, "fold", "dtype"), "float64"),  # twice as many bytes
        (("layers", 4, "fold", "shift"), False),  # fewer numbers
        (("layers", 4, "fold", "data"), "AADAfw==" * 7),  # not finite
        (("layers", 4, "fold", "data"), "*" * 76),
        (("layers", 4, "qk"), [[], []]),  # maps of other shapes
        (("layers", 4, "heads"), []),
    ],
)
def test_values_that_contradict_each_other(path: tuple[Any, ...], value: Any) -> None:
    refused(json.dumps(put(TREE, path, value)))


def test_the_message_names_the_field() -> None:
    error = refused(json.dumps(put(TREE, ("layers", 1, "qk", 2, 0), "x" * 10_000)))
    assert "layers[1].qk[2][0]" in error.where
    assert "whole number" in error.expected
    assert len(error.found) <= 80


@pytest.mark.parametrize(
    "text",
    [
        "", b"", " ", "null", "{}", "[]", "0", '"plan"', "nan", "NaN", "Infinity", "{", "}", "\x00", b"\xff\xfe",
        b"\xef\xbb\xbf", b"\x80abc", b'{"format": "\xff"}', b"\x00\x00\x00", "plan.json", "9" * 100_000, "1e999999",
        '"\\ud800"', '{"a":1}' * 2,
    ],
)  # fmt: skip
def test_not_a_plan_at_all(text: str | bytes) -> None:
    refused(text)


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "utf-16", "utf-32"])
def test_text_in_another_encoding(encoding: str) -> None:
    """Bytes that are not UTF-8, -16 or -32 are refused; those that are give the same plan."""
    text = json.dumps(TREE, ensure_ascii=False)
    raw = text.encode(encoding)
    if encoding == "latin-1":
        refused(raw)
    else:
        assert Plan.from_json(raw) == golden_plan()


@pytest.mark.parametrize("what", [None, 1, [], {}, object()])
def test_not_text_at_all(what: Any) -> None:
    refused(what)


@pytest.mark.parametrize("brackets", ["[", '{"a":', "[{", '[["'])
def test_deep_nesting(brackets: str) -> None:
    refused(brackets * 100_000)
    refused(("[" * 100_000) + ("]" * 100_000))


def test_nesting_just_below_what_the_parser_refuses() -> None:
    # what the parser still takes must not break whoever prints it in the message
    for depth in range(700, 1100, 1):
        nested = "[" * depth + "]" * depth
        refused(nested)
        refused(GOLDEN.read_text("utf-8").replace('"heads":[0,3]', f'"heads":{nested}', 1))


def test_truncation() -> None:
    raw = GOLDEN.read_bytes()
    for length in range(0, len(raw), 7):
        refused(raw[:length])
    refused(raw[:-1])
    refused(raw + b"}")
    refused(raw + raw)


def test_bit_flips() -> None:
    """One flipped bit gives another valid plan (in a name, a number) or PlanFormatError, nothing else.

    In ``make test`` one bit of every byte, another one in the next.
    """
    raw, good, tried = GOLDEN.read_bytes(), 0, 0
    for position in range(len(raw)):
        for bit in range(8) if ALL else [position % 8]:
            flipped = bytearray(raw)
            flipped[position] ^= 1 << bit
            tried += 1
            try:
                plan = Plan.from_json(bytes(flipped))
            except PlanFormatError:
                continue
            good += 1
            assert isinstance(plan, Plan)
            assert Plan.from_json(plan.to_json()) == plan
    assert 0 < good < tried / 2


# then


@settings(derandomize=True, deadline=None, max_examples=80)
@given(chains())
def test_then_is_associative(chain: list[Plan]) -> None:
    a, b, c = chain
    left, right = a.then(b).then(c), a.then(b.then(c))
    assert {layer.spec.name: layer for layer in left} == {layer.spec.name: layer for layer in right}
    assert left.layers == right.layers


@settings(derandomize=True, deadline=None, max_examples=80)
@given(chains())
def test_then_removes_what_both_remove(chain: list[Plan]) -> None:
    first, second = chain[:2]
    both = first.then(second)
    for name in {layer.spec.name for layer in both}:
        steps = [plan[name] for plan in (first, second) if any(layer.spec.name == name for layer in plan)]
        spec = steps[0].spec
        for kind in ("qk", "vo"):
            # the channels of every head by their own numbers, cut step by step
            left = {head: list(range(dim)) for head, dim in enumerate(spec.dims(kind))}
            for step in steps:
                present = list(left)
                left = {
                    present[head]: [left[present[head]][channel] for channel in step.kept(kind, head)]
                    for head in step.kept_heads
                }
            assert {head: list(both[name].kept(kind, head)) for head in both[name].kept_heads} == left


@settings(derandomize=True, deadline=None, max_examples=50)
@given(plans())
def test_an_empty_plan_is_neutral(plan: Plan) -> None:
    nothing = Plan(())
    before = Plan(tuple(LayerPlan(spec) for spec in plan.specs))
    after = Plan(tuple(LayerPlan(spec) for spec in plan.after))
    assert plan.then(nothing) == plan
    assert nothing.then(plan) == plan
    assert plan.then(after) == plan
    assert before.then(plan) == plan


def test_then_adds_up_what_was_asked() -> None:
    spec = AttentionSpec.of("a", heads=4, head_dim=4, d_model=8)
    half = Asked(Ratios.parse(0.5), scorer="magnitude", round_to=4)
    quarter = Asked(Ratios.parse({"qk": 0.25}), scorer="fisher")
    first = LayerPlan(spec, (0,))
    both = Plan((first,), half).then(Plan((LayerPlan(first.after, (0,)),), quarter))
    assert both.asked is not None
    assert both.asked.ratios == Ratios.parse({"qk": 0.625, "vo": 0.5})
    assert (both.asked.scorer, both.asked.granularity, both.asked.round_to) == ("magnitude+fisher", "channel", 1)
    again = both.then(Plan((LayerPlan(both["a"].after, (0,)),), quarter))
    assert again.asked is not None
    assert again.asked.scorer == "magnitude+fisher"


def test_then_of_a_plan_for_another_model() -> None:
    spec = AttentionSpec.of("a", heads=4, head_dim=4, d_model=8)
    first = Plan((LayerPlan(spec, (0,)),))
    others = [
        Plan((LayerPlan(spec),)),  # made for the model as it was
        Plan((LayerPlan(AttentionSpec.of("a", heads=3, head_dim=5, d_model=8)),)),
        Plan((LayerPlan(AttentionSpec.of("a", heads=3, head_dim=4, d_model=9)),)),
        Plan((LayerPlan(AttentionSpec.of("a", heads=3, head_dim=4, d_model=8, q_in=5)),)),
        Plan((LayerPlan(AttentionSpec.of("a", heads=3, head_dim=4, d_model=8, bias=(True, False, True, True))),)),
        Plan((LayerPlan(AttentionSpec.of("a", heads=3, head_dim=4, d_model=8, bias_kv=True)),)),
    ]
    for other in others:
        with pytest.raises(PlanMismatchError) as caught:
            first.then(other)
        assert caught.value.where == "a"
        assert "3 heads of 4" in caught.value.expected
