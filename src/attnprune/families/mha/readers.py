"""Code that reads the packed weight of an ``nn.MultiheadAttention`` instead of calling the module."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from inspect import unwrap
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from ..linears import is_tuner

WEIGHTS = ("in_proj_weight", "q_proj_weight")
_FUSED = "_transformer_encoder_layer_fwd"  # torch's own encoder layer, and copies of it, step aside for pruned modules
_DEPTH = 3


def read_by_hand(model: nn.Module) -> dict[str, str]:
    """Of every ``nn.MultiheadAttention`` whose weights another module's forward reads, by name, which one does.

    >>> class Mine(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.attention = nn.MultiheadAttention(8, 2)
    ...     def forward(self, x):
    ...         return x @ self.attention.in_proj_weight.T
    >>> read_by_hand(Mine())
    {'attention': 'Mine.forward reads its packed weight instead of calling it'}
    """
    found = {}
    for name, module in model.named_modules():
        kind: Any = type(module)
        if isinstance(module, nn.MultiheadAttention) or is_tuner(module):  # which is refused by its own name
            continue
        names = _names(kind)
        if not names.isdisjoint(WEIGHTS):
            for below in _meant(module, names):
                whole = f"{name}.{below}" if name else below
                found[whole] = f"{type(module).__name__}.forward reads its packed weight instead of calling it"
    return found


def _meant(module: nn.Module, names: frozenset[str]) -> Iterator[str]:
    for name, part in module.named_modules():
        steps = [step for step in name.split(".") if not step.isdigit()]
        if isinstance(part, nn.MultiheadAttention) and name and names.issuperset(steps):
            yield name


@lru_cache(maxsize=1024)
def _names(kind: Any) -> frozenset[str]:
    """Names in the code of a class's forward, and in what that calls; none of torch's own classes."""
    found: set[str] = set()
    pending: list[tuple[Any, int]] = [(kind.forward, 0)]
    seen: set[int] = set()
    while pending:
        function, depth = pending.pop()
        function = unwrap(function) if callable(function) else function
        if not isinstance(function, FunctionType) or id(function) in seen:
            continue
        if (function.__module__ or "").partition(".")[0] == "torch":
            continue
        seen.add(id(function))
        names = _of_code(function.__code__)
        if _FUSED in names:
            return frozenset()
        found |= names
        if depth < _DEPTH:
            pending += [(getattr(kind, name, function.__globals__.get(name)), depth + 1) for name in names]
    return frozenset(found)


def _of_code(code: CodeType) -> set[str]:
    inner = [one for one in code.co_consts if isinstance(one, CodeType)]
    return set(code.co_names).union(*(_of_code(one) for one in inner))
