"""Projections that leave features of their hosts out: Q, K and V read the others, O writes the others.

What O does not write is its bias there, or zero. A host that runs a forward of ours, or expanded, may have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .decoupled import Decoupled, decoupled_class, host_class


class Selected(Decoupled):
    """A projection that reads, or writes, some of the features that there are."""

    attnprune_features: tuple[int, ...] | None = None
    """What it reads or writes, ascending; None: all."""
    attnprune_total: int = 0
    """How many features there are, where it leaves some out."""
    attnprune_taken: Tensor
    """The same as :attr:`attnprune_features`."""

    def indices(self) -> dict[str, Sequence[int]]:
        """Where features lie among all, by the name of a buffer; moves along, and no file holds it."""
        return {} if self.attnprune_features is None else {"attnprune_taken": self.attnprune_features}

    def index(self) -> None:
        """Makes the buffers (anew: loaders of others fill buffers that no file holds with anything)."""
        device = next((p.device for p in self.parameters(recurse=False)), torch.device("cpu"))
        where = torch.device("cpu") if device.type == "meta" else device
        with torch.inference_mode(False):
            found = {name: torch.tensor(one, dtype=torch.long, device=where) for name, one in self.indices().items()}
        # new containers, so that whoever kept the old ones can put them back
        self.__dict__["_buffers"] = {**self._buffers, **found}
        self.__dict__["_non_persistent_buffers_set"] = {*self._non_persistent_buffers_set, *found}

    def laid_out(self) -> dict[str, Any]:
        """Which features it reads or writes."""
        if self.attnprune_features is None:
            return {}
        return {"features": self.attnprune_features, "of": self.attnprune_total}

    def extra_repr(self) -> str:
        """The host's own, and how many features there are."""
        own, kept = super().extra_repr(), self.attnprune_features
        return own if kept is None else f"{own}, {len(kept)} of {self.attnprune_total} features"


class SelectedInputs(Selected):
    """Q, K, V, or several of them in one: reads some of ``(..., features)``."""

    def selected(self, x: Tensor) -> Tensor:
        """``(..., features that it reads)``."""
        return x if self.attnprune_features is None else x.index_select(-1, self.attnprune_taken)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As in the host class: ``(..., features)`` to ``(..., channels)``."""
        out: Tensor = super().forward(self.selected(x), *args, **kwargs)
        return out

    @staticmethod
    def listen(module: nn.Module, one: Any) -> list[RemovableHandle]:
        """Makes another module of the compact shape, in the place of ``one``, take what that does."""
        if one.attnprune_features is None:
            return []
        return [
            module.register_forward_pre_hook(
                lambda _, given: (given[0].index_select(-1, one.attnprune_taken), *given[1:])
            )
        ]


class SelectedOutputs(Selected):
    """O: writes some of ``(..., features)``; the others are its bias, or zero."""

    def written(self, x: Tensor) -> Tensor:
        """``(..., features)`` from ``(..., channels)``."""
        if self.attnprune_features is None:
            whole: Tensor = super().forward(x)
            return whole
        weight: Any = self.weight
        return complete(x @ weight if "nf" in self.__dict__ else F.linear(x, weight), self)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As in the host class: ``(..., channels)`` to ``(..., features)``."""
        return self.written(x)

    @staticmethod
    def listen(module: nn.Module, one: Any) -> list[RemovableHandle]:
        """Makes another module of the compact shape, in the place of ``one`` and without its bias, hand on what that
        does."""
        if one.attnprune_features is None:
            return []
        return [module.register_forward_hook(lambda _, __, compact: complete(compact, one))]


def complete(compact: Tensor, one: Any) -> Tensor:
    """What O hands on, made of the features that it writes without its bias."""
    bias = one._parameters["bias"]
    if bias is None:
        return spread(compact, one.attnprune_taken, one.attnprune_total)
    bias = bias.to(compact.dtype)
    taken: Tensor = one.attnprune_taken
    out: Tensor = bias.expand(*compact.shape[:-1], one.attnprune_total).index_copy(
        -1, taken, compact + bias.index_select(0, taken)
    )
    return out


def spread(compact: Tensor, index: Tensor, width: int) -> Tensor:
    """``(..., width)`` from ``(..., compact)``: each in its place, zero elsewhere."""
    return compact.new_zeros(*compact.shape[:-1], width).index_copy(-1, index, compact)


def select(owner: nn.Module, features: Sequence[int], total: int, *, outputs: bool) -> None:
    """Gives a projection the class that reads, or writes, these features alone; only assigns.

    Args:
        owner: a Linear (or what is called like one) whose weight has these features alone already; may be expanded.
        features: what it reads or writes, ascending.
        total: how many features there are.
        outputs: whether it is O, whose features are what it writes.
    """
    owner.__dict__.update(attnprune_features=tuple(features), attnprune_total=total)
    if not isinstance(owner, Selected):
        kind: type[Selected] = SelectedOutputs if outputs else SelectedInputs
        object.__setattr__(owner, "__class__", decoupled_class(kind, host_class(owner)))
    assert isinstance(owner, Selected)
    owner.index()


def features_of(owner: object) -> tuple[int, tuple[int, ...]] | None:
    """How many features there are for a projection, and which of them it leaves out; None if it takes all."""
    if not isinstance(owner, Selected) or owner.attnprune_features is None:
        return None
    kept = set(owner.attnprune_features)
    return owner.attnprune_total, tuple(one for one in range(owner.attnprune_total) if one not in kept)
