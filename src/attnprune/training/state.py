"""What a pruner saves of itself, read by a pruner that trusts nothing: :func:`read_state`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..cost.latency.table import LatencyTable
from ..errors import OptionError
from ..values.layout import Projection
from ..values.plan import Plan
from ..values.spec import AttentionSpec
from .observing import Observations, Sums

VERSION = 1


class PrunerState(NamedTuple):
    """How far a pruner has come."""

    plan: Plan
    """All steps so far."""
    steps_done: int
    parameters: int
    """Of the model in the beginning."""
    seen: Observations
    cost: float
    """What the model cost in the beginning; 0 without a budget."""
    table: LatencyTable | None


def read_state(state: object, options: Mapping[str, Any], which: Sequence[Projection] = ()) -> PrunerState:
    """Reads :meth:`attnprune.AttentionPruner.state_dict`; everything is checked before anything is used.

    Args:
        state: what was loaded.
        options: ``steps``, ``ratios`` and ``budget`` of the pruner that reads it.
        which: projections whose features it observes.

    Raises:
        OptionError: malformed, or of a pruner with other options.
        PlanFormatError, LatencyError: its plan or latency table is malformed.
    """
    if not isinstance(state, Mapping) or state.get("version") != VERSION or isinstance(state.get("version"), bool):
        raise OptionError("state", "a mapping that state_dict gave", repr(state)[:60], "save pruner.state_dict()")
    if dict(options) != (theirs := {key: state.get(key) for key in options}):
        raise OptionError("state", str(options), str(theirs)[:200], "make the pruner with the options that it had")
    if not isinstance(state.get("plan"), str):
        _refuse("plan", "JSON text", state.get("plan"))
    plan = Plan.from_json(state["plan"])
    done = _number(state, "steps_done", options["steps"])
    if not done and not plan.empty:
        _refuse("steps_done", "at least 1, as its plan removes something", done)
    cost, table = 0.0, None
    if options["budget"] is not None:
        cost = state.get("cost")  # type: ignore[assignment]
        if isinstance(cost, bool) or not isinstance(cost, (int, float)) or not (isfinite(cost) and cost > 0):
            _refuse("cost", "a number above 0", cost)
        if state.get("latency") is not None:
            if not isinstance(state["latency"], str):
                _refuse("latency", "JSON text", state["latency"])
            table = LatencyTable.from_json(state["latency"])
    return PrunerState(plan, done, _number(state, "parameters"), _seen(state, plan, which), float(cost), table)


def _number(state: Mapping[str, Any], key: str, high: int | None = None) -> int:
    value = state.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0 or (high is not None and value > high):
        _refuse(key, "a whole number, not below 0" if high is None else f"a whole number from 0 to {high}", value)
    return value


def _seen(state: Mapping[str, Any], plan: Plan, which: Sequence[Projection]) -> Observations:
    count, sums = _number(state, "observations"), state.get("seen")
    names = {spec.name: spec for spec in plan.after} if count else {}
    if not isinstance(sums, Mapping) or sums.keys() != names.keys():
        expected = f"sums for {sorted(names)[:4]}" if count else "no sums, as nothing was observed"
        _refuse("seen", expected, sorted(map(str, sums)) if isinstance(sums, Mapping) else sums)
    return Observations({name: _sums(spec, sums[name], which) for name, spec in names.items()}, count)


def _sums(spec: AttentionSpec, parts: object, which: Sequence[Projection]) -> Sums:
    shapes = [(sum(spec.qk_dims),), (sum(spec.vo_dims),), (spec.heads,), *((spec.width(p),) for p in which), (1,)]
    tensors = [part for part in parts if isinstance(part, Tensor)] if isinstance(parts, (list, tuple)) else []
    found = [tuple(part.shape) for part in tensors]
    if found != shapes or len(parts) != len(shapes):  # type: ignore[arg-type]
        _refuse(f"seen: {spec.name}", f"tensors of shapes {shapes}", found or parts)
    if not all(part.is_floating_point() and bool(part.isfinite().all()) for part in tensors):
        _refuse(f"seen: {spec.name}", "finite floating-point numbers", [part.dtype for part in tensors])
    return tuple(part.detach().to("cpu", torch.float64, copy=True) for part in tensors)


def _refuse(key: str, expected: str, found: object) -> NoReturn:
    remedy = "load what pruner.state_dict() gave; this one was changed or cut"
    raise OptionError(f"state: {key}", expected, repr(found)[:80], remedy)
