"""What goes from a stand-in while a way to run is tried: :class:`Removal`."""

from __future__ import annotations

from collections.abc import Sequence

from ...values.layout import KIND_OF, KINDS, SIDES, Kind, Projection
from ...values.spec import AttentionSpec


class Removal:
    """What goes in a trial: most channels of every head, of each head others, so that nothing hides.

    Args:
        spec: the attention.
        heads: whether most heads go whole, too.
        ragged: whether heads keep different numbers of channels, and of qk others than of vo.
        channels: whether channels go at all.
    """

    def __init__(self, spec: AttentionSpec, heads: bool, ragged: bool, channels: bool = True) -> None:
        layout, last = spec.layout, spec.kv_heads - 1
        keys = [key for key in range(spec.kv_heads) if not heads or key in (min(1, last), last)]
        self.heads = [head for key in keys for head in layout.queries(key)]
        if heads and ragged:  # of a group, some of its query heads
            self.heads = [head for head in self.heads if head % 2 or head == layout.queries(layout.key_of[head])[0]]
        self.ragged = ragged
        self.removes_heads = len(self.heads) < spec.heads
        kept: dict[Kind, list[list[int]]] = {}
        pair = 2 if any(spec.rotary_dims) else 1
        least = max(min(dim for kind in KINDS for dim in spec.dims(kind)) // 2 // pair * pair, 1)
        for other, kind in enumerate(KINDS):
            kept[kind] = []
            for key in keys:
                units = spec.units(kind, key)
                if not channels:
                    kept[kind].append(list(range(spec.dims(kind)[key])))
                    continue
                size = least if not (ragged and (key + other) % 2) else -(-least // 2 // pair) * pair
                kept[kind].append(_some([*units[(key + other) % 2 :: 2], *units], max(size, len(units[0]))))
        turned = [sum(c < spec.rotary_dims[key] for c in some) for key, some in zip(keys, kept["qk"], strict=True)]
        qk, vo = ([len(some) for some in kept[kind]] for kind in KINDS)
        self.after = spec.keep(self.heads, qk, vo, turned)
        self.rows: dict[Projection, list[int]] = {}
        """Of each projection, the stored channels that stay, in the order in which they will be stored."""
        self.gone: dict[Projection, list[int]] = {}
        for p in SIDES:
            stays = keys if p in "kv" else self.heads
            self.rows[p] = []
            for place in self.after.layout.stored(p):
                head = stays[place]
                start = layout.span(p, head)[0]
                own = kept[KIND_OF[p]][keys.index(head if p in "kv" else layout.key_of[head])]
                own = list(range(spec.q_extra)) if p == "x" else own
                self.rows[p] += [start + channel for channel in own]
            self.gone[p] = sorted({*range(layout.channels(p))} - {*self.rows[p]})


def _some(units: Sequence[tuple[int, ...]], count: int) -> list[int]:
    """Channels of the first units that hold so many together, ascending."""
    found: set[int] = set()
    for unit in units:
        if len(found | {*unit}) <= count:
            found |= {*unit}
    return sorted(found)
