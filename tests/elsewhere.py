"""A second device, made up: tensors in ordinary memory that refuse to be mixed with those of the CPU.

What a GPU would refuse, this refuses, so that a machine without one sees it. Inside :func:`elsewhere` tensors come
here by ``device="lazy"`` (a kind of device that PyTorch knows and nobody has); :func:`move` brings a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from attnprune.surgery import check, optimizer_state

DEVICE = torch.device("lazy", 0)
AUTOCAST = torch.autocast
aten = torch.ops.aten
MIX = {aten._to_copy, aten.copy_, aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
"""May take tensors of two devices."""


class There(Tensor):
    """A tensor of the made-up device."""

    __slots__ = ("inner",)  # not among the attributes that a successor takes over

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        made: There = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:
        return f"There({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operation on the tensors inside; raises where a GPU would."""
    flat = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = [x for x in flat if isinstance(x, There)]
    here = [x for x in flat if not isinstance(x, There) and x.dim()]
    if there and here and func.overloadpacket not in MIX:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {DEVICE} and cpu")
    device = kwargs.get("device")
    target = bool(there) if device is None else torch.device(device).type == DEVICE.type
    if func.overloadpacket is aten.copy_:
        target = isinstance(args[0], There)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    found = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
    if func._schema.is_mutable and func.overloadpacket.__name__.endswith("_"):
        return args[0]
    return tree_map(lambda x: There(x) if isinstance(x, Tensor) and target else x, found)


def _inside(x: Any) -> Any:
    return x.inner if isinstance(x, There) else x


class _Modes(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What makes tensors of Python numbers before anything is dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == DEVICE.type:
            return There(func(*args, **{**kwargs, "device": "cpu"}))
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(one) if isinstance(one, list) else one for one in index)
            args = (args[0], index, *args[2:])
        if func is Tensor.data_ptr and isinstance(args[0], There):
            return args[0].inner.data_ptr()
        if func == Tensor.data.__set__ and isinstance(args[0], There):  # type: ignore[attr-defined]
            args[0].inner = args[1].inner
        return func(*args, **kwargs)


@contextmanager
def elsewhere() -> Iterator[None]:
    """Inside it the device is there."""
    kinds = SimpleNamespace(Parameter=There, Linear=nn.Linear, Module=nn.Module)  # other kinds would be refused
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch, "autocast", _autocast))
        for module in (check, optimizer_state):
            stack.enter_context(patch.object(module, "nn", kinds))
        stack.enter_context(_Functions())
        stack.enter_context(_Modes())
        yield


def _autocast(kind: str, *args: Any, **options: Any) -> Any:
    return nullcontext() if kind == DEVICE.type else AUTOCAST(kind, *args, **options)


def move(model: nn.Module) -> nn.Module:
    """The model, its parameters and buffers there; what was shared still is."""
    seen: dict[int, Tensor] = {}
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for name, x in kept.items():
                if x is not None and id(x) not in seen:
                    moved = There(x.detach().clone())
                    is_parameter = isinstance(x, nn.Parameter)
                    seen[id(x)] = nn.Parameter(moved, x.requires_grad) if is_parameter else moved
                if x is not None:
                    kept[name] = seen[id(x)]  # type: ignore[assignment]
    return model
