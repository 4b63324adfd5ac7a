"""One choice per group, least loss within a budget: the multiple-choice knapsack, by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import torch

BINS = 20_000
"""Steps in which costs are counted, unless whole numbers allow fewer."""


class Choice(NamedTuple):
    """What one choice loses and costs."""

    loss: float
    cost: float


def choose(groups: Sequence[Sequence[Choice]], budget: float) -> list[int] | None:
    """For every group the number of its choice: together at most ``budget``, and the least loss that this allows.

    Of choices that lose the same, the dearer: no more goes than was asked. Dynamic programming over the cost spent
    takes any loss and any cost, in particular costs that rise and fall as latency does, where greedy removal and
    Lagrange multipliers miss what lies off the convex hull. Whole numbers with a common divisor are counted exactly.
    Other costs are counted in :data:`BINS` steps, rounded up so that the budget holds, and what rounding left over is
    spent by exchanging single choices at their exact cost.

    Args:
        groups: at least one choice each; losses and costs finite, losses from 0.
        budget: of the sum of costs.

    Returns:
        One number per group; None if the cheapest choices together exceed the budget.

    >>> groups = [[Choice(0, 4), Choice(1, 2)], [Choice(0, 4), Choice(3, 1)]]
    >>> choose(groups, 6), choose(groups, 5), choose(groups, 2)
    ([1, 0], [0, 1], None)
    """
    options = [_undominated(group) for group in groups]
    least = [min(group[i].cost for i in kept) for group, kept in zip(groups, options, strict=True)]
    extra = [[group[i].cost - low for i in kept] for group, kept, low in zip(groups, options, least, strict=True)]
    room = min(budget - sum(least), float(sum(max(row) for row in extra)))
    if room < 0:
        return None
    steps, whole = _steps(extra, room)
    best, picks = torch.zeros(1, device="cpu", dtype=torch.float64), []
    for group, kept, row in zip(groups, options, steps, strict=True):
        size = min(len(best) + max(row), whole + 1)
        found = torch.full((size,), torch.inf, device="cpu", dtype=torch.float64)
        pick = torch.zeros(size, device="cpu", dtype=torch.int64)
        for number, step in sorted(zip(kept, row, strict=True), key=lambda pair: pair[1]):
            reach = min(len(best), size - step)
            if reach <= 0:
                continue
            part = slice(step, step + reach)
            losses = best[:reach] + group[number].loss
            better = losses < found[part]
            found[part] = torch.where(better, losses, found[part])
            pick[part][better] = number
        best = found
        picks.append(pick)
    at = int(torch.nonzero(best == best.min())[-1])
    chosen: list[int] = []
    for pick, kept, row in zip(reversed(picks), reversed(options), reversed(steps), strict=True):
        chosen.append(int(pick[at]))
        at -= row[kept.index(chosen[-1])]
    return _exchanged(groups, options, chosen[::-1], budget)


def _undominated(group: Sequence[Choice]) -> list[int]:
    """Choices that no other beats in loss at no more cost."""
    kept: list[int] = []
    least, last = float("inf"), None
    for i in sorted(range(len(group)), key=lambda i: (group[i].cost, group[i].loss)):
        if group[i].loss <= least and group[i] != last:
            kept.append(i)
            least, last = group[i].loss, group[i]
    return kept


def _steps(extra: Sequence[Sequence[float]], room: float) -> tuple[list[list[int]], int]:
    """Costs as whole numbers of steps, and how many steps there are room for."""
    if all(isinstance(cost, int) for row in extra for cost in row):
        unit = gcd(*(int(cost) for row in extra for cost in row)) or 1
        if room // unit <= BINS:
            return [[int(cost) // unit for cost in row] for row in extra], int(room // unit)
    size = room / BINS or 1.0
    # a cost that is a whole number of steps but for rounding is not rounded up
    return [[-int(-(cost / size - 1e-9) // 1) for cost in row] for row in extra], int(room / size + 1e-9)


def _exchanged(
    groups: Sequence[Sequence[Choice]], options: Sequence[Sequence[int]], chosen: list[int], budget: float
) -> list[int]:
    """While a single exchange fits the budget and loses less (or as much, and keeps more), the best one is made."""
    chosen = list(chosen)
    while True:
        spent = sum(group[i].cost for group, i in zip(groups, chosen, strict=True))
        best: tuple[float, float, int, int] | None = None
        for g, (group, now) in enumerate(zip(groups, chosen, strict=True)):
            for i in options[g]:
                one = group[i]
                gain = (one.loss - group[now].loss, group[now].cost - one.cost)
                if spent - gain[1] <= budget and gain < (0.0, 0.0) and (best is None or (*gain, g, i) < best):
                    best = (*gain, g, i)
        if best is None:
            return chosen
        chosen[best[2]] = best[3]
