"""The expanded way to run, for any host: :mod:`attnprune.nn.expanded` applied to an attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose
from typing import NamedTuple

from torch import nn

from ..nn.expanded import Expanded, ExpandedApart, Read, expand, expand_apart, part_name
from ..values.layout import KINDS, Kind, Projection
from ..values.spec import AttentionSpec
from . import linears
from .base import Adapter, AttentionView
from .slots import Slot, reader
from .states import Numbers


class Expansion(NamedTuple):
    """What an attention that runs expanded knows of itself."""

    spec: AttentionSpec
    """Its shape."""
    slots: Mapping[str, Slot]
    """Where its compact channels lie."""
    numbers: Numbers
    """Of each kind, per key head that is left, the dense numbers of its channels."""


class Joint(NamedTuple):
    """A parameter and all the slots of an attention that lie in it."""

    owner: nn.Module
    name: str
    axis: int
    keys: tuple[str, ...]
    """The slots, in the order in which they lie."""

    @property
    def slot(self) -> Slot:
        """The whole parameter."""
        slot = Slot(self.owner, self.name, 0, self.axis)
        return replace(slot, size=slot.parameter.shape[self.axis])

    def apart(self, view: AttentionView, spec: AttentionSpec) -> bool:
        """Whether what lies in it reads other features than one another, in a shape."""
        sides = {side for key in self.keys if key.endswith(".weight") for side in [reader(key)] if side is not None}
        missing = {spec.missing(side) for side in sides}
        return len(missing) > 1 or (bool(self.rest(view)) and any(missing))

    @property
    def columns(self) -> bool:
        """Whether channels are what the projection reads."""
        return self.keys[0][0] == "o"

    def places(self, view: AttentionView, rows: Mapping[Projection, Sequence[int]]) -> dict[str, list[int]]:
        """For every slot (``""`` for what is in none), the places along the axis that stay, in the order in which they
        will lie: each slot becomes a run.

        Args:
            view: the attention.
            rows: of each projection, the stored channels that stay.
        """
        found = {key: [view.slots[key].places[row] for row in rows[view.side(key)]] for key in self.keys}
        return {**found, "": self.rest(view)}

    def rest(self, view: AttentionView) -> list[int]:
        """The places along the axis that are in no slot, ascending."""
        held = {place for key in self.keys for place in view.slots[key].places}
        return [place for place in range(self.slot.size) if place not in held]


def joints(view: AttentionView) -> list[Joint]:
    """The parameters of an attention, each with the slots that lie in it."""
    found: dict[tuple[int, str], list[str]] = {}
    for key, slot in view.slots.items():
        found.setdefault((id(slot.owner), slot.name), []).append(key)
    result = []
    for keys in found.values():
        keys.sort(key=lambda key: view.slots[key].places[0])
        first = view.slots[keys[0]]
        result.append(Joint(first.owner, first.name, first.axis, tuple(keys)))
    return result


REST = "rest"
"""What stands for the rows of a parameter that are no projection's."""


@dataclass
class Weights:
    """The weights of a projection while they are exchanged: of each the dense numbers of its channels, and where there
    are several, the features that it reads."""

    owner: nn.Module
    width: int
    channels: dict[str, list[int]]
    reads: dict[str, tuple[int, ...]]
    whole: list[int]
    """Channels of the one weight that becomes several."""

    @classmethod
    def of(cls, joint: Joint) -> Weights:
        """As they are; ``joint`` is one of them."""
        owner = joint.owner
        if not isinstance(owner, Expanded):
            size = joint.slot.size
            return cls(owner, size, {"weight": list(range(size))}, {}, list(range(size)))
        channels, reads, start = {"weight": list(owner.attnprune_channels)}, {}, 0
        if isinstance(owner, ExpandedApart):
            for number, (size, part) in enumerate(zip(owner.sizes(), owner.attnprune_parts, strict=True)):
                channels[part_name(number)] = list(owner.attnprune_channels[start : start + size])
                reads[part_name(number)], start = part, start + size
        return cls(owner, owner.attnprune_width, channels, reads, list(owner.attnprune_channels))

    def cut(self, name: str, places: Sequence[int], spec: AttentionSpec, side: Projection | None) -> None:
        """Channels at these places are left of a weight."""
        self.channels[name] = [self.channels[name][place] for place in places]
        if self.reads and side is not None:
            self.reads[name] = spec.present(side)

    def add(self, places: Sequence[int], spec: AttentionSpec, side: Projection | None) -> str:
        """The name of the next weight that the one becomes; places are of the one."""
        name = part_name(len(self.reads))
        self.channels[name] = [self.whole[place] for place in places]
        self.reads[name] = tuple(range(spec.features("q"))) if side is None else spec.present(side)
        return name


def expand_view(
    view: AttentionView,
    parameters: Mapping[tuple[int, str], nn.Parameter],
    spec: AttentionSpec,
    kept: Sequence[int],
    rows: Mapping[Projection, Sequence[int]],
    *,
    read: bool = False,
) -> None:
    """Puts compact parameters in place; the host's own forward runs them on its dense dims. Only assigns.

    Args:
        view: the attention as it was.
        parameters: by the id of the owner and name, what becomes of every parameter of :func:`joints`; of one that
            becomes several (:meth:`Joint.apart`) by the id of the owner and the slot, or :data:`REST`.
        spec: the new shape.
        kept: query heads that stay.
        rows: of each projection, the stored channels that stay, in the order in which they will be stored.
        read: whether the host reads weights, instead of calling projections.
    """
    slots: dict[str, Slot] = {}
    held = {id(joint.owner): Weights.of(joint) for joint in joints(view) if joint.name == "weight"}
    for joint in joints(view):
        places, start, owner, own = joint.places(view, rows), 0, joint.owner, held[id(joint.owner)]
        if joint.name == "weight" and joint.apart(view, spec):
            for key, part in places.items():
                if part:
                    name = own.add(part, spec, reader(key))
                    linears.put(owner, name, parameters[id(owner), key or REST])
                    if key in view.slots:
                        slots[key] = Slot(owner, name, len(part), joint.axis)
            continue
        for key, part in places.items():
            if key in view.slots:
                slots[key] = Slot(owner, joint.name, len(part), joint.axis, start)
            start += len(part)
        if joint.name in own.channels:
            own.cut(joint.name, [place for part in places.values() for place in part], spec, reader(joint.keys[0]))
        linears.put(owner, joint.name, parameters[id(owner), joint.name])
        if joint.name == "weight" and not own.reads:
            axis = joint.axis if read else None
            expand(owner, own.channels["weight"], own.width, columns=joint.columns, axis=axis)
    for own in held.values():
        if own.reads:
            channels = [number for one in own.channels.values() for number in one]
            expand_apart(own.owner, channels, own.width, list(own.reads.values()))
    state = view.next_state(spec, kept)
    ordered = {key: slots[key] for key in view.slots}
    numbers = numbers_left(view, spec, kept, rows)
    view.module.attnprune_state = state._replace(expanded=Expansion(spec, ordered, numbers))  # type: ignore[assignment]


KEYS: tuple[Projection, Projection] = ("k", "v")
"""Of every kind, the projection whose heads are key heads."""


def numbers_left(
    view: AttentionView, spec: AttentionSpec, kept: Sequence[int], rows: Mapping[Projection, Sequence[int]]
) -> Numbers:
    """Of each kind, per key head that stays, the dense numbers of its channels; arguments as :func:`expand_view`'s."""
    found: dict[Kind, tuple[tuple[int, ...], ...]] = {}
    for kind, side in zip(KINDS, KEYS, strict=True):
        known, heads = view.numbers[kind], []
        for place, key in enumerate(view.spec.keys_of(kept)):
            start, _ = view.spec.layout.span(side, key)
            own = rows[side][slice(*spec.layout.span(side, place))]
            heads.append(tuple(known[key][row - start] for row in own))
        found[kind] = tuple(heads)
    return found


def rescale(view: AttentionView, scale: float) -> None:
    """Gives the host of an attention that runs expanded the head dim that makes a softmax scale; only assigns.

    For a host that makes its scale from its head dim, and had lost some of that by its attributes before it ran on
    dense dims. Does nothing where the host cannot have this scale.

    Args:
        view: the attention, on a host of its first head dim.
        scale: what it should multiply logits with.
    """
    state = view.state
    assert state is not None
    known: Expansion = state.expanded
    spec, slots = known.spec, known.slots
    if isclose(spec.scale, scale) or spec.rotary != "none":
        return
    dim = round(scale**-2)
    dims = (dim,) * (state.dense_heads // state.groups)
    host = replace(spec, qk_dims=dims, vo_dims=dims, groups=(state.groups,) * len(dims))
    gain = view.adapter.query_gain(view, host)
    last = max(number for numbers in known.numbers.values() for row in numbers for number in row)
    if gain == 1 or not isclose(gain, spec.scale / scale) or last >= dim or not all(s.whole for s in slots.values()):
        return
    for key, slot in slots.items():
        if key.endswith(".weight"):
            places, side = [0] * slot.size, view.side(key)
            rows = known.numbers[view.kinds[key]]
            if side in "kv":
                firsts = [view.spec.layout.queries(one)[0] for one in range(view.spec.kv_heads)]
                dense = [state.kept[head] // state.groups for head in firsts]
            else:
                dense, rows = list(state.kept), tuple(rows[one] for one in view.spec.layout.key_of)
            for head, span, row in zip(dense, view.spans(side), rows, strict=True):
                places[slice(*span)] = [head * dim + number for number in row]
            axis = slot.axis if isinstance(slot.owner, Read) else None
            expand(slot.owner, places, host.layout.channels(side), columns=key[0] == "o", axis=axis)
    view.adapter.reshape(view, host)
    expanded = known._replace(spec=replace(spec, scale=scale))
    view.module.attnprune_state = state._replace(scale=scale, expanded=expanded)  # type: ignore[assignment]


def expanded_view(name: str, host: nn.Module, adapter: Adapter) -> AttentionView | None:
    """The view of an attention that runs expanded, from what it knows of itself; None if it does not."""
    for module in host.modules():
        state = module.__dict__.get("attnprune_state")
        if state is not None:
            if state.expanded is None:
                return None
            found: Expansion = state.expanded
            return AttentionView(replace(found.spec, name=name), module, adapter, found.slots, host=host)
    return None
