"""What can be computed instead of trained: the best basis of every head, and the best fit of what stays.

Inside a head only two products matter, ``q k^T`` and ``context W_O``, so a head may be turned into another basis before
channels go. Covariances come from :class:`attnprune.Calibration`; all of this runs in float64 on the CPU, and its
result is folded into Q, K, V and O (:class:`attnprune.values.channel_maps.Fold`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ..families.base import AttentionView
from ..values.channel_maps import Fold
from ..values.layer_plan import LayerPlan
from ..values.layout import KINDS, Kind, Projection
from ..values.spec import AttentionSpec
from .moments import LayerMoments, Moments

RIDGE = 1e-10
"""Of a covariance's mean variance: keeps directions that the data lack apart from nothing."""
REFIT_RIDGE = 1e-3
"""The same for refits, which must also hold for other data."""


class Basis(NamedTuple):
    """A basis of the channels of one kind of one head."""

    first: Tensor
    """``(dim, dim)``: what Q (or V) is multiplied with, the direction with the most energy first."""
    second: Tensor
    """``(dim, dim)``: what K is multiplied with; for vo the transpose of what O is multiplied with."""
    energy: Tensor
    """``(dim,)``: mean square error of the product that a direction's removal alone causes, descending."""


@dataclass(frozen=True)
class Turn:
    """A basis for every head of an attention."""

    spec: AttentionSpec
    bases: Mapping[Kind, tuple[Basis, ...]]
    """Per head."""
    fixed: frozenset[Kind] = frozenset()
    """Kinds whose channels must not be mixed."""

    def layer(self, dtype: torch.dtype = torch.float64) -> LayerPlan:
        """The plan that turns every head and removes nothing; its maps in float32 or float64."""
        qk, vo = (self.bases[kind] for kind in KINDS)
        o: Tensor = torch.block_diag(*(one.second.T for one in vo))  # type: ignore[no-untyped-call]
        q, k, v = ([one[i] for one in bases] for bases, i in ((qk, 0), (qk, 1), (vo, 0)))
        return LayerPlan(self.spec, fold=Fold(tuple(q), tuple(k), tuple(v), o.to(dtype)))


def root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a covariance and the inverse of it, both symmetric; lifted by a little, so that both exist."""
    level = float(matrix.diagonal().mean())
    lift = RIDGE * level if level > 0 else 1.0
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    roots = (values.clamp_min(0) + lift).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def best_basis(left: Tensor, right: Tensor) -> Basis:
    """The basis whose first r directions give the best product of rank r, for every r.

    For random vectors x and y with mean outer products L and R, the SVD ``L^1/2 R^1/2 = U S V^T`` gives
    ``x' = S^1/2 U^T L^-1/2 x`` and ``y' = S^1/2 V^T R^-1/2 y``: at full rank ``x'^T y' = x^T y``, and with the first r
    directions alone the mean square of the difference is ``s_{r+1}^2 + ... + s_d^2``, the least that rank r allows
    (Eckart and Young).

    Args:
        left: ``(dim, dim)``, L: of queries, or the covariance of a head's context.
        right: ``(dim, dim)``, R: of keys, or ``W_O^T W_O`` of the head's columns of O.

    >>> basis = best_basis(torch.eye(2).double(), torch.diag(torch.tensor([1.0, 4.0])).double())
    >>> basis.energy.round(decimals=6)
    tensor([4., 1.], dtype=torch.float64)
    """
    (left_root, left_inverse), (right_root, _) = root(left), root(right)
    u, s, _ = torch.linalg.svd(left_root @ right_root)
    balance = s.clamp_min(torch.finfo(s.dtype).tiny).sqrt()
    first = balance[:, None] * (u.T @ left_inverse)
    # second = S^1/2 V^T R^-1/2 in exact arithmetic; as an inverse it undoes the first whatever rounding did to that
    second = torch.linalg.inv(first).T
    return Basis(first, second, s.square())


def standing(left: Tensor, right: Tensor) -> Basis:
    """The channels as they stand, in their own order; arguments as for :func:`best_basis`."""
    eye = torch.eye(len(left), device="cpu", dtype=torch.float64)
    return Basis(eye, eye, left.diagonal() * right.diagonal())


def output_gram(view: AttentionView) -> list[Tensor]:
    """Per head ``(vo_dim, vo_dim)``: ``W_O^T W_O`` of its columns of O."""
    return [weight @ weight.T for weight in (one.double().cpu() for one in view.heads("o"))]


def turn(view: AttentionView, moments: LayerMoments, rotated: bool = True) -> Turn:
    """The best basis of every head; not rotated, or of kinds that the adapter fixes, the channels as they stand."""
    spec, fixed = view.spec, frozenset(view.fixed)
    centred = spec.bias[3]
    pairs = {
        "qk": zip(moments.queries(), moments.keys(), strict=True),
        "vo": zip(moments.contexts(centred), output_gram(view), strict=True),
    }
    bases: dict[Kind, tuple[Basis, ...]] = {
        kind: _gathered([(best_basis if rotated and kind not in fixed else standing)(*pair) for pair in pairs[kind]])
        for kind in KINDS
    }
    return Turn(spec, bases, fixed)


def _gathered(bases: Sequence[Basis]) -> tuple[Basis, ...]:
    """The same in a block for each part, where heads are alike.

    While gates take their gradients a model keeps hundreds of them; each on its own, they hold on to the room around
    them that computing them took.
    """
    if len({len(one.energy) for one in bases}) > 1:
        return tuple(bases)
    blocks = [torch.stack(part).unbind() for part in zip(*bases, strict=True)]
    return tuple(Basis(*parts) for parts in zip(*blocks, strict=True))


def white_moments(view: AttentionView) -> LayerMoments:
    """What the moments would be if inputs were white noise: all that weights alone can tell.

    Keys lose their bias (a constant), contexts are values.
    """
    spec = view.spec

    def of(kind: Kind, projection: Projection) -> tuple[Moments, ...]:
        found = []
        slot = view.slots.get(f"{projection}.bias")
        weight = view.weight(projection).double().cpu()
        bias = torch.zeros(len(weight), device="cpu").double() if slot is None else slot.cut(slot.values).double().cpu()
        for b in spec.layout.buckets:
            rows = slice(b.qk_start, b.qk_stop) if kind == "qk" else slice(b.vo_start, b.vo_stop)
            each = rearrange(weight[rows], "(h d) e -> h d e", h=len(b.heads))
            mean = rearrange(bias[rows], "(h d) -> h d", h=len(b.heads))
            found.append(Moments.full(1.0, 0 * mean if projection == "k" else mean, each @ each.transpose(1, 2)))
        return tuple(found)

    return LayerMoments(spec, of("qk", "q"), of("qk", "k"), of("vo", "v"))


def with_fold(
    layer: LayerPlan, turn: Turn, moments: LayerMoments, refit: bool, dtype: torch.dtype = torch.float64
) -> LayerPlan:
    """A layer's plan with the maps that it needs: kept directions, refits, and the mean of what goes in O's bias.

    Heads that lose no channel of a kind keep their channels of that kind as they stand.

    Args:
        layer: what goes, in the coordinates of the turn.
        turn: the basis of every head.
        moments: of queries, keys and contexts.
        refit: whether what stays is also fitted to what went.
        dtype: of the maps, float32 or float64.
    """
    spec = layer.spec
    q, k, v, own = [], [], [], []
    queries, keys = moments.queries(), moments.keys()
    for head in layer.kept_heads:
        first, second = _cut(turn.bases["qk"][head], layer.kept("qk", head))
        if refit and len(first) < len(first.T) and "qk" not in turn.fixed:
            first, second = refit_product(queries[head], keys[head], first, second)
        q.append(first)
        k.append(second)
        first, second = _cut(turn.bases["vo"][head], layer.kept("vo", head))
        v.append(first)
        own.append(second.T)
    values, o = _place(layer, v, own)
    centred = spec.bias[3]
    shift = None
    if len(values) < len(o):
        if refit:
            o = refit_output(moments.context(centred), values, o, moments.tokens["vo"])
        if centred:
            mean = torch.cat(moments.context_means())
            shift = mean - o @ (values @ mean)
    return replace(layer, fold=Fold(tuple(q), tuple(k), tuple(v), o.to(dtype), shift))


def _cut(basis: Basis, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The maps of the directions that stay; the channels as they stand where all do."""
    if len(kept) == len(basis.first):
        eye = torch.eye(len(kept), device="cpu", dtype=torch.float64)
        return eye, eye
    return basis.first[list(kept)], basis.second[list(kept)]


def _place(layer: LayerPlan, v: Sequence[Tensor], own: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The maps of V ``(kept, all)`` and O ``(all, kept)`` over all heads, heads that go whole among the latter."""
    width, kept = sum(layer.spec.vo_dims), sum(layer.after.vo_dims)
    values, o = (torch.zeros(shape, device="cpu", dtype=torch.float64) for shape in ((kept, width), (width, kept)))
    starts = [sum(layer.spec.vo_dims[:head]) for head in range(layer.spec.heads)]
    row = 0
    for head, first, second in zip(layer.kept_heads, v, own, strict=True):
        rows, columns = slice(row, row + len(first)), slice(starts[head], starts[head] + layer.spec.vo_dims[head])
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

    def fitted(covariance: Tensor, kept: Tensor, towards: Tensor) -> Tensor:
        gram = kept @ covariance @ kept.T
        ridge = REFIT_RIDGE * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
        if not float(ridge[0, 0]) > 0:
            return towards
        solved: Tensor = torch.linalg.solve(gram + ridge, kept @ covariance + ridge @ towards)
        return solved

    def lost(first: Tensor, second: Tensor) -> float:
        rest = torch.eye(len(left), device=left.device, dtype=left.dtype) - first.T @ second
        return float(((left @ rest) * (rest @ right)).sum())

    choices = [(first, second), (fitted(right, second, first), second), (first, fitted(left, first, second))]
    return min(choices, key=lambda maps: lost(*maps))


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
