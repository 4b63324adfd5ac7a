"""A copy of a host with random weights, to run without touching the host: :class:`StandIn`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.nested import tensors_in
from ..base import AttentionView
from ..slots import Slot

_PLAIN = (bool, int, float, str, type(None))
_OWN = frozenset(nn.Module().__dict__)
"""Attributes of every module."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Told(int):
    """A layer's number that tells when something is computed from it.

    A number that only names a place in a cache leaves every layer the same function.
    """

    used: bool = False
    __hash__ = int.__hash__


def _telling(name: str) -> Any:
    plain = getattr(int, name)

    def computed(self: Told, *args: Any) -> Any:
        # dictionaries of caches compare numbers of this kind with one another, which computes nothing
        self.used = self.used or not (name in ("__eq__", "__ne__") and type(args[0]) is Told)
        return plain(self, *args)

    return computed


for _name in (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod", "pow",
    "rpow", "lt", "le", "gt", "ge", "eq", "ne", "bool", "neg", "and", "or", "divmod", "float",
):  # fmt: skip
    setattr(Told, f"__{_name}__", _telling(f"__{_name}__"))


class StandIn:
    """A copy of a view's host in evaluation mode on the CPU, with random weights.

    Args:
        view: the attention.
        dtype: of its floating-point parameters and buffers.
        small: whether widths that do not matter are cut (:meth:`attnprune.Adapter.small`).
    """

    fresh: dict[int, nn.Parameter]
    """Parameters that took the place of others."""

    def __init__(self, view: AttentionView, dtype: torch.dtype, small: bool) -> None:
        host = view.module if view.host is None else view.host
        generator = torch.Generator("cpu").manual_seed(0)
        spec, shapes, attributes = view.adapter.small(view) if small else (view.spec, {}, {})
        memo: dict[int, Any] = {id(view.adapter): view.adapter}
        for module in host.modules():
            for parameter in module._parameters.values():
                if parameter is not None and id(parameter) not in memo:
                    shape = shapes.get(id(parameter), parameter.shape)
                    memo[id(parameter)] = _random(parameter, shape, dtype, generator)
            for key, value in module.__dict__.items():
                if key not in _OWN:  # a cache of the host's
                    memo.update((id(tensor), tensor.detach().clone()) for tensor in tensors_in(value))
                if not isinstance(value, (Tensor, nn.Module, dict, list, tuple, set, *_PLAIN)):
                    memo.setdefault(id(value), copy.copy(value) if key == "config" else value)
        self.host: nn.Module = copy.deepcopy(host, memo)
        for original, module in zip(host.modules(), self.host.modules(), strict=True):
            for key in _HOOKS:
                module.__dict__[key] = type(module.__dict__[key])()
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = _buffer(buffer, dtype, generator)
            if type(module.__dict__.get("layer_idx")) is int:
                module.__dict__["layer_idx"] = Told(module.__dict__["layer_idx"])
            module.__dict__.update(attributes.get(id(original), {}))
        self.host.requires_grad_(True).eval()
        slots: dict[str, Slot] = {}
        for name, slot in view.slots.items():
            size, before = (one.layout.channels(view.side(name)) for one in (spec, view.spec))
            size, start = slot.size * size // before, slot.start * size // before
            slots[name] = replace(slot, owner=memo[id(slot.owner)], size=size, start=start)
        orders = {order: _owned(found, memo) for order, found in view.orders.items()}
        self.view = AttentionView(
            spec, memo[id(view.module)], view.adapter, slots, view.kinds, self.host, orders=orders
        )  # fmt: skip

    def copy(self) -> StandIn:
        """Another one with the very same parameters and buffers, whose modules may be changed."""
        memo: dict[int, Any] = {id(self.view.adapter): self.view.adapter}
        for module in self.host.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                memo[id(tensor)] = tensor
            for value in module.__dict__.values():
                if not isinstance(value, (Tensor, nn.Module, dict, list, tuple, set, *_PLAIN)):
                    memo[id(value)] = value
                for tensor in tensors_in(value):
                    memo[id(tensor)] = tensor
        new = object.__new__(StandIn)
        new.fresh = {}
        new.host = copy.deepcopy(self.host, memo)
        view = self.view
        slots = _owned(view.slots, memo)
        new.view = replace(view, module=memo[id(view.module)], slots=slots, host=new.host, orders={})
        return new

    @property
    def tells(self) -> bool:
        """Whether something was computed from the layer's number."""
        return any(getattr(module.__dict__.get("layer_idx"), "used", False) for module in self.host.modules())


def _owned(slots: Mapping[str, Slot], memo: Mapping[int, Any]) -> dict[str, Slot]:
    """The slots of a copy."""
    return {name: replace(slot, owner=memo[id(slot.owner)]) for name, slot in slots.items()}


def _random(like: nn.Parameter, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> nn.Parameter:
    """Random values of a size that lets logits be neither all alike nor one much above the others.

    A long run is repeated, not drawn on, as drawing takes most of the time of a wide layer's proof.
    """
    if not like.is_floating_point():
        return nn.Parameter(torch.ones(shape, dtype=like.dtype, device="cpu"), requires_grad=False)
    count = shape.numel()
    size = 1.2 * shape[-1] ** -0.5 if len(shape) > 1 else 0.7
    run = torch.randn(min(count, 99_991), generator=generator, dtype=dtype, device="cpu") * size
    return nn.Parameter(run.repeat(-(-count // max(len(run), 1)))[:count].view(shape))


def _unknown(buffer: Tensor) -> Tensor:
    """In place of values that nobody knows, those that hide least of what a host does.

    A mask of zeros would leave nothing to attend to, and tables of zeros no queries: truth values, and real numbers
    for pairs of tokens, are those of a causal mask, other real numbers ones. Whole numbers may be places in a table,
    which all have a place 0.
    """
    pairs = buffer.dim() > 1 and buffer.shape[-1] == buffer.shape[-2] > 1
    if buffer.dtype == torch.bool or (buffer.is_floating_point() and pairs):
        known = torch.ones(buffer.shape, dtype=buffer.dtype, device="cpu")
        return known.tril() if known.dim() > 1 else known
    fill = 1 if buffer.is_floating_point() or buffer.is_complex() else 0
    return torch.full(buffer.shape, fill, dtype=buffer.dtype, device="cpu")


def _buffer(buffer: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A buffer's values, those of real numbers scaled one by one, so that no special value hides what it does; what
    holds zeros and ones, a mask, stays."""
    if buffer.is_meta:
        buffer = _unknown(buffer)
    buffer = buffer.detach().cpu()
    if not buffer.is_floating_point():
        return buffer.clone()
    if bool(buffer.any()) and bool(((buffer == 0) | (buffer == 1)).all()) and not bool(buffer.all()):
        return buffer.to(dtype)
    return buffer.to(dtype) * (torch.rand(buffer.shape, generator=generator, dtype=dtype, device="cpu") * 0.5 + 0.5)
