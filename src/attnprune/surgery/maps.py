"""How the channels of a parameter become those of its successor: some are picked, or all are mixed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..families.base import AttentionView
from ..families.expansion import Joint
from ..families.slots import channels_of, reader
from ..values.layer_plan import LayerPlan
from ..values.layout import PROJECTIONS, SIDES, HeadLayout, Projection


@dataclass(frozen=True, eq=False)
class Pick:
    """Channels that stay as they are: ``new = old[rows]``."""

    rows: tuple[int, ...]

    def __call__(self, channels: Tensor) -> Tensor:
        return channels.index_select(0, torch.tensor(self.rows, device=channels.device))

    dual = squared = __call__

    def same(self, other: ChannelMap) -> bool:
        return isinstance(other, Pick) and self.rows == other.rows


Blocks = tuple[tuple[int, int, Tensor], ...]


@dataclass(frozen=True, eq=False)
class Mix:
    """Channels that are mixed, run by run: ``new = concatenate(matrix @ old[start:stop])``."""

    blocks: Blocks
    made: Callable[[], Blocks]
    """Gives the duals when they are asked for, as surgery on files never does."""

    @property
    def duals(self) -> Blocks:
        """What carries gradients over: the maps of the projection on the other side of the product."""
        return self.made()

    def __call__(self, channels: Tensor) -> Tensor:
        return _mix(self.blocks, channels)

    def dual(self, channels: Tensor) -> Tensor:
        return _mix(self.duals, channels)

    def squared(self, channels: Tensor) -> Tensor:
        return _mix([(start, stop, matrix.square()) for start, stop, matrix in self.duals], channels)

    def same(self, other: ChannelMap) -> bool:
        if not isinstance(other, Mix) or len(self.blocks) != len(other.blocks):
            return False
        pairs = zip(self.blocks, other.blocks, strict=True)
        return all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in pairs)


@dataclass(frozen=True, eq=False)
class Several:
    """Channels of several projections, each changed by its own map: ``new = concatenate(map(old[places]))``."""

    parts: tuple[tuple[Sequence[int], Pick | Mix], ...]

    def _each(self, channels: Tensor, change: Callable[[Pick | Mix, Tensor], Tensor]) -> Tensor:
        return torch.cat([change(one, channels_of(channels, 0, places)) for places, one in self.parts])

    def __call__(self, channels: Tensor) -> Tensor:
        return self._each(channels, lambda one, own: one(own))

    def dual(self, channels: Tensor) -> Tensor:
        return self._each(channels, lambda one, own: one.dual(own))

    def squared(self, channels: Tensor) -> Tensor:
        return self._each(channels, lambda one, own: one.squared(own))

    def same(self, other: ChannelMap) -> bool:
        if not isinstance(other, Several) or len(self.parts) != len(other.parts):
            return False
        pairs = zip(self.parts, other.parts, strict=True)
        return all([*a] == [*b] and one.same(another) for (a, one), (b, another) in pairs)


ChannelMap = Pick | Mix | Several


@dataclass(frozen=True, eq=False)
class FeatureChange:
    """What becomes of the features along the other axis of a projection's weight: some stay, refitted or as they
    stand."""

    places: tuple[int, ...]
    """Of those that stay, among those that there are."""
    matrix: Tensor | None = None
    """``(features before, features after)``: R of :class:`attnprune.values.feature_maps.FeatureMaps`."""

    def __call__(self, rows: Tensor) -> Tensor:
        """``(channels, features after)`` from ``(channels, features before)``."""
        if self.matrix is None:
            return self.pick(rows)
        return (rows.double() @ self.matrix.to(rows.device, torch.float64)).to(rows.dtype)

    def pick(self, rows: Tensor) -> Tensor:
        """The same for gradients, and whatever goes with single weights: what stays, as it is."""
        return rows.index_select(1, torch.tensor(self.places, device=rows.device))

    def same(self, other: FeatureChange | None) -> bool:
        if other is None or self.places != other.places or (self.matrix is None) != (other.matrix is None):
            return False
        return self.matrix is None or torch.equal(self.matrix, other.matrix)  # type: ignore[arg-type]


def feature_changes(view: AttentionView, layer: LayerPlan) -> dict[str, FeatureChange]:
    """For every slot that is a weight whose features change, how."""
    found = {}
    for key in view.slots:
        projection = reader(key)
        if key.endswith(".weight") and projection is not None and layer.features[PROJECTIONS.index(projection)]:
            matrix = None if layer.refit is None else layer.refit.reads.get(projection)
            found[key] = FeatureChange(layer.left(projection), matrix)
    return found


def _mix(blocks: Sequence[tuple[int, int, Tensor]], channels: Tensor) -> Tensor:
    """In float64, whatever the parameter's own precision."""
    flat = channels.reshape(len(channels), -1).double()
    parts = [matrix.to(flat) @ flat[start:stop] for start, stop, matrix in blocks]
    return torch.cat(parts).to(channels.dtype).reshape(-1, *channels.shape[1:])


def kept_channels(view: AttentionView, layer: LayerPlan, projection: Projection) -> list[int]:
    """The stored channels of a projection that stay, in the order in which they will be stored."""
    stays = layer.stays(projection)
    rows: list[int] = []
    for position in layer.after.layout.stored(projection):
        head, kept = stays[position]
        start, _ = view.spec.layout.span(projection, head)
        rows += [start + channel for channel in kept]
    return rows


def joined(view: AttentionView, joint: Joint, maps: Mapping[str, Pick | Mix]) -> ChannelMap:
    """How all of a parameter changes that several projections may share: their maps, one after the other."""
    rest = joint.rest(view)
    parts: list[tuple[Sequence[int], Pick | Mix]] = [(view.slots[key].places, maps[key]) for key in joint.keys]
    parts += [(rest, Pick(tuple(range(len(rest)))))] if rest else []
    rows: list[int] = []
    for places, one in parts:
        if not isinstance(one, Pick):
            return Several(tuple(parts))
        rows += [places[row] for row in one.rows]
    return Pick(tuple(rows))


def channel_maps(view: AttentionView, layer: LayerPlan) -> dict[str, Pick | Mix]:
    """For every slot of a view, how its channels (in stored order) change."""
    picks = {p: Pick(tuple(kept_channels(view, layer, p))) for p in SIDES}
    if layer.fold is None:
        return {key: picks[view.side(key)] for key in view.slots}
    blocks: dict[Projection, Blocks] = {
        "q": _by_head(view, layer, "q", layer.fold.q),
        "k": _by_head(view, layer, "k", layer.fold.k),
        "v": _by_head(view, layer, "v", layer.fold.v),
    }
    duals: dict[Projection, Blocks] = {
        "q": _by_head(view, layer, "q", _duals_of_q(layer)),
        "k": _by_head(view, layer, "k", _duals_of_k(layer)),
    }
    before, after = logical_channels(view.spec.layout, "o"), logical_channels(layer.after.layout, "o")
    o = layer.fold.o[before][:, after].T.contiguous()
    width = len(before)

    def values() -> Blocks:
        """V's map of every query head as one matrix: the dual of O's."""
        assert layer.fold is not None
        whole, row, key_of = torch.zeros_like(o), 0, layer.after.layout.key_of
        for start, stop, matrix in _by_head(view, layer, "o", [layer.fold.v[key] for key in key_of]):
            whole[row : row + len(matrix), start:stop] = matrix.to(whole)
            row += len(matrix)
        return ((0, width, whole),)

    mixes: dict[Projection, Pick | Mix] = {
        "q": Mix(blocks["q"], lambda: duals["q"]),
        "k": Mix(blocks["k"], lambda: duals["k"]),
        "v": Mix(blocks["v"], lambda: _by_head(view, layer, "v", _duals_of_v(layer))),
        "o": Mix(((0, width, o),), values),
        "x": picks["x"],
    }
    gates = picks["o"]  # of single channels, whatever becomes of O's weights
    return {key: gates if key.startswith("g.") else mixes[view.side(key)] for key in view.slots}


def _by_head(view: AttentionView, layer: LayerPlan, projection: Projection, matrices: Sequence[Tensor]) -> Blocks:
    """One block per kept head of a projection, in the order in which they will be stored."""
    stays = layer.stays(projection)
    order = layer.after.layout.stored(projection)
    return tuple((*view.spec.layout.span(projection, stays[i][0]), matrices[i]) for i in order)


def _duals_of_q(layer: LayerPlan) -> list[Tensor]:
    """Per kept query head the map of its keys: what carries gradients of Q over."""
    assert layer.fold is not None
    return [layer.fold.k[key] for key in layer.after.layout.key_of]


def _duals_of_k(layer: LayerPlan) -> list[Tensor]:
    """Per kept key head the map of its queries; the mean of several."""
    assert layer.fold is not None
    return [torch.stack(maps).mean(0) for maps in layer.after.layout.over_groups(layer.fold.q, "q")]


def _duals_of_v(layer: LayerPlan) -> list[Tensor]:
    """Per kept key head what O's map takes from its own channels; the mean over the query heads that share them."""
    assert layer.fold is not None
    rows, columns = (_starts(spec.layout.sizes("o")) for spec in (layer.spec, layer.after))
    own = [
        layer.fold.o[rows[head] : rows[head + 1], columns[place] : columns[place + 1]].T
        for place, head in enumerate(layer.kept_heads)
    ]
    return [torch.stack(maps).mean(0) for maps in layer.after.layout.over_groups(own, "o")]


def _starts(dims: Sequence[int]) -> list[int]:
    starts = [0]
    for dim in dims:
        starts.append(starts[-1] + dim)
    return starts


def logical_channels(layout: HeadLayout, projection: Projection) -> list[int]:
    """For every stored channel, its number when heads are counted in logical order."""
    starts = _starts(layout.sizes(projection))
    return [channel for head in layout.stored(projection) for channel in range(starts[head], starts[head + 1])]
