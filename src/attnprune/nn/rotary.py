"""Rotary embeddings of the channels that are left: every head keeps its own pairs and their frequencies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..values.layout import HeadLayout, Projection
from .kept import kept


class Pairs(NamedTuple):
    """Which channels of a module are rotated, and by which of the dense model's angles."""

    style: str
    """``"half"`` or ``"interleaved"``."""
    width: int
    """Channels of a dense head that are rotated."""
    turned: tuple[int, ...]
    """Per key head, how many of the channels left are rotated: the first ones."""
    numbers: tuple[tuple[int, ...], ...]
    """Per key head, the dense numbers of its channels."""
    by_pair: bool = False
    """Whether the tables have an angle for each pair, not for each channel, in their first half."""


class Turning(NamedTuple):
    """How the queries and keys of one call are rotated."""

    cos: Tensor
    """``(batch or 1, tokens, width)``."""
    sin: Tensor
    """The same."""
    pairs: Pairs


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, layout: HeadLayout, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Queries and keys, rotated.

    Args:
        q: ``(batch, tokens, channels of Q)``, in stored order.
        k: ``(batch, tokens, channels of K)``.
        cos: ``(batch or 1, tokens, width)``, the dense model's tables; likewise ``sin``.
        layout: where heads lie.
        pairs: what is rotated.

    Raises:
        RuntimeError: tables of another width than those of the model that was pruned.
    """
    if cos.shape[-1] != pairs.width:
        raise RuntimeError(
            f"The rotary tables have {cos.shape[-1]} channels, but the pruned model's have {pairs.width}."
        )
    uniform = layout.uniform and len(set(pairs.turned)) == 1
    if not (uniform and pairs.turned[0] == layout.qk[0]):
        cos, sin = F.pad(cos, (0, 1), value=1.0), F.pad(sin, (0, 1))  # the last angle is that of what is not rotated
    if uniform:
        return _uniform(q, k, cos, sin, layout, pairs)
    return _by_channel(q, "q", cos, sin, layout, pairs), _by_channel(k, "k", cos, sin, layout, pairs)


def of_all(cos: Tensor, sin: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Tables for all tokens, where those given may be of the last ones alone (DINOv3): the others are not rotated."""
    first = max(0, tokens - cos.shape[-2])
    return F.pad(cos, (0, 0, first, 0), value=1.0), F.pad(sin, (0, 0, first, 0))


def rotated_keys(k: Tensor, cos: Tensor, sin: Tensor, layout: HeadLayout, pairs: Pairs) -> Tensor:
    """Keys alone, rotated; arguments as for :func:`rotated`."""
    return _by_channel(k, "k", F.pad(cos, (0, 1), value=1.0), F.pad(sin, (0, 1)), layout, pairs)


def _by_channel(x: Tensor, side: Projection, cos: Tensor, sin: Tensor, layout: HeadLayout, pairs: Pairs) -> Tensor:
    """Queries or keys of heads of any dims, rotated by tables with an angle for what is not rotated at their end."""
    angles, partners, signs = _flat(pairs, layout, side, x.device)
    turned = x.index_select(-1, partners) * signs.to(x.dtype)
    return x * cos.index_select(-1, angles) + turned * sin.index_select(-1, angles)


def _uniform(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, layout: HeadLayout, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Heads of equal dims: tables of every key head serve all its query heads, or one table all heads."""
    keys, dim, turned = len(layout.qk), layout.qk[0], pairs.turned[0]
    angles = _angles(pairs, layout.key_order, q.device)
    cos, sin = (x.index_select(-1, angles).view(*x.shape[:-1], -1, 1, dim) for x in (cos, sin))
    if cos.shape[2] > 1 and len(set(layout.groups)) > 1:
        share = _shares(layout, q.device)
        both = (cos.index_select(2, share), sin.index_select(2, share))
        queries = q.view(*q.shape[:-1], layout.heads, 1, dim)
    else:
        both = (cos, sin)
        shape = (keys, -1, dim) if len(set(layout.groups)) == 1 else (1, -1, dim)
        queries = q.view(*q.shape[:-1], *shape)
    k = k.view(*k.shape[:-1], keys, 1, dim)
    out = queries * both[0] + _partner(queries, pairs.style, turned) * both[1]
    return out.flatten(2), (k * cos + _partner(k, pairs.style, turned) * sin).flatten(2)


def _partner(x: Tensor, style: str, turned: int) -> Tensor:
    """The other channel of each pair, the first one's sign turned; what is not rotated comes after, any."""
    if style == "half":
        half = turned // 2
        parts = [-x[..., half:turned], x[..., :half]]
        return torch.cat([*parts, x[..., turned:]] if turned < x.shape[-1] else parts, -1)
    pairs = x[..., :turned]
    swapped = torch.stack([-pairs[..., 1::2], pairs[..., ::2]], -1).flatten(-2)
    return torch.cat([swapped, x[..., turned:]], -1) if turned < x.shape[-1] else swapped


@kept
def _angles(pairs: Pairs, order: tuple[int, ...], device: torch.device) -> Tensor:
    """Per stored key head the places of its channels in the tables; of one where all are the same."""
    rows = [_places(pairs, key) for key in order]
    rows = rows[:1] if all(row == rows[0] for row in rows) else rows
    return torch.tensor([place for row in rows for place in row], device=device)


@kept
def _shares(layout: HeadLayout, device: torch.device) -> Tensor:
    """For every stored query head, the stored place of its key head."""
    return torch.tensor([layout.key_order.index(layout.key_of[head]) for head in layout.order], device=device)


def _places(pairs: Pairs, key: int) -> list[int]:
    turned, by = pairs.turned[key], 2 if pairs.by_pair else 1
    return [number // by if place < turned else pairs.width for place, number in enumerate(pairs.numbers[key])]


@kept
def _flat(pairs: Pairs, layout: HeadLayout, side: Projection, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For every stored channel its place in the tables, its partner, and the partner's sign."""
    angles: list[int] = []
    partners: list[int] = []
    signs: list[float] = []
    for head in layout.stored(side):
        key = head if side == "k" else layout.key_of[head]
        start, turned = layout.span(side, head)[0], pairs.turned[key]
        angles += _places(pairs, key)
        for channel in range(layout.qk[key]):
            other, sign = _other(pairs.style, turned, channel)
            partners.append(start + other)
            signs.append(sign)
    return (
        torch.tensor(angles, device=device),
        torch.tensor(partners, device=device),
        torch.tensor(signs, device=device),
    )


def _other(style: str, turned: int, channel: int) -> tuple[int, float]:
    """A channel's partner in its head, and its sign."""
    if channel >= turned:
        return channel, 1.0
    if style == "interleaved":
        return channel ^ 1, 1.0 if channel % 2 else -1.0
    half = turned // 2
    return (channel + half, -1.0) if channel < half else (channel - half, 1.0)


def pairs_of(style: str, width: int, turned: Sequence[int], numbers: Sequence[Sequence[int]]) -> Pairs:
    """As hashable values."""
    return Pairs(style, width, tuple(turned), tuple(map(tuple, numbers)))
