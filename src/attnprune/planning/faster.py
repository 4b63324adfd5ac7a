"""Whether channels or whole heads make a model faster where it is: ``granularity="auto"``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..cost.latency.measuring import measure_plan, slower_because
from ..errors import AllocationError, LatencyError
from ..families.base import AttentionView
from ..surgery import Surgeon
from ..values.budget import Budget, Ceiling
from ..values.plan import Plan
from ..values.ratios import Ratios
from ..values.request import Request
from ..values.rules import Granularity
from ..values.scores import Scores
from .allocate import allocate
from .costs import fitted

GAIN = 0.97
"""Heads go where that takes at most so much of what channels take, as channels lose less."""
SECONDS = 5.0
"""How long each is measured."""


def by_time(model: nn.Module, views: Sequence[AttentionView], request: Request) -> Request:
    """A request with ``granularity="auto"`` with the one that makes the model faster over ``example_inputs``, measured.

    Both are tried in the shape that they leave where every layer loses the same; half of the attention, where a budget
    is asked for. With a budget of latency they compete, each by what it was measured to save.
    """
    if request.rules.granularity != "auto":
        return request
    amount = request.amount
    if isinstance(amount, (Budget, Ceiling)) and amount.resource == "latency":
        return _with(request, "joint")
    found: dict[Granularity, float] = {}
    for granularity in ("channel", "head"):
        asked = _with(replace(request, amount=amount if isinstance(amount, Ratios) else Ratios.parse(0.5)), granularity)
        try:
            plan = _shapes(model, views, asked)
        except AllocationError:  # too few heads for that
            continue
        found[granularity] = _time(model, views, plan, request.evidence.example_inputs)
    heads = found.get("head", float("inf")) < GAIN * found.get("channel", 1.0)
    return _with(request, "head" if heads else "channel")


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
    return measure_plan(model, Surgeon.prepare(model, views, plan), example_inputs, seconds)[0]
