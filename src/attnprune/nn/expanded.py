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

from .decoupled import Decoupled, decoupled_class, host_class


class Expanded(Decoupled):
    """A projection with fewer channels than its host sees."""

    attnprune_channels: tuple[int, ...]
    """For every channel left, in stored order, its number in the dense projection."""
    attnprune_width: int
    """Channels of the dense projection."""
    attnprune_index: Tensor
    """Where what is handed on comes from: a buffer, so that it moves along; no file holds it."""

    def laid_out(self) -> dict[str, Any]:
        """Which of the dense projection's channels are left."""
        return {"channels": self.attnprune_channels, "width": self.attnprune_width}

    def extra_repr(self) -> str:
        """The host's own, and how many channels the host sees."""
        return f"{super().extra_repr()}, expanded to {self.attnprune_width}"


class ExpandedRows(Expanded):
    """Q, K, V, or several of them in one: the output has the dense channels, zero where they went."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in the host class: ``(..., in)`` to ``(..., dense channels)``."""
        compact: Tensor = super().forward(*args, **kwargs)
        return F.pad(compact, (0, 1)).index_select(-1, self.attnprune_index)  # the last channel is the zero


class ExpandedColumns(Expanded):
    """O: reads the channels that are left out of ``(..., dense channels)``."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As in the host class: ``(..., dense channels)`` to ``(..., out)``."""
        out: Tensor = super().forward(x.index_select(-1, self.attnprune_index), *args, **kwargs)
        return out


def expand(owner: nn.Module, channels: Sequence[int], width: int, *, columns: bool) -> None:
    """Gives a projection the class that fits its weights into a dense host.

    Args:
        owner: a Linear (or what is called like one) whose weights are compact already.
        channels: for every channel left, in stored order, its number in the dense projection.
        width: channels of the dense projection.
        columns: whether channels are what the projection reads (O), not what it writes.
    """
    device = next((p.device for p in owner.parameters(recurse=False)), None)
    if columns:
        index = list(channels)
    else:
        index = [len(channels)] * width
        for place, channel in enumerate(channels):
            index[channel] = place
    with torch.inference_mode(False):
        where = torch.device("cpu") if device is None or device.type == "meta" else device
        buffer = torch.tensor(index, dtype=torch.long, device=where)
    # new containers, so that whoever kept the old ones can put them back
    owner.__dict__["_buffers"] = {**owner._buffers, "attnprune_index": buffer}
    owner.__dict__["_non_persistent_buffers_set"] = {*owner._non_persistent_buffers_set, "attnprune_index"}
    owner.__dict__.update(attnprune_channels=tuple(channels), attnprune_width=width)
    object.__setattr__(
        owner, "__class__", decoupled_class(ExpandedColumns if columns else ExpandedRows, host_class(owner))
    )
