"""Blocks around attention: what else stands beside it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from ..families.base import AttentionView
from ..families.registry import all_views


@dataclass(frozen=True)
class Block:
    """A module with attention and the Linears beside it (an MLP, usually), by name."""

    name: str
    """The block's fully qualified name; empty for the model itself."""
    attention: tuple[str, ...]
    """The modules that hold Q, K, V and O; a packed attention holds its own."""
    linears: tuple[str, ...]
    """Every other Linear of the block."""


def find_blocks(model: nn.Module, views: Sequence[AttentionView] | None = None) -> tuple[Block, ...]:
    """For every attention the smallest module around it that runs and has a Linear besides, in model order.

    Attention modules in one such module (self- and cross-attention) share it. Where the only one is the whole model,
    and the attention is not its own child, the attention stands alone.

    >>> [block.linears for block in find_blocks(nn.TransformerEncoderLayer(32, 4))]
    [('linear1', 'linear2')]
    """
    every = all_views(model)
    views = every if views is None else views
    inside = {id(module) for view in every for top in view.modules for module in top.modules()}
    names = {module: name for name, module in model.named_modules()}
    others = [name for name, module in model.named_modules() if is_linear(module) and id(module) not in inside]
    lists = {name for name, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.ModuleDict))}
    found: dict[str, tuple[list[str], list[str]]] = {}
    for view in views:
        name, near = _around(view.name, others, lists)
        attention, _ = found.setdefault(name, ([], near))
        owners = dict.fromkeys(names[slot.owner] for slot in view.slots.values())
        attention += [owner for owner in owners if owner not in attention]
    return tuple(Block(name, tuple(attention), tuple(linears)) for name, (attention, linears) in found.items())


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a Linear, or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def _around(name: str, others: Sequence[str], lists: Collection[str]) -> tuple[str, list[str]]:
    """The name of the block of an attention, and the Linears in it; a list of modules is none, as nobody calls it."""
    top = name
    while "." in top:
        top = top.rpartition(".")[0]
        near = [other for other in others if other.startswith(f"{top}.")]
        if near and top not in lists:
            return top, near
    return ("", list(others)) if name and "." not in name and others else (name, [])
