"""Which features projections leave out, where one of a pair is to lose more than the other: :func:`thin`."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import fsum

from torch import Tensor

from ..errors import NonFiniteError, ScorerError
from ..values.amount import shared
from ..values.layer_plan import LayerPlan
from ..values.layout import PROJECTIONS, Projection
from ..values.plan import Plan
from ..values.ratios import Ratios
from ..values.rules import Rules
from ..values.spec import AttentionSpec
from .allocate import groups_of

FeatureScores = Mapping[Projection, Tensor]
"""Of Q, K and V one score for every feature that it reads, of O for every one that it writes; the lowest goes first."""
LEAST = 1e-6
"""A share that is less than any feature's."""
_SLACK = 1e-9


def uneven(ratios: Ratios, rules: Rules) -> tuple[Projection, ...]:
    """The projections that are to lose more than they lose with others; none where one budget is for all of them."""
    together = shared(ratios, rules)
    return tuple(p for p in PROJECTIONS if ratios.of(p) > together.of(p) + LEAST)


def thin(plan: Plan, scores: Mapping[str, FeatureScores], ratios: Ratios, rules: Rules) -> Plan:
    """The plan with the features that go besides, so that every projection loses its own share.

    Args:
        plan: the channels and heads that go.
        scores: by attention, for every projection of :func:`uneven`.
        ratios: the share of each projection's weights that is to go.
        rules: scope and rounding.

    Returns:
        A plan in which each of these projections loses what was asked to within one unit: ``round_to`` features.

    >>> import torch
    >>> spec = AttentionSpec.of("attention", heads=2, head_dim=2, d_model=4)
    >>> scores = {"attention": {"q": torch.tensor([3.0, 1.0, 2.0, 4.0])}}
    >>> thin(Plan((LayerPlan(spec),)), scores, Ratios(q=0.5), Rules())["attention"].features
    ((1, 2), (), (), ())
    """
    which = uneven(ratios, rules)
    gone: list[dict[Projection, tuple[int, ...]]] = [{} for _ in plan]
    for p in which:
        for group in groups_of(plan.specs, rules.scope):
            members = [plan.layers[i] for i in group]
            costs = [_checked(layer.spec, p, scores.get(layer.spec.name, {}).get(p)) for layer in members]
            for i, features in zip(group, _least(members, costs, p, ratios.of(p), rules), strict=True):
                gone[i][p] = features
    layers = tuple(_with(layer, each) for layer, each in zip(plan, gone, strict=True))
    return replace(plan, layers=layers)


def _with(layer: LayerPlan, gone: Mapping[Projection, tuple[int, ...]]) -> LayerPlan:
    q, k, v, o = (gone.get(p, ()) for p in PROJECTIONS)
    return replace(layer, features=(q, k, v, o))


def _checked(spec: AttentionSpec, p: Projection, scores: Tensor | None) -> list[float]:
    where, width = f"{spec.name}: scores of {p}'s features", spec.width(p)
    if not isinstance(scores, Tensor) or scores.shape != (width,):
        found = "none" if scores is None else f"shape {tuple(getattr(scores, 'shape', ()))}"
        raise ScorerError(where, f"one for each of {width}", found, "return them from score_features")
    if not bool(scores.isfinite().all()):
        raise NonFiniteError(where, "finite scores", "NaN or infinite ones", "look for overflow in the loss")
    values: list[float] = scores.double().cpu().tolist()
    return values


def _least(
    layers: Sequence[LayerPlan], costs: Sequence[Sequence[float]], p: Projection, ratio: float, rules: Rules
) -> list[tuple[int, ...]]:
    """Per layer the features that go, so that all layers together lose this share of a projection's weights."""
    specs, after = [layer.spec for layer in layers], [layer.after for layer in layers]
    total = sum(spec.weights(p) for spec in specs)
    slack = -_SLACK if rules.rounding == "up" else _SLACK
    step, share = rules.step, {"nearest": 0.5, "down": 1.0, "up": 0.0}[rules.rounding]
    left = (ratio + slack) * total - (total - sum(spec.weights(p) for spec in after))
    orders = [[feature for _, feature in sorted(zip(each, range(len(each)), strict=True))] for each in costs]
    taken = [0] * len(layers)
    heap: list[tuple[float, int, int]] = []

    def offer(i: int) -> None:
        count = len(orders[i]) - taken[i]
        more = count - (count - 1) // step * step
        if count - more >= 1:
            cost = fsum(costs[i][feature] for feature in orders[i][taken[i] : taken[i] + more])
            heapq.heappush(heap, (cost / more, i, more))

    for i in range(len(layers)):
        offer(i)
    while heap:
        _, i, more = heapq.heappop(heap)
        weights = more * after[i].layout.channels(p)
        if weights * share <= left:
            taken[i], left = taken[i] + more, left - weights
            offer(i)
    present = [spec.present(p) for spec in specs]
    return [tuple(sorted(present[i][feature] for feature in order[: taken[i]])) for i, order in enumerate(orders)]
