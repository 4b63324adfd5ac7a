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

from .decoupled import decoupled_class, host_class
from .selected import Selected, SelectedInputs, SelectedOutputs, spread


class Expanded(Selected):
    """A projection with fewer channels than its host sees; it may leave features out besides."""

    attnprune_channels: tuple[int, ...]
    """For every channel left, in stored order, its number in the dense projection."""
    attnprune_width: int
    """Channels of the dense projection."""
    attnprune_index: Tensor
    """The same as :attr:`attnprune_channels`."""
    attnprune_columns: bool
    """Whether channels are what the projection reads (O)."""

    def indices(self) -> dict[str, Sequence[int]]:
        """Of channels too."""
        return {**super().indices(), "attnprune_index": self.attnprune_channels}

    def dense_numbers(self, name: str, places: Sequence[int]) -> list[int]:
        """The dense numbers of channels that lie at places of a parameter."""
        return [self.attnprune_channels[place] for place in places]

    def laid_out(self) -> dict[str, Any]:
        """Which of the dense projection's channels and features are left."""
        return {"channels": self.attnprune_channels, "width": self.attnprune_width, **super().laid_out()}

    def extra_repr(self) -> str:
        """The host's own, and how many channels the host sees."""
        return f"{super().extra_repr()}, expanded to {self.attnprune_width}"


class ExpandedRows(Expanded, SelectedInputs):
    """Q, K, V, or several of them in one: the output has the dense channels, zero where they went."""

    attnprune_columns = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in the host class: ``(..., in)`` to ``(..., dense channels)``."""
        return spread(super().forward(*args, **kwargs), self.attnprune_index, self.attnprune_width)

    @staticmethod
    def listen(module: nn.Module, one: Any) -> list[RemovableHandle]:
        """Makes another module of the compact shape take and hand on what this one does."""
        after = module.register_forward_hook(
            lambda _, __, compact: spread(compact, one.attnprune_index, one.attnprune_width)
        )
        return [*SelectedInputs.listen(module, one), after]


class ExpandedColumns(Expanded, SelectedOutputs):
    """O: reads the channels that are left out of ``(..., dense channels)``."""

    attnprune_columns = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As in the host class: ``(..., dense channels)`` to ``(..., out)``."""
        out: Tensor = super().forward(x.index_select(-1, self.attnprune_index), *args, **kwargs)
        return out

    @staticmethod
    def listen(module: nn.Module, one: Any) -> list[RemovableHandle]:
        """Makes another module of the compact shape take and hand on what this one does."""
        before = module.register_forward_pre_hook(
            lambda _, given: (given[0].index_select(-1, one.attnprune_index), *given[1:])
        )
        return [before, *SelectedOutputs.listen(module, one)]


class ExpandedApart(Expanded):
    """Several of Q, K and V in one Linear that read features of their own: a weight for each, one after the other."""

    attnprune_columns = False
    attnprune_parts: tuple[tuple[int, ...], ...]
    """Of each weight, the features that it reads, ascending."""

    def indices(self) -> dict[str, Sequence[int]]:
        """Of what each weight reads too."""
        taken = {f"attnprune_taken_{i}": part for i, part in enumerate(self.attnprune_parts)}
        return {**super().indices(), **taken}

    @property
    def attnprune_weights(self) -> list[Any]:
        """The weights."""
        return [self._parameters[part_name(i)] for i in range(len(self.attnprune_parts))]

    def sizes(self) -> list[int]:
        """How many channels each weight has."""
        return [weight.shape[1 if "nf" in self.__dict__ else 0] for weight in self.attnprune_weights]

    def dense_numbers(self, name: str, places: Sequence[int]) -> list[int]:
        """Places of a weight count its own channels, those of the bias all of them."""
        names = [part_name(i) for i in range(len(self.attnprune_parts))]
        start = sum(self.sizes()[: names.index(name)]) if name in names else 0
        return super().dense_numbers(name, [start + place for place in places])

    def laid_out(self) -> dict[str, Any]:
        """Which features each weight reads, too."""
        return {**super().laid_out(), "parts": self.attnprune_parts}

    def forward(self, x: Tensor) -> Tensor:
        """As in the host class: ``(..., in)`` to ``(..., dense channels)``."""
        compact = []
        for i, weight in enumerate(self.attnprune_weights):
            own = x.index_select(-1, getattr(self, f"attnprune_taken_{i}"))
            compact.append(own @ weight if "nf" in self.__dict__ else F.linear(own, weight))
        out, bias = torch.cat(compact, -1), self._parameters["bias"]
        out = out if bias is None else out + bias.to(out.dtype)
        return spread(out, self.attnprune_index, self.attnprune_width)


def part_name(number: int) -> str:
    """The name of one of several weights."""
    return f"weight_{number}" if number else "weight"


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
        if compact.shape[axis] != len(owner.attnprune_channels):  # it is about to be exchanged
            return compact
        where = compact.device  # "meta" while files are pruned
        dense: Any = spread(compact.movedim(axis, -1), owner.attnprune_index.to(where), owner.attnprune_width)
        if compact.dim() > 1 and owner.attnprune_features is not None:
            dense = spread(dense.movedim(0, -1), owner.attnprune_taken.to(where), owner.attnprune_total).movedim(-1, 0)
        dense = dense.movedim(-1, axis)
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


def expand_apart(owner: nn.Module, channels: Sequence[int], width: int, parts: Sequence[Sequence[int]]) -> None:
    """The same for an owner of several weights (:func:`part_name`) that each read features of their own.

    Args:
        owner, channels, width: as for :func:`expand`; channels of all weights, one after the other.
        parts: of each weight, the features that it reads.
    """
    known = {"attnprune_channels": tuple(channels), "attnprune_width": width}
    owner.__dict__.update(known, attnprune_parts=tuple(map(tuple, parts)))
    object.__setattr__(owner, "__class__", decoupled_class(ExpandedApart, host_class(owner)))
    assert isinstance(owner, ExpandedApart)
    owner.index()
