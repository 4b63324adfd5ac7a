"""Ways of pruning tried side by side on copies of a model: :func:`sweep`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any

from torch import nn

from ..api import decided_by, prepare_plan
from ..bars import bar
from ..calibration.batches import call_of, device_of, to_device
from ..calibration.moments import Calibration
from ..calibration.quiet import silenced
from ..calibration.sample import Sample, first_of
from ..calibration.taps import calibrate
from ..cost.counting import count_macs, count_parameters
from ..cost.latency.cache import fingerprint
from ..cost.latency.measuring import measure_plan
from ..cost.memory import peak_bytes
from ..errors import AttnPruneWarning, DataError, OptionError
from ..families.registry import all_views, find_views, plain, report_skipped
from ..families.registry import skipped_attention as skipped_of
from ..nn.kept import ordinary
from ..report.rows import Row
from ..report.sweep import Sweep
from ..surgery import Surgeon
from ..values.amount import MaxError
from ..values.faults import Faults
from ..values.layout import PROJECTIONS
from ..values.options import Options
from ..values.plan import Plan
from ..values.request import Request
from .repeatable import repeatable
from .resuming import Finished, digest
from .ways import DENSE, Way, read_ways

if TYPE_CHECKING:
    from typing import Unpack

Evaluate = Callable[[nn.Module], Any]
"""``evaluate(model)`` gives a number."""


@ordinary
def sweep(
    model: nn.Module,
    evaluate: Evaluate,
    ratios: Sequence[float] = (0.25, 0.5, 0.75),
    ways: Sequence[str | Mapping[str, Any]] = ("default", "accurate", "fast", "paper:PH-G-FI"),
    *,
    data: Iterable[Any] | None = None,
    example_inputs: Any = None,
    higher_is_better: bool = True,
    seconds: float = 2.0,
    resume: str | os.PathLike[str] | None = None,
    **options: Unpack[Options],
) -> Sweep:
    """Prunes copies of a model in several ways and by several ratios, and says what each loses and saves.

    The model itself stays bitwise as it is. A way that cannot be had for it has its error in the table, and the others
    go on. All but what is timed is the same at every run: every copy starts from the same random state, and the global
    one stays as it was.

    Args:
        model: any module with attention of a known family.
        evaluate: ``evaluate(model)`` gives a number: accuracy on data kept for choosing, say. It gets a copy of its
            own, in evaluation mode; what it does to it (tuning, for one) touches nothing else.
        ratios: the fractions of the attention weights to remove, each in [0, 1).
        ways: a name is that of a preset, or ``"default"``: no options. A mapping has options of
            :func:`attnprune.prune_attention`, and a ``"name"`` for the table.
        data: batches for calibration, as in :func:`attnprune.prune_attention`: read once and kept, so a few hundred
            samples. They should not be those that ``evaluate`` looks at. Ways that need the same moments share one
            pass over them.
        example_inputs: a tensor, tuple or mapping, for multiply-adds, memory and latency; None: the first sample of
            the data, and without data there are none of these.
        higher_is_better: False for losses, perplexities and error rates.
        seconds: how long each row is timed, about; 0: not at all.
        resume: a file that keeps finished rows (JSON). A sweep that is begun again with the same model, data, options
            and machine reads them there; where anything of these changed, rows are made anew.
        options: those of :func:`attnprune.prune_attention`, for all ways (``include``, ``loss_fn``, ``min_channels``);
            a way's own go before. ``seed`` is also where random numbers start in ``evaluate``; ``progress`` is whether
            to show a progress bar.

    Raises:
        OptionError: a way, ratio or option that nobody knows, each with what to do; nothing has run by then.
        NoAttentionError: there is nothing to prune.
        DataError: ``evaluate`` gives no finite number for the dense model.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    >>> x = torch.randn(64, 5, 32)
    >>> y = model(x).detach()
    >>> def error(model):
    ...     return (model(x[32:]) - y[32:]).square().mean().item()
    >>> table = sweep(model, error, [0.5], ["default", "fast"], data=x[:32].split(8), higher_is_better=False, seconds=0)
    >>> [(row.way, row.params, row.macs) for row in (table.dense, *table.rows)]
    [('dense', 17088, 85120), ('default', 12896, 63040), ('fast', 12896, 63040)]
    """
    faults = Faults()
    known = faults.known("sweep", options, Options.__optional_keys__ | {"include", "exclude", "strict", "verify"})
    found = faults.attempt(read_ways, ways)
    asked = faults.attempt(read_ratios, ratios)
    if not callable(evaluate):
        remedy = "write evaluate(model), which returns a number"
        faults.add(OptionError("evaluate", "a function of a model", f"a {type(evaluate).__name__}", remedy))
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= 0:
        faults.add(OptionError("seconds", "a number from 0", repr(seconds), "write 2, or 0 for no timing"))
    kept = None if data is None else faults.attempt(read_data, data)
    inputs = example_inputs
    if inputs is None and kept:
        inputs = _first_sample(model, kept)
    given = _Given(model, evaluate, kept, inputs, seconds, known)
    for way in found or ():
        for ratio in (asked or (0.5,))[:1]:
            faults.attempt(given.request, way, ratio)
    finished = faults.attempt(Finished, resume)
    faults.throw()
    assert found is not None and asked is not None and finished is not None  # noqa: PT018
    dense = plain(model)
    parsed, sample = given.request(found[0], asked[0]), Sample(inputs, kept)
    find_views(dense, parsed.include, parsed.exclude, run=partial(sample.quietly, dense))
    report_skipped(skipped_of(dense), parsed.strict)
    key = "" if resume is None else given.key()
    tasks: list[tuple[Way, float]] = [(Way(DENSE, {}), 0.0), *((way, ratio) for way in found for ratio in asked)]
    rows: list[Row] = []
    with bar(tasks, what="sweep", shown=bool(known.get("progress", True))) as shown:
        for way, ratio in shown:
            shown.set_postfix_str(f"{way.name}, {ratio:g}" if rows else way.name)
            own = "" if resume is None else digest(key, way.options, ratio)
            row = finished.get(own) if own else None
            if row is None:
                row = given.row(way, ratio) if rows else given.dense()
                finished.add(own, row)
            rows.append(replace(row, way=way.name))
    return Sweep(rows[0], tuple(rows[1:]), {way.name: {**known, **way.options} for way in found}, higher_is_better)


def read_ratios(ratios: object) -> tuple[float, ...]:
    one = isinstance(ratios, (int, float)) and not isinstance(ratios, bool)
    values = [ratios] if one else list(ratios) if isinstance(ratios, (list, tuple, range)) else []
    fine = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if not values or len(fine) < len(values) or not all(0 <= value < 1 for value in fine):
        raise OptionError("ratios", "numbers in [0, 1)", repr(ratios)[:80], "write ratios=[0.25, 0.5, 0.75]")
    return tuple(dict.fromkeys(float(value) for value in fine))


def read_data(data: Iterable[Any]) -> list[Any]:
    """The batches, once and for all ways, so that a loader that shuffles gives all of them the same."""
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable) or hasattr(data, "untyped_storage"):
        raise DataError("data", "an iterable of batches", f"a {type(data).__name__}", "put one batch in a list")
    found = list(data)
    if not found:
        raise DataError("data", "at least one batch", "none", "check the data set; was the iterator used up before")
    return found


def scored(model: nn.Module, evaluate: Evaluate, seed: int) -> float:
    """What ``evaluate`` gives for a copy, put into evaluation mode.

    Raises:
        DataError: no finite number.
    """
    with repeatable(model, seed):
        found = evaluate(model.eval())
    try:
        score = float(found)
    except (TypeError, ValueError):
        score = float("nan")
    if not isfinite(score):
        raise DataError("evaluate", "a finite number", repr(found)[:80], "return accuracy, say, as a float")
    return score


def _first_sample(model: nn.Module, data: Sequence[Any]) -> Any:
    """How a model is called with the first sample of the data; None where it does not take it."""
    with suppress(DataError):
        call = call_of(model, to_device(first_of(data[0], 1), device_of(model)))
        return dict(call.kwargs) or call.args
    return None


@dataclass
class _Given:
    """What all rows have in common."""

    model: nn.Module
    evaluate: Evaluate
    data: list[Any] | None
    inputs: Any
    seconds: float
    options: Mapping[str, Any]
    calibrations: dict[str, Calibration] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Where random numbers start."""
        return int(self.options.get("seed", 0))

    def request(self, way: Way, ratio: float) -> Request:
        """What a row asks for."""
        options = {"measure": False, **self.options, **way.options, "progress": False}  # rows are timed side by side
        return Request.parse(ratio, data=self.data, example_inputs=self.inputs, **options)

    def key(self) -> str:
        """What tells these rows from those of another model, of other data, or on another machine."""
        machine = fingerprint(plain(self.model), self.inputs, {})
        told = plain(self.model), self.data, self.inputs, self.evaluate, self.seconds, self.options
        return digest(machine, *told)

    def dense(self) -> Row:
        """The row of the model as it is."""
        with repeatable(self.model, self.seed):
            copy = deepcopy(plain(self.model))
            row = self._costs(Row(DENSE, 0.0, 0.0), copy)
            if self.seconds and self.inputs is not None:
                nothing = Surgeon.prepare(copy, [], Plan(()))
                _, (seconds, _), _ = measure_plan(copy, nothing, self.inputs, min(self.seconds, 1.0))
                row = replace(row, latency=1.0, seconds=seconds)
            return replace(row, score=scored(copy, self.evaluate, self.seed))

    def row(self, way: Way, ratio: float) -> Row:
        """One way at one ratio; what it raises is in the row."""
        try:
            with silenced(AttnPruneWarning), repeatable(self.model, self.seed):  # said once for all rows
                return self._pruned(way, ratio)
        except Exception as error:  # whatever it is: the other ways go on
            text = " ".join(str(error).split())[:500]
            return Row(way.name, ratio, error=f"{type(error).__name__}: {text}")

    def _pruned(self, way: Way, ratio: float) -> Row:
        copy = deepcopy(plain(self.model))
        request = self._calibrated(self.request(way, ratio))
        made = decided_by(copy, request)
        latency = seconds = None
        if self.seconds and self.inputs is not None:
            surgeon = Surgeon.prepare(copy, all_views(copy, {spec.name for spec in made.plan.specs}), made.plan)
            latency, (_, seconds), _ = measure_plan(copy, surgeon, self.inputs, self.seconds)
        prepare_plan(copy, made.plan, sample=made.sample, verify=request.verify, skipped=made.skipped)()
        row = Row(way.name, ratio, _removed(made.plan), latency=latency, seconds=seconds)
        return replace(self._costs(row, copy), score=scored(copy, self.evaluate, self.seed))

    def _costs(self, row: Row, model: nn.Module) -> Row:
        row = replace(row, params=count_parameters(model))
        if self.inputs is None:
            return row
        return replace(row, macs=count_macs(model, self.inputs), memory=peak_bytes(model, self.inputs))

    def _calibrated(self, request: Request) -> Request:
        """The request with the moments that it needs, taken once for all that need the same."""
        evidence = request.evidence
        needed = request.decided.needs_maps or isinstance(request.amount, MaxError)
        if self.data is None or evidence.calibration is not None or not needed:
            return request
        key = repr((request.decided.refits, request.include, request.exclude, evidence.loss_fn))
        if key not in self.calibrations:
            self.calibrations[key] = calibrate(
                self.model, self.data, include=request.include, exclude=request.exclude, loss_fn=evidence.loss_fn,
                across_heads=request.decided.refits, progress=False,
            )  # fmt: skip
        return replace(request, evidence=replace(evidence, calibration=self.calibrations[key]))


def _removed(plan: Plan) -> float:
    """The share of all attention weights that a plan removes."""
    before, after = (sum(s.weights(p) for s in specs for p in PROJECTIONS) for specs in (plan.specs, plan.after))
    return 1 - after / before if before else 0.0
