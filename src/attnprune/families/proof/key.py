"""What makes two hosts the same, so that one proof serves both: :func:`key_of`."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from functools import partial
from logging import Logger
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

_NAMES = ("training", "layer_idx")
"""Attributes of modules that have a place of their own."""
_OF_CONFIGS = (
    "_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "architectures", "dtype", "torch_dtype",
    "id2label", "label2id", "attnprune", "attn_implementation",
)  # fmt: skip
"""Attributes of configs that say where something is from or goes, or what of it was pruned."""
_OWN = frozenset(nn.Module().__dict__) - {"training"}
"""Attributes of every module, which are looked at by themselves."""
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.Size)
_DEEP = 6
"""How many objects inside one another are looked into."""
_LONG = 4096
"""Numbers of a tensor that is an attribute; of longer ones, caches for one, the shape alone counts."""


def key_of(host: nn.Module) -> tuple[Any, ...]:
    """What a host's function depends on beside its weights: classes, their code, what attributes hold, shapes.

    Two hosts with one key compute the same function of inputs and weights. A patched class or instance has another
    key. A layer's number is left out (:class:`.stand_in.Told` finds out whether that is right).
    """
    found: list[Any] = []
    configs: dict[int, Any] = {}  # one serves many modules
    inside = {id(module) for module in host.modules()}
    for name, module in host.named_modules():
        found.append((name, *_code(type(module))))
        attributes = {key: value for key, value in module.__dict__.items() if key not in _OWN and key != "config"}
        found.append(_items(attributes, _NAMES, _DEEP, inside))
        for table, told in ((module._parameters, _size), (module._buffers, _buffer)):
            found.append(tuple((key, None if tensor is None else told(tensor)) for key, tensor in table.items()))
        config = module.__dict__.get("config")
        if config is not None and id(config) not in configs:
            configs[id(config)] = (type(config), _items(getattr(config, "__dict__", {}), _OF_CONFIGS, _DEEP, inside))
        found.append(configs.get(id(config)))
    return tuple(found)


def _code(kind: type) -> Iterator[Any]:
    """A class and the functions that it and its bases hold now."""
    yield kind
    for base in kind.__mro__:
        if base is not nn.Module and base is not object:
            for value in vars(base).values():
                if isinstance(value, (FunctionType, staticmethod, classmethod, property)):
                    yield value


def _items(table: Mapping[Any, Any], besides: Collection[str], depth: int, met: Collection[int]) -> tuple[Any, ...]:
    items = ((repr(key), _content(value, depth, met)) for key, value in table.items() if key not in besides)
    return tuple(sorted(items, key=lambda item: item[0]))


def _content(value: Any, depth: int, met: Collection[int]) -> Any:
    """Something to compare that tells values apart by what they hold, as far as that can be looked at.

    Args:
        value: an attribute, or what one holds.
        depth: how many objects inside are looked into.
        met: ids of objects around it, which are not looked into again.
    """
    kind = type(value)
    if kind in _PLAIN or isinstance(value, (Enum, type, CodeType)):
        return kind, value if isinstance(value, (type, CodeType)) else repr(value)
    if isinstance(value, Tensor):
        return _buffer(value, _LONG)
    if isinstance(value, (ModuleType, Logger)):
        return kind, value.__name__ if isinstance(value, ModuleType) else value.name
    if depth == 0 or id(value) in met:
        return kind
    depth, met = depth - 1, {*met, id(value)}
    if isinstance(value, dict):
        return kind, _items(value, (), depth, met)
    if isinstance(value, (list, tuple)):
        return kind, tuple(_content(one, depth, met) for one in value)
    if isinstance(value, (set, frozenset)):
        return kind, tuple(sorted(repr(_content(one, depth, met)) for one in value))
    if isinstance(value, partial):
        return kind, *(_content(one, depth, met) for one in (value.func, value.args, value.keywords))
    if isinstance(value, MethodType):
        return kind, _content(value.__func__, depth, met), _content(value.__self__, depth, met)
    if isinstance(value, FunctionType):
        cells = [_content(_held(cell), depth, met) for cell in value.__closure__ or ()]
        defaults = (_content(one, depth, met) for one in (value.__defaults__, value.__kwdefaults__))
        return kind, value.__code__, *cells, *defaults
    if callable(getattr(value, "tobytes", None)):  # arrays
        return kind, hashlib.sha256(value.tobytes()).hexdigest()
    slots = {key for base in kind.__mro__ for key in _names(vars(base).get("__slots__", ()))}
    held = {**getattr(value, "__dict__", {}), **{key: getattr(value, key) for key in slots if hasattr(value, key)}}
    besides = _OWN if isinstance(value, nn.Module) else _OF_CONFIGS if hasattr(kind, "model_type") else ()
    return kind, _items(held, besides, depth, met)


def _names(slots: Any) -> Collection[str]:
    return {slots} if isinstance(slots, str) else {key for key in slots if not key.startswith("__")}


def _held(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing yet
        return None


def _size(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype


def _buffer(tensor: Tensor, most: int = 1) -> Any:
    """Shape and dtype of a tensor, and what it holds where it may decide what a host does: whole numbers and truth
    values, and of real ones at most so many. Values of others are scaled in the proof, so that it holds for any."""
    facts = _size(tensor)
    few = tensor.numel() <= (most if tensor.is_floating_point() or tensor.is_complex() else 256 * _LONG)
    if not few or tensor.layout is not torch.strided or tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter):
        return facts
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        values = tensor.detach().cpu().contiguous().reshape(-1)
        return *facts, hashlib.sha256(values.view(torch.uint8).numpy().tobytes() if len(values) else b"").hexdigest()
