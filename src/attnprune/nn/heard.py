"""Projections whose weights a host reads, called instead: :class:`Calls`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from .expanded import Read


class Calls(TorchFunctionMode):
    """Calls the projection whose weight is handed to ``F.linear``.

    Args:
        owners: by the id of a weight, the projection that has it.
        stack: undoes what is set meanwhile.
    """

    def __init__(self, owners: Mapping[int, nn.Module], stack: ExitStack) -> None:
        super().__init__()
        self.owners = owners
        self.inside: set[nn.Module] = set()
        self.heard: set[nn.Module] = set()
        for owner in dict.fromkeys(owners.values()):
            stack.callback(owner.register_forward_pre_hook(lambda module, _: self._enter(module)).remove)
            stack.callback(owner.register_forward_hook(lambda module, *_: self.inside.discard(module)).remove)
            owner.__dict__["attnprune_heard"] = True
            stack.callback(owner.__dict__.pop, "attnprune_heard")

    def _enter(self, module: nn.Module) -> None:
        self.inside.add(module)
        self.heard.add(module)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) if func is F.linear else {}
        given |= kwargs or {}
        weight = given.get("weight")
        owner = self.owners.get(id(weight), getattr(weight, "attnprune_owner", None)) if func is F.linear else None
        if owner is None or owner in self.inside:
            return func(*args, **(kwargs or {}))
        # what the host adds need not be the projection's own bias
        held: dict[str, Any] = owner.__dict__ if isinstance(owner, Read) else owner._parameters
        key = "attnprune_bias" if isinstance(owner, Read) else "bias"
        own, held[key] = held.get(key), given.get("bias")
        try:
            return owner(given["input"])
        finally:
            held[key] = own
            if isinstance(owner, Read):
                del held[key]
