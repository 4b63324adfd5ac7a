"""What the whole model may cost, in place of ratios: :class:`Budget`."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Literal

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
