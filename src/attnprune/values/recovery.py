"""How a pruned model is tuned towards the dense one (:class:`Recovery`), and what that gave (:class:`Recovered`)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, TypedDict

from ..errors import OptionError
from .faults import Faults

Unit = Literal["steps", "seconds", "epochs"]
UNITS: Mapping[str, tuple[Unit, float]] = {
    **dict.fromkeys(("", "step", "steps"), ("steps", 1.0)),
    **dict.fromkeys(("epoch", "epochs"), ("epochs", 1.0)),
    **dict.fromkeys(("s", "sec", "second", "seconds"), ("seconds", 1.0)),
    **dict.fromkeys(("min", "minute", "minutes"), ("seconds", 60.0)),
    **dict.fromkeys(("h", "hour", "hours"), ("seconds", 3600.0)),
}
"""By how it is written, a unit and how many of it that is."""


class Length(NamedTuple):
    """How long a model is tuned.

    >>> Length.parse("1.5 min"), Length.parse(400), Length.parse("2 epochs").unit
    (Length(amount=90.0, unit='seconds'), Length(amount=400, unit='steps'), 'epochs')
    """

    amount: float
    unit: Unit

    @classmethod
    def parse(cls, value: object) -> Length:
        """Reads a number of steps, or a number with a unit.

        Raises:
            OptionError: neither, or nothing at all to do.
        """
        text = str(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else ""
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
        unit, size = UNITS.get(found[2] if found else "?", ("steps", 0.0))
        amount = float(found[1]) * size if found else 0.0
        if not amount or (unit == "steps" and not amount.is_integer()):
            expected = 'a number of steps, or a text such as "60s", "10min", "2 epochs"'
            raise OptionError("recover: steps", expected, repr(value)[:60], 'write 400, or "60s"')
        return cls(int(amount) if unit == "steps" else amount, unit)


class RecoveryOptions(TypedDict, total=False):
    """What :func:`attnprune.recover` and ``recover={"steps": ..., ...}`` take beside the number of steps."""

    lr: float | Literal["auto"]
    """Adam's step, as a share of the root mean square of what is tuned, tensor by tensor. It rises over 5 % of the
    steps and falls by a cosine. Where it makes a model worse than it was, it is cut to a quarter. ``"auto"`` (the
    default): 0.08 times the root of the loss over what was held out, at most 0.01, so that it is the smaller, the less
    there is to recover."""
    held_out: float | Iterable[Any]
    """The share of the data that is kept aside to stop by, at most 16 batches; or batches of its own."""
    kl: float
    """The weight of the divergence of logits (:func:`attnprune.distillation_loss`) beside the states; 0 by default."""
    temperature: float
    """Of that divergence; 1 by default."""
    labels: float
    """The weight of the loss by labels (``loss_fn``'s, or the model's own); 0 by default."""
    norms: bool
    """Whether norms of the blocks are tuned too; False by default."""
    lora: int | None
    """The rank of updates of weights, which are merged as they are made: less memory; None (default): of full rank."""
    layerwise: bool
    """Each block by itself learns to make of the dense block's input its output: no pass back through the whole model,
    so that the activations of one block are in memory at a time. False by default."""
    checkpointing: bool
    """Whether blocks run again in the pass back, instead of keeping their activations; False by default."""
    keep_states: bool | Literal["auto"]
    """Whether what the dense model says is kept, or told anew at each step; ``"auto"`` (the default): kept where it is
    asked for more than once and takes at most a quarter of the memory that is free. The result is the same."""
    seed: int
    """Of the order of batches and of which are held out; 0 by default."""
    resume: str | os.PathLike[str] | None
    """A file that is written on the way. Where it is there already, tuning goes on from it, bitwise as if it had not
    stopped."""


@dataclass(frozen=True)
class Recovery:
    """How long and how a pruned model is tuned; the fields are described by :class:`RecoveryOptions`.

    >>> Recovery.parse("60s").length
    Length(amount=60.0, unit='seconds')
    >>> Recovery.parse({"steps": 100, "layerwise": True}).layerwise
    True

    Raises:
        OptionError: a value that an option cannot take; all of them.
    """

    steps: int | str = 400
    lr: float | Literal["auto"] = "auto"
    held_out: Any = 0.1
    kl: float = 0.0
    temperature: float = 1.0
    labels: float = 0.0
    norms: bool = False
    lora: int | None = None
    layerwise: bool = False
    checkpointing: bool = False
    keep_states: bool | Literal["auto"] = "auto"
    seed: int = 0
    resume: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        faults = Faults()
        faults.attempt(Length.parse, self.steps)
        checks: dict[str, tuple[bool, str, str]] = {
            "lr": (self.lr == "auto" or _positive(self.lr), "a number above 0, or 'auto'", "use 0.01"),
            "held_out": (_share(self.held_out), "a share in (0, 1), or batches", "use 0.1"),
            "kl": (_weight(self.kl), "a finite weight of at least 0", "use 1.0, or 0.0 to leave it out"),
            "temperature": (_positive(self.temperature), "a number above 0", "use 1.0, or 2.0 to soften"),
            "labels": (_weight(self.labels), "a finite weight of at least 0", "use 1.0, or 0.0 to leave it out"),
            "norms": (isinstance(self.norms, bool), "True or False", "pick one of them"),
            "lora": (self.lora is None or _whole(self.lora, 1), "None, or a rank of at least 1", "use 16"),
            "layerwise": (isinstance(self.layerwise, bool), "True or False", "pick one of them"),
            "checkpointing": (isinstance(self.checkpointing, bool), "True or False", "pick one of them"),
            "keep_states": (self.keep_states in (True, False, "auto"), "True, False or 'auto'", "pick one of them"),
            "seed": (_whole(self.seed, -(2**63)), "a whole number", "write 0"),
            "resume": (self.resume is None or isinstance(self.resume, (str, os.PathLike)), "a path", "name a file"),
        }
        for key, (holds, expected, remedy) in checks.items():
            if not holds:
                faults.add(OptionError(f"recover: {key}", expected, repr(getattr(self, key))[:60], remedy))
        if self.layerwise is True:
            for key in ("kl", "labels", "checkpointing"):
                if getattr(self, key):
                    remedy = f"leave out {key}, or layerwise"
                    faults.add(OptionError(f"recover: {key}", "none with layerwise=True", "both", remedy))
        faults.throw()

    @property
    def length(self) -> Length:
        """How long."""
        return Length.parse(self.steps)

    @classmethod
    def parse(cls, value: object, **options: Any) -> Recovery:
        """Reads what ``recover=`` may be: how long, a mapping of the fields, or a :class:`Recovery`.

        Raises:
            OptionError: none of them, or an option that there is not.
        """
        if isinstance(value, Recovery) and not options:
            return value
        faults = Faults()
        given = {**value, **options} if isinstance(value, Mapping) else {"steps": value, **options}
        known = faults.known("recover", given, {one.name for one in fields(cls)})
        found = faults.attempt(cls, **known)
        faults.throw()
        assert found is not None
        return found


class Recovered(NamedTuple):
    """What tuning gave."""

    before: float
    """The loss over what was held out, of the model as it was given: 0 where it says what the dense model says."""
    after: float
    """The same of the model as it is now; never above ``before``."""
    steps: int
    """How many steps were taken."""
    seconds: float
    """How long they took, with all that is beside them."""

    def __str__(self) -> str:
        ratio = self.after / self.before if self.before else 1.0
        took = f"{self.steps:,} step{'s' * (self.steps != 1)}, {self.seconds:,.1f} s"
        return f"held-out loss {self.before:.4g} -> {self.after:.4g} (x {ratio:.3f}) in {took}"


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return _number(value) and 0 < value < float("inf")


def _weight(value: Any) -> bool:
    return _number(value) and 0 <= value < float("inf")


def _share(value: Any) -> bool:
    if _number(value):
        return bool(0 < value < 1)
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
