"""What a report says beside the plan: how attention runs, notes, measured latency."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any
from warnings import warn

from torch import nn

from ..cost.counting import count_parameters
from ..errors import AttnPruneWarning, LatencyError
from ..families.base import AttentionView
from ..families.calls import CACHES
from ..families.expansion import KEYS
from ..families.linears import reads_low_rank
from ..families.looks import Skipped
from ..families.registry import all_views, plain
from ..nn import host_class
from ..nn.expanded import Expanded
from ..surgery import Surgeon
from ..values.layout import Projection
from ..values.plan import Plan
from ..values.spec import AttentionSpec
from .report import Measured, Report


def planned_report(model: nn.Module, plan: Plan, skipped: Sequence[Skipped]) -> Report:
    """What :func:`attnprune.apply_plan` would report of a plan, as far as it is known before."""
    before = count_parameters(model)
    removed = sum(spec.parameters for spec in plan.specs) - sum(spec.parameters for spec in plan.after)
    views = all_views(plain(model), {spec.name for spec in plan.specs})
    ways, cache = ways_of(views, plan), cache_of(views, plan)
    notes = (*notes_of(views, plan), *slow_shapes(views, plan))
    return Report(plan, (before, before - removed), notes=notes, skipped=tuple(skipped), ways=ways, cache_bytes=cache)


def ways_of(views: Sequence[AttentionView], plan: Plan) -> dict[str, str]:
    """By name, how every attention that changes will run."""
    return {view.name: _way(view, plan[view.name].after) for view in views if not plan[view.name].empty}


def _way(view: AttentionView, after: AttentionSpec) -> str:
    """How an attention will run, and for the expanded way why."""
    way = view.way(after)
    if way != "expanded" or view.verdict is None:
        return str(way)
    if view.read:
        return "expanded: its host reads the weights of its projections, so that their products stay dense"
    why = next((reason for key, reason in view.verdict.reasons.items() if key.startswith("decoupled")), "")
    return f"expanded: {why or 'no forward of ours is known for it'}"


def cache_of(views: Sequence[AttentionView], plan: Plan) -> tuple[int, int] | None:
    """Bytes of keys and values that caches keep for every token, before and after; None where nothing is cached.

    A host that runs expanded keeps its dense dims there. One whose keys come from a low rank keeps that instead, of
    which nothing goes: it is left out.
    """
    before = after = 0
    for view in views:
        names = inspect.signature(host_class(view.module).forward).parameters
        place, decodes = (view.module.__dict__.get(key) for key in ("layer_idx", "is_decoder"))
        if not any(name in names for name in CACHES) or type(place) is not int or decodes is False:
            continue
        spec, then = view.spec, plan[view.name].after
        if reads_low_rank(spec, view.top):
            continue
        size = view.weight("k").element_size()
        now, left = (size * (sum(one.qk_dims) + sum(one.vo_dims)) for one in (spec, then))
        if view.way(then) == "expanded":
            now = left = size * sum(_dense_width(view, p) for p in KEYS)
        before, after = before + now, after + left
    return (before, after) if before else None


def _dense_width(view: AttentionView, projection: Projection) -> int:
    """Channels that a host which runs expanded sees."""
    owner = view.owner(projection)
    return owner.attnprune_width if isinstance(owner, Expanded) else view.spec.layout.channels(projection)


def missed(plan: Plan, latency: Measured | None) -> tuple[str, ...]:
    """A note where measured latency is more than 3 % above what was asked for."""
    budget = None if plan.asked is None else plan.asked.budget
    if budget is None or budget.resource != "latency" or latency is None or latency.ratio <= 1.03 * budget.share:
        return ()
    return (
        f"measured latency x {latency.ratio:.3f} is above the target x {budget.share:.3f}; on a quieter machine, or "
        "with attnprune.latency.measure(..., seconds=) of more, predictions are better",
    )


def measured(model: nn.Module, surgeon: Surgeon, plan: Plan, example_inputs: Any) -> Measured:
    """Measured latency, and a warning where it rose."""
    from ..cost.latency import measure_plan, slower_because

    found = Measured(*measure_plan(model, surgeon, example_inputs))
    if found.ratio > 1 and not plan.empty:
        why = "; ".join(slower_because(plan, found.seconds[0]))
        warn(
            f"The pruned model takes {found.ratio:.3f} of the dense one's time: {why}.", AttnPruneWarning, stacklevel=3
        )
    return found


SMALL = 512
"""Width below which, on a CPU, ragged heads were measured to cost more than they save (docs/benchmarks/speed)."""


def slow_shapes(views: Sequence[AttentionView], plan: Plan) -> tuple[str, ...]:
    """A note where shapes of this kind were measured to be no faster than dense ones, with what to do.

    On a CPU these are ragged heads of narrow models, and whatever runs expanded there; on other devices whatever leaves
    all heads and takes channels.
    """
    from ..cost.latency.measuring import slower_because

    changed = [view for view in views if not plan[view.name].empty]
    on_cpu = all(view.weight("q").device.type in ("cpu", "meta") for view in changed)
    expanded = {
        view.name
        for view in changed
        if on_cpu and view.spec.d_model < SMALL and view.way(plan[view.name].after) == "expanded"
    }
    few = [
        layer
        for view in changed
        for layer in [plan[view.name]]
        if (layer.after.ragged and view.spec.d_model < SMALL if on_cpu else layer.after.qk_dims != layer.spec.qk_dims)
        and view.name not in expanded
    ]
    notes = []
    if expanded:
        notes.append(
            f"may run no faster than dense, as {len(expanded)} layers run expanded, on dense dims (report.ways says "
            'why); measure=True tells, granularity="head" mostly avoids it'
        )
    if few and (reasons := "; ".join(slower_because(Plan(tuple(few)), 1.0))):
        notes.append(
            f"may run no faster than dense, as {reasons}; measure=True tells, "
            'preset="fast" or granularity="head" avoid it'
        )
    return tuple(notes)


def warn_of_time(plan: Plan, latency: Any) -> None:
    """Warns where a latency table predicts that a plan makes the model slower, with the reason and what to do."""
    if latency is None or plan.empty or any(spec.ragged for spec in plan.after):
        return
    try:
        found = latency.predict(plan)
    except LatencyError:  # a shape that was not measured
        return
    if found > 1:
        from ..cost.latency.measuring import slower_because

        why = "; ".join(slower_because(plan, getattr(latency, "seconds", 1.0)))
        warn(
            f"The plan is predicted to take {found:.3f} of the dense model's time: {why}.",
            AttnPruneWarning,
            stacklevel=3,
        )


def notes_of(views: Sequence[AttentionView], plan: Plan) -> tuple[str, ...]:
    """Where a rotated basis was asked for and a family keeps some channels as they stand."""
    if plan.asked is None or "rotated" not in plan.asked.basis:
        return ()
    reasons = dict.fromkeys((kind, why) for view in views for kind, why in view.fixed.items())
    return tuple(f"{kind} keeps its own channels instead of a rotated basis: {why}" for kind, why in reasons)
