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


def in_one_way(views: Sequence[AttentionView]) -> list[AttentionView]:
    """The views, those of tied attention without ways to run that only some of them have.

    One may read what another has cached, and heads that lie otherwise there would be other keys to it.
    """
    groups: dict[str, list[AttentionView]] = {}
    tied = tied_to(views)
    for view in views:
        groups.setdefault(tied.get(view.name, view.name), []).append(view)
    changed: dict[str, AttentionView] = {}
    for group in groups.values():
        verdicts = [view.verdict for view in group]
        known = [one for one in verdicts if one is not None]
        if len(group) == 1 or len(known) < len(group):
            continue
        stock, heads = all(one.stock for one in known), all(one.stock_heads for one in known)
        decoupled = known[0].decoupled if all(one.decoupled is known[0].decoupled for one in known) else None
        why = f"{group[0].name} and {group[-1].name} share projections, and not each can run so"
        for view, verdict in zip(group, known, strict=True):
            lost = {"stock": verdict.stock and not stock, "decoupled": verdict.decoupled is not decoupled}
            reasons = {**verdict.reasons, **{way: why for way, gone in lost.items() if gone}}
            left = replace(verdict, stock=stock, stock_heads=heads, decoupled=decoupled, reasons=reasons)
            if left != verdict and (left.prunable or view.called):
                changed[view.name] = replace(view, verdict=left)
    return [changed.get(view.name, view) for view in views]


def _key(view: AttentionView) -> Hashable:
    slots = [(key, id(slot.parameter), slot.axis, tuple(slot.places)) for key, slot in view.slots.items()]
    return tuple(slots), id(view.owner("o")._parameters.get("bias")), replace(view.spec, name="")
