"""Scores at the height of what layers really lose, found by running (``split="measured"``): :func:`measured`.

A score says what the loss of one unit does where nothing else goes. What many lose together may be another matter:
more, where each made up for the others; less, where a refit makes up for them. So each layer's channels of one kind
are taken away alone, at some levels, refits included, and what the model's outputs lose is seen. Between these levels
the scores say how it rises. What layers lose beside one another is not seen so: where that matters more, the scores as
they were may give the better plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate, pairwise
from math import fsum

from torch import nn

from ..bars import bar
from ..calibration.distance import Distance
from ..errors import AllocationError
from ..families.base import AttentionView
from ..surgery import masked_views
from ..values.layer_plan import LayerPlan
from ..values.layout import KINDS, Kind
from ..values.plan import Plan
from ..values.ratios import Ratios
from ..values.rules import Rules
from ..values.scores import Scores
from ..values.spec import AttentionSpec
from .allocate import Layer, allocate

LEVELS = (0.25, 0.5, 0.625, 0.75, 0.875, 0.9375)
"""Shares of a layer's channels of one kind that are taken away alone; closer where losses rise steeply."""
SAMPLES = 64
"""That outputs are compared on, spread evenly over the data."""
APART = 1e-9
"""Of the dearest channel: keeps those in their order that lose alike."""
TELLING = 1e-9
"""Sums of scores below this share of all tell nothing to scale."""
Maps = Callable[[Plan, Sequence[AttentionView]], Plan]
"""Gives a plan the maps of what stays."""


def measured(
    model: nn.Module,
    views: Sequence[AttentionView],
    scores: Mapping[str, Scores],
    rules: Rules,
    distance: Distance,
    maps: Maps,
    progress: bool = True,
) -> dict[str, Scores]:
    """The scores, every layer's of each kind scaled so that what goes together costs what was seen to be lost.

    Runs the model twelve times for each attention (:data:`LEVELS`, qk and vo).

    Args:
        model: left as found.
        views: the attention modules.
        scores: of their channels; the order in which these go stays.
        rules: whether heads are uniform, floors and rounding.
        distance: of the model's outputs now from those of the dense one.
        maps: what a plan does beside removing.
        progress: whether to show how far it has come.
    """
    alone = replace(rules, split="fixed", scope="local", match_dims=False)
    found: dict[str, Scores] = {}
    with bar(what="layers alone", shown=progress, total=len(views) * len(KINDS)) as shown:
        for view in views:
            own, layer = scores[view.name], Layer(view.spec, scores[view.name], alone)
            new = {kind: own.of(kind).clone() for kind in KINDS}
            for kind in KINDS:
                ranks = _ranks(layer, kind)
                points: dict[int, float] = {}
                for plan in _levels(view.spec, own, kind, alone):
                    gone = sum(map(len, _channels(plan.layers[0], kind))) // len(ranks[0])
                    if gone and gone not in points:
                        with masked_views(model, [view], maps(plan, [view])):
                            points[gone] = distance()
                costs = [fsum(float(new[kind][place]) for place in rank) for rank in ranks]
                for rank, cost in zip(ranks, rescaled(costs, points), strict=True):
                    for place in rank:
                        new[kind][place] = cost / len(rank)
                shown.update()
            found[view.name] = replace(own, qk=new["qk"], vo=new["vo"])
    return found


def between(first: Mapping[str, Scores], second: Mapping[str, Scores]) -> dict[str, Scores]:
    """The geometric means of scores that put channels in the same order."""
    return {
        name: replace(one, **{kind: (one.of(kind) * second[name].of(kind)).clamp_min(0).sqrt() for kind in KINDS})
        for name, one in first.items()
    }


def rescaled(costs: Sequence[float], points: Mapping[int, float]) -> list[float]:
    """Costs that rise, and whose sums over those that went first are what was seen to be lost.

    Between what was seen, the ratio of the loss to the sum of costs changes in a straight line.

    Args:
        costs: of what goes, in its order.
        points: what was lost, by how many went.

    >>> [round(cost, 3) for cost in rescaled([1.0, 1.0, 2.0, 4.0], {2: 6.0, 4: 24.0})]
    [3.0, 3.0, 6.0, 12.0]
    """
    sums = [0.0, *accumulate(costs)]
    places = [place for place in sorted(points) if sums[place] > TELLING * sums[-1]]
    ratios = [points[place] / sums[place] for place in places]
    if not any(ratios):
        return list(costs)
    heights = [sums[place] * _between(place, places, ratios) for place in range(len(sums))]
    blocks: list[tuple[float, int]] = []  # those that would fall share their mean
    for low, high in pairwise(heights):
        mean, size = high - low, 1
        while blocks and blocks[-1][0] >= mean:
            before, more = blocks.pop()
            mean, size = (before * more + mean * size) / (more + size), more + size
        blocks.append((mean, size))
    rising = [max(mean, 0.0) for mean, size in blocks for _ in range(size)]
    return [cost + APART * rising[-1] * number for number, cost in enumerate(rising)]


def _between(place: int, places: Sequence[int], values: Sequence[float]) -> float:
    """The value at a place: in a straight line between those known, that of the nearest beyond them."""
    after = next((number for number, known in enumerate(places) if known >= place), len(places))
    if after in (0, len(places)):
        return values[min(after, len(places) - 1)]
    share = (place - places[after - 1]) / (places[after] - places[after - 1])
    return values[after - 1] + share * (values[after] - values[after - 1])


def _levels(spec: AttentionSpec, scores: Scores, kind: Kind, rules: Rules) -> Iterator[Plan]:
    """Plans that take a share of one layer's channels of one kind alone, as far as floors allow."""
    for level in LEVELS:
        with suppress(AllocationError):
            yield allocate([spec], {spec.name: scores}, Ratios.parse({kind: level}), rules)


def _channels(layer: LayerPlan, kind: Kind) -> tuple[tuple[int, ...], ...]:
    return layer.qk if kind == "qk" else layer.vo


def _ranks(layer: Layer, kind: Kind) -> list[list[tuple[int, int]]]:
    """Key head and channel of what goes together, the first to go first."""
    orders, values = layer.order[kind], layer.values[kind]
    if layer.rules.heads == "uniform":
        return [list(enumerate(rank)) for rank in zip(*orders, strict=True)]
    every = [(value, key, rank) for key, own in enumerate(values) for rank, value in enumerate(own)]
    return [[(key, orders[key][rank])] for _, key, rank in sorted(every)]
