"""The best fit of what stays, multiplied with its basis into Q, K, V and O: :func:`with_maps`.

Least squares with a ridge, in float64 on the CPU; the result is a :class:`attnprune.values.channel_maps.ChannelMaps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from ..values.channel_maps import ChannelMaps
from ..values.layer_plan import LayerPlan
from .bases import Basis, HeadBases
from .elimination import REFIT_RIDGE
from .moments import LayerMoments


def with_maps(
    layer: LayerPlan, bases: HeadBases, moments: LayerMoments, refit: bool, dtype: torch.dtype = torch.float64
) -> LayerPlan:
    """A layer's plan with the maps that it needs: kept directions, refits, and the mean of what goes in O's bias.

    Heads that lose no channel of a kind keep their channels of that kind as they stand.

    Args:
        layer: what goes, in the coordinates of these bases.
        bases: the basis of every head.
        moments: of queries, keys and contexts.
        refit: whether what stays is also fitted to what went.
        dtype: of the maps, float32 or float64.
    """
    spec = layer.spec
    q, k, v, own = {}, [], {}, {}
    queries, keys = spec.layout.over_groups(moments.queries(), "q"), moments.keys()
    for key in layer.kept_keys:
        first, second = _cut(bases.by_kind["qk"][key], layer.kept("qk", key))
        if refit and len(first) < len(first.T):
            if "qk" not in bases.fixed:
                first, second = refit_product(torch.stack(queries[key]).sum(0), keys[key], first, second)
            elif moments.relative:
                first = refit_one(keys[key], second, first)
        q[key] = first
        k.append(second)
        v[key], second = _cut(bases.by_kind["vo"][key], layer.kept("vo", key))
        own[key] = second.T
    key_of = [spec.layout.key_of[head] for head in layer.kept_heads]
    values, o = _place(layer, [v[key] for key in key_of], [own[key] for key in key_of])
    centred = spec.bias[3]
    shift = None
    if len(values) < len(o):
        if refit:
            o = refit_output(moments.context(centred), values, o, moments.tokens["vo"])
        if centred:
            mean = torch.cat(moments.context_means())
            shift = mean - o @ (values @ mean)
    maps = ChannelMaps(tuple(q[key] for key in key_of), tuple(k), tuple(v.values()), o.to(dtype), shift)
    return replace(layer, fold=maps)


def _cut(basis: Basis, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The maps of the directions that stay; the channels as they stand where all do."""
    if len(kept) == len(basis.first):
        eye = torch.eye(len(kept), device="cpu", dtype=torch.float64)
        return eye, eye
    return basis.first[list(kept)], basis.second[list(kept)]


def _place(layer: LayerPlan, v: Sequence[Tensor], own: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The maps of V ``(kept, all)`` and O ``(all, kept)`` over all query heads, the latter with those that go whole."""
    width, kept = (spec.layout.channels("o") for spec in (layer.spec, layer.after))
    values, o = (torch.zeros(shape, device="cpu", dtype=torch.float64) for shape in ((kept, width), (width, kept)))
    starts = list(accumulate(layer.spec.layout.sizes("o"), initial=0))
    row = 0
    for head, first, second in zip(layer.kept_heads, v, own, strict=True):
        rows, columns = slice(row, row + len(first)), slice(starts[head], starts[head + 1])
        values[rows, columns], o[columns, rows] = first, second
        row += len(first)
    return values, o


def refit_product(left: Tensor, right: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Maps of Q and K, one of them refitted so that the product loses least; least squares with a ridge.

    Given the kept channels of K, ``k' = B k``, the best Q is ``(B R B^T)^-1 B R q``, and likewise with the roles
    changed; the better of the two is taken. Does nothing to directions of :func:`best_basis`, which do not correlate.

    Args:
        left: ``(dim, dim)``: mean outer products of queries.
        right: ``(dim, dim)``: covariance of keys.
        first: ``(kept, dim)``: the map of Q.
        second: ``(kept, dim)``: the map of K.
    """

    def lost(first: Tensor, second: Tensor) -> float:
        rest = torch.eye(len(left), device=left.device, dtype=left.dtype) - first.T @ second
        return float(((left @ rest) * (rest @ right)).sum())

    choices = [(first, second), (refit_one(right, second, first), second), (first, refit_one(left, first, second))]
    return min(choices, key=lambda maps: lost(*maps))


def refit_one(covariance: Tensor, kept: Tensor, towards: Tensor) -> Tensor:
    """``(kept, dim)``: the map of Q with which its product with the kept channels of K loses least, or the other way
    round: ``(B R B^T)^-1 B R``, with a ridge towards the map given.

    Of a rotary embedding, R is the covariance of keys as queries see them: channels that turn slowly are like one
    another there, and Q, which is mixed before it is rotated, may take those that stay for those that went.
    """
    gram = kept @ covariance @ kept.T
    ridge = REFIT_RIDGE * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    if not float(ridge[0, 0]) > 0:
        return towards
    solved: Tensor = torch.linalg.solve(gram + ridge, kept @ covariance + ridge @ towards)
    return solved


def refit_output(covariance: Tensor, values: Tensor, o: Tensor, tokens: float) -> Tensor:
    """The map of O that fits the dense context best from the kept one: ridge regression towards the map given.

    ``min_B E|c - B A c|^2 + ridge |B - B_0|^2``: as O itself is linear, the best fit of the context is the best fit of
    the attention's output, across heads.

    Args:
        covariance: ``(all, all)`` of the context.
        values: ``(kept, all)``: A, the map of V.
        o: ``(all, kept)``: B_0.
        tokens: how many contexts the covariance is of; with few, the ridge is stronger.
    """
    gram = values @ covariance @ values.T
    level = float(gram.diagonal().mean())
    if not level > 0:
        return o
    ridge = level * (REFIT_RIDGE + len(covariance) / max(tokens, 1.0))
    lifted = gram + ridge * torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    solved: Tensor = torch.linalg.solve(lifted, values @ covariance + ridge * o.T)
    return solved.T
