"""What became of every parameter: :class:`ParamMap`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..families.base import AttentionView
from ..families.expansion import Joint
from ..families.slots import Slot, channels_of, gathered, reader
from ..values.layer_plan import LayerPlan
from .maps import ChannelMap, FeatureChange, logical_channels


@dataclass(frozen=True, eq=False)
class ParamChange:
    """What became of a parameter: ``new = gain * map(old)``, along one axis.

    Channels that stay as they are were picked, ``new = gain * old.index_select(axis, index)``; those of a plan with
    maps were mixed (:attr:`index` is then None), and O's bias gained a vector.
    """

    old: nn.Parameter
    new: nn.Parameter
    axis: int
    """The dimension that was cut."""
    index: Tensor | None
    """``(kept,)`` int64: places along the axis of the old parameter, in the order of the new one; None if mixed."""
    gain: float = 1.0
    """What the values were multiplied with; 1 unless a softmax scale was folded into Q."""
    map: ChannelMap | None = None
    """How channels change, given those of the slot first; None for O's bias, whose entries are no channels."""
    places: Sequence[int] = ()
    """Where the slot's channels lie along the axis of the old parameter."""
    features: FeatureChange | None = None
    """What becomes of a weight's other axis; None where nothing does."""
    gained: Gain | OutputGain | None = None
    """What a bias gains before its channels change; None where nothing."""

    def carry(self, tensor: Tensor, squared: bool = False) -> Tensor:
        """What a gradient of the old parameter (or a running mean of gradients) is for the new one.

        Exact where channels were picked, or rotated at full rank: the chain rule.

        Args:
            tensor: shaped like the old parameter.
            squared: the tensor holds (running means of) squares; where channels are mixed, they are mixed by the
                squares of the map, as if gradients of different channels did not correlate.

        Returns:
            Shaped like the new one.
        """
        if self.map is None:
            return tensor.clone()
        change = self.map.squared if squared else self.map.dual
        return self._along(tensor, change) / (self.gain**2 if squared else self.gain)

    def _along(self, tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Channels changed; of features what stays, as it is."""
        pick = None if self.features is None else self.features.pick
        return along(tensor, self.axis, self.places, change, pick)

    def values(self, tensor: Tensor, values: Values | None = None) -> Tensor:
        """What values of the old parameter are in the new one, gain aside.

        Args:
            tensor: shaped like the old parameter.
            values: gives the values of weights, by which a bias gains something; None: as they are in the model.
        """
        if self.gained is None:
            assert self.map is not None
            return along(tensor, self.axis, self.places, self.map, self.features)
        change, gained = self.map or torch.clone, self.gained(values or held)

        def shifted(channels: Tensor) -> Tensor:
            return change((channels.double() + gained.to(channels.device)).to(channels.dtype))

        return along(tensor, self.axis, self.places, shifted)

    def move(self, tensor: Tensor) -> Tensor:
        """What values in the place of the old parameter's (an average of it, say) are in the place of the new one's."""
        return self.values(tensor) * self.gain

    def average(self, tensor: Tensor) -> Tensor:
        """The same for sizes of steps: weighted means, as far as channels are mixed, so that they stay positive."""
        if self.map is None:
            return tensor.clone()
        size, whole = (self._along(x, self.map.squared) for x in (tensor, torch.ones_like(tensor)))
        return size / whole * abs(self.gain)


def along(
    tensor: Tensor,
    axis: int,
    places: Sequence[int],
    change: Callable[[Tensor], Tensor],
    features: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Channels of a tensor, changed, and then its features, along the other axis; owned and contiguous."""
    changed = change(channels_of(tensor, axis, places))
    return (changed if features is None else features(changed)).movedim(0, axis).contiguous()


@dataclass(frozen=True, eq=False)
class ParamMap:
    """Old parameters and what became of them; parameters that did not change are not listed.

    A packed parameter has several entries, one for each projection that it held.
    """

    changes: tuple[ParamChange, ...]

    def __iter__(self) -> Iterator[ParamChange]:
        return iter(self.changes)

    def __len__(self) -> int:
        return len(self.changes)


Values = Callable[[nn.Parameter], Tensor]
"""Gives a parameter's values, which may lie in a file."""


def held(parameter: nn.Parameter) -> Tensor:
    """The values of a parameter, from all processes where it is sharded among them."""
    return gathered(parameter.detach())


@dataclass(frozen=True, eq=False)
class Gain:
    """What a bias of Q, K or V gains as its projection leaves inputs out: ``W s``, from the weights before."""

    parts: tuple[tuple[Sequence[int], Slot, nn.Parameter, Tensor], ...]
    """Places among the bias's channels, the weight's slot, its parameter and s."""
    size: int

    def __call__(self, values: Values = held) -> Tensor:
        """``(channels,)`` float64."""
        whole = torch.zeros(self.size, dtype=torch.float64, device="cpu")
        for places, slot, parameter, shift in self.parts:
            rows = slot.cut(values(parameter)).double()
            whole[list(places)] = (rows @ shift.to(rows)).cpu()
        return whole


@dataclass(frozen=True, eq=False)
class OutputGain:
    """What O's bias gains: what O made of a constant context."""

    slot: Slot
    parameter: nn.Parameter
    layer: LayerPlan

    def __call__(self, values: Values = held) -> Tensor:
        """``(d_model,)`` float64."""
        return gain_of(self.slot.cut(values(self.parameter)), self.layer)


def gains(layer: LayerPlan) -> bool:
    """Whether O's bias gains anything."""
    moved = layer.fold is not None and layer.fold.shift is not None
    return moved or (layer.refit is not None and bool(layer.refit.means))


def gain_of(weight: Tensor, layer: LayerPlan) -> Tensor:
    """``(d_model,)`` float64: what O's bias gains.

    Args:
        weight: O's columns before, ``(channels, features that it writes)`` in stored order.
        layer: what goes.
    """
    stored, spec, weight = logical_channels(layer.spec.layout, "o"), layer.spec, weight.double()
    gained = torch.zeros(spec.d_model, dtype=torch.float64, device=weight.device)
    written = torch.tensor(spec.present("o"), device=weight.device)
    if layer.fold is not None and layer.fold.shift is not None:
        gained[written] = layer.fold.shift[stored].to(weight) @ weight
    for outputs, mean in () if layer.refit is None else layer.refit.means:
        places = [place for place, feature in enumerate(spec.present("o")) if feature in set(outputs)]
        gained[written[places]] = mean[stored].to(weight) @ weight[:, places]
    return gained


def bias_gain(view: AttentionView, key: str, layer: LayerPlan) -> Gain | None:
    """What a slot that is a bias of Q, K or V gains; None where nothing."""
    side, _, part = key.partition(".")
    projection = reader(key)
    if layer.refit is None or part != "bias" or projection is None or projection not in layer.refit.shifts:
        return None
    shift = layer.refit.shifts[projection]
    weight, size = view.slots[f"{side}.weight"], view.slots[key].size
    return Gain(((range(size), weight, weight.parameter, shift),), size)


def joint_gain(view: AttentionView, joint: Joint, layer: LayerPlan) -> Gain | None:
    """The same for all of a bias that several projections may share; what is in no slot gains nothing."""
    found = [(key, gain) for key in joint.keys if (gain := bias_gain(view, key, layer)) is not None]
    parts = tuple((view.slots[key].places, *gain.parts[0][1:]) for key, gain in found)
    return Gain(parts, joint.slot.size) if parts else None
