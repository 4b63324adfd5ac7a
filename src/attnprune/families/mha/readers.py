"""Code that reads the packed weight of an ``nn.MultiheadAttention`` instead of calling the module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..code import names_in_forward
from ..linears import is_tuner

WEIGHTS = ("in_proj_weight", "q_proj_weight")
_FUSED = "_transformer_encoder_layer_fwd"  # torch's own encoder layer, and copies of it, step aside for pruned modules


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
        names = names_in_forward(kind)
        if _FUSED not in names and not names.isdisjoint(WEIGHTS):
            for below in _meant(module, names):
                whole = f"{name}.{below}" if name else below
                found[whole] = f"{type(module).__name__}.forward reads its packed weight instead of calling it"
    return found


def _meant(module: nn.Module, names: frozenset[str]) -> Iterator[str]:
    for name, part in module.named_modules():
        steps = [step for step in name.split(".") if not step.isdigit()]
        if isinstance(part, nn.MultiheadAttention) and name and names.issuperset(steps):
            yield name
