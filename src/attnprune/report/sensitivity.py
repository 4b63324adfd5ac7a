"""What each layer costs alone: :class:`Sensitivity`, a table of :class:`Cost`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import nan
from typing import Any

from ..errors import OptionError
from ..values import fields
from ..values.tables import aligned, html_table

FORMAT, VERSION = "attnprune.sensitivity", 1


@dataclass(frozen=True)
class Cost:
    """What it costs to take its share from one part of one attention, all else as it was."""

    name: str
    """The attention's."""
    part: str
    """What lost channels: ``"layer"`` (all four projections), ``"qk"``, ``"vo"``, or a projection."""
    achieved: float
    """The share of the attention's weights that went."""
    cost: float
    """The drop of the score, in its unit; without ``evaluate`` the distortion of the output: the square of the
    difference over the square of the dense output."""


@dataclass(frozen=True)
class Sensitivity:
    """What :func:`attnprune.sensitivity` found: which layers and projections matter. Frozen, JSON.

    ``str(found)`` and notebooks show a table, :meth:`plot` draws a map of it.

    >>> found = Sensitivity((Cost("a", "qk", 0.25, 0.5), Cost("b", "qk", 0.25, 0.125)), 0.5, "distortion")
    >>> found.of("b", "qk"), [one.name for one in found.ranked("qk")]
    (0.125, ['b', 'a'])
    >>> Sensitivity.from_json(found.to_json()) == found
    True
    """

    costs: tuple[Cost, ...]
    """In the order of the model, for each attention by part."""
    ratio: float
    """The share of the part's weights that was taken."""
    unit: str
    """``"distortion"``, or ``"drop of the score"``."""
    dense: float | None = None
    """The score of the model as it is; None where there is none."""

    @property
    def names(self) -> tuple[str, ...]:
        """The attention modules."""
        return tuple(dict.fromkeys(one.name for one in self.costs))

    @property
    def parts(self) -> tuple[str, ...]:
        """What lost channels."""
        return tuple(dict.fromkeys(one.part for one in self.costs))

    def of(self, name: str, part: str) -> float:
        """The cost of a part of an attention.

        Raises:
            OptionError: there is none.
        """
        for one in self.costs:
            if (one.name, one.part) == (name, part):
                return one.cost
        known = f"one of {', '.join(self.names)[:200]}, with one of {', '.join(self.parts)}"
        raise OptionError("sensitivity", known, f"{name!r}, {part!r}", "see its names and parts")

    def ranked(self, part: str = "layer") -> tuple[Cost, ...]:
        """The costs of one part, the cheapest first: what can go with the least harm."""
        found = sorted((one for one in self.costs if one.part == part), key=lambda one: one.cost)
        if not found:
            raise OptionError("part", f"one of {', '.join(self.parts)}", repr(part), "pick one of them")
        return tuple(found)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A map: a row for each attention, a column for each part. Needs matplotlib.

        Args:
            path: also written there; the suffix says in which format (``.png``, ``.svg``, ``.pdf``).

        Returns:
            The ``matplotlib.figure.Figure``.
        """
        from .trade_offs import sensitivity

        rows = dict(zip(self.names, self.rows(), strict=True))
        title = f"What it costs where {self.ratio:.0%} of one part goes alone"
        return sensitivity(rows, self.parts, unit=self.unit, title=title, path=path)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return fields.to_dict(self)

    def to_json(self) -> str:
        """JSON, keys sorted."""
        return fields.document(FORMAT, VERSION, self.to_dict())

    @classmethod
    def from_json(cls, text: str | bytes) -> Sensitivity:
        """Reads :meth:`to_json`'s text, trusting nothing.

        Raises:
            OptionError: malformed.
        """
        with fields.opened(text, FORMAT, VERSION, OptionError, "write it with to_json") as found:
            return fields.read(cls, found)

    def rows(self) -> list[list[float]]:
        """``(attention modules, parts)``: the costs; NaN where there is none."""
        by = {(one.name, one.part): one.cost for one in self.costs}
        return [[by.get((name, part), nan) for part in self.parts] for name in self.names]

    def _cells(self) -> list[list[str]]:
        rows = zip(self.names, self.rows(), strict=True)
        return [["attention", *self.parts], *([name or "(model)", *(f"{x:.4g}" for x in row)] for name, row in rows)]

    @property
    def _says(self) -> str:
        scored = "" if self.dense is None else f"; dense {self.dense:.5g}"
        return f"{self.unit} where {self.ratio:.0%} of one part goes alone{scored}"

    def __str__(self) -> str:
        head, *lines = aligned(self._cells())
        return "\n".join([head, "-" * len(head), *lines, self._says])

    def _repr_html_(self) -> str:
        head, *body = self._cells()
        return html_table(head, body, [self._says])
