"""All that a user asked, parsed once: :class:`Request`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from ..errors import OptionError
from .amount import TARGETS, Amount, MaxError, check_amount, parse_amount
from .asked import Asked
from .budget import Budget, Ceiling
from .choices import Choice, Choices, read_choices
from .faults import Faults
from .method import Method, check_one_of
from .options import Calibrated, Latencies, LossFn, OutputFn, YesNoAuto
from .presets import preset_options
from .ratios import Ratios
from .recovery import Recovery
from .rules import Rules

YES_NO_AUTO = ("auto", True, False)


@dataclass(frozen=True)
class Evidence:
    """What a decision may look at: live objects, of which nothing is compared or written to a file."""

    data: Iterable[Any] | None = None
    calibration: Any = None
    """An :class:`attnprune.Calibration`, or None."""
    loss_fn: LossFn | None = None
    output_fn: OutputFn | None = None
    latency: Any = None
    """An :class:`attnprune.LatencyTable`, or None."""
    example_inputs: Any = None
    progress: bool = True

    @property
    def has_data(self) -> bool:
        """Whether there are data, or what a pass over data gave."""
        return self.data is not None or self.calibration is not None


_RULES = tuple(one.name for one in fields(Rules))
_METHOD = tuple(one.name for one in fields(Method))
_EVIDENCE = ("calibration", "loss_fn", "output_fn", "latency", "progress")
OPTION_NAMES = frozenset((*_RULES, *_METHOD, *_EVIDENCE, *TARGETS, "measure", "recover"))
"""What :meth:`Request.parse` takes beyond its signature."""


@dataclass(frozen=True)
class Request:
    """All that a user asked: how much, by which rules, by which method, and what there is to decide by.

    :func:`attnprune.prune_attention`, :func:`attnprune.make_plan`, :func:`attnprune.score_attention`,
    :class:`attnprune.AttentionPruner`, the command line and what a plan's file says was asked are faces of it.

    >>> request = Request.parse(0.5, scope="local", scorer="magnitude")
    >>> request.rules.scope, request.decided.basis
    ('local', 'channels')
    >>> request == Request.parse({"qk": 0.5, "vo": 0.5}, rules={"scope": "local"}, method=Method("magnitude"))
    True
    >>> Request.parse(1.5, scope="all", granularty="head")
    Traceback (most recent call last):
    attnprune.errors.OptionError: options: expected no fault, found 3: (1) options: ... (2) scope: ... (3) qkvo_...
    """

    amount: Amount
    """How much is to go."""
    rules: Rules = field(default_factory=Rules)
    method: Method = field(default_factory=Method)
    """As asked; :attr:`decided` says what ``"auto"`` means."""
    evidence: Evidence = field(default_factory=Evidence, compare=False, repr=False)
    include: tuple[Choice, ...] | None = None
    """Glob patterns of names, classes, or functions of name and module; None: all."""
    exclude: tuple[Choice, ...] | None = None
    measure: YesNoAuto = "auto"
    verify: YesNoAuto = "auto"
    strict: bool = False
    recovery: Recovery | None = None
    """How the pruned model is tuned towards the dense one; None: not at all."""

    @classmethod
    def parse(
        cls,
        qkvo_ratios: Any = None,
        *,
        preset: str | None = None,
        rules: Rules | Mapping[str, Any] | None = None,
        method: Method | Mapping[str, Any] | None = None,
        data: Iterable[Any] | None = None,
        include: Choices | None = None,
        exclude: Choices | None = None,
        example_inputs: Any = None,
        verify: bool | Literal["auto"] = "auto",
        strict: bool = False,
        **options: Any,
    ) -> Request:
        """Reads the arguments of :func:`attnprune.prune_attention`, which says what they mean.

        Args:
            options: those of :class:`attnprune.Options`. An option given here, in ``rules`` or in ``method`` goes
                before that of a preset. Of a :class:`Rules` or :class:`Method`, what differs from the default counts
                as given.

        Raises:
            AttnPruneError: the fault, if there is one.
            OptionError: there are several; it lists each, and holds them as ``faults``.
        """
        faults = Faults()
        flat = faults.known("options", options, OPTION_NAMES)
        given = {
            **_fields_of("rules", Rules, rules, flat, faults),
            **_fields_of("method", Method, method, flat, faults),
            **flat,
        }
        ways = {"qkvo_ratios": qkvo_ratios, "data": data, "example_inputs": example_inputs}
        meant = {**(faults.attempt(preset_options, preset, {**ways, **given}) or {}), **given}
        rule_values, method_values = ({key: meant[key] for key in names if key in meant} for names in (_RULES, _METHOD))
        parsed_rules = faults.attempt(Rules, **rule_values)
        parsed_method = faults.attempt(Method, **method_values)
        amount = faults.attempt(parse_amount, qkvo_ratios, {key: meant.get(key) for key in TARGETS})
        included, excluded = (
            faults.attempt(read_choices, key, value) for key, value in (("include", include), ("exclude", exclude))
        )
        measure = meant.get("measure", "auto")
        for key, value, allowed in (
            ("measure", measure, YES_NO_AUTO),
            ("verify", verify, YES_NO_AUTO),
            ("strict", strict, (True, False)),
        ):
            faults.attempt(check_one_of, key, value, allowed)
        wanted = meant.get("recover")
        recovery = None if wanted is None else faults.attempt(Recovery.parse, wanted)
        if recovery is not None and isinstance(data, Iterator):
            data = list(data)  # read twice
        evidence = Evidence(
            data, meant.get("calibration"), meant.get("loss_fn"), meant.get("output_fn"), meant.get("latency"),
            example_inputs, bool(meant.get("progress", True)),
        )  # fmt: skip
        _check_evidence(evidence, faults)
        if amount is not None and parsed_rules is not None:
            faults.attempt(check_amount, amount, parsed_rules)
        _check_needs(amount, parsed_rules, meant, evidence, faults)
        faults.throw()
        assert amount is not None and parsed_rules is not None and parsed_method is not None  # noqa: PT018
        if isinstance(amount, (Budget, Ceiling)) and parsed_rules.split != "measured":
            parsed_rules = replace(parsed_rules, split="auto")
        return cls(
            amount, parsed_rules, parsed_method, evidence, included, excluded, measure, verify, strict, recovery
        )  # fmt: skip

    @property
    def decided(self) -> Method:
        """The method, with ``"auto"`` decided for these rules and this evidence."""
        return self.method.decided(has_data=self.evidence.has_data, whole_heads=self.rules.granularity == "head")

    @property
    def timed(self) -> bool:
        """Whether latency is to be measured before and after."""
        if self.measure != "auto":
            return self.measure
        by_latency = isinstance(self.amount, (Budget, Ceiling)) and self.amount.resource == "latency"
        return by_latency and self.evidence.example_inputs is not None

    def asked(self, scorer: str, ratios: Ratios | None = None) -> Asked:
        """What a plan keeps of this.

        Args:
            scorer: the name of the scores that the plan went by.
            ratios: what the plan removes, where another amount was asked for.
        """
        amount, rules = self.amount, self.rules
        if ratios is None:
            assert isinstance(amount, Ratios), "ratios of the plan are needed where none were asked for"
            ratios = amount
        asked = Asked(
            ratios, rules.granularity, rules.scope, rules.heads, scorer, rules.split,
            round_to=rules.step, rounding=rules.rounding, match_dims=rules.match_dims,
            target_error=amount.share if isinstance(amount, MaxError) else None,
            budget=amount if isinstance(amount, Budget) else None,
        )  # fmt: skip
        return asked.by(self.decided)


def _fields_of(
    name: str, kind: type[Rules] | type[Method], given: object, flat: Mapping[str, Any], faults: Faults
) -> dict[str, Any]:
    """What ``rules=`` or ``method=`` says; an option of the same name that says otherwise is a fault."""
    defaults = {one.name: one.default for one in fields(kind)}
    if given is None:
        return {}
    if isinstance(given, kind):
        said = {key: getattr(given, key) for key, value in defaults.items() if getattr(given, key) != value}
    elif isinstance(given, Mapping):
        said = faults.known(name, given, defaults)
    else:
        expected = f"an attnprune.{kind.__name__}, or a mapping of its fields"
        faults.add(OptionError(name, expected, repr(given)[:60], f"write {name}={kind.__name__}(...)"))
        return {}
    for key in (one for one in said if one in flat):
        if said[key] is not flat[key] and not (type(said[key]) is type(flat[key]) and said[key] == flat[key]):
            found = f"{flat[key]!r}, and {said[key]!r} in {name}="
            faults.add(OptionError(key, "one value", found[:120], "give it in one place"))
    return said


def _check_evidence(evidence: Evidence, faults: Faults) -> None:
    """Adds what is of another type."""
    expected = {
        "latency": (Latencies, "an attnprune.LatencyTable", "pass what attnprune.latency.measure gave"),
        "calibration": (Calibrated, "an attnprune.Calibration", "pass what attnprune.calibrate gave"),
    }
    for key, (kind, what, remedy) in expected.items():
        value = getattr(evidence, key)
        if value is not None and not isinstance(value, kind):
            faults.add(OptionError(key, what, f"a {type(value).__name__}", remedy))
    functions = {
        "loss_fn": "write loss_fn(model, batch), which gives a scalar",
        "output_fn": "write output_fn(output), which gives tensors of it",
    }
    for key, remedy in functions.items():
        value = getattr(evidence, key)
        if value is not None and not callable(value):
            faults.add(OptionError(key, "a function", f"a {type(value).__name__}", remedy))
    if evidence.loss_fn is not None and evidence.output_fn is not None:
        faults.add(OptionError("output_fn", "no loss_fn beside it", "both", "pick the tensors in loss_fn"))


def _check_needs(
    amount: Amount | None, rules: Rules | None, meant: Mapping[str, Any], evidence: Evidence, faults: Faults
) -> None:
    """Adds what is asked for and needs evidence that is not there."""
    no_inputs = evidence.example_inputs is None
    resource = amount.resource if isinstance(amount, (Budget, Ceiling)) else None
    if resource == "macs" and no_inputs:
        faults.add(OptionError("target_macs", "example_inputs to count with", "none", "pass example_inputs="))
    if resource == "latency" and no_inputs and evidence.latency is None:
        expected = "example_inputs to measure with, or a latency table"
        remedy = "pass example_inputs=, or latency= with what attnprune.latency.measure gave"
        faults.add(OptionError("target_latency", expected, "neither", remedy))
    if rules is not None and rules.granularity == "auto" and no_inputs:
        remedy = 'pass example_inputs=, or write granularity="channel"'
        faults.add(OptionError('granularity="auto"', "example_inputs to measure with", "none", remedy))
    if meant.get("measure") is True and no_inputs:
        faults.add(no_inputs_to_run())
    if meant.get("recover") is not None and evidence.data is None:
        faults.add(no_data_to_tune_on())
    if rules is not None and rules.split == "all":
        remedy = 'pass data= and no scorer, or split="auto"'
        if evidence.data is None or meant.get("scorer", "auto") != "auto" or meant.get("compensate") is False:
            expected = "data, and channels and features that the default scores and refits"
            faults.add(OptionError('split="all"', expected, "no data, a scorer by name, or no refit", remedy))
        if amount is not None and not isinstance(amount, Ratios):
            faults.add(OptionError('split="all"', "qkvo_ratios", "another budget", "write qkvo_ratios="))
    if rules is not None and rules.split == "measured":
        if evidence.data is None:
            faults.add(OptionError('split="measured"', "data to run on", "none", 'pass data=, or split="auto"'))
        if isinstance(amount, MaxError):
            faults.add(OptionError('split="measured"', "a ratio or a budget", "target_error", 'write split="auto"'))
    for option in ("compensate", "sequential"):
        if meant.get(option) is True and not evidence.has_data:
            faults.add(OptionError(f"{option}=True", "data to fit with", "none", "pass data=, or a calibration="))
    if meant.get("sequential") is True and evidence.data is None and evidence.has_data:
        faults.add(OptionError("sequential", "data to run layer by layer", "a calibration alone", "pass data="))


def no_data_to_tune_on() -> OptionError:
    """The error of ``recover=`` without data."""
    return OptionError("recover", "data to tune on", "none", "pass data=")


def no_inputs_to_run() -> OptionError:
    """The error of ``measure=True`` without inputs."""
    return OptionError("measure", "example_inputs to run", "none", "pass example_inputs=")
