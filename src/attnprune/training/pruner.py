"""Pruning as a step in somebody's training loop: :class:`AttentionPruner`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from ..api import Decided, apply_plan, decided_by, plan_for, prepare_plan
from ..calibration.processes import across_processes, active, agree, exchange
from ..calibration.sample import Sample
from ..cost.counting import count_parameters
from ..cost.latency.table import LatencyTable
from ..cost.rounding import auto_rounding
from ..errors import DataError, OptionError, PlanMismatchError
from ..families.base import AttentionView
from ..families.registry import find_views, plain
from ..nn.kept import ordinary
from ..planning.costs import cost_now, share_of, table_for
from ..planning.features import uneven
from ..report.report import Report
from ..surgery import Assignment, optimizers_of
from ..values.budget import Budget, Ceiling, Limit
from ..values.choices import Choices
from ..values.faults import Faults
from ..values.layer_plan import LayerPlan
from ..values.layout import PROJECTIONS, Projection
from ..values.method import Method
from ..values.options import PrunerOptions, YesNoAuto
from ..values.plan import Plan
from ..values.ratios import Ratios, RatiosLike
from ..values.request import Request
from ..values.rules import Rules
from .observing import Observations, observer, read
from .schedules import MOST, Schedule, check_schedule, gone, of_what_is_left
from .state import VERSION, read_state

if TYPE_CHECKING:
    from typing import Unpack


class AttentionPruner:
    """Removes attention step by step while a model trains; the one stateful thing in attnprune.

    After ``steps`` calls of :meth:`step` the model has lost ``qkvo_ratios`` of the weights that it had when the pruner
    was made. Every call removes what is due by the schedule, measured against that model, so rounding does not add up.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> pruner = AttentionPruner(model, 0.5, steps=2, scope="local", scorer="fisher")
    >>> x = torch.randn(8, 5, 32)
    >>> while not pruner.done:
    ...     for _ in range(3):
    ...         optimizer.zero_grad()
    ...         model(x).square().mean().backward()
    ...         pruner.observe()  # after backward, before the optimizer's step
    ...         optimizer.step()
    ...     report = pruner.step(optimizer)  # parameters and moments are cut along; no new optimizer
    >>> pruner.report.achieved["q"], model.layers[0].self_attn.q_proj.weight.shape
    (0.5, torch.Size([16, 32]))

    Args:
        model: any module with attention of a known family, pruned in place.
        qkvo_ratios: the fraction of each projection's weights that is gone in the end, as in
            :func:`attnprune.prune_attention`. In its place ``target_latency``, ``target_macs`` or ``target_params``:
            the share of what the whole model cost in the beginning that is left, or how much may be left. Latency is
            measured once, when the pruner is made, unless ``latency`` gives a table.
        schedule: ``"geometric"`` removes the same fraction of what is left every time (the paper's rounds),
            ``"linear"`` the same number of weights, ``"cubic"`` most of them early (Zhu and Gupta, arXiv 1710.01878),
            ``"one-shot"`` all at once; or a function from the share of steps done to that of the ratios then gone.
        steps: number of calls of :meth:`step`, 1 for ``"one-shot"``.
        data: as in :func:`attnprune.prune_attention`; every step plans by them. Without,
            ``scorer="taylor"``, ``"fisher"`` or ``"auto"`` (Fisher) need the gradients that :meth:`observe` saw.
        include: as there, and so ``exclude``, ``example_inputs``, ``verify``, ``strict``, ``preset``, ``rules`` and
            ``method``.
        options: of :class:`attnprune.values.options.PrunerOptions`: all of :class:`attnprune.Options` but
            ``target_error``, ``calibration`` and ``measure``.

    Raises:
        OptionError: an unknown schedule or option, steps below 1, or another fault of a request. Where there are
            several, it lists all of them.
    """

    @ordinary
    def __init__(
        self,
        model: nn.Module,
        qkvo_ratios: RatiosLike | None = None,
        *,
        schedule: Schedule = "geometric",
        steps: int = 10,
        data: Iterable[Any] | None = None,
        include: Choices | None = None,
        exclude: Choices | None = None,
        example_inputs: Any = None,
        verify: YesNoAuto = "auto",
        strict: bool = False,
        preset: str | None = None,
        rules: Rules | Mapping[str, Any] | None = None,
        method: Method | Mapping[str, Any] | None = None,
        **options: Unpack[PrunerOptions],
    ) -> None:
        faults = Faults()
        faults.attempt(check_schedule, schedule, steps)
        known = faults.known("AttentionPruner", options, PrunerOptions.__optional_keys__)
        request = faults.attempt(
            Request.parse, qkvo_ratios, data=data, include=include, exclude=exclude, example_inputs=example_inputs,
            verify=verify, strict=strict, preset=preset, rules=rules, method=method, measure=False, **known,
        )  # fmt: skip
        if request is not None and request.rules.granularity == "auto":
            faults.add(OptionError("granularity", "what is the same where a run is resumed", '"auto"', 'try "channel"'))
        if request is not None and _timed(request.amount) and request.evidence.latency is None:
            remedy = "pass latency= with what attnprune.latency.measure gave, or a share"
            faults.add(OptionError("target_latency", "a latency table, for runs to be resumed", "none", remedy))
        faults.throw()
        assert request is not None
        # gradients under DDP are averaged already; after a step, wrap the module anew (attnprune.rewrap)
        inner = plain(model)
        self.model = plain(inner.module) if type(inner).__name__ == "DistributedDataParallel" else inner  # type: ignore[arg-type]
        self.request, self.schedule = replace(request, measure="auto"), schedule
        self.steps = 1 if schedule == "one-shot" else steps
        self.steps_done = 0
        views = self._views()
        self._dense = tuple(view.spec for view in views)
        self._plan = Plan(tuple(LayerPlan(spec) for spec in self._dense))
        self._before = count_parameters(self.model)
        self._seen = Observations()
        self._cost = 0.0
        if request.rules.round_to == "auto":  # what is left later would be rounded finer
            step = auto_rounding(views, request.rules.granularity)
            self.request = replace(self.request, rules=replace(request.rules, round_to=step))
        self._gone(0.0, 1)  # a schedule that gives nonsense says so now
        if isinstance(request.amount, (Budget, Ceiling)):
            self._cost = self._measure_cost(request.amount, views)
            self.request = replace(self.request, amount=share_of(request.amount, self._cost, self._table))
        plan_for(self.model, self._trial)

    @property
    def ratios(self) -> Ratios:
        """What is gone of each projection in the end, where that was asked for; else nothing."""
        return self.request.amount if isinstance(self.request.amount, Ratios) else Ratios()

    @property
    def budget(self) -> Budget | None:
        """What the whole model may cost in the end, where that was asked for."""
        return self.request.amount if isinstance(self.request.amount, Budget) else None

    @property
    def _trial(self) -> Request:
        """What shows whether the model can be planned at all, without a look at data."""
        method = replace(self.request.method, scorer="random", compensate="auto", sequential=False)
        evidence = replace(self.request.evidence, data=None)
        return replace(self.request, amount=self.budget or Ratios(), method=method, evidence=evidence)

    def _views(self) -> list[AttentionView]:
        sample = Sample(self.request.evidence.example_inputs, None)
        run = partial(sample.quietly, self.model)
        return find_views(self.model, self.request.include, self.request.exclude, run=run)

    @property
    def _observed(self) -> tuple[Projection, ...]:
        """The projections whose features are scored: all, where one of a pair is to lose more than the other."""
        return PROJECTIONS if uneven(self.ratios, self.request.rules) else ()

    @property
    def _together(self) -> bool:
        """Whether qk and vo share one budget, or units hold both."""
        rules = self.request.rules
        return rules.together or ((rules.match_dims or rules.granularity == "head") and not self._observed)

    @property
    def done(self) -> bool:
        """Whether all steps have been taken."""
        return self.steps_done >= self.steps

    @property
    def plan(self) -> Plan:
        """All steps so far as one plan for the model as it was in the beginning."""
        return self._plan

    @property
    def report(self) -> Report:
        """What was asked and achieved so far, against the model as it was in the beginning."""
        return Report(self._plan, (self._before, count_parameters(self.model)))

    # observing

    @ordinary
    def observe(self, *, scaler: Any = None) -> None:
        """Adds the gradients that the loop has just computed to the scores; costs no pass of its own.

        Call it after ``loss.backward()`` (after the last one, where gradients of several are accumulated) and before
        gradients are clipped or zeroed. With ``torch.amp.GradScaler``, pass it: gradients are divided by its scale
        (call before ``scaler.unscale_``), and observations that overflowed are left out, as the optimizer leaves out
        the step.

        Raises:
            DataError: no gradient, or (without a scaler) one that is not finite.
            OptionError: the scorer cannot use gradients.
        """
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        found = read(observer(self.request), self._views(), scale, self._observed)
        if all(bool(part.isfinite().all()) for parts in found.values() for part in parts):
            self._seen = self._seen.plus(found)
        elif scaler is None:
            remedy = "pass scaler=, or look for overflow in the loss"
            raise DataError("observe", "finite gradients", "NaN or infinite ones", remedy)

    @property
    def observes(self) -> bool:
        """Whether :meth:`observe` can be called: scores come from gradients."""
        try:
            observer(self.request)
        except OptionError:
            return False
        return True

    # pruning

    @ordinary
    def step(
        self, optimizer: Any = None, scheduler: Any = None, *, averages: Iterable[nn.Module] = (),
        example_inputs: Any = None,
    ) -> Report:  # fmt: skip
        """Removes what is due; model, optimizer and averages change together or not at all.

        In several processes of ``torch.distributed`` all of them must call it: what they observed, and scores and
        moments of the ``data`` that each of them has, are put together (:func:`attnprune.across_processes`). Where one
        of them cannot, none does.

        Args:
            optimizer: an optimizer (or several, in a list) whose parameters and state are cut along.
            scheduler: a learning rate scheduler (or several). It goes on as it is, for groups stay the same objects;
                its optimizer is cut along, if it is not given by itself.
            averages: moving averages of the model to prune by the same plan.
            example_inputs: where given, the report counts multiply-adds.

        Returns:
            The report of this step; :attr:`report` has that of all of them.

        Raises:
            OptionError: all steps have been taken.
            DataError: the scorer needs gradients, and since the last step saw none, or of some attention zeros alone.
            PlanMismatchError: processes of ``torch.distributed`` came to different plans; raised in all of them.
            ProcessError: another of them failed.
        """
        self._check_open()

        def prepared() -> tuple[Plan, Callable[[], Report]]:
            made = self._next()
            plan = made.plan
            number, whole = self.steps_done + 1, self._plan.then(plan) if self.steps_done else plan
            if self.budget is not None and whole.asked is not None and whole.asked.budget is not None:
                asked = replace(whole.asked.budget, share=self._left(self.budget, number))  # of the beginning
                whole = replace(whole, asked=replace(whole.asked, budget=asked))
            mine = Assignment(self, _plan=whole, steps_done=number, _seen=Observations())
            optimizers = optimizers_of(optimizer, scheduler)
            return plan, prepare_plan(
                self.model,
                plan,
                optimizer=optimizers,
                averages=averages,
                example_inputs=example_inputs,
                also=[mine],
                sample=made.sample,
                # a difference that one process alone sees would leave the others pruned
                verify=False if active() and self.request.verify == "auto" else self.request.verify,
                skipped=made.skipped,
                recovery=self.request.recovery,
                progress=self.request.evidence.progress,
            )

        with across_processes():
            _, commit = agree(prepared, digest=lambda both: both[0].digest)
        return commit()

    @ordinary
    def next_plan(self) -> Plan:
        """What :meth:`step` would do now, without doing it: for a model that is sharded (FSDP2), say.

        Raises:
            The errors of :meth:`step`; nothing changes.
        """
        self._check_open()
        with across_processes():
            return agree(lambda: self._next().plan, digest=lambda plan: plan.digest)

    def _check_open(self) -> None:
        if self.done:
            raise OptionError("step", f"at most {self.steps} steps", "one more", "check pruner.done")

    def _next(self) -> Decided:
        number = self.steps_done + 1
        due: Ratios | Budget = self._due(number) if self.budget is None else self._share_due(self.budget, number)
        request, seen = replace(self.request, amount=due), self._seen.pooled()
        if seen.count:
            scorer: Any = seen.scorer(observer(request), self._observed)
            request = replace(request, method=replace(request.method, scorer=scorer))
        elif request.evidence.data is None and request.method.scorer in ("auto", "fisher", "taylor"):
            remedy = 'call observe() after loss.backward(), give data, or ask for scorer="magnitude"'
            raise DataError("step", "gradients to score by", "none", remedy)
        return decided_by(self.model, request)

    def _gone(self, share: float, number: int) -> float:
        """Of a final share that goes, what is gone after step ``number``."""
        return gone(self.schedule, share, number / self.steps)

    def _due(self, number: int) -> Ratios:
        """What step ``number`` is to remove of what is left."""
        now = tuple(view.spec for view in self._views())
        found = {p: self._gone(self.ratios.of(p), number) for p in PROJECTIONS}
        return of_what_is_left(found, self._dense, now, self._together)

    def _left(self, budget: Budget, number: int) -> float:
        """What is left after step ``number`` of what the model cost in the beginning."""
        return min(1 - self._gone(1 - budget.share, number), MOST)

    def _share_due(self, budget: Budget, number: int) -> Budget:
        """The budget of step ``number``, as a share of what the model costs now."""
        now = cost_now(budget, self.model, self._views(), self.request.evidence.example_inputs, self._table)
        return Budget(budget.resource, min(self._left(budget, number) * self._cost / now, MOST))

    @property
    def _table(self) -> LatencyTable | None:
        table: LatencyTable | None = self.request.evidence.latency
        return table

    def _measure_cost(self, budget: Limit, views: Sequence[AttentionView]) -> float:
        """What the model costs in the beginning; measures latency unless a table was given."""
        evidence = self.request.evidence
        if budget.resource == "latency" and self._table is None:
            table = table_for(self.model, views, evidence.example_inputs, self.request.rules, evidence.progress)
            self._keep_table(exchange(table)[0] if active() else table)  # one clock for all processes
        return cost_now(budget, self.model, views, evidence.example_inputs, self._table)

    def _keep_table(self, table: LatencyTable) -> None:
        self.request = replace(self.request, evidence=replace(self.request.evidence, latency=table))

    # checkpoints

    @property
    def _options(self) -> dict[str, Any]:
        """What a pruner that goes on must have been asked for."""
        budget = None if self.budget is None else {"resource": self.budget.resource, "share": self.budget.share}
        return {"steps": self.steps, "ratios": {p: self.ratios.of(p) for p in PROJECTIONS}, "budget": budget}

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on in another process, beside the model's and the optimizer's own: plain values."""
        bare = replace(self._plan, layers=tuple(replace(one, fold=None, refit=None) for one in self._plan))
        return {
            "version": VERSION,
            **self._options,
            "steps_done": self.steps_done,
            "cost": self._cost,
            "latency": None if self._table is None else self._table.to_json(),
            "plan": bare.to_json(),
            "parameters": self._before,
            "observations": self._seen.count,
            "seen": {name: list(parts) for name, parts in self._seen.sums.items()},
        }

    @ordinary
    def load_state_dict(
        self, state: Mapping[str, Any], *, optimizer: Any = None, averages: Iterable[nn.Module] = ()
    ) -> None:
        """Goes on where :meth:`state_dict` was taken.

        A model as it was in the beginning is given the shapes that it had then, and so are an optimizer that was made
        for it already and averages; load the weights and the optimizer's state afterwards.

        Raises:
            OptionError: the state of a pruner with other ratios or steps, or one that is malformed.
            PlanMismatchError: the state of another model.
        """
        found = read_state(state, self._options, self._observed)
        plan = found.plan
        now = {view.name: view.spec for view in self._views()}
        if {spec.name: spec.shape for spec in now.values()} != {spec.name: spec.shape for spec in plan.after}:
            if {spec.name for spec in plan.specs} != set(now):
                raise PlanMismatchError(
                    "state", f"attention modules {sorted(now)[:4]}", f"{sorted(s.name for s in plan.specs)[:4]}",
                    "load it into a pruner of the model it was saved from",
                )  # fmt: skip
            apply_plan(self.model, plan, optimizer=optimizer, averages=averages)
        self._plan, self._dense = plan, plan.specs
        if self.budget is not None:
            self._cost = found.cost
            if found.table is not None:
                self._keep_table(found.table)
        self._before, self.steps_done, self._seen = found.parameters, found.steps_done, found.seen


def _timed(amount: object) -> bool:
    """Whether it is a time in seconds."""
    return isinstance(amount, Ceiling) and amount.resource == "latency"
