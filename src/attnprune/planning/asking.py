"""How a user may ask: by ratios, by an error, or by a budget of the whole model; and what budgets need to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from glob import escape
from typing import Any

from torch import nn

from ..cost.counting import count_macs, count_parameters, mac_prices, parameter_prices
from ..cost.latency.table import LatencyTable
from ..errors import OptionError, RatioError
from ..families.base import AttentionView
from ..values.budget import RESOURCES, Budget
from ..values.ratios import Ratios
from ..values.rules import Rules
from .by_budget import Costs

WAYS = "qkvo_ratios", "target_error", *(f"target_{resource}" for resource in RESOURCES)


def check_ways(**given: Any) -> Budget | None:
    """The budget, if one was asked for.

    Raises:
        OptionError: several ways to ask, or a share outside (0, 1).
        RatioError: (an OptionError) none of them.
    """
    used = [way for way in WAYS if given[way] is not None]
    if not used:
        expected = f"a number in [0, 1), or one of {', '.join(WAYS[1:])}"
        raise RatioError("qkvo_ratios", expected, "none of them", "write 0.5 for half of the attention weights")
    if len(used) > 1:
        found = " and ".join(f"{way}={given[way]!r}"[:40] for way in used)
        raise OptionError(used[-1], f"one of {', '.join(WAYS)}", found, "give one of them")
    resource = next((one for one in RESOURCES if used == [f"target_{one}"]), None)
    return None if resource is None else Budget(resource, given[used[0]])


def check_table(latency: object) -> None:
    """Raises OptionError unless it is a latency table, or None."""
    if latency is not None and not isinstance(latency, LatencyTable):
        found = f"a {type(latency).__name__}"
        raise OptionError("latency", "an attnprune.LatencyTable", found, "pass what attnprune.latency.measure gave")


def stock_rules(stock: object, rules: Rules, qkvo_ratios: object) -> Rules:
    """The rules under which every layer keeps the same shape, with as many qk as vo channels.

    Raises:
        OptionError: another option asks for something else.
    """
    if stock is not True:
        raise OptionError("stock", "True or False", repr(stock), "pick one of them")
    others = {
        "granularity": (rules.granularity != "joint", '"channel" or "head"', rules.granularity),
        "heads": (rules.heads == "uniform", '"uniform"', rules.heads),
        "split": (rules.split == "fixed", '"fixed"', rules.split),
        "qkvo_ratios": (qkvo_ratios is not None, "ratios", "another way to ask, which gives each layer its own shape"),
    }
    for key, (fine, expected, found) in others.items():
        if not fine:
            remedy = "leave stock off, or this option as it is by default"
            raise OptionError(f"stock=True with {key}", expected, found, remedy)
    ratios = Ratios.parse(qkvo_ratios)  # type: ignore[arg-type]
    if ratios.qk != ratios.vo:
        found = f"qk={ratios.qk:g} and vo={ratios.vo:g}"
        raise OptionError("stock=True with qkvo_ratios", "one ratio for qk and vo", found, "write one number for all")
    return replace(rules, scope="local", match_dims=rules.granularity == "channel")


def cost_now(
    budget: Budget, model: nn.Module, views: Sequence[AttentionView], example_inputs: Any, latency: LatencyTable | None
) -> float:
    """What the whole model costs now; for latency as a share of the model that was measured."""
    if budget.resource == "params":
        return count_parameters(model)
    if budget.resource == "macs":
        return count_macs(model, example_inputs)
    assert latency is not None
    return latency.predict([view.spec for view in views])


def costs_for(
    budget: Budget,
    model: nn.Module,
    views: Sequence[AttentionView],
    example_inputs: Any,
    latency: LatencyTable | None,
    rules: Rules,
    progress: bool,
) -> tuple[Costs, Rules]:
    """What shapes cost, and the rules, whose rounding for latency is that of the shapes that were measured.

    Raises:
        OptionError: the budget needs ``example_inputs`` (or, for latency, a table).
        LatencyError: the table is of another model.
    """
    if budget.resource == "params":
        prices = {view.name: parameter_prices(view.spec) for view in views}
        return Costs(budget, count_parameters(model), prices), rules
    if budget.resource == "macs":
        if example_inputs is None:
            raise OptionError("target_macs", "example_inputs to count with", "none", "pass example_inputs=")
        return Costs(budget, count_macs(model, example_inputs), mac_prices(model, views, example_inputs)), rules
    if latency is None:
        latency = table_for(model, views, example_inputs, rules, progress)
    if rules.round_to == 1 and rules.granularity != "head":
        rules = replace(rules, round_to=latency.step)
    return Costs(budget, latency.predict([view.spec for view in views]), {}, latency), rules


def table_for(
    model: nn.Module, views: Sequence[AttentionView], example_inputs: Any, rules: Rules, progress: bool
) -> LatencyTable:
    """Measures what plans by these rules need to know."""
    from ..cost.latency import measure

    if example_inputs is None:
        remedy = "pass example_inputs=, or latency= with what attnprune.latency.measure gave"
        raise OptionError("target_latency", "example_inputs to measure with, or a latency table", "neither", remedy)
    return measure(
        model, example_inputs, granularity=rules.granularity, include=[escape(view.name) for view in views],
        round_to="auto" if rules.round_to == 1 else rules.round_to, progress=progress,
    )  # fmt: skip
