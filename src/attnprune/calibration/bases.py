"""The best basis of every head, computed instead of trained: :func:`head_bases`.

Inside a head only two products matter, ``q k^T`` and ``context W_O``, so a head may be rotated into another basis
before channels go. Covariances come from :class:`attnprune.Calibration`; all of this runs in float64 on the CPU. What
stays is then fitted to what went (:mod:`attnprune.calibration.refit`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..families.base import AttentionView
from ..values.channel_maps import ChannelMaps
from ..values.layer_plan import LayerPlan
from ..values.layout import KINDS, Kind, Projection
from ..values.spec import AttentionSpec
from .elimination import refitted_losses
from .moments import LayerMoments, Moments

RIDGE = 1e-10
"""Of a covariance's mean variance: keeps directions that the data lack apart from nothing."""


class Basis(NamedTuple):
    """A basis of the channels of one kind of one head."""

    first: Tensor
    """``(dim, dim)``: what Q (or V) is multiplied with, the direction with the most energy first."""
    second: Tensor
    """``(dim, dim)``: what K is multiplied with; for vo the transpose of what O is multiplied with."""
    energy: Tensor
    """``(dim,)``: mean square error of the product that a direction's removal alone causes, descending."""


@dataclass(frozen=True)
class HeadBases:
    """A basis for every key head of an attention; query heads that share one have one basis."""

    spec: AttentionSpec
    by_kind: Mapping[Kind, tuple[Basis, ...]]
    """Per key head, in logical order."""
    fixed: frozenset[Kind] = frozenset()
    """Kinds whose channels must not be mixed."""
    alone: Mapping[Kind, tuple[Tensor, ...]] = field(default_factory=dict)
    """What each channel loses alone, as it stands, of kinds whose energies are what channels lose that go one after the
    other, the rest being refitted."""

    def layer(self, dtype: torch.dtype = torch.float64) -> LayerPlan:
        """The plan that rotates every head and removes nothing; its maps in float32 or float64."""
        qk, vo = (self.by_kind[kind] for kind in KINDS)
        key_of = self.spec.layout.key_of
        o: Tensor = torch.block_diag(*(vo[key].second.T for key in key_of))  # type: ignore[no-untyped-call]
        q, k, v = [qk[key].first for key in key_of], [one.second for one in qk], [one.first for one in vo]
        return LayerPlan(self.spec, fold=ChannelMaps(tuple(q), tuple(k), tuple(v), o.to(dtype)))


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
    """Per key head ``(vo_dim, vo_dim)``: ``W_O^T W_O`` of its columns of O; the mean over query heads that share it."""
    grams = [weight @ weight.T for weight in (weight.double().cpu() for weight in view.heads("o"))]
    return [torch.stack(group).mean(0) for group in view.spec.layout.over_groups(grams, "o")]


def head_bases(view: AttentionView, moments: LayerMoments, rotated: bool = True, refits: bool = False) -> HeadBases:
    """The best basis of every head; not rotated, or of kinds that the adapter fixes, the channels as they stand.

    Args:
        view: the attention.
        moments: of its queries, keys and contexts.
        rotated: whether to rotate.
        refits: whether rotary pairs that go will be made up for.
    """
    spec, fixed = view.spec, frozenset(view.fixed)
    centred = spec.bias[3]
    queries, contexts = (
        [torch.stack(group).sum(0) for group in spec.layout.over_groups(parts, "q")]
        for parts in (moments.queries(), moments.contexts(centred))
    )
    pairs = {
        "qk": zip(queries, moments.keys(), strict=True), "vo": zip(contexts, output_gram(view), strict=True)
    }  # fmt: skip
    by_kind: dict[Kind, tuple[Basis, ...]] = {
        kind: _gathered([(best_basis if rotated and kind not in fixed else standing)(*pair) for pair in pairs[kind]])
        for kind in KINDS
    }
    if not (refits and moments.relative and "qk" in fixed):
        return HeadBases(spec, by_kind, fixed)
    losses = [
        refitted_losses(left, right, spec.units("qk", key))
        for key, (left, right) in enumerate(zip(queries, moments.keys(), strict=True))
    ]
    qk = tuple(basis._replace(energy=loss) for basis, loss in zip(by_kind["qk"], losses, strict=True))
    return HeadBases(spec, {**by_kind, "qk": qk}, fixed, {"qk": tuple(basis.energy for basis in by_kind["qk"])})


def _gathered(bases: Sequence[Basis]) -> tuple[Basis, ...]:
    """The same in a block for each part, where heads are alike.

    While gates take their gradients a model keeps hundreds of them; each on its own, they hold on to the room around
    them that computing them took.
    """
    if len({len(basis.energy) for basis in bases}) > 1:
        return tuple(bases)
    blocks = [torch.stack(part).unbind() for part in zip(*bases, strict=True)]
    return tuple(Basis(*parts) for parts in zip(*blocks, strict=True))


def white_moments(view: AttentionView) -> LayerMoments:
    """What the moments would be if inputs were white noise: all that weights alone can tell.

    Contexts are values. Of keys only covariances count, in which their bias, a constant, has no part.
    """
    spec = view.spec

    def of(projection: Projection) -> tuple[Moments, ...]:
        moments = []
        slot = view.slots.get(f"{projection}.bias")
        weight = view.weight(projection).double().cpu()
        bias = torch.zeros(len(weight), device="cpu").double() if slot is None else slot.cut(slot.values).double().cpu()
        layout = spec.layout
        for b in layout.buckets:
            # contexts are of query heads, which have the values of their key heads
            heads = {"q": b.heads, "k": b.keys, "v": [layout.key_of[head] for head in b.heads]}[projection]
            spans = [slice(*layout.span(projection, head)) for head in heads]
            weights = torch.stack([weight[span] for span in spans])
            mean = torch.stack([bias[span] for span in spans])
            moments.append(Moments.full(1.0, mean, weights @ weights.transpose(1, 2)))
        return tuple(moments)

    return LayerMoments(spec, of("q"), of("k"), of("v"))
