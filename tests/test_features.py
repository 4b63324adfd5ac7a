"""Which features go and how plans of them compose, counted and multiplied by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnprune import AttentionSpec, LayerPlan, Plan, Ratios, Rules
from attnprune.errors import NonFiniteError, PlanMismatchError, ScorerError, UnknownUnitError
from attnprune.planning.features import thin, uneven
from attnprune.values.channel_maps import ChannelMaps
from attnprune.values.feature_maps import FeatureMaps
from attnprune.values.layer_plan import difference, make_layer
from attnprune.values.layout import PROJECTIONS


def spec(name: str = "a", width: int = 4, **facts: Any) -> AttentionSpec:
    return AttentionSpec.of(name, heads=2, head_dim=2, d_model=width, **facts)


def of_q(layers: LayerPlan | list[LayerPlan], scores: Any, share: float, k: float = 0.0, **rules: Any) -> Any:
    """The features that Q leaves out, by layer."""
    layers = layers if isinstance(layers, list) else [layers]
    given = {layer.spec.name: {"q": torch.tensor(one)} for layer, one in zip(layers, scores, strict=True)}
    found = thin(Plan(tuple(layers)), given, Ratios(q=share, k=k), Rules(**rules))
    assert not any(gone for layer in found for gone in layer.features[1:])
    return [layer.features[0] for layer in found]


# which go

SCORES = [[3.0, 1.0, 2.0, 4.0]]


@pytest.mark.parametrize(
    ("share", "rounding", "gone"),
    [
        (0.375, "nearest", (1, 2)),  # one and a half of four
        (0.37, "nearest", (1,)),
        (0.375, "down", (1,)),
        (0.3, "up", (1, 2)),
        (0.5, "up", (1, 2)),  # all that was asked has gone
        (0.5, "down", (1, 2)),
        (0.99, "nearest", (0, 1, 2)),  # one stays
        (0.1, "nearest", ()),
    ],
)
def test_the_cheapest_go_to_the_nearest_or_as_the_rounding_says(share: float, rounding: Any, gone: Any) -> None:
    assert of_q(LayerPlan(spec()), SCORES, share, rounding=rounding) == [gone]


def test_three_tenths_of_ten_are_three() -> None:
    for rounding in ("nearest", "down", "up"):
        assert of_q(LayerPlan(spec(width=10)), [[*map(float, range(10))]], 0.3, rounding=rounding) == [(0, 1, 2)]


def test_what_channels_took_counts_and_features_free_what_is_left_of_them() -> None:
    """Of 16 weights 8 went with channels, each feature has 2 left: for three quarters two of them go."""
    layer = LayerPlan(spec(), qk=((0,), (1,)))
    assert of_q(layer, SCORES, 0.75, k=0.5) == [(1, 2)]


def test_what_stays_is_a_multiple() -> None:
    """Of ten features two go first, then four at a time."""
    ramp = [*map(float, range(10))]
    found = [of_q(LayerPlan(spec(width=10)), [ramp], share, round_to=4) for share in (0.15, 0.5, 0.6)]
    assert found == [[(0, 1)], [(*range(6),)], [(*range(6),)]]


def test_costs_are_of_one_feature() -> None:
    """Four that cost 2 each go before one that costs 3."""
    layers = [LayerPlan(spec("five", 5)), LayerPlan(spec("eight", 8))]
    found = of_q(layers, [[3.0] * 5, [2.0] * 8], 0.3, scope="global", round_to=4)
    assert found == [(), (0, 1, 2, 3)]


def test_numbers_count_features_of_the_dense_projection() -> None:
    layer = LayerPlan(spec(left_out=((1,), (), (), ())))
    assert of_q(layer, [[3.0, 1.0, 2.0]], 0.3) == [(2,)]


def test_what_is_uneven() -> None:
    ratios = Ratios(q=0.5, k=0.25, v=0.1, o=0.1)
    assert uneven(ratios, Rules()) == ("q",)
    assert uneven(ratios, Rules(split="auto")) == (), "one budget for all has no shares of its own"
    assert uneven(Ratios(q=0.1 + 0.2, k=0.3), Rules()) == (), "but for rounding they are one"


def test_scores_of_features_are_checked() -> None:
    with pytest.raises(ScorerError, match="scores of q's features: expected one for each of 4, found shape"):
        of_q(LayerPlan(spec()), [[1.0] * 3], 0.5)
    with pytest.raises(ScorerError, match="found none"):
        thin(Plan((LayerPlan(spec()),)), {}, Ratios(q=0.5), Rules())
    with pytest.raises(NonFiniteError, match="q's features"):
        of_q(LayerPlan(spec()), [[1.0, torch.nan, 0.0, 0.0]], 0.5)


# plans


def test_units_that_there_are_not() -> None:
    rotary = replace(spec(), qk_dims=(4, 4), rotary="half", rotary_dims=(4, 4))
    wrong: list[Any] = [
        lambda: LayerPlan(spec(), features=((0, 1, 2, 3), (), (), ())),
        lambda: LayerPlan(spec(), features=((), (4,), (), ())),
        lambda: LayerPlan(spec(), features=((), (), (1, 0), ())),
        lambda: LayerPlan(spec(), heads=(-1,)),
        lambda: LayerPlan(spec(), heads=(2,)),
        lambda: LayerPlan(spec(), qk=((-1,), ())),
        lambda: LayerPlan(spec(), heads=(0,), qk=((0,), ())),
        lambda: LayerPlan(rotary, qk=((0,), ())),
    ]
    for make in wrong:
        with pytest.raises(UnknownUnitError):
            make()
    LayerPlan(rotary, qk=((0, 2), ()))


def test_channels_of_heads_that_go_whole_are_left_out() -> None:
    assert make_layer(spec(), {0}, {"qk": ((1,), (0,)), "vo": ((), ())}).qk == ((), (0,))


def test_rotary_channels_that_are_left_are_counted() -> None:
    """The first four of six are rotated; the pair 1 and 3 goes, and the last two, which are not rotated."""
    one = replace(spec(), qk_dims=(6, 6), rotary="half", rotary_dims=(4, 4))
    assert LayerPlan(one, qk=((1, 3), (4, 5))).after.rotary_dims == (2, 4)


def test_what_lies_beside_q_reads_what_q_reads() -> None:
    layer = LayerPlan(spec(q_extra=1), features=((0, 3), (1,), (), ()))
    assert [layer.left(p) for p in ("q", "x", "k", "v", "o")] == [(1, 2), (1, 2), (0, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3)]  # type: ignore[arg-type]


def test_a_refit_alone_is_something() -> None:
    assert LayerPlan(spec()).empty
    assert not LayerPlan(spec(), refit=FeatureMaps({"q": torch.eye(4)})).empty


OTHER: dict[str, Any] = {
    "name": "b", "qk_dims": (2, 1), "vo_dims": (1, 2), "d_model": 5, "q_in": 5, "k_in": 5, "v_in": 5, "q_extra": 1,
    "groups": (2, 1), "bias": (True, True, True, False), "bias_kv": True, "gated": True,
    "left_out": ((0,), (), (), ()),
}  # fmt: skip


@pytest.mark.parametrize("key", OTHER)
def test_a_plan_is_of_one_shape(key: str) -> None:
    with pytest.raises(PlanMismatchError):
        difference(spec(), replace(spec(), **{key: OTHER[key]}))


def test_how_weights_are_packed_and_scaled_is_no_shape() -> None:
    difference(spec(), replace(spec(), fused=True, scale=3.0))


# one plan and then another


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_refits_of_two_plans_are_multiplied() -> None:
    """``W x`` becomes ``W (R1 x' + s1)``, then ``W R1 (R2 x'' + s2) + W s1``."""
    first = LayerPlan(
        spec(), features=((1,), (), (), ()), refit=FeatureMaps({"q": numbers(4, 3)}, {"q": numbers(4, seed=1)})
    )
    second = LayerPlan(
        first.after, features=((3,), (0,), (), ()),
        refit=FeatureMaps({"q": numbers(3, 2, seed=2)}, {"q": numbers(3, seed=3), "k": numbers(4, seed=4)}),
    )  # fmt: skip
    whole = first.then(second)
    assert whole.features == ((1, 3), (0,), (), ())
    assert whole.refit is not None
    r1, s1, r2, s2 = numbers(4, 3), numbers(4, seed=1), numbers(3, 2, seed=2), numbers(3, seed=3)
    torch.testing.assert_close(whole.refit.reads["q"], r1 @ r2)
    torch.testing.assert_close(whole.refit.shifts["q"], s1 + r1 @ s2)
    torch.testing.assert_close(whole.refit.shifts["k"], numbers(4, seed=4))
    assert "k" not in whole.refit.reads, "as it stands"


def test_means_of_two_plans_count_what_the_first_made_of_o() -> None:
    """Of O the second sees ``O B``, and a bias that gained ``O s``: what it leaves out keeps ``O (B m + s)``."""
    eye = torch.eye(2, dtype=torch.float64)
    o, shift, mean = numbers(4, 3), numbers(4, seed=1), numbers(3, seed=2)
    maps = ChannelMaps((eye, eye), (eye, eye), (eye[:1], eye), o, shift)
    first = LayerPlan(spec(), vo=((0,), ()), fold=maps)
    second = LayerPlan(first.after, features=((), (), (), (2,)), refit=FeatureMaps(means=(((2,), mean),)))
    whole = first.then(second)
    assert whole.refit is not None
    ((outputs, found),) = whole.refit.means
    assert outputs == (2,)
    torch.testing.assert_close(found, o @ mean + shift)
    assert whole.fold is not None
    torch.testing.assert_close(whole.fold.o, o)


def test_numbers_of_two_plans_keep_their_precision() -> None:
    first = LayerPlan(spec(), features=((1,), (), (), ()), refit=FeatureMaps({"q": numbers(4, 3).float()}))
    second = LayerPlan(first.after, features=((3,), (), (), ()))
    for whole in (first.then(second), LayerPlan(spec()).then(first)):
        assert whole.refit is not None
        assert {tensor.dtype for tensor in whole.refit.tensors} == {torch.float32}


def test_units_of_a_second_plan_count_what_the_first_left() -> None:
    one = AttentionSpec.of("a", heads=3, head_dim=4, d_model=8)
    first = LayerPlan(one, heads=(0,), qk=((), (0,), (1,)), vo=((), (), (3,)))
    second = LayerPlan(first.after, heads=(1,), qk=((1,), ()), vo=((3,), ()))
    whole = first.then(second)
    assert (whole.heads, whole.qk, whole.vo) == ((0, 2), ((), (0, 2), ()), ((), (3,), ()))


def test_maps_of_one_of_two_plans_are_enough() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    turned = LayerPlan(spec(), fold=ChannelMaps((turn, eye), (turn, eye), (eye, eye), torch.eye(4).double()))
    plain = LayerPlan(spec(), qk=((0,), ()))
    both = turned.then(plain), plain.then(LayerPlan(plain.after, fold=ChannelMaps(
        (eye[:1, :1], turn), (eye[:1, :1], turn), (eye, eye), torch.eye(4).double())))  # fmt: skip
    for whole, q in zip(both, ((turn[1:], eye), (eye[1:], turn)), strict=True):
        assert whole.fold is not None
        assert all(torch.equal(one, other) for one, other in zip(whole.fold.q, q, strict=True))


def test_every_projection_has_its_place() -> None:
    """Features are told in the order of Q, K, V, O."""
    scores = {p: torch.arange(4.0) for p in PROJECTIONS}
    for number, p in enumerate(PROJECTIONS):
        found = thin(Plan((LayerPlan(spec()),)), {"a": scores}, Ratios(**{p: 0.5}), Rules())["a"].features
        assert [*map(bool, found)] == [place == number for place in range(4)]
