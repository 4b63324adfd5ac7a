"""The functions that users call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn
from torch.optim.swa_utils import AveragedModel

from .calibration.processes import agree
from .calibration.sample import Sample
from .cost.counting import count_macs, count_parameters
from .errors import DataError, OptionError
from .families.base import AttentionView
from .families.looks import Skipped
from .families.registry import Survey, all_views, chosen, find_views, plain, report_skipped, select
from .nn.kept import ordinary
from .report.making import cache_of, measured, missed, notes_of, slow_shapes, warn_of_time, ways_of
from .report.report import Report
from .surgery import (
    OptimizerPatch,
    Step,
    Surgeon,
    Verification,
    check_expressible,
    check_held,
    check_views,
    commit_all,
    optimizers_of,
)
from .surgery.mask import masked_by_user
from .values.choices import Choices
from .values.method import Method, check_one_of
from .values.options import Options, YesNoAuto
from .values.plan import Plan
from .values.ratios import RatiosLike
from .values.recovery import Recovery
from .values.request import YES_NO_AUTO, Request, no_data_to_tune_on, no_inputs_to_run
from .values.rules import Rules
from .values.spec import AttentionSpec

if TYPE_CHECKING:
    from typing import Unpack

    from .recovery.recover import Recovering


@ordinary
def find_attention(
    model: nn.Module, *, include: Choices | None = None, exclude: Choices | None = None
) -> tuple[AttentionSpec, ...]:
    """The attention modules of a model that can be pruned, in the order of ``named_modules``.

    Args:
        model: any module.
        include: as in :func:`prune_attention`, and so ``exclude``; together they list what it would prune.
        exclude: what to leave out.

    Raises:
        NoAttentionError: none of a known family; lists what looks like one.

    >>> import torch
    >>> [spec.name for spec in find_attention(torch.nn.TransformerEncoderLayer(32, 4))]
    ['self_attn']
    """
    return tuple(view.spec for view in find_views(plain(model), include, exclude))


@ordinary
def make_plan(
    model: nn.Module,
    qkvo_ratios: RatiosLike | None = None,
    *,
    data: Iterable[Any] | None = None,
    include: Choices | None = None,
    exclude: Choices | None = None,
    example_inputs: Any = None,
    verify: YesNoAuto = "auto",
    strict: bool = False,
    preset: str | None = None,
    rules: Rules | Mapping[str, Any] | None = None,
    method: Method | Mapping[str, Any] | None = None,
    **options: Unpack[Options],
) -> Plan:
    """Decides what :func:`prune_attention` would remove; changes nothing.

    Takes the same arguments, but those of what happens to a model that is changed: ``optimizer`` and ``averages``.
    ``verify``, ``measure`` and ``recover`` change nothing in a plan.

    >>> import torch
    >>> model = torch.nn.TransformerEncoderLayer(32, 4)
    >>> make_plan(model, {"qk": 0.5})["self_attn"].after.qk_dims
    (4, 4, 4, 4)
    """
    request = Request.parse(
        qkvo_ratios, data=data, include=include, exclude=exclude, example_inputs=example_inputs, verify=verify,
        strict=strict, preset=preset, rules=rules, method=method, **options,
    )  # fmt: skip
    return plan_for(model, request)


def plan_for(model: nn.Module, request: Request) -> Plan:
    """Decides what a request removes from a model; changes nothing.

    >>> import torch
    >>> plan_for(torch.nn.TransformerEncoderLayer(32, 4), Request.parse(0.5))["self_attn"].after.qk_dims
    (4, 4, 4, 4)
    """
    return decided_by(model, request).plan


class Decided(NamedTuple):
    """A plan, and what was learned on the way to it."""

    plan: Plan
    skipped: tuple[Skipped, ...]
    """What the plan passes over."""
    sample: Sample
    """Inputs to run the model on."""


def decided_by(model: nn.Module, request: Request) -> Decided:
    """:func:`plan_for`, with what it passes over and inputs to run the model on."""
    from .planning.costs import fitted  # what only planning needs is loaded when there is something to plan
    from .planning.decide import decide
    from .planning.faster import by_time, check_time

    model, rules, evidence = plain(model), request.rules, request.evidence
    sample = Sample(evidence.example_inputs, evidence.data, evidence.loss_fn, evidence.output_fn)
    skipped: list[Skipped] = []

    def run() -> object:
        return sample.quietly(model)

    def decided() -> Plan:
        survey = Survey(model, run=run)
        views = select(survey, request.include, request.exclude)
        meant = chosen(survey, request.include, request.exclude)
        check_views(model, views, shards=not evidence.has_data)
        if rules.stock:
            from .checkpoint.stock import check_possible, check_stock

            check_possible(model, views, rules.granularity)
        asked = by_time(model, views, replace(request, evidence=replace(evidence, data=sample.data)))
        plan = decide(model, views, *fitted(asked, model, views))
        check_expressible(views, plan)
        check_time(model, views, plan, request)
        warn_of_time(plan, evidence.latency)
        if rules.stock:
            check_stock(model, plan.after)
        seen = survey.skipped(run if request.verify and sample.given else None)
        skipped.extend(one for one in seen if meant(one.name))
        report_skipped(skipped, request.strict)
        return plan

    return Decided(agree(decided, digest=lambda plan: plan.digest), tuple(skipped), sample)


@ordinary
def apply_plan(
    model: nn.Module,
    plan: Plan,
    *,
    example_inputs: Any = None,
    optimizer: Any = None,
    averages: Iterable[nn.Module] = (),
    measure: bool = False,
    verify: YesNoAuto = "auto",
    data: Iterable[Any] | None = None,
    recover: Recovery | Mapping[str, Any] | int | str | None = None,
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
        verify: as in :func:`prune_attention`, with ``example_inputs`` or ``data``.
        data: batches, to verify with and for ``recover``.
        recover: as in :func:`prune_attention`: how long what is left is tuned towards the dense model.

    Raises:
        PlanMismatchError: the plan was made for another model.
        OptimizerStateError: the optimizer has state that cannot follow, or lacks what is pruned and trained.
        VerificationError: the result computes something else; it was put back.
        WrappedModelError: (and its kinds) a projection cannot be pruned as it is.

    >>> import torch
    >>> model = torch.nn.TransformerEncoderLayer(32, 4)
    >>> apply_plan(model, make_plan(model, 0.5)).achieved["v"]
    0.5
    """
    check_one_of("verify", verify, YES_NO_AUTO)
    recovery = None if recover is None else Recovery.parse(recover)
    if recovery is not None and data is None:
        raise no_data_to_tune_on()
    commit = prepare_plan(
        model, plan, example_inputs=example_inputs, optimizer=optimizer, averages=averages, measure=measure,
        sample=Sample(example_inputs, list(data) if isinstance(data, Iterator) else data), verify=verify,
        recovery=recovery,
    )  # fmt: skip
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
    sample: Sample | None = None,
    verify: YesNoAuto = "auto",
    skipped: Sequence[Skipped] | None = None,
    recovery: Recovery | None = None,
    progress: bool = True,
) -> Callable[[], Report]:
    """:func:`apply_plan` in two: here everything is checked and built, and what is returned commits it.

    Args:
        also: other steps that are taken along with the surgery, or not at all.
        sample: inputs to verify the result with.
        verify: whether to; ``"auto"``: where there is a sample.
        skipped: what was found not to be prunable; None: what looks like it.
        recovery: how the result is tuned towards the dense model, on the sample's data; None: not at all.
        progress: whether that shows a bar.

    Raises:
        DataError: ``verify=True`` and nothing to run the model on.
    """
    from .checkpoint.entry import ConfigEntry

    if measure and example_inputs is None:
        raise no_inputs_to_run()
    model = plain(model)
    survey = Survey(model, trusted=_names(plan))
    views = [view for view in survey.views if view.name in _names(plan)]
    for name in survey.errors.keys() & _names(plan):
        raise survey.errors[name]
    surgeon = Surgeon.prepare(model, views, plan)
    copies = [plain(one.module if isinstance(one, AveragedModel) else one) for one in averages]
    steps = [surgeon, *(Surgeon.prepare(one, all_views(one, _names(plan)), plan) for one in copies)]
    entries = [] if plan.empty else [ConfigEntry(one) for one in (model, *copies)]
    optimizers = optimizers_of(optimizer)
    check_held(optimizers, surgeon.changes, model)
    patches = [OptimizerPatch(one, surgeon.changes, model) for one in optimizers]
    notes = notes_of(views, plan)
    before = count_parameters(model)
    macs = None if example_inputs is None else count_macs(model, example_inputs)
    latency = measured(model, surgeon, plan, example_inputs) if measure else None
    notes += missed(plan, latency) if measure else slow_shapes(views, plan)
    ways, cache = ways_of(views, plan), cache_of(views, plan)
    skipped = survey.skipped() if skipped is None else skipped
    check = _verification(model, views, plan, sample, verify)
    tuning: Recovering | None = None
    if recovery is not None and sample is not None and sample.data is not None and not plan.empty:
        from .recovery.recover import Recovering

        tuning = Recovering(model, plan, recovery, sample.data, sample.loss_fn, sample.output_fn, progress)

    def commit() -> Report:
        last: list[Step] = [one for one in (check, tuning) if one is not None]
        commit_all([*steps, *entries, *patches, *also, *last])
        counts = None if macs is None else (macs, count_macs(model, example_inputs))
        said = notes if check is None or not check.why_not else (*notes, f"not verified: {check.why_not}")
        verified = None if check is None else check.found
        parameters = before, count_parameters(model)
        recovered = None if tuning is None else tuning.found
        return Report(plan, parameters, counts, said, latency, tuple(skipped), ways, cache, verified, recovered)

    return commit


def _verification(
    model: nn.Module, views: Sequence[AttentionView], plan: Plan, sample: Sample | None, verify: YesNoAuto
) -> Verification | None:
    """The step that compares the result with the masked model, where that is asked for and possible."""
    if verify is True and (sample is None or not sample.given):
        remedy = "pass example_inputs= (or data= to prune_attention)"
        raise DataError("verify=True", "inputs to run the model on", "none", remedy)
    if verify is False or sample is None or plan.empty or not sample.given:
        return None
    return Verification(model, views, plan, sample.run, sample.samples, needed=verify is True)


@ordinary
def prune_attention(
    model: nn.Module,
    qkvo_ratios: RatiosLike | None = None,
    *,
    data: Iterable[Any] | None = None,
    optimizer: Any = None,
    averages: Iterable[nn.Module] = (),
    include: Choices | None = None,
    exclude: Choices | None = None,
    example_inputs: Any = None,
    verify: YesNoAuto = "auto",
    strict: bool = False,
    preset: str | None = None,
    rules: Rules | Mapping[str, Any] | None = None,
    method: Method | Mapping[str, Any] | None = None,
    **options: Unpack[Options],
) -> Report:
    """Removes heads or channels from the attention modules of a model, in place.

    Args:
        model: any module with attention of a known family.
        qkvo_ratios: the fraction of each projection's weights to remove, in [0, 1): one number for all four, a mapping
            with keys of ``q k v o qk vo`` (missing: 0), or a sequence in the order q, k, v, o. Q and K share
            the channels of a product, and so do V and O; where one of a pair is to lose more than the other, the rest
            goes from the features that it reads (O: writes). In its place a ``target_...`` of the options.
        data: an iterable of batches. A mapping is called ``model(**batch)``, a pair is ``(inputs, targets)``, a
            tensor is called ``model(x)``. Labels are needed only by scorers that take the gradient of a loss.
        optimizer: an optimizer (or several, in a list) whose parameters and state follow the model's. Together they
            hold all that is pruned and trained.
        averages: moving averages of the model, changed by the same plan.
        include: only these attention modules are pruned, and ratios are of these: a glob pattern of names, a class, a
            function of name and module, or a list of such. :func:`find_attention` lists what they mean.
        exclude: what to leave alone, likewise.
        example_inputs: a tensor, tuple or mapping; where given, the report counts multiply-adds. Budgets of latency and
            multiply-adds need it.
        verify: whether the pruned model is run against the dense one with what went at zero, before the call returns;
            a difference above rounding puts everything back and raises. ``"auto"``: where there are ``example_inputs``
            or ``data``. It takes two forward passes over at most 4 samples of the data.
        strict: whether attention that cannot be pruned is an error; else it is in ``report.skipped``, and a warning.
        preset: options that go well together; an option given beside it goes before. ``"accurate"`` (with data, qk and
            vo, layers and heads share one budget), ``"fast"`` (what this device's kernels like; with ``example_inputs``
            channels or heads, by measurement), ``"stock"`` (plain transformers can load it), or one of the paper's
            eight, with channels as they stand and no refit: ``"paper:PH-G-FI"``, ``"paper:EH-L-MAG"`` and so on.
        rules: a :class:`Rules`, or a mapping of its fields, in place of options of these names.
        method: a :class:`attnprune.Method`, or a mapping of its fields, in place of options of these names.
        options: of :class:`attnprune.Options`, which says what each means: ``granularity``, ``scope``, ``heads``,
            ``split``, ``round_to``, ``min_heads``, ``min_channels``, ``match_dims``, ``stock``; ``scorer``, ``basis``,
            ``compensate``, ``sequential``, ``seed``; ``target_error``, ``target_latency``, ``target_macs``,
            ``target_params``; ``recover``; ``calibration``, ``loss_fn``, ``output_fn``, ``latency``, ``measure``,
            ``progress``.

    Returns:
        What was asked and what was achieved. They differ by less than one unit of the granularity and rounding.

    Raises:
        AttnPruneError: one of its kinds; the model is then bitwise as it was. Where several arguments are wrong, an
            OptionError lists all of them.

    >>> import torch
    >>> model = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True)
    >>> report = prune_attention(model, 0.5)
    >>> model.self_attn.q_proj.weight.shape, report.achieved["q"]
    (torch.Size([16, 32]), 0.5)
    """
    request = Request.parse(
        qkvo_ratios, data=data, include=include, exclude=exclude, example_inputs=example_inputs, verify=verify,
        strict=strict, preset=preset, rules=rules, method=method, **options,
    )  # fmt: skip
    made = decided_by(model, request)
    commit = prepare_plan(
        model, made.plan, example_inputs=example_inputs, optimizer=optimizer, averages=averages, measure=request.timed,
        sample=made.sample, verify=request.verify, skipped=made.skipped, recovery=request.recovery,
        progress=request.evidence.progress,
    )  # fmt: skip
    return commit()


@ordinary
def masked(model: nn.Module, plan: Plan) -> AbstractContextManager[None]:
    """The plan's effect without surgery: inside the block, what it removes is zero; on exit every value is back.

    Until then the model cannot be pruned (:class:`attnprune.errors.BusyError`).
    Averaged attention weights still count the heads that a plan removes; outputs are those of the pruned model.

    >>> import torch
    >>> model = torch.nn.MultiheadAttention(16, 4)
    >>> with masked(model, make_plan(model, 0.5)):
    ...     int((model.in_proj_weight == 0).all(dim=1).sum())
    24
    """
    model = plain(model)
    return masked_by_user(model, all_views(model, _names(plan)), plan)


def _names(plan: Plan) -> set[str]:
    """The attention modules that a plan is about."""
    if not isinstance(plan, Plan):
        remedy = "make one with make_plan, or read one with Plan.from_json"
        raise OptionError("plan", "an attnprune.Plan", f"a {type(plan).__name__}", remedy)
    return {spec.name for spec in plan.specs}
