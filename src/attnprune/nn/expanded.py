"""Compact projections that hand a host tensors of its dense dims: any host at all runs them.

Q, K and V put zeros where channels went, O reads the channels that are left. So what the host computes in between sees
the dense model with rows and columns at zero, whatever it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .decoupled import Decoupled, decoupled_class, host_class


class Expanded(Decoupled):
    """A projection with fewer channels than its host sees."""

    attnprune_channels: tuple[int, ...]
    """For every channel left, in stored order, its number in the dense projection."""
    attnprune_width: int
    """Channels of the dense projection."""
    attnprune_index: Tensor
    """Where what is handed on comes from: a buffer, so that it moves along; no file holds it."""
    attnprune_columns: bool
    """Whether channels are what the projection reads (O)."""

    def index(self) -> None:
        """Makes the buffer (anew: loaders of others fill buffers that no file holds with anything)."""
        channels, width = self.attnprune_channels, self.attnprune_width
        if isinstance(self, ExpandedColumns):
            index = list(channels)
        else:
            index = [len(channels)] * width
            for place, channel in enumerate(channels):
                index[channel] = place
        device = next((p.device for p in self.parameters(recurse=False)), torch.device("cpu"))
        with torch.inference_mode(False):
            where = torch.device("cpu") if device.type == "meta" else device
            buffer = torch.tensor(index, dtype=torch.long, device=where)
        # new containers, so that whoever kept the old ones can put them back
        self.__dict__["_buffers"] = {**self._buffers, "attnprune_index": buffer}
        self.__dict__["_non_persistent_buffers_set"] = {*self._non_persistent_buffers_set, "attnprune_index"}

    def laid_out(self) -> dict[str, Any]:
        """Which of the dense projection's channels are left."""
        return {"channels": self.attnprune_channels, "width": self.attnprune_width}

    def extra_repr(self) -> str:
        """The host's own, and how many channels the host sees."""
        return f"{super().extra_repr()}, expanded to {self.attnprune_width}"


class ExpandedRows(Expanded):
    """Q, K, V, or several of them in one: the output has the dense channels, zero where they went."""

    attnprune_columns = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in the host class: ``(..., in)`` to ``(..., dense channels)``."""
        return _spread(super().forward(*args, **kwargs), self.attnprune_index)

    @staticmethod
    def listen(module: nn.Module, index: Tensor) -> RemovableHandle:
        """Makes another module of the compact channels hand on the dense ones, too."""
        return module.register_forward_hook(lambda _, __, compact: _spread(compact, index))


class ExpandedColumns(Expanded):
    """O: reads the channels that are left out of ``(..., dense channels)``."""

    attnprune_columns = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As in the host class: ``(..., dense channels)`` to ``(..., out)``."""
        out: Tensor = super().forward(x.index_select(-1, self.attnprune_index), *args, **kwargs)
        return out

    @staticmethod
    def listen(module: nn.Module, index: Tensor) -> RemovableHandle:
        """Makes another module of the compact channels read the dense ones, too."""
        return module.register_forward_pre_hook(lambda _, given: (given[0].index_select(-1, index), *given[1:]))


def _spread(compact: Tensor, index: Tensor) -> Tensor:
    return F.pad(compact, (0, 1)).index_select(-1, index)  # the last channel is the zero


class _Dense:
    """A parameter as the host reads it: dense, with zeros where channels went."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        if owner is None:
            return self
        if self.name == "bias" and "attnprune_bias" in owner.__dict__:
            return owner.attnprune_bias
        compact: Tensor | None = owner._parameters[self.name]
        if compact is None or (self.name == "bias" and owner.attnprune_columns):
            return compact
        axis = owner.attnprune_axis if compact.dim() > 1 else 0
        zero = compact.new_zeros([1 if place == axis else size for place, size in enumerate(compact.shape)])
        dense: Any = torch.cat([compact, zero], axis).index_select(axis, owner.attnprune_index)
        if "attnprune_heard" in owner.__dict__:
            dense.attnprune_owner = owner
        return dense

    def __set__(self, owner: nn.Module, value: Any) -> None:
        owner.register_parameter(self.name, value)


class Read(Expanded):
    """A projection whose weight the host reads, instead of calling it: what is read is dense, what is kept compact.

    So parameters, their gradients, files and optimizers get smaller, and the products stay as they were.
    """

    attnprune_axis: int
    """The weight's dimension along which channels run."""
    attnprune_heard: bool
    """Set while calibration has to know whose weight it is that somebody read."""
    attnprune_bias: Tensor | None
    """Set while the projection is called with a bias of the host's."""
    weight: Any = _Dense("weight")
    bias: Any = _Dense("bias")


def expand(owner: nn.Module, channels: Sequence[int], width: int, *, columns: bool, axis: int | None = None) -> None:
    """Gives a projection the class that fits its weights into a dense host.

    Args:
        owner: a Linear (or what is called like one) whose weights are compact already.
        channels: for every channel left, in stored order, its number in the dense projection.
        width: channels of the dense projection.
        columns: whether channels are what the projection reads (O), not what it writes.
        axis: of a host that reads the weight instead of calling the projection, its dimension along which channels run.
    """
    kind: type[Expanded] = ExpandedColumns if columns else ExpandedRows
    owner.__dict__.update(attnprune_channels=tuple(channels), attnprune_width=width)
    if axis is not None:
        owner.__dict__.update(attnprune_axis=axis, attnprune_columns=columns)
        kind = Read
    object.__setattr__(owner, "__class__", decoupled_class(kind, host_class(owner)))
    assert isinstance(owner, Expanded)
    owner.index()
