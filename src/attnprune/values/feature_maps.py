"""What Q, K and V make of the features that they still read: :class:`FeatureMaps`."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteError, PlanFormatError
from . import fields
from .channel_maps import DTYPES, Shape, brief, decode, plain
from .layout import PROJECTIONS, Projection

READERS: tuple[Projection, ...] = PROJECTIONS[:3]
"""The projections that read features: Q, K and V."""


@dataclass(frozen=True, eq=False)
class FeatureMaps:
    """Refits of projections that leave features out.

    A projection reads ``x`` and keeps its features S: ``W`` becomes ``W R`` and its bias gains ``W s``, so that
    ``W R x_S + W s`` comes as near to ``W x`` as the covariance of ``x`` allows. What O no longer writes keeps the mean
    that it had: O's bias gains ``O m`` there.

    Two of them are equal if all their numbers are.
    """

    reads: Mapping[Projection, Tensor] = field(default_factory=dict)
    """By projection R, ``(features before, features after)``; none where it reads all that it did, or as it stands."""
    shifts: Mapping[Projection, Tensor] = field(default_factory=dict)
    """By projection s, ``(features before,)``; none where it has no bias."""
    means: tuple[tuple[tuple[int, ...], Tensor], ...] = ()
    """Numbers of features that O leaves out, and m, ``(channels of O,)`` in logical order of heads."""

    def __post_init__(self) -> None:
        dtypes = {tensor.dtype for tensor in self.tensors}
        dtype = dtypes.pop() if len(dtypes) == 1 and dtypes <= {*DTYPES.values()} else torch.float64
        for name in ("reads", "shifts"):
            own = getattr(self, name)
            object.__setattr__(self, name, {p: plain(own[p], dtype) for p in READERS if p in own})
        means = tuple((tuple(outputs), plain(mean, dtype)) for outputs, mean in self.means)
        object.__setattr__(self, "means", means)

    @property
    def tensors(self) -> Iterator[Tensor]:
        """All numbers, in the order in which they are stored."""
        yield from self.reads.values()
        yield from self.shifts.values()
        yield from (mean for _, mean in self.means)

    def check(
        self, where: str, before: Mapping[Projection, int], after: Mapping[Projection, int], channels: int
    ) -> None:
        """Raises unless shapes are those of projections of so many features, and every number is finite."""
        found = {
            **{f"reads.{p}": (tuple(R.shape), (before[p], after[p])) for p, R in self.reads.items()},
            **{f"shifts.{p}": (tuple(s.shape), (before[p],)) for p, s in self.shifts.items()},
            **{f"means[{i}]": (tuple(m.shape), (channels,)) for i, (_, m) in enumerate(self.means)},
        }
        for key, (shape, expected) in found.items():
            if shape != expected:
                what = f"{where}: refit.{key}"
                raise PlanFormatError(what, f"shape {brief([expected])}", brief([shape]), "make the plan anew")
        if not all(bool(tensor.isfinite().all()) for tensor in self.tensors):
            raise NonFiniteError(f"{where}: refit", "finite numbers", "NaN or infinite ones", "make the plan anew")

    def to(self, dtype: torch.dtype) -> FeatureMaps:
        """The same numbers in float32 or float64."""
        reads, shifts = ({p: t.to(dtype) for p, t in own.items()} for own in (self.reads, self.shifts))
        return FeatureMaps(reads, shifts, tuple((outputs, mean.to(dtype)) for outputs, mean in self.means))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the numbers and what they belong to."""
        what = [*self.reads, *self.shifts, *(outputs for outputs, _ in self.means)]
        parts = b"".join(_bytes(tensor) for tensor in self.tensors)
        return hashlib.sha256(repr((what, [tuple(t.shape) for t in self.tensors])).encode() + parts).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FeatureMaps) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        shapes = brief([tuple(tensor.shape) for tensor in self.tensors])
        return f"FeatureMaps({shapes}; digest {self.digest[:12]})"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping: numbers as base64 texts, little-endian, row by row; the plan knows shapes."""
        dtype = next((tensor.dtype for tensor in self.tensors), torch.float64)
        return {
            "dtype": next(name for name, known in DTYPES.items() if known == dtype),
            **{name: {p: _text(t) for p, t in getattr(self, name).items()} for name in ("reads", "shifts")},
            "means": [[list(outputs), _text(mean)] for outputs, mean in self.means],
        }

    @classmethod
    def from_dict(
        cls, raw: object, where: str, before: Mapping[Projection, int], after: Mapping[Projection, int], channels: int
    ) -> FeatureMaps:
        """Reads :meth:`to_dict`'s mapping, trusting nothing; other arguments as for :meth:`check`."""
        found = fields.mapping(where, raw, {"dtype", "reads", "shifts", "means"})
        dtype = fields.string(f"{where}.dtype", found["dtype"])
        if dtype not in DTYPES:
            fields.fail(f"{where}.dtype", " or ".join(DTYPES), dtype)

        def tensor(key: str, text: object, shape: Shape) -> Tensor:
            numbers = decode(f"{where}.{key}", text, dtype, int(np.prod(shape)))
            return torch.from_numpy(numbers.reshape(shape).copy())

        def by_projection(key: str, shapes: Mapping[Projection, Shape]) -> dict[Projection, Tensor]:
            given = found[key]
            if not isinstance(given, dict) or not set(given) <= set(shapes):
                fields.fail(f"{where}.{key}", f"a mapping with keys of {sorted(shapes)}", given)
            return {p: tensor(f"{key}.{p}", given[p], shapes[p]) for p in READERS if p in given}

        reads = by_projection("reads", {p: (before[p], after[p]) for p in READERS})
        shifts = by_projection("shifts", {p: (before[p],) for p in READERS})
        means = []
        for i, one in enumerate(fields.array(f"{where}.means", found["means"])):
            outputs, text = fields.array(f"{where}.means[{i}]", one, 2)
            mean = tensor(f"means[{i}]", text, (channels,))
            means.append((fields.integers(f"{where}.means[{i}]", outputs), mean))
        return cls(reads, shifts, tuple(means))


def selection(before: Sequence[int], after: Sequence[int]) -> Tensor:
    """``(before, after)`` float64: R of a projection whose features are picked as they stand."""
    places = {feature: place for place, feature in enumerate(before)}
    picked = torch.zeros(len(before), len(after), device="cpu", dtype=torch.float64)
    for column, feature in enumerate(after):
        picked[places[feature], column] = 1.0
    return picked


def _bytes(tensor: Tensor) -> bytes:
    array = tensor.numpy()
    return bytes(array.astype(array.dtype.newbyteorder("<")).tobytes())


def _text(tensor: Tensor) -> str:
    return base64.b64encode(_bytes(tensor)).decode()
