"""What the channels that stay are made of: :class:`ChannelMaps`, which surgery multiplies into Q, K, V and O."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteError, PlanFormatError
from . import fields

DTYPES = {"float32": torch.float32, "float64": torch.float64}
"""What numbers of maps may be, by the name in files."""
Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ChannelMaps:
    """Linear maps from the channels of a module to those that stay in it.

    Of every kept head (of Q query heads, of K and V key heads), in ascending order, Q, K and V become ``A Q``,
    ``A K``, ``A V`` (weight and bias; ``A`` is a head's matrix for that projection), O becomes ``O B``, and O's bias
    gains ``O s``. Removing channels as they stand is the case in which every ``A`` picks rows of the identity, ``B``
    the same columns, and ``s`` is zero.

    Two of them are equal if all their numbers are.

    >>> eye = torch.eye(4, dtype=torch.float64)
    >>> maps = ChannelMaps(q=(eye[:2],), k=(eye[:2],), v=(eye[1:],), o=eye[:, 1:])
    >>> maps.shapes
    ((2, 4), (2, 4), (3, 4), (4, 3))
    """

    q: tuple[Tensor, ...]
    """Per kept query head ``(kept qk channels, qk_dim)``."""
    k: tuple[Tensor, ...]
    """Per kept key head ``(kept qk channels, qk_dim)``."""
    v: tuple[Tensor, ...]
    """Per kept key head ``(kept vo channels, vo_dim)``."""
    o: Tensor
    """``(channels, kept channels)`` of all query heads: rows and columns in logical order of heads, the kept ones only
    among the columns."""
    shift: Tensor | None = None
    """``(channels,)`` of all query heads, or None where O's bias stays (or does not exist)."""

    def __post_init__(self) -> None:
        dtype = self.o.dtype if self.o.dtype in DTYPES.values() else torch.float64
        for key, value in (("q", self.q), ("k", self.k), ("v", self.v)):
            object.__setattr__(self, key, tuple(plain(matrix, dtype) for matrix in value))
        object.__setattr__(self, "o", plain(self.o, dtype))
        if self.shift is not None:
            object.__setattr__(self, "shift", plain(self.shift, dtype))

    @property
    def tensors(self) -> Iterator[Tensor]:
        """All maps, in the order in which they are stored."""
        yield from (*self.q, *self.k, *self.v, self.o)
        if self.shift is not None:
            yield self.shift

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of all maps."""
        return tuple(tuple(tensor.shape) for tensor in self.tensors)

    def check(self, where: str, shapes: Sequence[Shape]) -> None:
        """Raises unless the shapes are these and every number is finite."""
        if self.shapes != tuple(shapes):
            raise PlanFormatError(
                f"{where}: fold", f"maps of shapes {brief(shapes)}", brief(self.shapes), "make the plan anew"
            )
        if not all(bool(tensor.isfinite().all()) for tensor in self.tensors):
            raise NonFiniteError(f"{where}: fold", "finite maps", "NaN or infinite ones", "make the plan anew")

    def then(self, other: ChannelMaps, heads: Sequence[int], keys: Sequence[int]) -> ChannelMaps:
        """These maps and then others, made for what these leave.

        Args:
            other: the later maps.
            heads: for every query head that ``other`` keeps, its place among those that these maps keep.
            keys: the same for key heads.
        """
        dtype = torch.promote_types(self.o.dtype, other.o.dtype)

        def product(left: Tensor, right: Tensor) -> Tensor:
            return (left.double() @ right.double()).to(dtype)

        q, k, v = (
            tuple(product(late, early[head]) for late, head in zip(second, places, strict=True))
            for early, second, places in ((self.q, other.q, heads), (self.k, other.k, keys), (self.v, other.v, keys))
        )
        shift = self.shift
        if other.shift is not None:
            moved = product(self.o, other.shift)
            shift = moved if shift is None else shift + moved
        return ChannelMaps(q, k, v, product(self.o, other.o), shift)

    @cached_property
    def _bytes(self) -> bytes:
        arrays = (tensor.numpy() for tensor in self.tensors)
        return b"".join(array.astype(array.dtype.newbyteorder("<")).tobytes() for array in arrays)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the numbers and shapes."""
        return hashlib.sha256(repr(self.shapes).encode() + self._bytes).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChannelMaps) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"ChannelMaps({brief(self.shapes)}; digest {self.digest[:12]})"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping: all numbers in one base64 text, little-endian, row by row; the plan knows shapes."""
        dtype = next(name for name, known in DTYPES.items() if known == self.o.dtype)
        return {"dtype": dtype, "shift": self.shift is not None, "data": base64.b64encode(self._bytes).decode()}

    @classmethod
    def from_dict(
        cls, raw: object, where: str, q: Sequence[Shape], k: Sequence[Shape], v: Sequence[Shape], o: tuple[int, int]
    ) -> ChannelMaps:
        """Reads :meth:`to_dict`'s mapping, trusting nothing; shapes are per kept head (kept channels, channels)."""
        found = fields.mapping(where, raw, {"dtype", "shift", "data"})
        name = fields.string(f"{where}.dtype", found["dtype"])
        if name not in DTYPES:
            fields.fail(f"{where}.dtype", " or ".join(DTYPES), name)
        shapes: list[Shape] = [*q, *k, *v, o]
        if fields.boolean(f"{where}.shift", found["shift"]):
            shapes.append((o[0],))
        numbers = decode(f"{where}.data", found["data"], name, sum(int(np.prod(shape)) for shape in shapes))
        parts, start = [], 0
        for shape in shapes:
            size = int(np.prod(shape))
            parts.append(torch.from_numpy(numbers[start : start + size].reshape(shape).copy()))
            start += size
        n, end = len(q), len(q) + len(k) + len(v)
        whole = cls(tuple(parts[:n]), tuple(parts[n : n + len(k)]), tuple(parts[n + len(k) : end]), *parts[end:])
        if not np.isfinite(numbers).all():
            fields.fail(f"{where}.data", "finite numbers", "NaN or infinite ones")
        return whole


def decode(where: str, text: object, dtype: str, count: int) -> np.ndarray[Any, Any]:
    """So many numbers from a base64 text."""
    kind = np.dtype(dtype).newbyteorder("<")
    if not isinstance(text, str) or len(text) != (count * kind.itemsize + 2) // 3 * 4:
        fields.fail(
            where, f"base64 text of {count} numbers", f"{len(text)} characters" if isinstance(text, str) else text
        )
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        fields.fail(where, "base64 text", text)
    if len(data) != count * kind.itemsize:
        fields.fail(where, f"{count} numbers", f"{len(data)} bytes")
    return np.frombuffer(data, dtype=kind).astype(dtype)


def plain(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A map as it is kept: on the CPU, without a graph."""
    return value.detach().to(device="cpu", dtype=dtype).contiguous()


def brief(shapes: Sequence[Shape]) -> str:
    """Shapes for messages."""
    shown = ", ".join("x".join(map(str, shape)) for shape in shapes[:6])
    return shown + (f" and {len(shapes) - 6} more" if len(shapes) > 6 else "")
