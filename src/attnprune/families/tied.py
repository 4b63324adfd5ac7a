"""Attention modules that share all their parameters, such as those of an encoder and a decoder that are tied."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from .base import AttentionView


def tied_to(views: Sequence[AttentionView]) -> dict[str, str]:
    """By name, each attention that has the very projections of one before it: that one's name.

    What goes from one goes from the other, so they are planned as one and lose the same.

    >>> from torch import nn
    >>> from attnprune.families import find_views
    >>> model = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)])
    >>> for one, other in zip(model[2].modules(), model[0].modules()):
    ...     one._parameters.update(other._parameters)
    >>> tied_to(find_views(model))
    {'2': '0'}
    """
    first: dict[Hashable, str] = {}
    found: dict[str, str] = {}
    for view in views:
        name = first.setdefault(_key(view), view.name)
        if name != view.name:
            found[view.name] = name
    return found


def _key(view: AttentionView) -> Hashable:
    slots = [(key, id(slot.parameter), slot.axis, tuple(slot.places)) for key, slot in view.slots.items()]
    return tuple(slots), id(view.owner("o")._parameters.get("bias")), replace(view.spec, name="")
