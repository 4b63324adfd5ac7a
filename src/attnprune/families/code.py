"""What the forward of a class names: hints of what a call may do, where nothing can be run."""

from __future__ import annotations

from functools import lru_cache
from inspect import unwrap
from types import CodeType, FunctionType
from typing import Any

_DEPTH = 3


@lru_cache(maxsize=4096)
def names_in_forward(kind: Any, functions: bool = True) -> frozenset[str]:
    """Names in the code of a class's forward, and in what that calls; none of torch's own code.

    Args:
        kind: a class of modules.
        functions: whether functions of the class's file count, besides its methods.

    >>> from torch import nn
    >>> class Mine(nn.Module):
    ...     heads = 4
    ...     def forward(self, x):
    ...         return self.widened(x)
    ...     def widened(self, x):
    ...         return x.repeat(self.heads)
    >>> sorted(names_in_forward(Mine))
    ['heads', 'repeat', 'widened']
    """
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
        found |= names
        if depth < _DEPTH:
            outside = function.__globals__ if functions else {}
            pending += [(getattr(kind, name, outside.get(name)), depth + 1) for name in names]
    return frozenset(found)


def _of_code(code: CodeType) -> set[str]:
    inner = [one for one in code.co_consts if isinstance(one, CodeType)]
    return set(code.co_names).union(*(_of_code(one) for one in inner))
