"""What makes a model faster where it is: channels or whole heads (``granularity="auto"``), and multiples of how many
channels (``round_to="auto"``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import nn

from ..calibration.processes import of_first
from ..cost.latency.measuring import measure_plan, slower_because
from ..cost.latency.multiples import measure_multiples
from ..cost.rounding import auto_rounding, most_levels
from ..errors import AllocationError, LatencyError
from ..families.base import AttentionView
from ..surgery import Surgeon
from ..values.budget import Budget, Ceiling
from ..values.layout import Kind
from ..values.plan import Plan
from ..values.ratios import Ratios
from ..values.request import Request
from ..values.rules import Granularity, Rules
from ..values.scores import Scores
from .allocate import allocate
from .costs import fitted

GAIN = 0.97
"""Heads, or coarser multiples, are taken where the model takes at most so much of its time without: both lose more."""
SURE = (1 - GAIN) / 2
"""The standard error with which such a gain is told from none."""
SECONDS = 5.0
"""How long channels, and heads, are measured."""
MULTIPLES = 30.0
"""How long multiples are, all together and at most."""
HALF = Ratios.parse(0.5)
"""What is tried where it is not known beforehand how much goes of each projection."""


def by_time(model: nn.Module, views: Sequence[AttentionView], request: Request) -> Request:
    """A request with what makes the model faster over ``example_inputs`` in place of ``"auto"``, measured."""
    rounded = _rounded(model, views, request)
    return _channels_or_heads(model, views, request, rounded) if request.rules.granularity == "auto" else rounded


def _rounded(model: nn.Module, views: Sequence[AttentionView], request: Request) -> Request:
    """With the finest multiple of channels than which no coarser one is faster, where there is something to run.

    As it is where times vary too much to tell. A budget of latency is spent on shapes that are measured themselves, and
    whole heads are not rounded.
    """
    rules, amount, inputs = request.rules, request.amount, request.evidence.example_inputs
    if rules.round_to != "auto" or rules.granularity == "head" or inputs is None or request.measure is False:
        return request
    if isinstance(amount, (Budget, Ceiling)) and amount.resource == "latency":
        return request
    kept, liked = _kept(amount if isinstance(amount, Ratios) else HALF, rules), auto_rounding(views, rules.granularity)
    multiples = [2**power for power in range(most_levels([view.spec for view in views]).bit_length())]
    if len(multiples) == 1 or min(kept.values()) == 1:
        return request
    shares = measure_multiples(
        model, views, inputs, multiples, liked, kept, rules.heads == "ragged", SURE, MULTIPLES,
        request.evidence.progress,
    )  # fmt: skip
    shares = of_first(shares)
    if any(share.error > SURE for share in shares.values()):
        return request
    best = min(share.median for share in shares.values())
    finest = next(multiple for multiple in multiples if GAIN * shares[multiple].median <= best)
    return replace(request, rules=replace(rules, round_to=finest))


def _kept(ratios: Ratios, rules: Rules) -> dict[Kind, float]:
    """The share of qk and of vo channels that stays; of both alike where that is what comes of it."""
    if rules.together or rules.match_dims:
        alike = fmean((ratios.q, ratios.k, ratios.v, ratios.o))
        return {"qk": 1 - alike, "vo": 1 - alike}
    return {"qk": 1 - min(ratios.q, ratios.k), "vo": 1 - min(ratios.v, ratios.o)}


def _channels_or_heads(model: nn.Module, views: Sequence[AttentionView], request: Request, rounded: Request) -> Request:
    """With channels or heads, whichever makes the model faster; only channels are rounded.

    Both are tried in the shape that they leave where every layer loses the same; half of the attention, where a budget
    is asked for. With a budget of latency they compete, each by what it was measured to save.
    """
    amount = request.amount
    if isinstance(amount, (Budget, Ceiling)) and amount.resource == "latency":
        return _with(request, "joint")
    asked = {"channel": _with(rounded, "channel"), "head": _with(request, "head")}
    found: dict[str, float] = {}
    for granularity, one in asked.items():
        try:
            plan = _shapes(model, views, replace(one, amount=amount if isinstance(amount, Ratios) else HALF))
        except AllocationError:  # too few heads for that
            continue
        found[granularity] = _time(model, views, plan, request.evidence.example_inputs)
    heads = found.get("head", float("inf")) < GAIN * found.get("channel", 1.0)
    return asked["head" if heads else "channel"]


def check_time(model: nn.Module, views: Sequence[AttentionView], plan: Plan, request: Request) -> None:
    """Raises LatencyError where the plan of a request with ``granularity="auto"`` makes the model slower, measured."""
    if plan.empty or request.rules.granularity != "auto":
        return
    ratio = _time(model, views, plan, request.evidence.example_inputs, 2 * SECONDS)
    if ratio > 1:
        why = "; ".join(slower_because(plan, 1.0))
        raise LatencyError(
            'granularity="auto"', "a plan that is faster than the dense model over example_inputs",
            f"x {ratio:.3f} of its time ({why})",
            'give larger example_inputs, or leave out preset="fast" where parameters or memory are what counts',
        )  # fmt: skip


def _with(request: Request, granularity: Granularity) -> Request:
    return replace(request, rules=replace(request.rules, granularity=granularity))


def _shapes(model: nn.Module, views: Sequence[AttentionView], request: Request) -> Plan:
    """A plan in which every layer loses the same, whatever it is."""
    fit, _ = fitted(request, model, views)
    alike = replace(fit.rules, scope="local", split="fixed")
    assert isinstance(fit.amount, Ratios)
    return allocate([view.spec for view in views], {view.name: _alike(view) for view in views}, fit.amount, alike)


def _alike(view: AttentionView) -> Scores:
    spec = view.spec
    qk, vo = (torch.ones(spec.kv_heads, dim) for dim in (spec.qk_dim, spec.vo_dim))
    return Scores(qk, vo, torch.ones(spec.heads))


def _time(
    model: nn.Module, views: Sequence[AttentionView], plan: Plan, example_inputs: Any, seconds: float = SECONDS
) -> float:
    """What the model takes, pruned by a plan, of its time now."""
    return of_first(measure_plan(model, Surgeon.prepare(model, views, plan), example_inputs, seconds)[0])
