"""Features that projections leave out: what that loses, and the best fit of the others (:class:`FeatureMaps`).

A projection ``W x`` that reads the features S alone becomes ``W C_s C_ss^-1 x_s``, C being the covariance of ``x``:
least squares, in closed form, in float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..families.base import AttentionView
from ..values.feature_maps import READERS, FeatureMaps
from ..values.layer_plan import LayerPlan
from ..values.layout import Projection
from .elimination import REFIT_RIDGE
from .moments import LayerMoments, Moments

AT_ONCE = 64
"""Features that go before the matrices are made smaller."""


def eliminated(weight: Tensor, covariance: Tensor) -> Tensor:
    """``(features,)``: what is lost with each feature, as they go one after the other, the least loss first, while the
    others are refitted.

    With P the inverse of the covariance of the features that are left, R their map onto all of them, and Z = R^T M R,
    removing feature j loses ``Z_jj / P_jj`` more, where Z is of the coefficients ``P C``.

    Args:
        weight: ``(features, features)``, M: what an error of the input costs.
        covariance: ``(features, features)``, C, lifted so that it can be inverted.
    """
    inverse = torch.linalg.inv(covariance)
    cost = weight.clone()  # of the coefficients P C, which are the identity as long as all are left
    losses, total = torch.zeros(len(covariance), device="cpu", dtype=torch.float64), 0.0
    numbers, gone = torch.arange(len(covariance), device="cpu"), torch.zeros(len(covariance), device="cpu").bool()
    tiny = torch.finfo(torch.float64).tiny
    for step in range(len(covariance)):
        if step and step % AT_ONCE == 0:  # what went no longer takes part
            rest = (~gone).nonzero()[:, 0]
            inverse, cost, numbers, gone = inverse[rest][:, rest], cost[rest][:, rest], numbers[rest], gone[rest]
        found = cost.diagonal().clamp_min(0) / inverse.diagonal().clamp_min(tiny)
        j = int(found.masked_fill(gone, torch.inf).argmin())
        total += float(found[j])
        losses[numbers[j]], gone[j] = total, True
        share = inverse[:, j] / inverse[j, j]
        row = cost[j] - share * (cost[j, j] / 2)
        cost.addr_(share, row, alpha=-1).addr_(row, share, alpha=-1)
        inverse.addr_(share, inverse[j].clone(), alpha=-1)
    return losses


def lifted(covariance: Tensor, tokens: float) -> Tensor:
    """A covariance with a ridge, stronger with few tokens, as for O's refit."""
    level = float(covariance.diagonal().mean())
    ridge = (level if level > 0 else 1.0) * (REFIT_RIDGE + len(covariance) / max(tokens, 1.0))
    return covariance + ridge * torch.eye(len(covariance), device="cpu", dtype=torch.float64)


def feature_losses(
    view: AttentionView, layer: LayerPlan, moments: LayerMoments, which: tuple[Projection, ...], refits: bool
) -> dict[Projection, Tensor]:
    """``(features,)`` of some projections: what the products of the attention lose with each of them.

    Of Q and K an error of logits, of V and O of the output. Where the others are refitted, features go one after the
    other (:func:`eliminated`), else each for itself.

    Args:
        view: the attention.
        layer: the channels that go.
        moments: of queries, keys and contexts, and of what is read; none of the latter: as if that were white noise.
        which: the projections.
        refits: whether what stays will be refitted.
    """
    found: dict[Projection, Tensor] = {}
    for p in which:
        if p == "o":
            o = view.weight("o").double().cpu()
            context = moments.context(view.spec.bias[3])
            order = [channel for span in view.spans("o") for channel in range(*span)]
            found[p] = ((context @ o[order]) * o[order]).sum(0).clamp_min(0)
            continue
        cost, read = _cost(view, layer, moments, p), _read(view, moments, p)
        if read is None:
            found[p] = cost.diagonal().clone()
        elif refits:
            found[p] = eliminated(cost, lifted(read[1], read[0].count))
        else:
            found[p] = cost.diagonal() * read[1].diagonal()
    return found


def with_features(view: AttentionView, layer: LayerPlan, moments: LayerMoments) -> LayerPlan:
    """A layer's plan with the refit of projections that leave features out, in the maps' own precision."""
    if not any(layer.features):
        return layer
    reads, shifts = {}, {}
    for p in READERS:
        read = _read(view, moments, p)
        if not layer.features[READERS.index(p)] or read is None:
            continue
        kept = list(layer.left(p))
        covariance = lifted(read[1], read[0].count)
        reads[p] = torch.linalg.solve(covariance[kept][:, kept], covariance[kept]).T
        reads[p][kept] = torch.eye(len(kept), device="cpu", dtype=torch.float64)
        if view.spec.bias["qkv".index(p)]:
            mean = read[0].mean[0]
            shifts[p] = mean - reads[p] @ mean[kept]
    means = ()
    if layer.features[3] and view.spec.bias[3] and moments.tokens["vo"]:
        means = ((layer.features[3], torch.cat(moments.context_means())),)  # type: ignore[assignment]
    dtype = layer.fold.o.dtype if layer.fold is not None else torch.float64
    return replace(layer, refit=FeatureMaps(reads, shifts, means).to(dtype))


def _read(view: AttentionView, moments: LayerMoments, p: Projection) -> tuple[Moments, Tensor] | None:
    """What a projection reads, and its covariance; where it has no bias to keep the mean, mean outer products."""
    if not moments.reads:
        return None
    one = moments.x[READERS.index(p)]
    return one, (one.covariance if view.spec.bias["qkv".index(p)] else one.second)[0]


def _cost(view: AttentionView, layer: LayerPlan, moments: LayerMoments, p: Projection) -> Tensor:
    """``(features, features)``, M: what an error of a projection's input costs in the product that it is for."""
    spec, maps, weights = layer.spec, layer.maps, [weight.double().cpu() for weight in view.heads(p)]
    key_of, kept_heads, kept_keys = spec.layout.key_of, layer.kept_heads, layer.kept_keys
    place = {key: i for i, key in enumerate(kept_keys)}
    total = torch.zeros(spec.width(p), spec.width(p), device="cpu", dtype=torch.float64)
    queries, keys = moments.queries(), moments.keys()
    columns, start = [], 0
    if p == "v":
        o = view.weight("o").double().cpu()
        order = [channel for span in view.spans("o") for channel in range(*span)]
        whole = maps.o.double().T @ o[order]
        for head in kept_heads:
            size = len(layer.kept("vo", key_of[head]))
            columns.append(whole[start : start + size])
            start += size
    for i, head in enumerate(kept_heads):
        key = key_of[head]
        if p == "q":
            inner = maps.k[place[key]].double()
            rows, gram = maps.q[i].double() @ weights[head], inner @ keys[key] @ inner.T
        elif p == "k":
            inner = maps.q[i].double()
            rows, gram = maps.k[place[key]].double() @ weights[key], inner @ queries[head] @ inner.T
        else:
            rows, gram = maps.v[place[key]].double() @ weights[key], columns[i] @ columns[i].T
        total += rows.T @ gram @ rows
    return total + _beside(view, p, float(total.diagonal().mean()))


def _beside(view: AttentionView, p: Projection, level: float) -> Tensor | float:
    """The same for what lies beside Q in its Linear, of which no product is known: it weighs as much as Q's rows do."""
    rows = [
        (slot := view.slots[key]).cut(slot.values).double().cpu()
        for key in ("x.weight", "g.weight")
        if key in view.slots
    ]
    if p != "q" or not rows:
        return 0.0
    own = view.weight("q").double().square().sum().item() / view.spec.width("q")
    return sum(part.T @ part for part in rows) * (level / max(own, 1e-300))


def scaled(losses: Mapping[Projection, Tensor], gates: Mapping[Projection, Tensor]) -> dict[Projection, Tensor]:
    """Losses that add up to what gates say of a projection's features, so that they compare across layers."""
    found = {}
    for p, loss in losses.items():
        most, gate = float(loss.max()), float(gates[p].sum())
        found[p] = loss * (gate / most) if most > 0 and gate > 0 else loss
    return found
