"""Norms between a projection and the product, over the channels that are left: means stay those of the dense model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..values.layout import HeadLayout, Projection
from .kept import kept

EPS = ("variance_epsilon", "eps", "epsilon", "norm_eps")


def normed(x: Tensor, norm: nn.Module, layout: HeadLayout, side: Projection, numbers: Numbers) -> Tensor:
    """What an RMS norm of the dense model makes of channels, those that went being zero.

    A mean square over all channels of a head, or of all heads, counts them all, so it is the sum of what is left over
    the dense number of channels. The norm's weight, in whatever form the host applies it, is what the host's own module
    makes of ones. In float64, where results are compared, the host's module norms the dense channels themselves, as it
    may round to float32.

    Args:
        x: ``(batch, tokens, channels of Q or K)``, in stored order.
        norm: the host's norm, of a dense head's channels or of those of all dense heads.
        layout: where heads lie.
        side: ``"q"`` or ``"k"``.
        numbers: the dense numbers of channels, and of heads.
    """
    per_key, heads, dense = numbers
    eps = next((float(getattr(norm, name)) for name in EPS if getattr(norm, name, None) is not None), 0.0)
    weight = getattr(norm, "weight", None)
    width = dense if weight is None else len(weight)
    if x.dtype == torch.float64:
        return _densely(x, norm, layout, side, numbers, width)
    ones = torch.ones(width, device=x.device, dtype=x.dtype)
    gain: Tensor = norm(ones) * (1 + eps) ** 0.5
    index = _index(layout, side, per_key, heads if width > dense else None, dense, x.device)
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    if width > dense:
        size = exact.square().sum(-1, keepdim=True)
    elif layout.uniform:
        apart = exact.view(*exact.shape[:-1], -1, layout.qk[0])
        size = apart.square().sum(-1, keepdim=True).expand_as(apart).flatten(-2)
    else:
        spread = _heads(layout, side, x.device)
        sums = torch.zeros(*x.shape[:-1], len(layout.sizes(side)), device=x.device, dtype=exact.dtype)
        size = sums.index_add(-1, spread, exact.square()).index_select(-1, spread)
    scaled = (exact * torch.rsqrt(size / width + eps)).to(x.dtype)
    return scaled * gain.index_select(0, index)


def _densely(x: Tensor, norm: nn.Module, layout: HeadLayout, side: Projection, numbers: Numbers, width: int) -> Tensor:
    per_key, heads, dense = numbers
    index = _index(layout, side, per_key, heads if width > dense else None, dense, x.device)
    if width <= dense:
        index = index + _heads(layout, side, x.device) * dense
    whole = x.new_zeros(*x.shape[:-1], max(width, len(layout.sizes(side)) * dense)).index_copy(-1, index, x)
    out: Tensor = norm(whole.view(*x.shape[:-1], -1, width)).flatten(-2)
    return out.index_select(-1, index)


Numbers = tuple[tuple[tuple[int, ...], ...], tuple[int, ...], int]
"""Per key head the dense numbers of its channels; per head of the projection its own dense number; channels of a dense
head."""


@kept
def _index(
    layout: HeadLayout,
    side: Projection,
    numbers: tuple[tuple[int, ...], ...],
    heads: tuple[int, ...] | None,
    dense: int,
    device: torch.device,
) -> Tensor:
    """For every stored channel its place in the norm's weight."""
    found: list[int] = []
    for head in layout.stored(side):
        key = head if side == "k" else layout.key_of[head]
        start = 0 if heads is None else heads[head] * dense
        found += [start + number for number in numbers[key]]
    return torch.tensor(found, device=device)


@kept
def _heads(layout: HeadLayout, side: Projection, device: torch.device) -> Tensor:
    """For every stored channel the stored place of its head."""
    stored = layout.stored(side)
    return torch.tensor(
        [place for place, head in enumerate(stored) for _ in range(layout.sizes(side)[head])], device=device
    )
