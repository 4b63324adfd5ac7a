"""How many channels each head has, and where they are stored: :class:`HeadLayout`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple

Kind = Literal["qk", "vo"]
Projection = Literal["q", "k", "v", "o"]
KINDS: tuple[Kind, Kind] = ("qk", "vo")
PROJECTIONS: tuple[Projection, ...] = ("q", "k", "v", "o")
KIND_OF: Mapping[Projection, Kind] = {"q": "qk", "k": "qk", "v": "vo", "o": "vo"}


class Bucket(NamedTuple):
    """Heads of equal shape that are stored side by side, so that they run as one batched product."""

    heads: tuple[int, ...]
    """Logical head numbers, ascending."""
    qk_dim: int
    vo_dim: int
    qk_start: int
    """First row of these heads in Q and K."""
    vo_start: int
    """First row in V, first column in O."""

    @property
    def qk_stop(self) -> int:
        return self.qk_start + len(self.heads) * self.qk_dim

    @property
    def vo_stop(self) -> int:
        return self.vo_start + len(self.heads) * self.vo_dim

    def width(self, kind: Kind) -> int:
        """Channels of all its heads."""
        return len(self.heads) * (self.qk_dim if kind == "qk" else self.vo_dim)


@dataclass(frozen=True)
class HeadLayout:
    """How many channels each head has, and in which order heads are stored.

    Heads of like shape are stored side by side (buckets, in the order of their first head; ascending inside), so that
    a bucket is a slice of every projection, never a gather. With equal heads there is one bucket and the stored order
    is the logical one. The order follows from the dims alone.

    >>> layout = HeadLayout(qk=(4, 2, 4), vo=(4, 4, 4))
    >>> [bucket.heads for bucket in layout.buckets], layout.order, layout.span("qk", 2)
    ([(0, 2), (1,)], (0, 2, 1), (4, 8))
    """

    qk: tuple[int, ...]
    """Channels of the dot product, per logical head."""
    vo: tuple[int, ...]
    """Channels carried out, per logical head."""

    def _kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What is worked out once; code that is compiled can ask too, which locks of cached_property do not let it."""
        found = getattr(self, name, None)
        if found is None:
            found = make()
            object.__setattr__(self, name, found)
        return found

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        found: tuple[Bucket, ...] = self._kept("_buckets", self._find_buckets)
        return found

    def _find_buckets(self) -> tuple[Bucket, ...]:
        by_shape: dict[tuple[int, int], list[int]] = {}
        for head, shape in enumerate(zip(self.qk, self.vo, strict=True)):
            by_shape.setdefault(shape, []).append(head)
        found, qk, vo = [], 0, 0
        for (qk_dim, vo_dim), heads in by_shape.items():
            found.append(Bucket(tuple(heads), qk_dim, vo_dim, qk, vo))
            qk, vo = found[-1].qk_stop, found[-1].vo_stop
        return tuple(found)

    @property
    def order(self) -> tuple[int, ...]:
        """The logical number of every stored head."""
        found: tuple[int, ...] = self._kept("_order", self._find_order)
        return found

    def _find_order(self) -> tuple[int, ...]:
        return tuple([head for bucket in self.buckets for head in bucket.heads])

    @property
    def inverse(self) -> tuple[int, ...]:
        """The stored position of every logical head."""
        return tuple(sorted(range(len(self.order)), key=self.order.__getitem__))

    @property
    def uniform(self) -> bool:
        """Whether all heads have the same number of channels."""
        return len(self.buckets) == 1

    def dims(self, kind: Kind) -> tuple[int, ...]:
        return self.qk if kind == "qk" else self.vo

    def _find_spans(self) -> dict[str, tuple[tuple[int, int], ...]]:
        spans: dict[str, tuple[tuple[int, int], ...]] = {}
        for kind in KINDS:
            dims = self.dims(kind)
            ends = list(accumulate(dims[head] for head in self.order))
            stored = {head: (end - dims[head], end) for head, end in zip(self.order, ends, strict=True)}
            spans[kind] = tuple(stored[head] for head in range(len(dims)))
        return spans

    def span(self, kind: Kind, head: int) -> tuple[int, int]:
        """First and last-plus-one stored row of a logical head."""
        spans: dict[str, tuple[tuple[int, int], ...]] = self._kept("_spans", self._find_spans)
        return spans[kind][head]
