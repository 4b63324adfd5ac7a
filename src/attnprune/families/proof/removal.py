"""What goes from a stand-in while a way to run is tried: :class:`Removal`."""

from __future__ import annotations

from ...values.layout import KINDS, Kind
from ...values.spec import AttentionSpec


class Removal:
    """What goes in a trial: most channels of every head, of each head others, so that nothing hides.

    Args:
        spec: the attention.
        heads: whether most heads go whole, too.
        ragged: whether heads keep different numbers of channels, and of qk others than of vo.
    """

    def __init__(self, spec: AttentionSpec, heads: bool, ragged: bool) -> None:
        everyone = range(spec.heads)
        self.heads = [head for head in everyone if not heads or head in (min(1, spec.heads - 1), spec.heads - 1)]
        self.ragged = ragged
        self.removes_heads = len(self.heads) < spec.heads
        least = min(-(-dim // 2) for kind in KINDS for dim in spec.dims(kind))
        kept: dict[Kind, list[list[int]]] = {}
        for other, kind in enumerate(KINDS):
            kept[kind] = []
            for head in self.heads:
                dim = spec.dims(kind)[head]
                some = (list(range((head + other) % 2, dim, 2)) or [0])[:least]  # every other one
                kept[kind].append(some[: -(-len(some) // 2)] if ragged and (head + other) % 2 else some)
            shortest = len(some) if ragged else min(map(len, kept[kind]))
            kept[kind] = [some if ragged else some[:shortest] for some in kept[kind]]
        if not ragged:
            even = min(len(some) for rows in kept.values() for some in rows)
            kept = {kind: [some[:even] for some in rows] for kind, rows in kept.items()}
        self.after = spec.keep(self.heads, *([len(some) for some in kept[kind]] for kind in KINDS))
        self.rows: dict[Kind, list[int]] = {}
        self.gone: dict[Kind, list[int]] = {}
        for kind in KINDS:
            starts = [spec.layout.span(kind, head)[0] for head in self.heads]
            places = self.after.layout.order
            self.rows[kind] = [starts[place] + channel for place in places for channel in kept[kind][place]]
            self.gone[kind] = sorted({*range(sum(spec.dims(kind)))} - {*self.rows[kind]})
