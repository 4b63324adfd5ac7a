"""Live handles on the attention modules of a model: where the rows and columns of Q, K, V and O lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn

from ..values.layout import KIND_OF, PROJECTIONS, Kind, Projection
from ..values.spec import AttentionSpec

if TYPE_CHECKING:
    from .base import Adapter


def gathered(tensor: Tensor) -> Tensor:
    """A tensor that is sharded among processes (a DTensor), whole; every process must ask. Others as they are."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    whole: Tensor = tensor.full_tensor()
    return whole


@dataclass(frozen=True, eq=False)
class Slot:
    """A run of channels in one parameter: all of it, or a part of a packed one."""

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

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself."""
        parameter: nn.Parameter = getattr(self.owner, self.name)
        return parameter

    def cut(self, tensor: Tensor) -> Tensor:
        """``(channels, ...)``: these channels of a tensor shaped like the parameter, first; a view."""
        return tensor.narrow(self.axis, self.start, self.size).movedim(self.axis, 0)

    @property
    def values(self) -> Tensor:
        """The parameter's values, detached: itself, or gathered from all processes where it is sharded among them."""
        return gathered(self.parameter.detach())

    @property
    def whole(self) -> bool:
        """Whether the slot covers its parameter."""
        return self.parameter.shape[self.axis] == self.size


@dataclass(frozen=True, eq=False)
class AttentionView:
    """A live attention module: its spec and where its projections live. Never serialised.

    Args:
        spec: the module's facts.
        module: the module whose forward splits heads.
        adapter: who made the view, and who can commit another shape to the module.
        slots: where channels lie, by name: ``q.weight``, ``q.bias`` (if there is one), ``k.weight`` … ``o.weight``,
            and whatever else runs along channels (:class:`torch.nn.MultiheadAttention`'s ``bias_k``, ``bias_v``).
        kinds: for every slot, whose channels it follows: ``"qk"`` or ``"vo"``.
    """

    spec: AttentionSpec
    module: nn.Module
    adapter: Adapter
    slots: Mapping[str, Slot]
    kinds: Mapping[str, Kind] = field(default_factory=dict)

    def __post_init__(self) -> None:
        usual = {name: KIND_OF[p] for name in self.slots for p in PROJECTIONS if name.startswith(f"{p}.")}
        object.__setattr__(self, "kinds", {**usual, **self.kinds})

    @property
    def name(self) -> str:
        """The module's fully qualified name."""
        return self.spec.name

    def weight(self, projection: Projection) -> Tensor:
        """``(channels, in)`` weight rows of Q, K, V, or columns of O, in stored order, detached; a view."""
        slot = self.slots[f"{projection}.weight"]
        return slot.cut(slot.values)

    def heads(self, projection: Projection) -> list[Tensor]:
        """Per head ``(channel, in)``: the weights of a projection in logical order; views.

        For O the second dimension is what it writes. With equal heads, :meth:`stacked` gives one tensor.
        """
        return [self.weight(projection)[slice(*span)] for span in self.spans(KIND_OF[projection])]

    def stacked(self, projection: Projection) -> Tensor:
        """``(head, channel, in)``: the weights of a projection with equal heads; a view."""
        return rearrange(self.weight(projection), "(h d) e -> h d e", h=self.spec.heads)

    def spans(self, kind: Kind) -> Iterator[tuple[int, int]]:
        """Per logical head, its first and last-plus-one stored channel."""
        return (self.spec.layout.span(kind, head) for head in range(self.spec.heads))

    def by_head(self, values: Tensor, kind: Kind) -> Tensor:
        """``(heads, dim)`` from ``(channels,)`` in stored order; places that ragged heads lack hold infinity."""
        if not self.spec.ragged:
            return rearrange(values, "(h d) -> h d", h=self.spec.heads)
        rows = [values[slice(*span)] for span in self.spans(kind)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.inf)

    @property
    def linears(self) -> dict[Projection, nn.Linear] | None:
        """The four Linear modules, or None where the host holds packed parameters instead."""
        owners = {p: self.slots[f"{p}.weight"].owner for p in PROJECTIONS}
        if any(self.slots[f"{p}.weight"].start for p in PROJECTIONS):  # a fused Linear is none of the four
            return None
        if not all(isinstance(owner, nn.Linear) for owner in owners.values()):
            return None
        return {p: owner for p, owner in owners.items() if isinstance(owner, nn.Linear)}

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Every module that a commit may touch: the attention itself and the owners of its parameters."""
        found = {id(module): module for module in (self.module, *(slot.owner for slot in self.slots.values()))}
        return tuple(found.values())
