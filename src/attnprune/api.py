"""The functions that users call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal
from warnings import warn

from torch import nn
from torch.optim.swa_utils import AveragedModel

from .calibration.processes import agree
from .cost.counting import count_macs, count_parameters
from .cost.rounding import auto_rounding, check_rounding
from .errors import AttnPruneWarning, OptionError
from .families import find_views
from .families.base import AttentionView
from .families.registry import all_views, plain
from .report.report import Measured, Report
from .surgery import (
    OptimizerPatch,
    Step,
    Surgeon,
    check_expressible,
    check_views,
    commit_all,
    masked_views,
    optimizers_of,
)
from .values.plan import Plan
from .values.ratios import Ratios, RatiosLike
from .values.rules import Granularity, Heads, Rules, Scope, Split
from .values.spec import AttentionSpec

if TYPE_CHECKING:
    from .calibration.losses import LossFn
    from .calibration.moments import Calibration
    from .cost.latency.table import LatencyTable
    from .planning.decide import Basis, Compensate
    from .planning.scorers import Scorer


def find_attention(model: nn.Module) -> tuple[AttentionSpec, ...]:
    """The attention modules of a model, in the order of ``named_modules``.

    Raises:
        NoAttentionError: none of a known family; lists what looks like one.

    >>> import torch
    >>> [spec.name for spec in find_attention(torch.nn.TransformerEncoderLayer(32, 4))]
    ['self_attn']
    """
    return tuple(view.spec for view in find_views(plain(model)))


def make_plan(
    model: nn.Module,
    qkvo_ratios: RatiosLike | None = None,
    *,
    granularity: Granularity = "channel",
    scope: Scope = "global",
    heads: Heads = "uniform",
    scorer: str | Scorer | Any = "auto",
    basis: Basis = "auto",
    compensate: Compensate = "auto",
    split: Split = "fixed",
    sequential: bool = False,
    target_error: float | None = None,
    target_latency: float | None = None,
    target_macs: float | None = None,
    target_params: float | None = None,
    latency: LatencyTable | None = None,
    data: Iterable[Any] | None = None,
    calibration: Calibration | None = None,
    loss_fn: LossFn | None = None,
    round_to: int | Literal["auto"] = 1,
    match_dims: bool = False,
    stock: bool = False,
    min_heads: int = 1,
    min_channels: int = 1,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    example_inputs: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> Plan:
    """Decides what :func:`prune_attention` would remove; changes nothing. Takes the same arguments.

    >>> import torch
    >>> model = torch.nn.TransformerEncoderLayer(32, 4)
    >>> make_plan(model, {"qk": 0.5})["self_attn"].after.qk_dims
    (4, 4, 4, 4)
    """
    from .calibration.moments import Calibration  # what only planning needs is loaded when there is something to plan
    from .planning.asking import check_table, check_ways, costs_for, stock_rules
    from .planning.by_error import check_target
    from .planning.decide import Method, decide

    check_rounding(round_to)
    step = 1 if round_to == "auto" else round_to
    rules = Rules(granularity, scope, heads, split, step, min_heads, min_channels, match_dims)
    budget = check_ways(
        qkvo_ratios=qkvo_ratios, target_error=target_error, target_latency=target_latency, target_macs=target_macs,
        target_params=target_params,
    )  # fmt: skip
    check_table(latency)
    if stock is not False:
        from .checkpoint.stock import check_possible, check_stock

        rules = stock_rules(stock, rules, qkvo_ratios)
    target_error = None if target_error is None else check_target(target_error, rules)
    ratios = None if qkvo_ratios is None else Ratios.parse(qkvo_ratios)
    if calibration is not None and not isinstance(calibration, Calibration):
        found = f"a {type(calibration).__name__}"
        raise OptionError("calibration", "an attnprune.Calibration", found, "pass what attnprune.calibrate gave")
    has_data = data is not None or calibration is not None
    method = Method.resolve(basis, compensate, sequential, rules, has_data=has_data)
    if method.sequential and data is None:
        raise OptionError("sequential", "data to run layer by layer", "a calibration alone", "pass data=")
    model = plain(model)

    def decided() -> Plan:
        views = find_views(model, include, exclude)
        check_views(model, views, shards=not has_data)
        if stock:
            check_possible(model, views, granularity)
        whole, costs = rules, None
        if round_to == "auto":
            whole = replace(whole, round_to=auto_rounding(views, granularity))
        if budget is not None:
            whole = replace(whole, split="auto")
            costs, whole = costs_for(budget, model, views, example_inputs, latency, whole, progress)
        plan = decide(
            model, views, ratios, whole, method, costs=costs, scorer=scorer, data=data, calibration=calibration,
            loss_fn=loss_fn, target_error=target_error, seed=seed, progress=progress,
        )  # fmt: skip
        check_expressible(views, plan)
        if stock:
            check_stock(model, plan.after)
        return plan

    return agree(decided, digest=lambda plan: plan.digest)


def apply_plan(
    model: nn.Module,
    plan: Plan,
    *,
    example_inputs: Any = None,
    optimizer: Any = None,
    averages: Iterable[nn.Module] = (),
    measure: bool = False,
) -> Report:
    """Applies a plan in place: everything that it says, or nothing.

    A model of transformers also gets a config of its own, with an entry that says what shape its attention has, so that
    :func:`attnprune.from_pretrained` loads what its ``save_pretrained`` writes.

    Args:
        model: the model that the plan was made for.
        plan: from :func:`make_plan` or :meth:`Plan.from_json`.
        example_inputs: where given, the report counts multiply-adds of a forward pass over them.
        optimizer: an optimizer (or several, in a list) whose parameters and state follow the model's; training goes on
            as it was.
        averages: moving averages of the model (``torch.optim.swa_utils.AveragedModel``, or plain copies), changed by
            the same plan.
        measure: whether to time forward passes over ``example_inputs``, the model before and after in turns, for the
            report. An :class:`attnprune.errors.AttnPruneWarning` says why a plan may have made it slower.

    Raises:
        PlanMismatchError: the plan was made for another model.
        OptimizerStateError: the optimizer has state that cannot follow.
        WrappedModelError: (and its kinds) a projection cannot be pruned as it is.

    >>> import torch
    >>> model = torch.nn.TransformerEncoderLayer(32, 4)
    >>> apply_plan(model, make_plan(model, 0.5)).achieved["v"]
    0.5
    """
    commit = prepare_plan(
        model, plan, example_inputs=example_inputs, optimizer=optimizer, averages=averages, measure=measure
    )
    return commit()


def prepare_plan(
    model: nn.Module,
    plan: Plan,
    *,
    example_inputs: Any = None,
    optimizer: Any = None,
    averages: Iterable[nn.Module] = (),
    measure: bool = False,
    also: Sequence[Step] = (),
) -> Callable[[], Report]:
    """:func:`apply_plan` in two: here everything is checked and built, and what is returned commits it.

    Args:
        also: other steps that are taken along with the surgery, or not at all.
    """
    from .checkpoint.record import ConfigEntry

    if measure and example_inputs is None:
        raise OptionError("measure", "example_inputs to run", "none", "pass example_inputs=")
    model = plain(model)
    views = all_views(model, _names(plan))
    surgeon = Surgeon.prepare(model, views, plan)
    copies = [plain(_averaged(one)) for one in averages]
    steps = [surgeon, *(Surgeon.prepare(one, all_views(one, _names(plan)), plan) for one in copies)]
    entries = [] if plan.empty else [ConfigEntry(one) for one in (model, *copies)]
    patches = [OptimizerPatch(one, surgeon.changes, model) for one in optimizers_of(optimizer)]
    notes = _notes(views, plan)
    before = count_parameters(model)
    macs = None if example_inputs is None else count_macs(model, example_inputs)
    latency = _latency(model, surgeon, plan, example_inputs) if measure else None
    notes += _missed(plan, latency)

    def commit() -> Report:
        commit_all([*steps, *entries, *patches, *also])
        counts = None if macs is None else (macs, count_macs(model, example_inputs))
        return Report(plan, (before, count_parameters(model)), counts, notes, latency)

    return commit


def _missed(plan: Plan, latency: Measured | None) -> tuple[str, ...]:
    """A note where measured latency is more than 3 % above what was asked for."""
    budget = None if plan.asked is None else plan.asked.budget
    if budget is None or budget.resource != "latency" or latency is None or latency.ratio <= 1.03 * budget.share:
        return ()
    return (
        f"measured latency x {latency.ratio:.3f} is above the target x {budget.share:.3f}; on a quieter machine, or "
        "with attnprune.latency.measure(..., seconds=) of more, predictions are better",
    )


def _latency(model: nn.Module, surgeon: Surgeon, plan: Plan, example_inputs: Any) -> Measured:
    """Measured latency, and a warning where it rose."""
    from .cost.latency import measure_plan, slower_because

    found = Measured(*measure_plan(model, surgeon, example_inputs))
    if found.ratio > 1 and not plan.empty:
        why = "; ".join(slower_because(plan, found.seconds[0]))
        warn(
            f"The pruned model takes {found.ratio:.3f} of the dense one's time: {why}.", AttnPruneWarning, stacklevel=3
        )
    return found


def _averaged(model: nn.Module) -> nn.Module:
    """The model inside an AveragedModel."""
    return model.module if isinstance(model, AveragedModel) else model


def _notes(views: Sequence[AttentionView], plan: Plan) -> tuple[str, ...]:
    """Where a rotated basis was asked for and a family keeps some channels as they stand."""
    if plan.asked is None or "rotated" not in plan.asked.basis:
        return ()
    reasons = dict.fromkeys((kind, why) for view in views for kind, why in view.fixed.items())
    return tuple(f"{kind} keeps its own channels instead of a rotated basis: {why}" for kind, why in reasons)


def prune_attention(
    model: nn.Module,
    qkvo_ratios: RatiosLike | None = None,
    *,
    granularity: Granularity = "channel",
    scope: Scope = "global",
    heads: Heads = "uniform",
    scorer: str | Scorer | Any = "auto",
    basis: Basis = "auto",
    compensate: Compensate = "auto",
    split: Split = "fixed",
    sequential: bool = False,
    target_error: float | None = None,
    target_latency: float | None = None,
    target_macs: float | None = None,
    target_params: float | None = None,
    latency: LatencyTable | None = None,
    data: Iterable[Any] | None = None,
    calibration: Calibration | None = None,
    loss_fn: LossFn | None = None,
    round_to: int | Literal["auto"] = 1,
    match_dims: bool = False,
    stock: bool = False,
    min_heads: int = 1,
    min_channels: int = 1,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    example_inputs: Any = None,
    measure: bool | Literal["auto"] = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Removes heads or channels from the attention modules of a model, in place.

    Args:
        model: any module with attention of a known family.
        qkvo_ratios: the fraction of each projection's weights to remove, in [0, 1): one number for all four, a mapping
            with keys of ``q k v o qk vo`` (missing: 0), or a sequence in the order q, k, v, o. Q and K, and V and O,
            share the channels of a product and take equal ratios.
        granularity: ``"head"`` removes whole heads (the paper's EH), ``"channel"`` channels inside heads (PH),
            ``"joint"`` lets heads and channels compete by score per weight.
        scope: ``"local"`` removes the same fraction in every layer, ``"global"`` lets layers compete.
        heads: ``"uniform"`` every head of a layer keeps as many channels, ``"ragged"`` each its own number.
        scorer: ``"magnitude"``, ``"taylor"``, ``"fisher"``, ``"gate"``, ``"random"``, a :class:`Scorer`, an importance
            of Torch-Pruning, or ``"auto"``: the best for what was given (see :doc:`closed_form`).
        basis: ``"channels"`` removes channels as they stand. ``"rotated"`` turns every head into the basis in which the
            fewest directions carry the most, and removes directions; the result is plain Linears all the same.
            ``"auto"``: rotated if there are ``data`` (or a ``calibration``) and channels are to go, else channels.
        compensate: ``False`` nothing but removal; ``True`` what stays is refitted in closed form to make up for what
            went (needs data); ``"auto"``: if there are data.
        split: ``"fixed"`` every projection loses its own ratio; ``"auto"`` the ratios' total is one budget of attention
            weights, and the method finds who bears it: qk or vo, which layer, which head.
        sequential: moments and refits layer by layer, each from what the pruned layers before it hand on; takes a
            forward pass over the data per layer.
        target_error: in place of ``qkvo_ratios``: the share of the energy of logits (qk) and outputs (vo) that every
            layer (with ragged heads every head) may lose, in (0, 1).
        target_latency: in place of ``qkvo_ratios``: the forward pass over ``example_inputs`` is to take this share of
            what it takes now, in (0, 1); what each shape takes is measured first, or given (see :doc:`latency`).
        target_macs: in place of ``qkvo_ratios``: the share of the whole model's multiply-adds over ``example_inputs``.
        target_params: in place of ``qkvo_ratios``: the share of the whole model's parameters. Of these budgets the plan
            of least loss is taken; they set ``split="auto"``.
        latency: what :func:`attnprune.latency.measure` gave, for ``target_latency``.
        data: an iterable of batches. A mapping is called ``model(**batch)``, a pair is ``(inputs, targets)``, a
            tensor is called ``model(x)``. Labels are needed only by scorers that take the gradient of a loss.
        calibration: what :func:`attnprune.calibrate` gave for this model, in place of its pass over ``data``.
        loss_fn: ``loss_fn(model, batch)`` gives a scalar; None for the model's own loss, or for a pair cross entropy
            (integer targets) or square error.
        round_to: channels that a head keeps (heads that a layer keeps, with head granularity) are a multiple of this;
            ``"auto"``: of what the model's device likes (:func:`attnprune.cost.rounding.rounding`), 1 for whole heads.
        match_dims: every head keeps as many qk as vo channels, so that layers with uniform heads keep their own
            forward and fused kernels; layers still differ. Needs one ratio for both, or ``split="auto"``.
        stock: plans whose result :func:`attnprune.export_stock` can write for plain transformers: every layer keeps as
            many heads and channels as every other, and as many qk as vo. Implies ``scope="local"`` and ``match_dims``.
        min_heads: heads that every layer keeps at least.
        min_channels: qk and vo channels that every head keeps at least.
        include: glob patterns of names; only these attention modules are pruned, and ratios are of these.
        exclude: glob patterns of names to leave alone.
        example_inputs: a tensor, tuple or mapping; where given, the report counts multiply-adds. Budgets of latency and
            multiply-adds need it.
        measure: whether the report has latency, measured in turns before and after; ``"auto"``: with
            ``target_latency`` and ``example_inputs``.
        seed: for ``scorer="random"`` and projections of the output.
        progress: whether to show a progress bar over ``data``.

    Returns:
        What was asked and what was achieved. They differ by less than one unit of the granularity and rounding.

    Raises:
        AttnPruneError: one of its kinds; the model is then bitwise as it was.

    >>> import torch
    >>> model = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True)
    >>> report = prune_attention(model, 0.5)
    >>> model.self_attn.q_proj.weight.shape, report.achieved["q"]
    (torch.Size([16, 32]), 0.5)
    """
    plan = make_plan(
        model, qkvo_ratios, granularity=granularity, scope=scope, heads=heads, scorer=scorer, basis=basis,
        compensate=compensate, split=split, sequential=sequential, target_error=target_error,
        target_latency=target_latency, target_macs=target_macs, target_params=target_params, latency=latency, data=data,
        calibration=calibration, loss_fn=loss_fn, round_to=round_to, match_dims=match_dims, stock=stock,
        min_heads=min_heads, min_channels=min_channels, include=include, exclude=exclude,
        example_inputs=example_inputs, seed=seed, progress=progress,
    )  # fmt: skip
    timed = target_latency is not None and example_inputs is not None if measure == "auto" else measure
    return apply_plan(model, plan, example_inputs=example_inputs, measure=timed)


def masked(model: nn.Module, plan: Plan) -> AbstractContextManager[None]:
    """The plan's effect without surgery: inside the block, what it removes is zero; on exit every value is back.

    Averaged attention weights still count the heads that a plan removes; outputs are those of the pruned model.

    >>> import torch
    >>> model = torch.nn.MultiheadAttention(16, 4)
    >>> with masked(model, make_plan(model, 0.5)):
    ...     int((model.in_proj_weight == 0).all(dim=1).sum())
    24
    """
    model = plain(model)
    return masked_views(model, all_views(model, _names(plan)), plan)


def _names(plan: Plan) -> set[str]:
    """The attention modules that a plan is about."""
    if not isinstance(plan, Plan):
        remedy = "make one with make_plan, or read one with Plan.from_json"
        raise OptionError("plan", "an attnprune.Plan", f"a {type(plan).__name__}", remedy)
    return {spec.name for spec in plan.specs}
