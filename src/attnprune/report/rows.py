"""One way of pruning at one ratio, in figures: :class:`Row`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal

from ..values import fields

Saved = Literal["params", "latency", "macs", "memory"]
SIZES: tuple[Saved, ...] = ("params", "latency", "macs", "memory")
Count = Annotated[int, partial(fields.integer, high=1 << 62)]
"""A whole number from 0, of parameters, multiply-adds or bytes."""


@dataclass(frozen=True)
class Row:
    """One way at one ratio, or the dense model. Rows are equal if all is that was not timed."""

    way: str
    ratio: float
    """The share of the attention weights that was to go; 0 for the dense model."""
    achieved: float | None = None
    """The share of the attention weights that went."""
    score: float | None = None
    """What ``evaluate`` gave."""
    params: Count | None = None
    """Parameters of the whole model."""
    macs: Count | None = None
    """Multiply-adds of a forward pass over the example inputs."""
    memory: Count | None = None
    """The most bytes of tensors at a moment of that pass (:func:`attnprune.cost.memory.peak_bytes`)."""
    latency: float | None = field(default=None, compare=False)
    """Its time over the dense model's: the median of pairs, measured in turns."""
    seconds: float | None = field(default=None, compare=False)
    """Its time, a median."""
    error: str = ""
    """Why there are no figures: the way cannot be had for this model."""

    def size(self, by: Saved) -> float | None:
        """What this costs, in the unit of one column."""
        found: float | None = getattr(self, by)
        return found


def read_row(raw: object) -> Row:
    """A row from its JSON form.

    Raises:
        PlanFormatError: malformed.
    """
    return fields.read(Row, raw, "row")
