"""From options to a plan: which method they mean, and its steps in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from ..calibration.bases import Turn, turn, white_moments
from ..calibration.losses import LossFn, loss_with_or_without_labels
from ..calibration.moments import Calibration, LayerMoments
from ..calibration.refit import with_fold
from ..calibration.taps import check_calibration, moments_of
from ..errors import OptionError
from ..families.base import AttentionView
from ..surgery import masked_views
from ..values.layout import KINDS, Kind
from ..values.plan import Plan
from ..values.ratios import Ratios
from ..values.rules import Rules
from ..values.scores import Scores
from .allocate import allocate, check_request
from .by_budget import Costs, allocate_budget, check_budget
from .by_error import allocate_error
from .scorers import Gate, Scorer, resolve

Basis = Literal["auto", "channels", "rotated"]
Compensate = Literal["auto"] | bool
SAMPLES = 32
"""Samples that gate scores look at where the split is fixed; with ``split="auto"`` they look at all data."""


@dataclass(frozen=True)
class Method:
    """What ``basis``, ``compensate`` and ``sequential`` mean for what was given."""

    rotated: bool
    refit: bool
    sequential: bool

    @classmethod
    def resolve(cls, basis: Any, compensate: Any, sequential: Any, rules: Rules, *, has_data: bool) -> Method:
        """Checks the options against one another.

        Raises:
            OptionError: an unknown value, or one that needs data where there are none.
        """
        for option, value, allowed in (
            ("basis", basis, ("auto", "channels", "rotated")),
            ("compensate", compensate, ("auto", True, False)),
            ("sequential", sequential, (True, False)),
        ):
            if not any(value is one or (isinstance(value, str) and value == one) for one in allowed):
                words = ", ".join(map(repr, allowed))
                raise OptionError(option, f"one of {words}", repr(value), "pick one of them")
        for option, on in (("compensate=True", compensate is True), ("sequential=True", sequential is True)):
            if on and not has_data:
                raise OptionError(option, "data to fit with", "none", "pass data=, or a calibration=")
        whole_heads = rules.granularity == "head"
        rotated = basis == "rotated" or (basis == "auto" and has_data and not whole_heads)
        return cls(rotated, has_data if compensate == "auto" else compensate is True, sequential is True)

    @property
    def folds(self) -> bool:
        """Whether anything is turned or refitted."""
        return self.rotated or self.refit


def decide(
    model: nn.Module,
    views: Sequence[AttentionView],
    ratios: Ratios | None,
    rules: Rules,
    method: Method,
    *,
    scorer: Any,
    data: Iterable[Any] | None,
    calibration: Calibration | None,
    loss_fn: LossFn | None,
    target_error: float | None,
    costs: Costs | None,
    seed: int,
    progress: bool,
) -> Plan:
    """The plan: moments, bases, scores in these bases, who goes, and the maps of what stays."""
    specs = [view.spec for view in views]
    if ratios is not None and (data is not None or calibration is not None):
        check_request(specs, ratios, rules)
    if costs is not None:
        check_budget(specs, costs, rules)
    data, moments, turns = _turns(
        model, views, method, data, calibration, loss_fn, progress, needed=target_error is not None
    )
    if target_error is not None:
        plan = allocate_error(specs, turns, target_error, rules)
    else:
        chosen, scores = _scores(model, views, turns, method, rules, scorer, data, loss_fn, seed, progress)
        if costs is not None:
            plan = allocate_budget(specs, scores, costs, rules, chosen)
        else:
            assert ratios is not None
            plan = allocate(specs, scores, ratios, rules, chosen)
    assert plan.asked is not None
    basis, compensate = "rotated" if method.rotated else "channels", "yes" if method.refit else "no"
    plan = replace(plan, asked=replace(plan.asked, basis=basis, compensate=compensate))
    if not method.folds:
        return plan
    if method.sequential:
        assert data is not None
        return _in_sequence(model, views, plan, turns, moments, method, data, loss_fn, progress)
    return _folded(plan, views, turns, moments, method.refit)


def scored(
    model: nn.Module,
    views: Sequence[AttentionView],
    rules: Rules,
    method: Method,
    *,
    scorer: Any,
    data: Iterable[Any] | None,
    calibration: Calibration | None,
    loss_fn: LossFn | None,
    seed: int,
    progress: bool,
) -> dict[str, Scores]:
    """The scores that :func:`decide` goes by."""
    data, _, turns = _turns(model, views, method, data, calibration, loss_fn, progress)
    return _scores(model, views, turns, method, rules, scorer, data, loss_fn, seed, progress)[1]


def _turns(
    model: nn.Module,
    views: Sequence[AttentionView],
    method: Method,
    data: Iterable[Any] | None,
    calibration: Calibration | None,
    loss_fn: LossFn | None,
    progress: bool,
    needed: bool = False,
) -> tuple[Iterable[Any] | None, Mapping[str, LayerMoments], dict[str, Turn]]:
    """The data, fit to be read again, their moments and the bases that these give; nothing where nothing folds."""
    if data is not None and method.folds and isinstance(data, Iterator):
        data = list(data)  # it is read more than once
    moments: Mapping[str, LayerMoments] = {}
    if method.folds or needed:
        if calibration is not None:
            check_calibration(calibration, views, method.refit)
            moments = calibration
        elif data is not None:
            moments = moments_of(model, views, data, loss_fn, method.refit, progress)
        else:
            moments = {view.name: white_moments(view) for view in views}
    return data, moments, {view.name: turn(view, moments[view.name], method.rotated) for view in views if moments}


def _scores(
    model: nn.Module,
    views: Sequence[AttentionView],
    turns: Mapping[str, Turn],
    method: Method,
    rules: Rules,
    scorer: Any,
    data: Iterable[Any] | None,
    loss_fn: LossFn | None,
    seed: int,
    progress: bool,
) -> tuple[str, dict[str, Scores]]:
    """The scorer's name and its scores, in the coordinates of the turns."""
    auto = isinstance(scorer, str) and scorer == "auto"
    if auto and method.folds and data is None:
        return "energy", {view.name: energy_scores(turns[view.name]) for view in views}
    if auto and method.folds:
        chosen: Scorer = Gate(SAMPLES if rules.split == "fixed" else None, seed=seed, turns=turns)
        return chosen.name, chosen.score(model, views, data=data, loss_fn=loss_fn, progress=progress)
    chosen = resolve(scorer, has_data=data is not None, seed=seed)
    if auto and loss_fn is None:
        loss_fn = loss_with_or_without_labels(seed)
    with turned(model, views, turns) if method.rotated else nullcontext():
        return chosen.name, chosen.score(model, views, data=data, loss_fn=loss_fn, progress=progress)


@contextmanager
def turned(model: nn.Module, views: Sequence[AttentionView], turns: Mapping[str, Turn]) -> Iterator[None]:
    """Inside the block every head runs in another basis, at full rank: the same function, other channels."""
    with masked_views(model, views, Plan(tuple(turns[view.name].layer(_fold_dtype(view)) for view in views))):
        yield


def energy_scores(turn: Turn) -> Scores:
    """The share of a layer's energy that a direction carries; heads sum theirs over qk and vo."""
    found: dict[Kind, torch.Tensor] = {}
    for kind in KINDS:
        rows = [basis.energy for basis in turn.bases[kind]]
        total = float(sum(float(row.sum()) for row in rows)) or 1.0
        found[kind] = nn.utils.rnn.pad_sequence([row / total for row in rows], batch_first=True)
    return Scores(found["qk"], found["vo"], found["qk"].sum(1) + found["vo"].sum(1))


def _folded(
    plan: Plan,
    views: Sequence[AttentionView],
    turns: Mapping[str, Turn],
    moments: Mapping[str, LayerMoments],
    refit: bool,
) -> Plan:
    dtypes = {view.name: _fold_dtype(view) for view in views}
    layers = [
        layer if layer.empty else with_fold(layer, turns[name], moments[name], refit, dtypes[name])
        for layer in plan
        for name in [layer.spec.name]
    ]
    return replace(plan, layers=tuple(layers))


def _fold_dtype(view: AttentionView) -> torch.dtype:
    return torch.float64 if view.weight("q").dtype == torch.float64 else torch.float32


def _in_sequence(
    model: nn.Module,
    views: Sequence[AttentionView],
    plan: Plan,
    turns: Mapping[str, Turn],
    moments: Mapping[str, LayerMoments],
    method: Method,
    data: Iterable[Any],
    loss_fn: LossFn | None,
    progress: bool,
) -> Plan:
    """Bases and refits layer by layer, each from what the layers before it, pruned, hand on.

    How many directions every head keeps stays as decided; which ones they are follows from the new moments.
    """
    done = _folded(plan, views, turns, moments, method.refit)
    layers = list(done.layers)
    for i, view in enumerate(views):
        if plan.layers[i].empty:
            continue
        before = Plan(tuple(layers[:i]))
        with masked_views(model, views[:i], before):
            new = moments_of(model, [view], data, loss_fn, method.refit, progress)
        fresh = turn(view, new[view.name], method.rotated)
        layers[i] = with_fold(plan.layers[i], fresh, new[view.name], method.refit, _fold_dtype(view))
    return replace(done, layers=tuple(layers))
