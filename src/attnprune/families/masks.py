"""Masks with a row for every head that a model makes outside of its attention: for how many heads it may make some."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from ..nn.attempt import MACHINE
from .code import names_in_forward
from .looks import looks

_TABLES = ("bias_table", "relative", "position_bias", "rel_pos", "rpb", "slopes", "alibi")
"""What tables of biases are called, in part; they may be kept outside of the attention that they are for."""


def heads_of_masks(model: nn.Module, attention: Collection[nn.Module]) -> set[int]:
    """Numbers of heads for which a model may hand masks to its attention.

    It may where a table of biases has that many columns, and where the forward of a module that is no attention reads
    a number of heads. An attention with so many heads keeps taking such masks when it has lost some.

    Args:
        model: any module.
        attention: those of its modules that are attention by what their family says.
    """
    inside = {part for module in attention for part in module.modules()}
    found = {
        size
        for name, module in model.named_modules()
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and any(word in f"{'.'.join(name.split('.')[-2:])}.{key}" for word in _TABLES)
        for size in tensor.shape
    }
    for module in model.modules():
        if module not in inside and looks(module) and inside.isdisjoint(module.modules()):
            inside.update(module.modules())  # attention that cannot be pruned
        if module not in inside:
            found |= _heads_read(module)
    return found


def _heads_read(module: nn.Module) -> set[int]:
    """What the attributes hold, of a module or its config, that its forward reads and that are called heads."""
    kind: Any = type(module)
    names = [name for name in names_in_forward(kind, functions=False) if name.endswith(("head", "heads"))]
    holders = (module, _attribute(module, "config"))
    values = [_attribute(one, name) for one in holders for name in names]
    return {value for value in values if isinstance(value, int) and not isinstance(value, bool)}


def _attribute(holder: Any, name: str) -> Any:
    """None where there is none, or where it is a property that does not work outside of forward."""
    try:
        return getattr(holder, name, None)
    except MACHINE:
        raise
    except Exception:  # whatever a class of the user's raises
        return None
