"""Measured latency as a value: :class:`LatencyTable` predicts that of plans."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any

from ...errors import LatencyError
from ...values import fields
from ...values.fields import From0, Positive, Size
from ...values.layout import Kind
from ...values.plan import Plan
from ...values.spec import AttentionSpec

FORMAT, VERSION = "attnprune.latency", 1


@dataclass(frozen=True)
class Grid:
    """One kind of attention of a model in several shapes: every combination of heads, qk and vo channels."""

    heads: tuple[Size, ...]
    """Numbers of heads, ascending, the dense one last."""
    qk: tuple[Size, ...]
    vo: tuple[Size, ...]
    shares: tuple[From0, ...]
    """Time of one layer in every shape, as a share of the dense model's forward pass; vo varies fastest."""

    def dims(self, kind: Kind) -> tuple[int, ...]:
        """Measured numbers of channels."""
        return self.qk if kind == "qk" else self.vo

    def at(self, heads: int, qk: int, vo: int) -> float:
        """The share of a measured shape (places in :attr:`heads`, :attr:`qk`, :attr:`vo`)."""
        return self.shares[(heads * len(self.qk) + qk) * len(self.vo) + vo]

    def share(self, heads: int, qk: int, vo: int) -> float | None:
        """The share of a shape, between measured ones by linear interpolation along each axis; None outside them.

        Equal qk and vo dims run by other kernels than unequal ones, so equal dims are interpolated between equal ones.
        """
        a, d = _between(self.heads, heads), {"qk": _between(self.qk, qk), "vo": _between(self.vo, vo)}
        if a is None or d["qk"] is None or d["vo"] is None:
            return None
        if qk == vo and self.qk == self.vo:
            return fsum(x * y * self.at(h, i, i) for h, x in a for i, y in d["qk"])
        return fsum(x * y * z * self.at(h, i, j) for h, x in a for i, y in d["qk"] for j, z in d["vo"])


def _between(levels: Sequence[int], value: int) -> list[tuple[int, float]] | None:
    """Places of the neighbours of a value among ascending levels, with their weights."""
    if not levels[0] <= value <= levels[-1]:
        return None
    right = min(bisect_right(levels, value), len(levels) - 1)
    left = max(right - 1, 0)
    if left == right or levels[right] == value:
        return [(right, 1.0)]
    part = (value - levels[left]) / (levels[right] - levels[left])
    return [(left, 1 - part), (right, part)] if part else [(left, 1.0)]


@dataclass(frozen=True)
class LatencyTable:
    """What :func:`measure` found; predicts the latency of plans. Frozen, JSON.

    The prediction is additive: 1, less what the shape of every layer saves beside the dense one.

    >>> grid = Grid((2,), (4, 8), (4, 8), (0.1, 0.2, 0.2, 0.3))
    >>> table = LatencyTable({"device": "cpu"}, 0.01, 0.7, (("attention", 0),), (grid,), step=4, rounds=5)
    >>> spec = AttentionSpec.of("attention", heads=2, head_dim=8, d_model=16)
    >>> table.share(spec), table.predict([spec.keep(range(2), (4, 4), (4, 4))])
    (0.3, 0.8)
    >>> LatencyTable.from_json(table.to_json()) == table
    True
    """

    machine: Mapping[str, str]
    """What the figures hold for: device, processor, threads, versions, model and inputs."""
    seconds: Positive
    """Median seconds of a forward pass of the dense model."""
    rest: From0
    """Share of everything but attention."""
    layers: tuple[tuple[str, int], ...]
    """By name, the number of the layer's grid."""
    grids: tuple[Grid, ...]
    step: Size
    """Channels of measured shapes are multiples of this."""
    rounds: Size
    """How many rounds were measured."""

    def grid(self, name: str) -> Grid:
        """The grid of a layer."""
        number = dict(self.layers).get(name)
        if number is None:
            raise LatencyError(
                name, f"an attention module in the latency table ({[n for n, _ in self.layers][:4]})", "none",
                "measure this model with the same include and exclude",
            )  # fmt: skip
        return self.grids[number]

    def share(self, spec: AttentionSpec) -> float:
        """The time of an attention of this name and shape, as a share of the dense model's.

        Raises:
            LatencyError: a layer that was not measured, ragged heads, or a shape outside what was measured.
        """
        grid = self.grid(spec.name)
        found = None if spec.ragged else grid.share(spec.heads, spec.qk_dim, spec.vo_dim)
        if found is None:
            ranges = ", ".join(f"{dims[0]} to {dims[-1]} {what}" for dims, what in (
                (grid.heads, "heads"), (grid.qk, "qk"), (grid.vo, "vo channels")))  # fmt: skip
            expected = f"a shape within what was measured: {ranges}, equal heads"
            raise LatencyError(
                spec.name, expected, spec.describe(), 'measure with granularity="joint", or another plan'
            )
        return found

    def predict(self, after: Plan | Sequence[AttentionSpec]) -> float:
        """Latency over the dense model's.

        Args:
            after: a plan for the dense model, or specs; layers without one stay dense.
        """
        specs = after.after if isinstance(after, Plan) else after
        return 1.0 - fsum(self.grid(spec.name).shares[-1] - self.share(spec) for spec in specs)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return fields.to_dict(self)

    def to_json(self) -> str:
        """JSON, keys sorted."""
        return fields.document(FORMAT, VERSION, self.to_dict())

    @classmethod
    def from_json(cls, text: str | bytes) -> LatencyTable:
        """Reads :meth:`to_json`'s text, trusting nothing.

        Raises:
            LatencyError: malformed.
        """
        with fields.opened(text, FORMAT, VERSION, LatencyError, "measure anew") as found:
            table = fields.read(cls, found)
            table._check()
            return table

    def _check(self) -> None:
        """Raises where grids and layers do not fit one another."""
        for i, grid in enumerate(self.grids):
            for axis in (grid.heads, grid.qk, grid.vo):
                if not axis or list(axis) != sorted(set(axis)):
                    fields.fail(f"grids[{i}]", "ascending levels", axis)
            if (size := len(grid.heads) * len(grid.qk) * len(grid.vo)) != len(grid.shares):
                fields.fail(f"grids[{i}].shares", f"a list of {size}", len(grid.shares))
        for i, (_, number) in enumerate(self.layers):
            fields.integer(f"layers[{i}]", number, high=len(self.grids) - 1)
        if len({name for name, _ in self.layers}) != len(self.layers):
            fields.fail("layers", "each layer once", len(self.layers))
