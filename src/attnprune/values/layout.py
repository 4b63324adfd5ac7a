"""How many channels each head has, and where they are stored: :class:`HeadLayout`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple

Kind = Literal["qk", "vo"]
Projection = Literal["q", "k", "v", "o", "x"]
KINDS: tuple[Kind, Kind] = ("qk", "vo")
PROJECTIONS: tuple[Projection, ...] = ("q", "k", "v", "o")
SIDES: tuple[Projection, ...] = (*PROJECTIONS, "x")
"""What may hold channels: the four projections, and what Q holds besides (:attr:`HeadLayout.extra`)."""
KIND_OF: Mapping[Projection, Kind] = {"q": "qk", "k": "qk", "v": "vo", "o": "vo", "x": "qk"}


class Bucket(NamedTuple):
    """Heads of equal shape that are stored side by side, so that they run as one batched product."""

    heads: tuple[int, ...]
    """Logical numbers of (query) heads, ascending."""
    qk_dim: int
    vo_dim: int
    qk_start: int
    """First row of these heads in Q, and in K where every query head has its own key head."""
    vo_start: int
    """First column in O, and first row in V where every query head has its own."""
    keys: tuple[int, ...] = ()
    """Logical numbers of their key heads, ascending."""
    k_start: int = 0
    """First row of these in K."""
    v_start: int = 0
    """First row of these in V."""

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

    With grouped queries several query heads share the keys and values of one key head; they then have as many channels
    as that. Dims are of key heads; where every query head has its own, the two are the same.

    Heads of like shape are stored side by side (buckets, in the order of their first head; ascending inside), so that
    a bucket is a slice of every projection, never a gather. With equal heads there is one bucket and the stored order
    is the logical one. The order follows from the dims alone.

    >>> layout = HeadLayout(qk=(4, 2, 4), vo=(4, 4, 4))
    >>> [bucket.heads for bucket in layout.buckets], layout.order, layout.span("q", 2)
    ([(0, 2), (1,)], (0, 2, 1), (4, 8))
    >>> grouped = HeadLayout(qk=(4, 2), vo=(4, 4), groups=(2, 2))
    >>> grouped.heads, grouped.span("q", 3), grouped.span("k", 1)
    (4, (10, 12), (4, 6))
    """

    qk: tuple[int, ...]
    """Channels of the dot product, per logical key head."""
    vo: tuple[int, ...]
    """Channels carried out, per logical key head."""
    groups: tuple[int, ...] = ()
    """Query heads per key head; none given: one each."""
    extra: int = 0
    """Channels of every query head that Q holds beside those of ``qk`` (:attr:`AttentionSpec.q_extra`)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups) or (1,) * len(self.qk))

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
        shapes = list(zip(self.qk, self.vo, strict=True))
        for head, key in enumerate(self.key_of):
            by_shape.setdefault(shapes[key], []).append(head)
        found, qk, vo, k, v = [], 0, 0, 0, 0
        for (qk_dim, vo_dim), heads in by_shape.items():
            keys = tuple(dict.fromkeys(self.key_of[head] for head in heads))
            found.append(Bucket(tuple(heads), qk_dim, vo_dim, qk, vo, keys, k, v))
            qk, vo = found[-1].qk_stop, found[-1].vo_stop
            k, v = k + len(keys) * qk_dim, v + len(keys) * vo_dim
        return tuple(found)

    @property
    def order(self) -> tuple[int, ...]:
        """The logical number of every stored (query) head."""
        found: tuple[int, ...] = self._kept("_order", self._find_order)
        return found

    def _find_order(self) -> tuple[int, ...]:
        return tuple([head for bucket in self.buckets for head in bucket.heads])

    @property
    def key_order(self) -> tuple[int, ...]:
        """The logical number of every stored key head."""
        found: tuple[int, ...] = self._kept("_key_order", self._find_key_order)
        return found

    def _find_key_order(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self.key_of[head] for head in self.order))

    @property
    def key_of(self) -> tuple[int, ...]:
        """Of every logical query head, the key head whose keys and values it uses."""
        found: tuple[int, ...] = self._kept("_key_of", self._find_key_of)
        return found

    def _find_key_of(self) -> tuple[int, ...]:
        return tuple([key for key, count in enumerate(self.groups) for _ in range(count)])

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return len(self.key_of)

    @property
    def grouped(self) -> bool:
        """Whether query heads share key heads."""
        return self.heads > len(self.qk)

    def queries(self, key: int) -> range:
        """The logical query heads of a key head."""
        first = sum(self.groups[:key])
        return range(first, first + self.groups[key])

    @property
    def uniform(self) -> bool:
        """Whether all heads have the same number of channels."""
        return len(self.buckets) == 1

    def dims(self, kind: Kind) -> tuple[int, ...]:
        """Channels per key head."""
        return self.qk if kind == "qk" else self.vo

    def sizes(self, projection: Projection) -> tuple[int, ...]:
        """Channels of a projection, per head of its own: query heads of Q and O, key heads of K and V."""
        if projection == "x":
            return (self.extra,) * self.heads
        dims = self.dims(KIND_OF[projection])
        return dims if projection in "kv" else tuple([dims[key] for key in self.key_of])

    def stored(self, projection: Projection) -> tuple[int, ...]:
        """The logical number of every stored head of a projection."""
        return self.key_order if projection in "kv" else self.order

    def channels(self, projection: Projection) -> int:
        """Channels of a projection over all heads."""
        return sum(self.sizes(projection))

    def _find_spans(self) -> dict[Projection, tuple[tuple[int, int], ...]]:
        spans: dict[Projection, tuple[tuple[int, int], ...]] = {}
        for projection in SIDES:
            sizes, order = self.sizes(projection), self.stored(projection)
            ends = list(accumulate(sizes[head] for head in order))
            stored = {head: (end - sizes[head], end) for head, end in zip(order, ends, strict=True)}
            spans[projection] = tuple(stored[head] for head in range(len(sizes)))
        return spans

    def span(self, projection: Projection, head: int) -> tuple[int, int]:
        """First and last-plus-one stored channel of a logical head (of Q and O a query head, of K and V a key head)."""
        return self.spans(projection)[head]

    def spans(self, projection: Projection) -> tuple[tuple[int, int], ...]:
        """:meth:`span` of every head of a projection."""
        spans: dict[Projection, tuple[tuple[int, int], ...]] = self._kept("_spans", self._find_spans)
        return spans[projection]

    def over_groups(self, values: Sequence[Any], projection: Projection) -> list[Any]:
        """Per logical key head the list of what its heads of a projection have: of K and V lists of one."""
        if projection in "kv":
            return [[value] for value in values]
        return [[values[head] for head in self.queries(key)] for key in range(len(self.qk))]
