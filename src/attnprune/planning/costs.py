"""What the model at hand adds to a request: what ``"auto"`` rounds to here, and what shapes cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from glob import escape
from typing import Any

from torch import nn

from ..calibration.processes import of_first
from ..cost.counting import Prices, count_macs, count_parameters, mac_prices, parameter_prices
from ..cost.latency.table import LatencyTable
from ..cost.rounding import auto_rounding
from ..families.base import AttentionView
from ..families.tied import tied_to
from ..values.budget import Budget, Ceiling, Limit
from ..values.layout import KINDS
from ..values.request import Request
from ..values.rules import Rules
from .by_budget import Costs


def fitted(request: Request, model: nn.Module, views: Sequence[AttentionView]) -> tuple[Request, Costs | None]:
    """The request with a number to round to, and what shapes cost where a budget was asked for.

    Raises:
        LatencyError: the latency table is of another model.
        OptionError: the model costs no more than it may already.
    """
    rules, costs = request.rules, None
    if rules.round_to == "auto":
        rules = replace(rules, round_to=auto_rounding(views, rules.granularity))
    if isinstance(request.amount, (Budget, Ceiling)):
        costs, rules = _costs(request, request.amount, model, views, rules)
        request = replace(request, amount=costs.budget)
    return replace(request, rules=rules), costs


def _costs(
    request: Request, limit: Limit, model: nn.Module, views: Sequence[AttentionView], rules: Rules
) -> tuple[Costs, Rules]:
    """What shapes cost, and the rules, whose rounding for latency is that of the shapes that were measured."""
    evidence = request.evidence
    prices: Mapping[str, Prices] = {}
    latency: LatencyTable | None = None
    tied = tied_to(views)
    if limit.resource == "params":
        prices = {view.name: parameter_prices(view.spec) for view in views}
    elif limit.resource == "macs":
        prices = _of_all(mac_prices(model, views, evidence.example_inputs), tied)
    else:
        latency = evidence.latency or table_for(model, views, evidence.example_inputs, rules, evidence.progress)
        if rules.round_to == 1 and rules.granularity != "head":
            rules = replace(rules, round_to=latency.step)
    total = cost_now(limit, model, views, evidence.example_inputs, latency)
    return Costs(share_of(limit, total, latency), total, prices, latency, limit, tied), rules


def _of_all(prices: Mapping[str, Prices], tied: Mapping[str, str]) -> dict[str, Prices]:
    """Prices, those of attention whose projections others have too of all of these."""
    found = dict(prices)
    for name, first in tied.items():
        one, other = found[first], prices[name]
        found[first] = {kind: (one[kind][0] + other[kind][0], one[kind][1] + other[kind][1]) for kind in KINDS}
    return found


def share_of(limit: Limit, total: float, latency: LatencyTable | None) -> Budget:
    """A limit as a share of what the model costs now.

    Args:
        limit: what was asked for.
        total: what the model costs (:func:`cost_now`).
        latency: where that is latency, the table that it is a share of.

    Raises:
        OptionError: the model costs no more than it may.
    """
    if isinstance(limit, Budget):
        return limit
    return limit.of(total * (latency.seconds if latency is not None else 1.0))


def cost_now(
    budget: Limit, model: nn.Module, views: Sequence[AttentionView], example_inputs: Any, latency: LatencyTable | None
) -> float:
    """What the whole model costs now; for latency as a share of the model that was measured."""
    if budget.resource == "params":
        return count_parameters(model)
    if budget.resource == "macs":
        return count_macs(model, example_inputs)
    assert latency is not None
    return latency.predict([view.spec for view in views])


def table_for(
    model: nn.Module, views: Sequence[AttentionView], example_inputs: Any, rules: Rules, progress: bool
) -> LatencyTable:
    """Measures what plans by these rules need to know; of several processes that share data, the first one's counts."""
    from ..cost.latency import measure

    table = measure(
        model, example_inputs, granularity=rules.granularity, include=[escape(view.name) for view in views],
        round_to="auto" if rules.round_to == 1 else rules.round_to, progress=progress,
    )  # fmt: skip
    return of_first(table)
