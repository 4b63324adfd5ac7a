"""Where the channels of an attention live: :class:`Slot`; and how to listen to them: :class:`Port`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..nn.expanded import Expanded
from ..values.layout import SIDES, Projection

FOLLOWS: Mapping[str, Projection] = {**{side: side for side in SIDES}, "g": "o"}
"""By the first word of a slot's name, whose channels it follows; ``g`` gates what O reads."""
READS: Mapping[str, Projection] = {"q": "q", "x": "q", "g": "q", "k": "k", "v": "v", "o": "o"}
"""By the same word, whose features it reads (O: writes): what lies beside Q in its Linear reads what Q reads."""


def reader(key: str) -> Projection | None:
    """The projection whose features a slot, by its name, reads or writes; None of what has none."""
    return READS.get(key.partition(".")[0])


def gathered(tensor: Tensor) -> Tensor:
    """A tensor that is sharded among processes (a DTensor), whole; every process must ask. Others as they are."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    whole: Tensor = tensor.full_tensor()
    return whole


def channels_of(tensor: Tensor, axis: int, places: Sequence[int]) -> Tensor:
    """``(places, ...)``: what lies at places along an axis of a tensor; a view where they are a range."""
    if isinstance(places, range):
        return tensor.narrow(axis, places.start, len(places)).movedim(axis, 0)
    return tensor.index_select(axis, torch.tensor(places, dtype=torch.long, device=tensor.device)).movedim(axis, 0)


@dataclass(frozen=True, eq=False)
class Slot:
    """The channels of one projection in one parameter: all of it, a run in a packed one, or places anywhere in it."""

    owner: nn.Module
    """The module that holds the parameter."""
    name: str
    """The parameter's name in its owner."""
    size: int
    """Number of channels."""
    axis: int = 0
    """The parameter's dimension along which channels run."""
    start: int = 0
    """The first channel's place along it."""
    apart: tuple[int, ...] | None = None
    """Every channel's place along it, where they are no run (as where each head's query, key and value lie together).
    """

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself; compact, where the owner shows its host a dense one."""
        parameter = self.owner._parameters.get(self.name)
        return getattr(self.owner, self.name) if parameter is None else parameter

    @property
    def places(self) -> Sequence[int]:
        """Every channel's place along the axis, in stored order."""
        return range(self.start, self.start + self.size) if self.apart is None else self.apart

    def cut(self, tensor: Tensor) -> Tensor:
        """``(channels, ...)``: these channels of a tensor shaped like the parameter, first; to be read."""
        return channels_of(tensor, self.axis, self.places)

    def write(self, channels: Tensor, first: int = 0) -> None:
        """Puts ``(channels, ...)`` in place in the parameter, from the ``first``-th of the slot's channels on.

        A graph that is still to be differentiated does not notice.
        """
        along = self.parameter.data.movedim(self.axis, 0)
        places = self.places[first : first + len(channels)]
        if isinstance(places, range):
            along.narrow(0, places.start, len(places)).copy_(channels)
        else:
            along[torch.tensor(places, dtype=torch.long, device=along.device)] = channels.to(along)

    @property
    def values(self) -> Tensor:
        """The parameter's values, detached: itself, or gathered from all processes where it is sharded among them."""
        return gathered(self.parameter.detach())

    @property
    def whole(self) -> bool:
        """Whether the slot covers its parameter."""
        return self.parameter.shape[self.axis] == self.size


@dataclass(frozen=True, eq=False)
class Port:
    """What a projection writes (Q, K, V) or reads (O) while the model runs: its own channels of a module's tensor."""

    slot: Slot
    """The projection's weight; its owner is a module that is called."""
    reads: bool
    """Whether the channels are what the owner reads."""

    @property
    def owner(self) -> nn.Module:
        """The module that is called."""
        return self.slot.owner

    def _places(self, x: Tensor) -> Tensor | None:
        """Where the channels are in the last dimension of what the owner hands on; None: all of it."""
        channels = self.slot.places
        if isinstance(self.owner, Expanded):
            channels = self.owner.dense_numbers(self.slot.name, channels)
        elif len(channels) == x.shape[-1]:
            return None
        return torch.tensor(channels, dtype=torch.long, device=x.device)

    def own(self, x: Tensor) -> Tensor:
        """``(..., channels)`` in stored order, of what the owner reads or hands on."""
        places = self._places(x)
        return x if places is None else x.index_select(-1, places)

    def _changed(self, x: Tensor, change: Callable[[Tensor], Tensor | None]) -> Tensor:
        places = self._places(x)
        own = self.own(x)
        new = change(own)
        if new is None or new is own:
            return x
        return new if places is None else x.index_copy(-1, places, new)

    def listen(self, change: Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]) -> RemovableHandle:
        """Calls ``change(module, inputs, channels)`` at every run, with ``(..., channels)`` in stored order.

        What it returns takes the channels' place, unless that is None.
        """
        if self.reads:

            def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                return (self._changed(inputs[0], lambda own: change(module, inputs, own)), *inputs[1:])

            return self.owner.register_forward_pre_hook(before)

        def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
            if isinstance(output, tuple):  # I-BERT's hands on its scale too
                return (after(module, inputs, output[0]), *output[1:])
            return self._changed(output, lambda own: change(module, inputs, own))

        return self.owner.register_forward_hook(after)
