"""Who goes: :func:`allocate` turns scores and ratios into a plan; ties go by (score, model order, unit).

One greedy loop serves every mode. A *move* removes one unit: a head, one channel of one head (ragged), one channel of
every head of a layer (uniform; the paper's PH-G), or a qk and a vo channel together (matched dims). The cheapest move
that fits its budget is made, until none fits. Modes differ only in which moves there are, and in what a budget spans:
one layer (local) or all of them (global).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import fsum, lcm
from typing import NamedTuple, Protocol

import torch

from ..cost.counting import Prices
from ..errors import AllocationError, OptionError, ScorerError
from ..values.amount import check_amount, shared
from ..values.layer_plan import LayerPlan, make_layer
from ..values.layout import KIND_OF, KINDS, PROJECTIONS, Kind
from ..values.plan import Plan
from ..values.ratios import Ratios
from ..values.request import Request
from ..values.rules import Rounding, Rules, Scope
from ..values.scores import Scores
from ..values.spec import AttentionSpec
from .units import ranked, step_of

_SLACK = 1e-9  # of a budget: keeps 0.3 x 10 = 3 in spite of binary fractions


def unmatched(spec: AttentionSpec) -> OptionError:
    """The error of a layer whose dims cannot be kept equal, as they are not."""
    remedy = "exclude this layer, or leave match_dims off"
    return OptionError(f"{spec.name}: match_dims", "as many qk as vo channels in every head", spec.describe(), remedy)


class Move(NamedTuple):
    cost: float
    heads: tuple[int, ...]
    """Key heads that lose channels, or units of heads (:attr:`AttentionSpec.head_units`) that go whole."""
    kinds: tuple[Kind, ...]
    """Whose channels go; none for whole heads."""
    channels: int
    """How many channels each of the heads loses."""
    frees: Mapping[Kind, int]
    """Weights freed."""


_SOURCES: Mapping[str, tuple[Kind, ...]] = {"qk": ("qk",), "vo": ("vo",), "pair": KINDS, "head": ()}
"""By name of a source, whose channels its moves take."""


class Layer:
    """One attention while the greedy loop takes units away."""

    def __init__(self, spec: AttentionSpec, scores: Scores, rules: Rules, prices: Prices | None = None) -> None:
        if rules.match_dims and spec.qk_dims != spec.vo_dims:
            raise unmatched(spec)
        self.spec, self.rules = spec, rules
        self.units = spec.head_units
        self.alive = list(range(len(self.units)))
        of_heads: list[float] = scores.head.tolist()
        self.head_scores = [fsum(of_heads[head] for head in unit) for unit in self.units]
        self.order: dict[Kind, list[list[int]]] = {}
        """Per key head its channels, the one that goes first first."""
        self.values: dict[Kind, list[list[float]]] = {}
        """Per key head what these cost, in this order."""
        self.steps: dict[Kind, int] = {}
        """Of how many channels what stays is a multiple."""
        for kind in KINDS:
            ranks = [ranked(spec, kind, key, row) for key, row in enumerate(scores.of(kind).tolist())]
            self.order[kind] = [order for order, _ in ranks]
            self.values[kind] = [costs for _, costs in ranks]
            self.steps[kind] = lcm(rules.step, step_of(spec, kind))
        self.gone: dict[Kind, list[int]] = {kind: [0] * spec.kv_heads for kind in KINDS}
        self.per_weight = rules.granularity == "joint" or rules.together
        """Whether costs are compared per weight, as moves of different kinds compete."""
        self.prices = prices or {kind: spec.per_channel(kind) for kind in KINDS}
        """What a channel frees: weights, or in a budget of something else that."""
        self.besides = spec.q_extra * prices["qk"][0] if prices else 0
        """What a query head frees beside its channels; in no ratio, as those never go alone."""

    @property
    def keys(self) -> list[int]:
        """Key heads that are left."""
        return [0] if self.spec.kv_heads == 1 else self.alive

    def price(self, kind: Kind, key: int) -> int:
        """What one channel of a key head and all its query heads frees."""
        outer, inner = self.prices[kind]
        return outer * (len(self.alive) if self.spec.kv_heads == 1 else self.spec.groups[key]) + inner

    def sources(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names of the places from which moves come; each offers one move at a time."""
        found: list[tuple[str, tuple[int, ...]]] = []
        if self.rules.granularity != "head":
            for name in ("pair",) if self.rules.match_dims else KINDS:
                groups = [(h,) for h in self.keys] if self.rules.heads == "ragged" else [tuple(self.keys)]
                found += [(name, heads) for heads in groups]
        if self.rules.granularity == "joint":
            found += [("head", (h,)) for h in self.alive]
        if self.rules.granularity == "head":
            found.append(("head", tuple(self.alive)))
        return found

    def offer(self, source: tuple[str, tuple[int, ...]]) -> Move | None:
        """The next move of a source, or None at its floor."""
        name, heads = source
        return self._drop(heads) if name == "head" else self._thin(_SOURCES[name], heads)

    def left(self, kind: Kind, head: int) -> int:
        return self.spec.dims(kind)[head] - self.gone[kind][head]

    def _thin(self, kinds: tuple[Kind, ...], heads: tuple[int, ...]) -> Move | None:
        """Removes the cheapest channels of these heads, down to the next multiple of ``round_to``."""
        step, floor = lcm(*(self.steps[kind] for kind in kinds)), self.rules.min_channels
        counts = {self.left(kind, head) for kind in kinds for head in heads}
        if len(counts) != 1:
            raise OptionError(
                self.spec.name,
                'heads="ragged", as its heads differ already',
                'heads="uniform"',
                'pass heads="ragged" or exclude this layer',
            )
        count = counts.pop()
        target = (count - 1) // step * step
        if target < max(floor, 1):
            return None
        channels = count - target
        parts = ((self.values[kind][h], self.gone[kind][h]) for kind in kinds for h in heads)
        cost = fsum(fsum(values[gone : gone + channels]) for values, gone in parts)
        freed = {kind: channels * sum(self.price(kind, h) for h in heads) for kind in kinds}
        return Move(self._price(cost, freed, channels), heads, kinds, channels, freed)

    def _drop(self, heads: tuple[int, ...]) -> Move | None:
        """Removes a unit of heads; with head granularity the cheapest ones, down to a multiple of ``round_to``."""
        count, joint = len(self.alive), self.rules.granularity == "joint"
        step = 1 if joint else self.rules.step
        target = (count - 1) // step * step
        if target < self.rules.min_heads:
            return None
        shared = self.spec.kv_heads == 1 and count > 1  # its keys and values stay for the other heads
        if joint:
            keys = [0] if shared else heads
            cost = fsum(fsum(self.values[kind][h][self.gone[kind][h] :]) for kind in KINDS for h in keys)
            cost = cost / count if shared else cost
        else:
            heads = tuple(sorted(heads, key=lambda h: (self.head_scores[h], h))[: count - target])
            cost = fsum(self.head_scores[h] for h in heads)
        freed: dict[Kind, int] = {
            kind: len(heads) * self.left(kind, 0) * self.prices[kind][0]
            if shared
            else sum(self.left(kind, h) * self.price(kind, h) for h in heads)
            for kind in KINDS
        }
        freed["qk"] += self.besides * sum(len(self.units[h]) for h in heads)
        return Move(self._price(cost, freed, len(heads)), heads, (), 0, freed)

    def _price(self, cost: float, freed: Mapping[Kind, int], units: int) -> float:
        return cost / max(sum(freed.values()), 1) if self.per_weight else cost / units

    def make(self, move: Move) -> None:
        if not move.kinds:
            self.alive = [h for h in self.alive if h not in move.heads]
        for kind in move.kinds:
            for head in move.heads:
                self.gone[kind][head] += move.channels

    def plan(self) -> LayerPlan:
        heads = {head for number, unit in enumerate(self.units) if number not in self.alive for head in unit}
        channels = {
            kind: tuple(tuple(order[:gone]) for order, gone in zip(self.order[kind], self.gone[kind], strict=True))
            for kind in KINDS
        }
        return make_layer(self.spec, heads, channels)


class _Budget:
    """Weights to free: for qk and vo apart, or (``split="auto"``) for both together."""

    def __init__(
        self, specs: Iterable[AttentionSpec], wanted: Ratios, together: bool, rounding: Rounding = "nearest"
    ) -> None:
        specs, self.rounding = list(specs), rounding
        self.key: dict[Kind, str] = {kind: "all" if together else kind for kind in KINDS}
        self.target = dict.fromkeys(self.key.values(), 0.0)
        self.total = dict.fromkeys(self.key.values(), 0)
        self.freed = dict.fromkeys(self.key.values(), 0)
        for p in PROJECTIONS:
            weights, key = sum(spec.weights(p) for spec in specs), self.key[KIND_OF[p]]
            self.total[key] += weights
            self.target[key] += weights * wanted.of(p)

    def fits(self, move: Move, nearest: bool) -> bool:
        """Whether what is freed stays within what was asked; with ``nearest`` as the rounding says: or comes nearer to
        it, or was still short of it."""
        share = {"nearest": 0.5, "down": 1.0, "up": 0.0}[self.rounding] if nearest else 1.0
        cost: dict[str, int] = {}
        for kind, weights in move.frees.items():
            cost[self.key[kind]] = cost.get(self.key[kind], 0) + weights
        slack = -_SLACK if nearest and self.rounding == "up" else _SLACK
        return all(
            self.freed[key] + weights * share <= self.target[key] + slack * self.total[key]
            for key, weights in cost.items()
        )

    def spend(self, move: Move) -> None:
        for kind, weights in move.frees.items():
            self.freed[self.key[kind]] += weights


class Spending(Protocol):
    """Decides which moves may still be made."""

    def fits(self, move: Move, nearest: bool) -> bool: ...

    def spend(self, move: Move) -> None: ...


def greedy(layers: Sequence[Layer], budget: Spending) -> None:
    """Makes the cheapest move that fits, until none fits. ``born`` marks offers that a later move has outdated."""
    heap: list[tuple[float, int, int, int, str, Move]] = []
    born = [0] * len(layers)

    def push(i: int, sources: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        for name, heads in sources:
            move = layers[i].offer((name, heads))
            if move is not None:
                rank = list(_SOURCES).index(name) * len(layers[i].units) + heads[0]
                heapq.heappush(heap, (move.cost, i, rank, born[i], name, move))

    for i, layer in enumerate(layers):
        push(i, layer.sources())
    while heap:
        _, i, _, when, name, move = heapq.heappop(heap)
        fine = bool(move.kinds) or layers[i].rules.granularity == "head"  # else finer moves fill what is left
        if when != born[i] or not budget.fits(move, nearest=fine):
            continue
        layers[i].make(move)
        budget.spend(move)
        if layers[i].rules.granularity == "channel":
            push(i, [(name, move.heads)])  # channels of one source outdate no other offer
        else:
            born[i] += 1
            push(i, layers[i].sources())


def groups_of(specs: Sequence[AttentionSpec], scope: Scope) -> Iterator[list[int]]:
    """Numbers of the layers that share a budget: every layer its own, or all together."""
    yield from ([i] for i in range(len(specs))) if scope == "local" else [list(range(len(specs)))]


def check_request(specs: Sequence[AttentionSpec], ratios: Ratios, rules: Rules) -> None:
    """Raises where ratios, rules and modules contradict one another, before any data are read."""
    check_amount(ratios, rules)
    if rules.granularity != "joint":  # what can be reached does not depend on the scores
        allocate(specs, {spec.name: no_scores(spec) for spec in specs}, ratios, rules)


def no_scores(spec: AttentionSpec) -> Scores:
    qk, vo = (torch.zeros(spec.kv_heads, dim, device="cpu") for dim in (spec.qk_dim, spec.vo_dim))
    return Scores(qk, vo, torch.zeros(spec.heads, device="cpu"))


def allocate(
    specs: Sequence[AttentionSpec],
    scores: Mapping[str, Scores],
    ratios: Ratios,
    rules: Rules | None = None,
    scorer: str = "scores",
) -> Plan:
    """Decides which channels and heads go: what projections lose together. Where Q is to lose more than K, or V than
    O, :func:`attnprune.make_plan` takes the rest from features.

    Args:
        specs: the attention modules, in model order.
        scores: by name, one for each spec; the lowest goes first.
        ratios: the fraction of each projection's weights to remove.
        rules: granularity, scope, heads, split, rounding and floors.
        scorer: the scores' name, kept in the plan.

    Returns:
        The plan. What it frees differs from what was asked (of a pair: from the smaller ratio) by less than one unit of
        the granularity and rounding.

    Raises:
        ScorerError: scores are missing or of the wrong shape.
        NonFiniteError: scores are NaN or infinite.
        AllocationError: the floors do not allow the ratios.

    >>> import torch
    >>> spec = AttentionSpec.of("attn", heads=2, head_dim=2, d_model=4)
    >>> scores = Scores(qk=torch.tensor([[1.0, 2], [4, 3]]), vo=torch.tensor([[1.0, 2], [4, 3]]), head=torch.ones(2))
    >>> allocate([spec], {"attn": scores}, Ratios.parse(0.5))["attn"].qk
    ((0,), (1,))
    """
    rules = rules or Rules()
    check_amount(ratios, rules)
    wanted = shared(ratios, rules)
    check_scores(specs, scores)
    layers = [Layer(spec, scores[spec.name], rules) for spec in specs]
    for group in groups_of(specs, rules.scope):
        members = [layers[i] for i in group]
        together = rules.together or rules.match_dims
        budget = _Budget([layer.spec for layer in members], wanted, together, rules.rounding)
        greedy(members, budget)
        _check_reached(members, budget, rules)
    return Plan(tuple(layer.plan() for layer in layers), Request(ratios, rules).asked(scorer))


def check_scores(specs: Sequence[AttentionSpec], scores: Mapping[str, Scores]) -> None:
    """Raises ScorerError unless there are scores of the right shape for every spec."""
    if not isinstance(scores, Mapping):
        raise ScorerError("scores", "a mapping from name to Scores", f"a {type(scores).__name__}", "return a dict")
    missing = [spec.name for spec in specs if spec.name not in scores]
    if missing:
        raise ScorerError(missing[0], "scores for every attention module", "none", "return one Scores for each view")
    for spec in specs:
        if not isinstance(scores[spec.name], Scores):
            found = f"a {type(scores[spec.name]).__name__}"
            raise ScorerError(f"{spec.name}: scores", "attnprune.Scores", found, "wrap qk, vo and head in Scores")
        scores[spec.name].check(spec)


def _unit(layer: Layer, kind: Kind) -> int:
    """Weights in one unit, were there no floors."""
    spec, rules = layer.spec, layer.rules
    dim, outer, inner = max(spec.dims(kind)), *spec.per_channel(kind)
    each = outer * max(spec.groups) + inner
    if rules.granularity == "head":
        return rules.step * dim * (outer if spec.kv_heads == 1 else each)
    heads = 1 if rules.heads == "ragged" else spec.kv_heads
    return min(layer.steps[kind], dim) * heads * each


def _check_reached(layers: Sequence[Layer], budget: _Budget, rules: Rules) -> None:
    """Raises if floors, not rounding, kept the budget from being reached."""
    for key, target in budget.target.items():
        kinds = [kind for kind in KINDS if budget.key[kind] == key]
        unit = max(sum(_unit(layer, kind) for kind in kinds) for layer in layers)
        if target - budget.freed[key] >= unit:
            where = layers[0].spec.name if len(layers) == 1 else "all layers"
            raise AllocationError(
                where if key == "all" else f"{where}: {key}",
                f"floors that allow {target / budget.total[key]:.1%} to go",
                f"at most {budget.freed[key] / budget.total[key]:.1%} with min_heads={rules.min_heads}, "
                f"min_channels={rules.min_channels}, round_to={rules.round_to}",
                "lower the floors, the rounding or the ratio",
            )
