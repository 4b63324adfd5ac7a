"""Budgets: the least loss within what the whole model may cost, exactly."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import ASTConfig, ASTForAudioClassification

import attnprune
from attnprune import AttentionSpec, LatencyTable, LayerPlan, Rules, Scores, errors
from attnprune.cost.counting import count_macs, parameter_prices
from attnprune.cost.latency.table import Grid
from attnprune.planning import knapsack
from attnprune.planning.by_budget import Costs, allocate_budget
from attnprune.planning.knapsack import BINS, Choice, choose
from attnprune.values.budget import Budget
from attnprune.values.layout import KINDS

# the knapsack against all choices


def brute(groups: list[list[Choice]], budget: float) -> tuple[float, float] | None:
    """The least loss within the budget and, of those, the most cost."""
    found = []
    for combination in itertools.product(*groups):
        cost = sum(one.cost for one in combination)
        if cost <= budget:
            found.append((sum(one.loss for one in combination), -cost))
    return min(found, default=None)


def of(groups: list[list[Choice]], chosen: list[int]) -> tuple[float, float]:
    picked = [group[i] for group, i in zip(groups, chosen, strict=True)]
    return sum(one.loss for one in picked), sum(one.cost for one in picked)


def groups_of(costs: st.SearchStrategy[Any]) -> st.SearchStrategy[list[list[Choice]]]:
    losses = st.integers(0, 12).map(lambda n: n / 4)  # ties are common, sums exact
    return st.lists(st.lists(st.builds(Choice, losses, costs), min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=100)
@given(groups_of(st.integers(0, 40)), st.integers(0, 120))
def test_whole_costs_give_the_optimum(groups: list[list[Choice]], budget: int) -> None:
    best, chosen = brute(groups, budget), choose(groups, budget)
    assert (best is None) == (chosen is None)
    if best is not None and chosen is not None:
        loss, cost = of(groups, chosen)
        assert (loss, -cost) == best


@settings(max_examples=80)
@given(groups_of(st.floats(0, 1)), st.floats(0, 4))
def test_other_costs_keep_the_budget_and_lose_no_more_than_with_a_little_less(
    groups: list[list[Choice]], budget: float
) -> None:
    chosen = choose(groups, budget)
    assert (chosen is None) == (sum(min(one.cost for one in group) for group in groups) > budget)
    if chosen is None:
        return
    loss, cost = of(groups, chosen)
    assert cost <= budget
    room = budget - sum(min(one.cost for one in group) for group in groups)
    less = brute(groups, budget - room * (len(groups) + 1) / BINS)
    assert less is None or loss <= less[0]
    for g, group in enumerate(groups):  # no single exchange helps
        for i, one in enumerate(group):
            changed = [*chosen[:g], i, *chosen[g + 1 :]]
            if of(groups, changed)[1] <= budget:
                assert one.loss >= group[chosen[g]].loss


def test_large_whole_costs_are_counted_in_steps() -> None:
    torch.manual_seed(0)
    sizes = torch.randint(1, 10**12, (3, 6)).tolist()
    groups = [[Choice(float(1e12 - size), size) for size in row] for row in sizes]
    budget = sum(sorted(row)[2] for row in sizes)
    chosen = choose(groups, budget)
    assert chosen is not None
    assert of(groups, chosen)[1] <= budget
    less = brute(groups, budget - 4 * (budget - sum(map(min, sizes))) / BINS)
    assert less is not None
    assert of(groups, chosen)[0] <= less[0]


def test_costs_are_rounded_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "BINS", 10)
    chosen = choose([[Choice(1, 0.0), Choice(0, 1.9)]] * 8, 10.0)
    assert chosen is not None
    assert sum(chosen) == 5


def test_cliffs_off_the_convex_hull_are_found() -> None:
    """Greedy removal by loss per cost would never stop at the middle choice."""
    groups = [[Choice(0, 10.0), Choice(5, 6.0), Choice(6, 1.0)] for _ in range(2)]
    assert choose(groups, 16.0) == [0, 1]


# plans for a budget

Shape = tuple[int, int, int]


def spec(name: str, heads: int = 2, dim: int = 3, width: int = 4, **facts: Any) -> AttentionSpec:
    return AttentionSpec.of(name, heads=heads, head_dim=dim, d_model=width, **facts)


def scores_of(one: AttentionSpec, seed: int) -> Scores:
    draw = torch.Generator().manual_seed(seed)
    qk, vo = (torch.randint(0, 40, (one.heads, dim), generator=draw) / 8 for dim in (one.qk_dim, one.vo_dim))
    return Scores(qk, vo, torch.randint(0, 40, (one.heads,), generator=draw) / 8)


def lost(one: AttentionSpec, scores: Scores, shape: Shape, granularity: str) -> float:
    """The least loss of a uniform shape, by its definition: heads that go by their own score, channels by theirs."""
    heads, qk, vo = shape
    channels = {"qk": scores.qk.tolist(), "vo": scores.vo.tolist()}
    if granularity == "head":
        return sum(sorted(scores.head.tolist())[: one.heads - heads])
    whole = [sum(channels["qk"][h]) + sum(channels["vo"][h]) for h in range(one.heads)]
    order = sorted(range(one.heads), key=lambda h: (whole[h], h))
    dropped, kept = order[: one.heads - heads], order[one.heads - heads :]
    part = sum(
        sum(sorted(channels[kind][h])[: one.dims(kind)[h] - dim])  # type: ignore[index,arg-type]
        for kind, dim in (("qk", qk), ("vo", vo))
        for h in kept
    )
    return sum(whole[h] for h in dropped) + part


def gone(layer: LayerPlan, scores: Scores, granularity: str) -> float:
    """The scores of what a plan removes."""
    if granularity == "head":
        return float(scores.head[list(layer.heads)].sum())
    total = 0.0
    for kind in KINDS:
        for head, row in enumerate(scores.of(kind)):
            places = range(len(row)) if head in layer.heads else layer.removed(kind)[head]
            total += float(row[list(places)].sum())
    return total


def shapes(one: AttentionSpec, granularity: str, match: bool, step: int = 1) -> list[Shape]:
    def levels(n: int) -> list[int]:
        return [k for k in range(1, n + 1) if k % step == 0 or k == n]

    heads = [one.heads] if granularity == "channel" else list(range(1, one.heads + 1))
    dims = [one.qk_dim] if granularity == "head" else levels(one.qk_dim)
    return [shape for shape in itertools.product(heads, dims, dims) if not match or shape[1] == shape[2]]


def table_for(specs: list[AttentionSpec], seed: int, rest: float = 0.4) -> LatencyTable:
    """Times that rise and fall, of every shape."""
    draw = torch.Generator().manual_seed(seed)
    grids = []
    for one in specs:
        axes = [tuple(range(1, n + 1)) for n in (one.heads, one.qk_dim, one.vo_dim)]
        count = len(axes[0]) * len(axes[1]) * len(axes[2])
        shares = torch.rand(count, generator=draw).double()
        shares = shares / max(shares[-1], shares.max() * 0.6) * (1 - rest) / len(specs)
        shares[-1] = (1 - rest) / len(specs)
        grids.append(Grid(*axes, tuple(shares.tolist())))
    return LatencyTable({}, 1.0, rest, tuple((one.name, i) for i, one in enumerate(specs)), tuple(grids), 1, 3)


@settings(max_examples=40)
@given(
    st.integers(0, 999),
    st.sampled_from(["params", "macs", "latency"]),
    st.floats(0.3, 0.99),
    st.sampled_from(["channel", "head", "joint"]),
    st.booleans(),
)
def test_uniform_plans_are_the_best_of_all(
    seed: int, resource: Any, share: float, granularity: Any, match: bool
) -> None:
    specs = [spec("a"), spec("b", heads=3, dim=2, k_in=5, bias=(True, False, True, False))]
    scores = {one.name: scores_of(one, seed + i) for i, one in enumerate(specs)}
    if resource == "latency":
        costs = Costs(Budget(resource, share), 1.0, {}, table_for(specs, seed))
    else:
        made_up = {"a": {"qk": (3, 4), "vo": (5, 4)}, "b": {"qk": (1, 1), "vo": (0, 1)}}
        prices = made_up if resource == "macs" else {one.name: parameter_prices(one) for one in specs}
        total = 20 + sum(sum(one.dims(kind)) * sum(prices[one.name][kind]) for one in specs for kind in ("qk", "vo"))
        costs = Costs(Budget(resource, share), total, prices)
    rules = Rules(granularity, match_dims=match)

    def cost(one: AttentionSpec, shape: Shape) -> float:
        heads, qk, vo = shape
        return costs.of(one.keep(range(heads), [qk] * heads, [vo] * heads))

    groups = [
        [
            Choice(lost(one, scores[one.name], shape, granularity), cost(one, shape))
            for shape in shapes(one, granularity, match)
        ]
        for one in specs
    ]
    budget = sum(costs.of(one) for one in specs) - (1 - share) * costs.total
    best = brute(groups, budget + 1e-9 * costs.total)
    if best is None:
        with pytest.raises(errors.AllocationError, match="at least"):
            allocate_budget(specs, scores, costs, rules)
        return
    plan = allocate_budget(specs, scores, costs, rules)
    ours = [(len(layer.after.qk_dims), layer.after.qk_dim, layer.after.vo_dim) for layer in plan]
    assert not any(layer.after.ragged for layer in plan)
    loss = sum(lost(one, scores[one.name], shape, granularity) for one, shape in zip(specs, ours, strict=True))
    spent = sum(cost(one, shape) for one, shape in zip(specs, ours, strict=True))
    assert spent <= budget + 2e-9 * costs.total
    if resource == "latency":
        room = budget - sum(min(one.cost for one in group) for group in groups)
        less = brute(groups, budget - room * 3 / BINS)
        assert less is None or loss <= less[0] + 1e-9
    else:
        assert loss == pytest.approx(best[0], abs=1e-9)
    removed = sum(gone(layer, scores[layer.spec.name], granularity) for layer in plan)  # the cheapest units went
    assert removed == pytest.approx(loss, abs=1e-9)
    assert plan.asked is not None
    assert plan.asked.budget is not None
    assert plan.asked.budget.promised == pytest.approx(1 - (sum(map(costs.of, specs)) - spent) / costs.total)


@pytest.mark.parametrize("bias", [(True,) * 4, (False, True, False, True)])
@pytest.mark.parametrize("bias_kv", [False, True])
def test_prices_are_what_specs_hold(bias: Any, bias_kv: bool) -> None:
    one = spec("a", heads=3, dim=4, k_in=5, v_in=6, bias=bias, bias_kv=bias_kv)
    prices = parameter_prices(one)
    after = one.keep([0, 2], [1, 3], [4, 2])
    freed = (12 - 4) * sum(prices["qk"]) + (12 - 6) * sum(prices["vo"])
    assert one.parameters - after.parameters == freed


@settings(max_examples=40)
@given(
    st.integers(0, 999), st.floats(0.55, 0.95), st.sampled_from(["channel", "head", "joint"]), st.sampled_from([1, 2]),
    st.booleans(),
)  # fmt: skip
def test_ragged_plans_are_within_one_unit_below_the_budget(
    seed: int, share: float, granularity: Any, step: int, match: bool
) -> None:
    specs = [spec("a", dim=4), spec("b", heads=4, dim=6)]
    scores = {one.name: scores_of(one, seed + i) for i, one in enumerate(specs)}
    prices = {"a": {"qk": (4, 6), "vo": (15, 5)}, "b": {"qk": (3, 4), "vo": (5, 4)}}
    total = 100 + sum(sum(one.dims(kind)) * sum(prices[one.name][kind]) for one in specs for kind in ("qk", "vo"))
    costs = Costs(Budget("macs", share), total, prices)
    rules = Rules(granularity, heads="ragged", round_to=step, match_dims=match)
    try:
        plan = allocate_budget(specs, scores, costs, rules)
    except errors.AllocationError:
        least = total - sum(costs.of(one) - costs.least(one, rules) for one in specs)
        assert least > share * total
        return
    after = total - sum(costs.of(layer.spec) - costs.of(layer.after) for layer in plan)
    unit = step * (4 * 30 if granularity == "head" else 30)  # heads and channels compete: channels fill what is left
    assert share * total - unit < after <= share * total + 1e-6
    assert not match or all(layer.after.qk_dims == layer.after.vo_dims for layer in plan)


def test_a_head_does_not_go_for_want_of_a_channel() -> None:
    one = spec("a", heads=2, dim=4)
    cheap = Scores(torch.tensor([[0.0] * 4, [9.0] * 4]), torch.tensor([[0.0] * 4, [9.0] * 4]), torch.tensor([0.0, 9.0]))
    for share, channels in ((0.99, 1), (0.9, 2), (0.7, 5), (0.5625, 7), (0.5, 8)):
        costs = Costs(Budget("macs", share), 160, {"a": {"qk": (5, 5), "vo": (5, 5)}})
        plan = allocate_budget([one], {"a": cheap}, costs, Rules("joint", heads="ragged"))
        assert 16 - sum(plan["a"].after.qk_dims) - sum(plan["a"].after.vo_dims) == channels


def test_local_scope_takes_the_same_fraction_of_every_layer() -> None:
    specs = [spec("a", dim=8), spec("b", heads=4, dim=8)]
    scores = {"a": scores_of(specs[0], 0), "b": Scores(torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(4))}
    prices = {one.name: {"qk": (5, 5), "vo": (5, 5)} for one in specs}
    plan = allocate_budget(specs, scores, Costs(Budget("macs", 0.5), 960, prices), Rules(scope="local"))
    assert [sum(layer.after.qk_dims) + sum(layer.after.vo_dims) for layer in plan] == [16, 32]


def test_of_choices_that_lose_nothing_the_dearest_is_taken() -> None:
    one = spec("a", heads=1, dim=8)
    blank = {"a": Scores(torch.zeros(1, 8), torch.zeros(1, 8), torch.zeros(1))}
    plan = allocate_budget([one], blank, Costs(Budget("macs", 0.75), 160, {"a": {"qk": (5, 5), "vo": (5, 5)}}))
    assert sum(plan["a"].after.qk_dims) + sum(plan["a"].after.vo_dims) == 12


# through the front door


def encoder(layers: int = 3, **facts: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, **facts)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()


X = torch.linspace(-1, 1, 2 * 7 * 32).reshape(2, 7, 32)


class Cross(nn.Module):
    """Attention whose keys are others, fewer, narrower, and gain a token or two."""

    def __init__(self, **facts: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, kdim=6, vdim=10, batch_first=True, **facts)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x[:, :3, :6], x[:, :3, :10], need_weights=False)[0])


def ast() -> nn.Module:
    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=37, num_mel_bins=16,
        max_length=24, patch_size=8, frequency_stride=8, time_stride=8, num_labels=3,
    )  # fmt: skip
    return ASTForAudioClassification(config).eval()


MODELS: dict[str, tuple[Any, Any]] = {
    "ast": (ast, torch.ones(2, 24, 16)),
    "encoder": (encoder, X),
    "cross": (Cross, torch.ones(2, 5, 16)),
    "cross, more keys": (lambda: Cross(add_bias_kv=True, add_zero_attn=True), torch.ones(2, 5, 16)),
}


@pytest.mark.parametrize("heads", ["uniform", "ragged"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_promised_is_what_is_counted(name: str, heads: Any) -> None:
    build, x = MODELS[name]
    for resource, options in (("params", {}), ("macs", {"example_inputs": x})):
        report = attnprune.prune_attention(build(), heads=heads, **{f"target_{resource}": 0.85}, **options)
        assert report.plan.asked is not None
        budget = report.plan.asked.budget
        assert budget is not None
        before, after = report.model_parameters if resource == "params" else report.macs or (1, 1)
        assert budget.promised == pytest.approx(after / before, abs=1e-12)
        assert 0.75 < after / before <= 0.85
        assert "budget: " in str(report)
        assert "\nasked" not in str(report)
        assert report.plan.asked.split == "auto"
        assert attnprune.Plan.from_json(report.plan.to_json()) == report.plan


def test_budgets_with_data_rotate_and_refit_and_beat_ratios() -> None:
    data = [torch.randn(4, 24, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    dense, options = ast(), {"data": data, "progress": False}
    unseen = torch.randn(8, 24, 16, generator=torch.Generator().manual_seed(9))
    lost = {}
    with torch.no_grad():
        for way in ({"target_macs": 0.9, "example_inputs": data[0]}, {"target_params": 0.85}):
            model = ast()
            report = attnprune.prune_attention(model, **options, **way)  # type: ignore[arg-type]
            assert report.plan.asked is not None
            assert (report.plan.asked.basis, report.plan.asked.compensate) == ("rotated", "yes")
            assert report.plan.asked.scorer == "gate"
            lost[next(iter(way))] = float((model(unseen).logits - dense(unseen).logits).square().mean())
        share = report.model_parameters[1]
        for ratio in (0.3, 0.4, 0.5):  # the uniform plan of at least as many parameters
            model = ast()
            if attnprune.prune_attention(model, ratio, scope="local", **options).model_parameters[1] >= share:  # type: ignore[arg-type]
                uniform = float((model(unseen).logits - dense(unseen).logits).square().mean())
                more = model
    assert sum(p.numel() for p in more.parameters()) >= share
    assert lost["target_params"] < uniform


def test_unreachable_budgets_say_what_can_be_reached() -> None:
    for options in (
        {"target_params": 0.1},
        {"target_macs": 0.1, "example_inputs": X},
        {"target_params": 0.1, "scope": "local"},
    ):
        for heads in ("uniform", "ragged"):
            with pytest.raises(errors.AllocationError, match="at least") as caught:
                attnprune.make_plan(encoder(), heads=heads, min_channels=2, **options)  # type: ignore[arg-type]
            least = float(caught.value.expected.split("at least ")[1].split(",")[0])
            way = next(iter(options))
            plan = attnprune.make_plan(encoder(), heads=heads, min_channels=2, **{**options, way: least + 0.001})  # type: ignore[arg-type]
            assert {dim for one in plan.after for dim in (*one.qk_dims, *one.vo_dims)} == {2}


@pytest.mark.parametrize(("granularity", "least"), [("channel", 0.4), ("head", 0.375), ("joint", 0.3)])
def test_ragged_modules_reach_their_floors(granularity: Any, least: float) -> None:
    one = spec("a", heads=3, dim=8).keep(range(3), [8, 5, 3], [4, 8, 2])
    scores = Scores(torch.rand(3, 8), torch.rand(3, 8), torch.tensor([3.0, 2.0, 1.0]))
    scores.qk[2] += 2
    scores.vo[2] += 2
    if granularity == "head":
        scores.head[2] = 9.0
    rules, prices = Rules(granularity, heads="ragged"), {"a": {"qk": (5, 5), "vo": (5, 5)}}
    plan = allocate_budget([one], {"a": scores}, Costs(Budget("macs", least), 400, prices), rules)
    assert plan.asked is not None
    assert plan.asked.budget is not None
    assert plan.asked.budget.promised == pytest.approx(least)
    with pytest.raises(errors.AllocationError, match=f"at least {least:.3f}"):
        allocate_budget([one], {"a": scores}, Costs(Budget("macs", least - 1e-3), 400, prices), rules)


def test_unreachable_budgets_are_refused_before_data_are_read() -> None:
    def data() -> Any:
        raise AssertionError("read")
        yield

    with pytest.raises(errors.AllocationError):
        attnprune.make_plan(encoder(), target_params=0.1, data=data())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "one of target_error, target_latency, target_macs, target_params, found none of them"),
        ({"qkvo_ratios": 0.5, "target_params": 0.5}, "target_params.*qkvo_ratios=0.5 and target_params=0.5"),
        ({"target_macs": 0.5, "target_params": 0.5}, "target_macs=0.5 and target_params=0.5"),
        ({"target_params": 1.0}, r"target_params: expected a number in \(0, 1\)"),
        ({"target_params": 0}, r"target_params: expected a number in \(0, 1\)"),
        ({"target_params": True}, r"target_params: expected a number in \(0, 1\)"),
        ({"target_latency": float("nan")}, r"target_latency: expected a number in \(0, 1\)"),
        ({"target_macs": 0.5}, "target_macs: expected example_inputs"),
        ({"target_latency": 0.5}, "target_latency: expected example_inputs to measure with, or a latency table"),
        ({"target_latency": 0.5, "latency": 3}, "LatencyTable, found a int"),
        ({"target_params": 0.9, "match_dims": 1}, "match_dims"),
    ],
)
def test_what_is_refused(options: dict[str, Any], words: str) -> None:
    for call in (attnprune.make_plan, attnprune.prune_attention, attnprune.AttentionPruner):
        model = encoder()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(errors.OptionError, match=words):
            call(model, **options)  # type: ignore[operator]
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def table_of(model: nn.Module) -> LatencyTable:
    """Time in proportion to channels, but for a cliff where qk is unlike vo."""
    levels = (2, 4, 6, 8)
    shares = tuple(0.01 * (qk + vo) * (1 if qk == vo else 1.5) for qk in levels for vo in levels)
    specs = attnprune.find_attention(model)
    grid = Grid((4,), levels, levels, shares)
    return LatencyTable({}, 1.0, 1 - 0.16 * len(specs), tuple((one.name, 0) for one in specs), (grid,), 2, 3)


def test_latency_plans_come_from_measured_shapes_and_avoid_cliffs() -> None:
    model = encoder()
    table = table_of(model)
    plan = attnprune.make_plan(model, target_latency=0.8, latency=table, scorer="random")
    assert plan.asked is not None
    assert plan.asked.round_to == 2
    assert plan.asked.budget is not None
    assert plan.asked.budget.promised == pytest.approx(table.predict(plan))
    assert 0.75 < table.predict(plan) <= 0.8
    assert all(one.qk_dim == one.vo_dim for one in plan.after)
    assert {dim for one in plan.after for dim in one.qk_dims} <= {2, 4, 6, 8}
    for options in ({"heads": "ragged"}, {"granularity": "head"}):  # ragged times are not measured, nor are fewer heads
        with pytest.raises(errors.AttnPruneError, match=r"target_latency|at least 1\.000"):
            attnprune.make_plan(model, target_latency=0.8, latency=table, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["params", "macs", "latency"])
def test_a_pruner_ends_within_its_budget_and_resumes(way: str) -> None:
    def pruner(model: nn.Module) -> attnprune.AttentionPruner:
        extra = {"macs": {"example_inputs": X}, "latency": {"latency": table_of(encoder())}, "params": {}}[way]
        return attnprune.AttentionPruner(
            model, **{f"target_{way}": 0.8}, schedule="linear", steps=3, scorer="magnitude", **extra
        )  # type: ignore[arg-type]

    model, shares = encoder(), []
    one = pruner(model)
    table = table_of(encoder())
    state = one.state_dict()
    for number in range(3):
        report = one.step(example_inputs=X)
        specs = attnprune.find_attention(model)
        macs = count_macs(model, X) / count_macs(encoder(), X)
        params = report.model_parameters[1] / one.report.model_parameters[0]
        shares.append({"params": params, "macs": macs, "latency": table.predict(specs)}[way])
        assert shares[-1] <= 1 - 0.2 * (number + 1) / 3 + 1e-9
        if number == 0:
            state = one.state_dict()
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] > 0.7
    assert one.plan.asked is not None
    assert one.plan.asked.budget is not None
    assert one.plan.asked.budget.share == pytest.approx(0.8)
    assert one.plan.asked.budget.promised == pytest.approx(shares[-1])
    resumed = encoder()
    other = pruner(resumed)
    other.load_state_dict(state)
    with torch.no_grad():  # its weights
        first = pruner(mine := encoder())
        first.step()
        resumed.load_state_dict(mine.state_dict())
    other.step()
    other.step()
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in model.state_dict().items())
    late = pruner(mine)  # made for the model as it is after a step
    late.load_state_dict(state)
    late.step()
    late.step()
    assert all(torch.equal(value, mine.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(errors.OptionError, match="budget"):
        attnprune.AttentionPruner(encoder(), 0.5, steps=3).load_state_dict(state)
