"""Features that go beside channels, out of one budget (``split="all"``): :func:`beside`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import fsum

from ..values.layout import KINDS, PROJECTIONS, Projection
from ..values.plan import Plan
from ..values.ratios import Ratios
from ..values.rules import Rules
from ..values.scores import Scores
from ..values.spec import AttentionSpec
from .allocate import Layer, allocate
from .features import FeatureScores

SHARES = (0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16, 0.24, 0.32)
"""Of what goes, how much may come from features."""
DEARER = 3.0
"""How much less than a channel a feature has to lose, per weight: gates on single features do not see how the loss of
several adds up, and a plan without features runs faster. Of one model, the keywords, whose test losses were seen
beside those of the validation split (``benchmarks/outer_sides.py``)."""
Move = tuple[float, int, Projection, tuple[int, ...], int]
"""Loss per weight, the layer's number, a projection, features of it, and the weights that they free."""


def beside(
    plan: Plan,
    scores: Mapping[str, Scores],
    ratios: Ratios,
    rules: Rules,
    losses: Callable[[Plan], Mapping[str, FeatureScores]],
) -> Plan:
    """The plan, or one that takes fewer channels, and features that lose less per weight, with as many weights gone.

    Args:
        plan: the channels that go where no feature does.
        scores: of channels, by attention.
        ratios: whose total is the budget.
        rules: with ``split="all"``.
        losses: by attention and projection what is lost with features that go one after the other, in the unit of the
            scores, where these channels go.
    """
    specs, moves, best = plan.specs, _moves(plan, losses(plan), rules), 0.0
    budget = fsum(spec.weights(p) * ratios.of(p) for spec in specs for p in PROJECTIONS)
    for share in SHARES:
        fewer = _fewer(specs, scores, ratios, rules, share)
        taken = _cheapest(fewer, moves, budget, rules)
        if not taken or DEARER * taken[-1][0] > _dearest(fewer, scores, rules):
            break
        best = share
    if not best:
        return plan
    fewer = _fewer(specs, scores, ratios, rules, best)
    gone: list[dict[Projection, list[int]]] = [{p: [] for p in PROJECTIONS} for _ in specs]
    for _, i, p, features, _ in _cheapest(fewer, _moves(fewer, losses(fewer), rules), budget, rules):
        gone[i][p] += [specs[i].present(p)[feature] for feature in features]
    layers = []
    for layer, one in zip(fewer, gone, strict=True):
        q, k, v, o = (tuple(sorted(one[p])) for p in PROJECTIONS)
        layers.append(replace(layer, features=(q, k, v, o)))
    return replace(plan, layers=tuple(layers))


def _fewer(
    specs: Sequence[AttentionSpec], scores: Mapping[str, Scores], ratios: Ratios, rules: Rules, share: float
) -> Plan:
    return allocate(specs, scores, Ratios(*(ratios.of(p) * (1 - share) for p in PROJECTIONS)), rules)


def _moves(plan: Plan, losses: Mapping[str, FeatureScores], rules: Rules) -> list[Move]:
    """All features, by loss per weight; of each projection one after the other, ``round_to`` at a time."""
    found: list[Move] = []
    for i, layer in enumerate(plan):
        for p, loss in losses[layer.spec.name].items():
            weights, (total, order) = layer.after.layout.channels(p), loss.double().cpu().sort()
            count, start, so_far, least = len(order), 0, 0.0, 0.0
            end = count - (count - 1) // rules.step * rules.step
            while end < count:
                more = fsum(total[start:end].tolist()) if p == "o" else float(total[end - 1]) - so_far
                so_far, freed = float(total[end - 1]), weights * (end - start)
                least = max(least, more / max(freed, 1))
                found.append((least, i, p, tuple(order[start:end].tolist()), freed))
                start, end = end, end + rules.step
    return sorted(found)


def _cheapest(plan: Plan, moves: Sequence[Move], budget: float, rules: Rules) -> list[Move]:
    """The first moves, as many as the budget needs beside the plan's channels."""
    left = budget - sum(layer.spec.weights(p) - layer.after.weights(p) for layer in plan for p in PROJECTIONS)
    share = {"nearest": 0.5, "down": 1.0, "up": 0.0}[rules.rounding]
    found = []
    for move in moves:
        if move[-1] * share >= left:
            break
        found.append(move)
        left -= move[-1]
    return found


def _dearest(plan: Plan, scores: Mapping[str, Scores], rules: Rules) -> float:
    """What the dearest channels of a plan lose per weight."""
    most = 0.0
    for layer in plan:
        one = Layer(layer.spec, scores[layer.spec.name], rules)
        for kind in KINDS:
            counts = [len(gone) for gone in (layer.qk if kind == "qk" else layer.vo)]
            last = [one.values[kind][key][count - 1] if count else 0.0 for key, count in enumerate(counts)]
            prices = [one.price(kind, key) for key in range(len(counts))]
            if rules.heads == "ragged":
                most = max(most, *(cost / max(price, 1) for cost, price in zip(last, prices, strict=True)))
            else:
                most = max(most, fsum(last) / max(sum(prices), 1))
    return most
