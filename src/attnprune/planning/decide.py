"""From a request to a plan: the steps of its method in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..calibration.bases import HeadBases, head_bases, white_moments
from ..calibration.batches import device_of, to_device
from ..calibration.distance import Distance
from ..calibration.features import feature_losses, scaled, with_features
from ..calibration.losses import loss_with_or_without_labels
from ..calibration.moments import LayerMoments
from ..calibration.refit import with_maps
from ..calibration.sample import spread
from ..calibration.taps import check_calibration, moments_of
from ..families.base import AttentionView
from ..families.tied import tied_to
from ..surgery import masked_views
from ..values.amount import MaxError
from ..values.layer_plan import LayerPlan
from ..values.layout import KINDS, PROJECTIONS, Kind, Projection
from ..values.method import Method
from ..values.plan import Plan
from ..values.ratios import Ratios
from ..values.request import Evidence, Request
from ..values.rules import Rules
from ..values.scores import Scores
from .allocate import allocate, check_request, check_scores
from .beside import beside
from .by_budget import Costs, allocate_budget, check_budget
from .by_error import allocate_error
from .features import thin, uneven
from .measured import SAMPLES as MEASURED
from .measured import between, measured
from .scorers import Gate, Scorer, resolve
from .scorers.base import Evidence as Learned
from .scorers.gradient import check_reached

SAMPLES = 32
"""Samples that gate scores look at where the split is fixed; with ``split="auto"`` they look at all data."""


def decide(model: nn.Module, views: Sequence[AttentionView], request: Request, costs: Costs | None) -> Plan:
    """The plan: moments, bases, scores in these bases, who goes, and the maps of what stays.

    Args:
        model: the whole model, left as found.
        views: the attention modules that may lose something.
        request: with a number to round to (:func:`attnprune.planning.costs.fitted`).
        costs: what shapes cost, where a budget is asked for.
    """
    tied = tied_to(views)
    alone = [view for view in views if view.name not in tied]
    specs = [view.spec for view in views]
    amount, rules, method = request.amount, request.rules, request.decided
    if isinstance(amount, Ratios) and request.evidence.has_data:
        check_request(specs, amount, rules)
    if costs is not None:
        check_budget([view.spec for view in alone], costs, rules)
    which = uneven(amount, rules) if isinstance(amount, Ratios) else ()
    evidence, moments, bases = _bases(
        model,
        views,
        method,
        request.evidence,
        isinstance(amount, MaxError),
        reads=rules.split == "all" or any(p != "o" for p in which),
        again=rules.split == "measured",
    )
    if isinstance(amount, MaxError):
        _check_reached(views, moments)
        plan = _alike(allocate_error(specs, bases, amount.share, rules), views, tied)
    else:
        chosen, scores = _scores(model, views, bases, method, rules, evidence)
        _check_reached(views, moments)

        def allocated(by: Mapping[str, Scores]) -> Plan:
            if isinstance(amount, Ratios):
                check_scores([view.spec for view in alone], by)
                by = {**by, **{name: by[first] for name, first in tied.items()}}
                return _alike(allocate(specs, by, amount, rules, chosen), views, tied)
            assert costs is not None
            found = allocate_budget([view.spec for view in alone], by, costs, rules, chosen)
            return _alike(found, views, tied)

        # a pruner tries shapes before it has looked at any data
        if rules.split == "measured" and evidence.data is not None:
            plan = _measured(model, views, scores, allocated, bases, moments, method, rules, evidence)
        else:
            plan = allocated(scores)
        if isinstance(amount, Ratios):
            if which:
                found = _feature_scores(model, views, plan, bases, moments, request, evidence, which)
                plan = thin(plan, found, amount, rules)
            elif rules.split == "all" and evidence.data is not None:
                gates = Gate(seed=method.seed).score_features(model, views, PROJECTIONS, **_learned(evidence))
                losses = partial(_losses, views, bases, moments, gates)
                plan = beside(plan, scores, amount, rules, losses)
            plan = _alike(plan, views, tied)
    assert plan.asked is not None
    plan = replace(plan, asked=plan.asked.by(method))
    if not method.needs_maps:
        return plan
    if not method.sequential:
        return _with_maps(plan, views, bases, moments, method.refits)
    once = replace(plan, layers=tuple(layer for layer in plan if layer.spec.name not in tied))
    return _alike(_in_sequence(model, alone, once, bases, moments, method, evidence), views, tied)


def _alike(plan: Plan, views: Sequence[AttentionView], tied: Mapping[str, str]) -> Plan:
    """The plan, in which attention that shares its projections with another loses what that one loses."""
    by_name = {layer.spec.name: layer for layer in plan}
    layers = [by_name[tied.get(view.name, view.name)].renamed(view.name) for view in views]
    return replace(plan, layers=tuple(layers)) if tied else plan


def scored(model: nn.Module, views: Sequence[AttentionView], request: Request) -> dict[str, Scores]:
    """The scores that :func:`decide` goes by."""
    evidence, moments, bases = _bases(model, views, request.decided, request.evidence)
    _, scores = _scores(model, views, bases, request.decided, request.rules, evidence)
    _check_reached(views, moments)
    return scores


def _check_reached(views: Sequence[AttentionView], moments: Mapping[str, LayerMoments]) -> None:
    """Raises DataError if no data ran through some attention, once all else is right with them."""
    check_reached({view.name: moments[view.name].tokens["vo"] for view in views if moments})


def _bases(
    model: nn.Module,
    views: Sequence[AttentionView],
    method: Method,
    evidence: Evidence,
    needed: bool = False,
    reads: bool = False,
    again: bool = False,
) -> tuple[Evidence, Mapping[str, LayerMoments], dict[str, HeadBases]]:
    """The evidence, its data fit to be read again, moments and the bases that they give; none where none are needed."""
    data, calibration = evidence.data, evidence.calibration
    if data is not None and (method.needs_maps or again) and isinstance(data, Iterator):
        data = list(data)  # it is read more than once
    moments: Mapping[str, LayerMoments] = {}
    if method.needs_maps or needed:
        if calibration is not None:
            check_calibration(calibration, views, method.refits, reads and method.refits)
            moments = calibration
        elif data is not None:
            reads &= method.refits
            moments = moments_of(model, views, data, evidence.loss_fn, method.refits, evidence.progress, reads)
        else:
            moments = {view.name: white_moments(view) for view in views}
    moments = _together(moments, views)
    bases = {
        view.name: head_bases(view, moments[view.name], method.rotated, method.refits) for view in views if moments
    }
    return replace(evidence, data=data), moments, bases


def _together(moments: Mapping[str, LayerMoments], views: Sequence[AttentionView]) -> Mapping[str, LayerMoments]:
    """The moments, those of attention that shares its projections of all that runs through them."""
    tied = tied_to(views)
    if not tied:
        return moments
    merged = dict(moments)
    for name, first in tied.items():
        if name in merged:
            merged[first] = merged[first].merge(merged[name].renamed(first))
    return merged | {name: merged[first].renamed(name) for name, first in tied.items() if name in merged}


def _scores(
    model: nn.Module,
    views: Sequence[AttentionView],
    bases: Mapping[str, HeadBases],
    method: Method,
    rules: Rules,
    evidence: Evidence,
) -> tuple[str, dict[str, Scores]]:
    """The scorer's name and its scores, in the coordinates of these bases."""
    if not method.named and method.needs_maps and evidence.data is None:
        return "energy", {view.name: energy_scores(bases[view.name]) for view in views}
    if not method.named and method.needs_maps:
        chosen: Scorer = Gate(SAMPLES if rules.split == "fixed" else None, seed=method.seed, bases=bases)
        found = dict(chosen.score(model, views, **_learned(evidence)))
        tied = tied_to(views)
        for name, first in tied.items():  # a channel is gone wherever it runs
            found[first] = found[first].plus(found[name])
        found |= {name: found[first] for name, first in tied.items()}
        return chosen.name, {name: in_turn(bases[name], scores) for name, scores in found.items()}
    chosen, learned = _scorer(method, evidence)
    with in_bases(model, views, bases) if method.rotated else nullcontext():
        return chosen.name, chosen.score(model, views, **learned)


def _learned(evidence: Evidence) -> Learned:
    """What a scorer may learn from."""
    learned: Learned = {"data": evidence.data, "loss_fn": evidence.loss_fn, "progress": evidence.progress}
    if evidence.output_fn is not None:
        learned["output_fn"] = evidence.output_fn
    return learned


def _scorer(method: Method, evidence: Evidence) -> tuple[Scorer, Learned]:
    """The scorer of a method that scores channels as they stand, or that the user names; what it may learn from."""
    scorer, learned = resolve(method.scorer, has_data=evidence.data is not None, seed=method.seed), _learned(evidence)
    if not method.named and evidence.loss_fn is None:
        learned["loss_fn"] = loss_with_or_without_labels(method.seed, evidence.output_fn)
    return scorer, learned


def _feature_scores(
    model: nn.Module,
    views: Sequence[AttentionView],
    plan: Plan,
    bases: Mapping[str, HeadBases],
    moments: Mapping[str, LayerMoments],
    request: Request,
    evidence: Evidence,
    which: tuple[Projection, ...],
) -> dict[str, dict[Projection, Tensor]]:
    """By attention, scores of the features that some projections read or write.

    Where the method refits, of a projection's features by what their going loses while the others make up for it; gates
    say how much that is beside other layers. Else the scorer's own.
    """
    method, rules = request.decided, request.rules
    if method.named or not method.needs_maps:
        scorer, learned = _scorer(method, evidence)
        return scorer.score_features(model, views, which, **learned)
    done = _with_maps(plan, views, bases, moments, method.refits)
    losses = {
        view.name: feature_losses(view, done[view.name], moments[view.name], which, method.refits) for view in views
    }
    if rules.scope == "local" or evidence.data is None:
        return losses
    gates = Gate(SAMPLES, seed=method.seed).score_features(model, views, which, **_learned(evidence))
    return {name: scaled(loss, gates[name]) for name, loss in losses.items()}


def _measured(
    model: nn.Module,
    views: Sequence[AttentionView],
    scores: Mapping[str, Scores],
    allocated: Callable[[Mapping[str, Scores]], Plan],
    bases: Mapping[str, HeadBases],
    moments: Mapping[str, LayerMoments],
    method: Method,
    rules: Rules,
    evidence: Evidence,
) -> Plan:
    """Of plans by the scores, by these at the height of what each layer was seen to lose, and by their geometric mean,
    the one with which the whole model is seen to lose least."""

    def maps(plan: Plan, some: Sequence[AttentionView]) -> Plan:
        return _with_maps(plan, some, bases, moments, method.refits) if method.needs_maps else plan

    assert evidence.data is not None
    batches = [to_device(batch, device_of(model)) for batch in spread(evidence.data, MEASURED)]
    distance = Distance(model, batches, evidence.loss_fn, evidence.output_fn)
    alone = [view for view in views if view.name not in tied_to(views)]
    seen = measured(model, alone, scores, rules, distance, maps, evidence.progress)
    plans = [allocated(by) for by in (scores, seen, between(seen, scores))]

    def lost(plan: Plan) -> float:
        with masked_views(model, views, maps(plan, views)):
            return distance()

    return min(plans, key=lost)


def _losses(
    views: Sequence[AttentionView],
    bases: Mapping[str, HeadBases],
    moments: Mapping[str, LayerMoments],
    gates: Mapping[str, Mapping[Projection, Tensor]],
    plan: Plan,
) -> dict[str, dict[Projection, Tensor]]:
    """By attention and projection, what goes with features one after the other beside a plan's channels."""
    done = _with_maps(plan, views, bases, moments, True)
    return {
        view.name: scaled(
            feature_losses(view, done[view.name], moments[view.name], PROJECTIONS, True), gates[view.name]
        )
        for view in views
    }


@contextmanager
def in_bases(model: nn.Module, views: Sequence[AttentionView], bases: Mapping[str, HeadBases]) -> Iterator[None]:
    """Inside the block every head runs in another basis, at full rank: the same function, other channels."""
    with masked_views(model, views, Plan(tuple(bases[view.name].layer(_maps_dtype(view)) for view in views))):
        yield


def in_turn(bases: HeadBases, scores: Scores) -> Scores:
    """The scores, those of rotary pairs for what each loses when its turn to go comes.

    A gate tells what closing a pair alone does; others may make up for it, or need it once more have gone. So gates say
    what a loss of logits costs in a head, and the losses are those of :func:`refitted_losses`.
    """
    if "qk" not in bases.alone:
        return scores
    qk = scores.qk.clone()
    for row, basis, alone in zip(qk, bases.by_kind["qk"], bases.alone["qk"], strict=True):
        own, total = row[: len(alone)], float(alone.sum())
        if total > 0:
            own.copy_(basis.energy * (float(own.sum()) / total))
    return replace(scores, qk=qk)


def energy_scores(bases: HeadBases) -> Scores:
    """The share of a layer's energy that a direction carries; heads sum theirs over qk and vo."""
    found: dict[Kind, torch.Tensor] = {}
    for kind in KINDS:
        rows = [basis.energy for basis in bases.by_kind[kind]]
        total = float(sum(float(row.sum()) for row in rows)) or 1.0
        found[kind] = nn.utils.rnn.pad_sequence([row / total for row in rows], batch_first=True)
    by_key = found["qk"].sum(1) + found["vo"].sum(1)
    heads = [by_key[key] / bases.spec.groups[key] for key in bases.spec.layout.key_of]
    return Scores(found["qk"], found["vo"], torch.stack(heads))


def _with_maps(
    plan: Plan,
    views: Sequence[AttentionView],
    bases: Mapping[str, HeadBases],
    moments: Mapping[str, LayerMoments],
    refit: bool,
) -> Plan:
    dtypes = {view.name: _maps_dtype(view) for view in views}
    by_name = {view.name: view for view in views}

    def mapped(layer: LayerPlan) -> LayerPlan:
        name = layer.spec.name
        if layer.empty:
            return layer
        if layer.heads or any(layer.qk) or any(layer.vo):
            layer = with_maps(layer, bases[name], moments[name], refit, dtypes[name])
        return with_features(by_name[name], layer, moments[name]) if refit else layer

    return replace(plan, layers=tuple(mapped(layer) for layer in plan))


def _maps_dtype(view: AttentionView) -> torch.dtype:
    return torch.float64 if view.weight("q").dtype == torch.float64 else torch.float32


def _in_sequence(
    model: nn.Module,
    views: Sequence[AttentionView],
    plan: Plan,
    bases: Mapping[str, HeadBases],
    moments: Mapping[str, LayerMoments],
    method: Method,
    evidence: Evidence,
) -> Plan:
    """Bases and refits layer by layer, each from what the layers before it, pruned, hand on.

    How many directions every head keeps stays as decided; which ones they are follows from the new moments.
    """
    assert evidence.data is not None, "a request that is sequential has data"
    refit = method.refits
    done = _with_maps(plan, views, bases, moments, refit)
    layers = list(done.layers)
    for i, view in enumerate(views):
        if plan.layers[i].empty:
            continue
        before = Plan(tuple(layers[:i]))
        with masked_views(model, views[:i], before):
            reads = any(plan.layers[i].features[:3])
            new = moments_of(model, [view], evidence.data, evidence.loss_fn, refit, evidence.progress, reads)
        fresh = {view.name: head_bases(view, new[view.name], method.rotated)}
        (layers[i],) = _with_maps(Plan((plan.layers[i],)), [view], fresh, new, refit)
    return replace(done, layers=tuple(layers))
