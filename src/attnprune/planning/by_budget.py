"""Plans for a budget of the whole model: parameters, multiply-adds or latency, with the least loss that it allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, product
from math import fsum, lcm
from typing import NamedTuple

from ..cost.counting import Prices, total
from ..cost.latency.table import LatencyTable
from ..errors import AllocationError, OptionError
from ..values.amount import check_amount
from ..values.budget import Budget, Ceiling, Limit
from ..values.layer_plan import LayerPlan
from ..values.layout import KINDS, PROJECTIONS, Kind
from ..values.plan import Plan
from ..values.ratios import Ratios
from ..values.request import Request
from ..values.rules import Rules
from ..values.scores import Scores
from ..values.spec import AttentionSpec
from .allocate import Layer, Move, check_scores, greedy, groups_of, no_scores
from .knapsack import Choice, choose
from .units import step_of

_SLACK = 1e-9  # of the total


@dataclass(frozen=True)
class Costs:
    """A budget, what the model costs now, and what its attention modules cost in other shapes."""

    budget: Budget
    total: float
    """What the whole model costs now."""
    prices: Mapping[str, Prices]
    """By name, what a qk and a vo channel cost; none for latency, which is not a sum over channels."""
    table: LatencyTable | None = None
    limit: Limit | None = None
    """What was asked for, in its own words; None: the budget itself."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Attention that loses what another one loses, as it has the same projections; prices are of both."""

    def _share(self, spec: AttentionSpec) -> float:
        """Of the latency, by an attention of this shape and all that have its projections."""
        assert self.table is not None
        names = [spec.name, *(name for name, first in self.tied.items() if first == spec.name)]
        return fsum(self.table.share(replace(spec, name=name)) for name in names)

    def of(self, spec: AttentionSpec) -> float:
        """What an attention costs in some shape, up to a constant of its own."""
        if self.table is not None:
            return self._share(spec)
        return total(spec, self.prices[spec.name])

    def shape(self, spec: AttentionSpec, heads: Sequence[int], qk: int, vo: int) -> float:
        """The same where these query heads are left, with equal dims."""
        keys = len(spec.keys_of(heads))
        if self.table is not None:
            return self._share(spec.keep(heads, [qk] * keys, [vo] * keys))
        prices = self.prices[spec.name]
        return len(heads) * spec.q_extra * prices["qk"][0] + sum(
            dim * (len(heads) * outer + keys * inner)
            for dim, (outer, inner) in ((qk, prices["qk"]), (vo, prices["vo"]))
        )

    def levels(self, spec: AttentionSpec, rules: Rules) -> tuple[list[int], dict[Kind, list[int]]]:
        """Numbers of units of heads, and of channels of each kind, that a layer may keep; what it has now among them.

        Units are whole heads, or with grouped queries key heads with all their query heads.
        """
        units = spec.head_units
        heads, dims = [len(units)], {kind: [max(spec.dims(kind))] for kind in KINDS}
        measured = None if self.table is None else self.table.grid(spec.name)
        if rules.granularity != "channel":
            counts = range(1, len(units))
            allowed = [n for n in counts if measured is None or n * len(units[0]) in measured.heads]
            by = rules.step if rules.granularity == "head" else 1
            heads += [n for n in allowed if rules.min_heads <= n and n % by == 0]
        if rules.granularity != "head":
            for kind in KINDS:
                now, step = dims[kind][0], lcm(rules.step, step_of(spec, kind))
                found = range(1, now) if measured is None else measured.dims(kind)
                dims[kind] += [n for n in found if rules.min_channels <= n < now and n % step == 0]
        return heads, dims

    def least(self, spec: AttentionSpec, rules: Rules) -> float:
        """What an attention costs at the floors."""
        if not spec.ragged:
            counts, dims = self.levels(spec, rules)
            units = sorted(spec.head_units, key=len)
            left = {count: [head for unit in units[:count] for head in unit] for count in counts}
            if self.table is None:
                return self.shape(spec, left[min(counts)], min(dims["qk"]), min(dims["vo"]))
            shapes = product(left.values(), dims["qk"], dims["vo"])
            return min(self.shape(spec, *one) for one in shapes if not rules.match_dims or one[1] == one[2])
        each = []
        for key in range(spec.kv_heads):
            heads = range(spec.groups[key])
            one = spec.keep(spec.layout.queries(key), [spec.qk_dims[key]], [spec.vo_dims[key]])
            dims = self.levels(one, rules)[1]
            each.append(self.shape(one, heads, min(dims["qk"]), min(dims["vo"])))
        return fsum(sorted(each)[: spec.kv_heads if rules.granularity == "channel" else rules.min_heads])


def check_budget(specs: Sequence[AttentionSpec], costs: Costs, rules: Rules) -> None:
    """Raises where budget, rules and modules contradict one another, before any data are read."""
    check_amount(costs.budget, rules)
    blank = {spec.name: no_scores(spec) for spec in specs}
    for spec in specs:
        layer = Layer(spec, blank[spec.name], rules)  # dims that cannot be matched raise
        if rules.heads == "uniform":
            if spec.ragged:
                raise OptionError(
                    spec.name, 'heads="ragged", as its heads differ already', 'heads="uniform"',
                    'pass heads="ragged" or exclude this layer',
                )  # fmt: skip
            for source in layer.sources():
                layer.offer(source)
    free = (1 - costs.budget.share) * costs.total
    now, least = ([each(spec) for spec in specs] for each in (costs.of, lambda spec: costs.least(spec, rules)))
    for group, target in zip(groups_of(specs, rules.scope), _targets(specs, costs, rules), strict=True):
        reach = fsum(now[i] - least[i] for i in group)
        if target > reach + _SLACK * costs.total:
            share = 1 - (reach / target * free) / costs.total
            expected, asked = f"a share of the whole model of at least {share:.3f}", f"{costs.budget.share:g}"
            if isinstance(costs.limit, Ceiling):
                unit = costs.total * (1.0 if costs.table is None else costs.table.seconds)
                expected, asked = (costs.limit.said(each * unit) for each in (share, costs.budget.share))
                expected = f"at least {expected}"
            raise AllocationError(
                f"target_{costs.budget.resource}" + (f" in {specs[group[0]].name}" if rules.scope == "local" else ""),
                f"{expected}, what is left when all attention is at its floors", asked,
                "raise the target, or lower min_heads, min_channels or round_to",
            )  # fmt: skip


def _targets(specs: Sequence[AttentionSpec], costs: Costs, rules: Rules) -> list[float]:
    """What every group of layers has to free: of all together, each layer the same fraction of its own cost."""
    free = (1 - costs.budget.share) * costs.total
    if rules.scope == "global":
        return [free]
    now = [costs.of(spec) for spec in specs]
    return [free * one / (fsum(now) or 1.0) for one in now]


def allocate_budget(
    specs: Sequence[AttentionSpec],
    scores: Mapping[str, Scores],
    costs: Costs,
    rules: Rules | None = None,
    scorer: str = "scores",
) -> Plan:
    """The plan of least loss whose cost is within the budget; loss is the sum of the scores of what goes.

    Uniform heads are decided by dynamic programming over the shapes that every layer may take
    (:func:`attnprune.planning.knapsack.choose`). Ragged heads go greedily by score per cost, which for costs that are a
    sum over channels is within one unit of the best.

    Args:
        specs: the attention modules, in model order.
        scores: by name; comparable across qk, vo, layers and heads.
        costs: the budget and what shapes cost.
        rules: granularity, scope, heads, rounding and floors; the split is ``"auto"`` or ``"measured"``.
        scorer: the scores' name, kept in the plan.

    Raises:
        AllocationError: the floors do not allow the budget; says the least that they allow.
        OptionError: ragged heads with a budget of latency.
    """
    rules = rules or Rules()
    rules = rules if rules.split == "measured" else replace(rules, split="auto")
    check_scores(specs, scores)
    check_budget(specs, costs, rules)
    targets = _targets(specs, costs, rules)
    if rules.heads == "ragged":
        layers = _free(specs, scores, costs.prices, targets, rules)
    else:
        layers = _best(specs, scores, costs, targets, rules)
    plan = Plan(tuple(layers))
    saved = fsum(costs.of(layer.spec) - costs.of(layer.after) for layer in plan)
    ratios = Ratios(*(max(plan.fraction(p), 0.0) for p in PROJECTIONS))
    kept = replace(costs.budget, promised=1 - saved / costs.total)
    return replace(plan, asked=Request(kept, rules).asked(scorer, ratios))


# uniform heads


class _Option(NamedTuple):
    """One shape of a layer, or the number of its channels of one kind alone."""

    choice: Choice
    heads: tuple[int, ...]
    """Units of heads that go whole."""
    gone: Mapping[Kind, int]
    """Channels that every other head loses."""


def _best(
    specs: Sequence[AttentionSpec],
    scores: Mapping[str, Scores],
    costs: Costs,
    targets: Sequence[float],
    rules: Rules,
) -> list[LayerPlan]:
    layers = [Layer(spec, scores[spec.name], rules, costs.prices.get(spec.name)) for spec in specs]
    for group, target in zip(groups_of(specs, rules.scope), targets, strict=True):
        options = [(i, found) for i in group for found in _options(layers[i], costs, rules)]
        now = fsum(found[0].choice.cost for _, found in options)  # the first option is what the layer has now
        chosen = choose([[one.choice for one in found] for _, found in options], now - target + _SLACK * costs.total)
        assert chosen is not None, "check_budget found that it can be reached"
        for (i, found), number in zip(options, chosen, strict=True):
            layers[i].alive = [head for head in layers[i].alive if head not in found[number].heads]
            for kind, count in found[number].gone.items():
                layers[i].gone[kind] = [count] * layers[i].spec.kv_heads
    return [layer.plan() for layer in layers]


def _options(layer: Layer, costs: Costs, rules: Rules) -> Iterator[list[_Option]]:
    """The groups of choices of a layer: its shapes, or where costs are a sum its qk and its vo channels apart."""
    spec = layer.spec
    counts, dims = costs.levels(spec, rules)
    if rules.granularity == "channel" and costs.table is None and not rules.match_dims:
        for kind in KINDS:
            price = sum(layer.price(kind, key) for key in layer.keys)
            lost, now = _losses(layer, kind, layer.keys), dims[kind][0]
            yield [_Option(Choice(lost[now - n], n * price), (), {kind: now - n}) for n in dims[kind]]
        return
    found = []
    order = _head_order(layer, rules)
    for count in counts:
        dropped, kept = tuple(order[: len(order) - count]), sorted(order[len(order) - count :])
        base = fsum(_head_loss(layer, head, rules) for head in dropped)
        keys = [0] if spec.kv_heads == 1 else kept
        both = {kind: _losses(layer, kind, keys) for kind in KINDS}
        heads = [head for number in kept for head in layer.units[number]]
        for qk, vo in product(dims["qk"], dims["vo"]):
            if rules.match_dims and qk != vo:
                continue
            gone: dict[Kind, int] = {"qk": dims["qk"][0] - qk, "vo": dims["vo"][0] - vo}
            loss = base + both["qk"][gone["qk"]] + both["vo"][gone["vo"]]
            found.append(_Option(Choice(loss, costs.shape(spec, heads, qk, vo)), dropped, gone))
    yield found


def _losses(layer: Layer, kind: Kind, heads: Sequence[int]) -> list[float]:
    """``(dim + 1,)``: what is lost when each of these heads loses its 0, 1, ... cheapest channels."""
    ranks = [fsum(layer.values[kind][head][rank] for head in heads) for rank in range(layer.spec.dims(kind)[0])]
    return [0.0, *accumulate(ranks)]


def _head_loss(layer: Layer, head: int, rules: Rules) -> float:
    if rules.granularity == "head":
        return layer.head_scores[head]
    if layer.spec.kv_heads == 1:
        return fsum(fsum(layer.values[kind][0]) for kind in KINDS) / len(layer.units)
    return fsum(fsum(layer.values[kind][head]) for kind in KINDS)


def _head_order(layer: Layer, rules: Rules) -> list[int]:
    """Units of heads, the one that goes first first."""
    return sorted(range(len(layer.units)), key=lambda head: (_head_loss(layer, head, rules), head))


# ragged heads


class _AtLeast:
    """Something to free at least, whatever it is that channels cost; the last move may free too much."""

    def __init__(self, target: float, total: float) -> None:
        self.target, self.freed, self.slack = target, 0, _SLACK * total
        self.whole_heads = False
        """Whether whole heads may free too much, too: once channels alone are too few."""

    @property
    def reached(self) -> bool:
        return self.freed >= self.target - self.slack

    def fits(self, move: Move, nearest: bool) -> bool:
        fine = nearest or self.whole_heads
        return not self.reached and (fine or self.freed + sum(move.frees.values()) <= self.target + self.slack)

    def spend(self, move: Move) -> None:
        self.freed += sum(move.frees.values())


def _free(
    specs: Sequence[AttentionSpec],
    scores: Mapping[str, Scores],
    prices: Mapping[str, Prices],
    targets: Sequence[float],
    rules: Rules,
) -> list[LayerPlan]:
    """Removes the cheapest units per price until each group has freed its target, or as much as floors allow.

    Args:
        specs: the attention modules.
        scores: by name.
        prices: by name, what a channel of each kind frees.
        targets: one for every layer (``scope="local"``), or one for all.
        rules: with ``split="auto"``.
    """
    layers = [Layer(spec, scores[spec.name], rules, prices[spec.name]) for spec in specs]
    for group, target in zip(groups_of(specs, rules.scope), targets, strict=True):
        budget = _AtLeast(target, sum(total(specs[i], prices[specs[i].name]) for i in group))
        greedy([layers[i] for i in group], budget)
        budget.whole_heads = True
        greedy([layers[i] for i in group], budget)
    return [layer.plan() for layer in layers]
