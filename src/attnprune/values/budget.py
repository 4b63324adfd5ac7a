"""What the whole model may cost, in place of ratios: a share (:class:`Budget`), or so much (:class:`Ceiling`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import ceil, isfinite, log10
from numbers import Real
from typing import Any, Literal

from ..errors import OptionError

Resource = Literal["latency", "macs", "params"]
RESOURCES: tuple[Resource, ...] = ("latency", "macs", "params")


@dataclass(frozen=True)
class Budget:
    """What the whole model may cost, as a share of what it costs now, in place of ratios.

    >>> Budget("params", 0.8).then(Budget("params", 0.5))
    Budget(resource='params', share=0.4, promised=None)
    """

    resource: Resource
    """``"latency"``, ``"macs"`` or ``"params"``."""
    share: float
    """What was asked for, in (0, 1)."""
    promised: float | None = None
    """What the plan costs: counted for parameters and multiply-adds, predicted for latency. At most the share."""

    def __post_init__(self) -> None:
        if self.resource not in RESOURCES:
            words = ", ".join(RESOURCES)
            raise OptionError("budget", f"one of {words}", repr(self.resource), "pick one of them")
        value = self.share
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < 1:
            expected = "a number in (0, 1): a share of what the whole model costs now"
            raise OptionError(f"target_{self.resource}", expected, repr(value), "write 0.8 for four fifths")
        object.__setattr__(self, "share", float(value))

    def then(self, other: Budget | None) -> Budget | None:
        """The budget of two plans in a row; None where they are not of one resource."""
        if other is None or other.resource != self.resource:
            return None
        known = self.promised is not None and other.promised is not None
        promised = self.promised * other.promised if known else None  # type: ignore[operator]
        return Budget(self.resource, max(self.share * other.share, LEAST), promised)


LEAST = 2.0**-53  # keeps a ratio below 1 where nearly nothing is left

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_TIME = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(s|ms|us|µs)")
_WORDS = {"latency": "seconds", "macs": "multiply-adds", "params": "parameters"}
_EXAMPLES = {"latency": '"20ms"', "macs": "4e9", "params": "10_000_000"}


@dataclass(frozen=True)
class Ceiling:
    """What the whole model may cost at most, in place of a share: so many seconds, multiply-adds or parameters.

    >>> Ceiling("macs", 3e9).of(4e9)
    Budget(resource='macs', share=0.75, promised=None)
    >>> Ceiling.read("latency", "20 ms").said(0.01234567)
    '12.35 ms'
    """

    resource: Resource
    """``"latency"``, ``"macs"`` or ``"params"``."""
    most: float
    """Seconds, multiply-adds or parameters; above 0."""

    @classmethod
    def read(cls, resource: Resource, value: Any) -> Ceiling | None:
        """A number above 1, or of latency a text with a unit (``"20ms"``, ``"1.5 s"``, ``"300us"``); None: neither."""
        if resource == "latency":
            found = (
                re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(s|ms|us|µs)\s*", value)
                if isinstance(value, str)
                else None
            )
            number = None if found is None or found[1].count(".") > 1 else float(found[1]) * UNITS[found[2]]
        else:
            number = (
                float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 1 else None
            )
        return cls(resource, number) if number and isfinite(number) else None

    def of(self, total: float) -> Budget:
        """The budget of a model that costs ``total`` now.

        Raises:
            OptionError: it costs no more than it may.
        """
        if self.most >= total:
            remedy = "leave it as it is, or ask for less"
            expected = f"less than the {self.said(total)} that the model takes now"
            raise OptionError(f"target_{self.resource}", expected, self.said(self.most), remedy)
        return Budget(self.resource, self.most / total)

    def said(self, amount: float) -> str:
        """An amount in words; rounded up, so that what is said to be enough is."""
        if self.resource != "latency":
            return f"{ceil(amount - 1e-6):,} {_WORDS[self.resource]}"
        milliseconds = 1000 * amount
        digits = max(3 - int(log10(milliseconds)), 0) if milliseconds > 0 else 0
        return f"{ceil(milliseconds * 10**digits - 1e-9) / 10**digits:.{digits}f} ms"


Limit = Budget | Ceiling
"""What may be asked for with ``target_latency``, ``target_macs`` and ``target_params``."""


def read_limit(resource: Resource, value: Any) -> Limit:
    """What a ``target_...`` means: a share in (0, 1), or an amount.

    Raises:
        OptionError: neither.

    >>> read_limit("params", 0.8), read_limit("latency", "1.5s")
    (Budget(resource='params', share=0.8, promised=None), Ceiling(resource='latency', most=1.5))
    """
    found = Ceiling.read(resource, value)
    if found is not None:
        return found
    try:
        return Budget(resource, value)
    except OptionError as error:
        example = _EXAMPLES[resource]
        expected = f"{error.expected}, or {_WORDS[resource]} ({example})"
        raise OptionError(error.where, expected, error.found, f"{error.remedy}, or {example}") from None
