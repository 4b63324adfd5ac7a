"""What others do to attention, written from their papers for ``quality.py``: plans that this library applies.

All take the same data, remove the same share of every projection and touch attention alone. What a method does to MLPs
or to the width of the model is left out, and so is training. Sources: FLAP (arXiv 2312.11983), Wanda-sp (the same
paper, after 2306.11695), LLM-Pruner (2305.11627), CLOVER (2411.17426), MoDeGPT (2408.09632), A3 (2505.12942), CORP
(2602.05243), Torch-Pruning (2301.12900). SliceGPT (2401.15024) is not here: it rotates the stream between layers and
cuts the model's width, of which nothing is left where embeddings and MLPs must stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import attnprune
from attnprune.calibration.bases import Basis, HeadBases, best_basis, standing
from attnprune.calibration.moments import LayerMoments
from attnprune.calibration.refit import with_maps
from attnprune.families import find_views
from attnprune.families.base import AttentionView
from attnprune.values.channel_maps import ChannelMaps
from attnprune.values.layer_plan import LayerPlan, make_layer
from attnprune.values.layout import KINDS, Kind, Projection

Batches = Sequence[Any]
Loss = Callable[[nn.Module, Any], Tensor]
RIDGE = 1e-3
"""Of CORP's regressions, times the mean variance; 1e-5 to 1e-2 hardly differ on the keywords' validation split."""


def seen(model: nn.Module, data: Batches) -> attnprune.Calibration:
    """Second moments of queries, keys, contexts and of what the projections read."""
    return attnprune.calibrate(model, data, reads=True, progress=False)


# Heads: a score for each, then this library's allocation


class HeadScores(attnprune.Scorer):
    """Scores that were computed before."""

    def __init__(self, found: dict[str, Tensor]) -> None:
        self.found = found

    def score(self, model: nn.Module, views: Sequence[AttentionView], **_: Any) -> dict[str, attnprune.Scores]:
        def channels(heads: int, dim: int) -> Tensor:
            return torch.zeros(heads, dim)

        return {
            view.name: attnprune.Scores(channels(s.kv_heads, s.qk_dim), channels(s.kv_heads, s.vo_dim), heads)
            for view in views
            for s, heads in [(view.spec, self.found[view.name])]
        }


def by_heads(model: nn.Module, ratio: float, found: dict[str, Tensor], scope: str) -> attnprune.Plan:
    """Whole heads, those that score least."""
    options: dict[str, Any] = {"granularity": "head", "scope": scope, "heads": "ragged"}
    return attnprune.make_plan(model, ratio, scorer=HeadScores(found), progress=False, **options)


def flap(model: nn.Module, ratio: float, data: Batches, loss: Loss) -> attnprune.Plan:
    """Fluctuation of what O reads times its weights, squared; standardised per layer, so that heads of all layers
    compete; what goes leaves its mean in O's bias, where there is one."""
    moments, scores = seen(model, data), {}
    for view in find_views(model):
        variance = [one.diagonal() for one in moments[view.name].contexts(centred=True)]
        weights = [weight.double().cpu().square().sum(1) for weight in view.heads("o")]
        metric = torch.cat([a * b for a, b in zip(variance, weights, strict=True)]).square()
        metric = (metric - metric.mean()) / metric.std()
        sizes = view.spec.layout.sizes("o")
        scores[view.name] = torch.stack([one.mean() for one in metric.split(list(sizes))])
    plan = by_heads(model, ratio, scores, "global")
    return replace(plan, layers=tuple(_with_mean(layer, moments[layer.spec.name]) for layer in plan))


def _with_mean(layer: LayerPlan, moments: LayerMoments) -> LayerPlan:
    """The plan of whole heads, the mean of what goes kept in O's bias."""
    if layer.empty or not layer.spec.bias[3]:
        return layer
    mean = torch.cat(moments.context_means())
    maps = layer.maps
    kept = maps.o.double().sum(1)
    return replace(layer, fold=ChannelMaps(maps.q, maps.k, maps.v, maps.o, mean * (1 - kept)))


def wanda_sp(model: nn.Module, ratio: float, data: Batches, loss: Loss) -> attnprune.Plan:
    """``|W| |X|`` of O's columns, summed over heads; layers lose alike."""
    moments, scores = seen(model, data), {}
    for view in find_views(model):
        norms = [one.diagonal().sqrt() for one in moments[view.name].contexts(centred=False)]
        weights = [weight.double().cpu().abs().sum(1) for weight in view.heads("o")]
        scores[view.name] = torch.stack([(a * b).sum() for a, b in zip(norms, weights, strict=True)])
    return by_heads(model, ratio, scores, "local")


def llm_pruner(model: nn.Module, ratio: float, data: Batches, loss: Loss) -> attnprune.Plan:
    """First-order Taylor, ``|w g|`` by elements, summed over a head's weights in Q, K, V and O; layers lose alike."""
    model.zero_grad(set_to_none=True)
    for batch in data:
        (loss(model, batch) / len(data)).backward()
    scores = {}
    for view in find_views(model):
        total = torch.zeros(view.spec.heads, dtype=torch.float64)
        for p in ("q", "k", "v", "o"):
            total += _taylor(view, p)
        scores[view.name] = total
    model.zero_grad(set_to_none=True)
    return by_heads(model, ratio, scores, "local")


def _taylor(view: AttentionView, projection: Projection) -> Tensor:
    slot = view.slots[f"{projection}.weight"]
    product = (slot.cut(slot.values) * slot.cut(slot.parameter.grad)).abs().sum(1).double().cpu()
    sums = torch.stack([product[slice(*span)].sum() for span in view.spans(projection)])
    return sums[list(view.spec.layout.key_of)] if projection in "kv" else sums


# Torch-Pruning, as it prunes attention alone: the same channels of every head, of Q, K, V and O together


def coupled(importance: str) -> Callable[[nn.Module, float, Batches, Loss], attnprune.Plan]:
    """An importance of Torch-Pruning; one set of channels for all heads and projections of a layer."""

    def plan(model: nn.Module, ratio: float, data: Batches, loss: Loss) -> attnprune.Plan:
        import torch_pruning as tp

        views = find_views(model)
        scorer = attnprune.scorers.TorchPruning(getattr(tp.importance, importance)())
        evidence = {"data": data, "loss_fn": loss} if "Taylor" in importance else {}
        found = scorer.score(model, views, progress=False, **evidence)
        layers = []
        for view in views:
            spec, scores = view.spec, found[view.name]
            total = scores.qk.mean(0) + scores.vo.mean(0)
            units = [sorted(unit) for unit in spec.units("qk", 0)]
            gone = lowest([float(total[unit].sum()) for unit in units], units, ratio * spec.qk_dim)
            each = (gone,) * spec.kv_heads
            layers.append(make_layer(spec, set(), {"qk": each, "vo": each}))
        return attnprune.Plan(tuple(layers))

    return plan


def lowest(scores: Sequence[float], units: Sequence[Sequence[int]], channels: float) -> tuple[int, ...]:
    """The channels of the units that score least, as many as come nearest to a number of channels; one unit stays."""
    count = min(round(channels / len(units[0])), len(units) - 1)
    order = sorted(range(len(units)), key=lambda i: scores[i])
    return tuple(sorted(channel for i in order[:count] for channel in units[i]))


# Low rank and refits: every head keeps the same rank


def factored(model: nn.Module, ratio: float, pick: Callable[[AttentionView], HeadBases]) -> attnprune.Plan:
    """The plan in which every head keeps its first directions of a basis, or the channels that lose least."""
    layers = []
    for view in find_views(model):
        spec, bases = view.spec, pick(view)
        gone: dict[Kind, tuple[tuple[int, ...], ...]] = {}
        for kind in KINDS:
            gone[kind] = tuple(
                lowest(_unit_scores(bases.by_kind[kind][key], units), units, ratio * spec.dims(kind)[key])
                for key in range(spec.kv_heads)
                for units in [[sorted(unit) for unit in spec.units(kind, key)]]
            )
        layer = with_maps(make_layer(spec, set(), gone), bases, LayerMoments.zero(spec, False), refit=False)
        layers.append(layer)
    return attnprune.Plan(tuple(layers))


def _unit_scores(basis: Basis, units: Sequence[Sequence[int]]) -> list[float]:
    return [float(basis.energy[list(unit)].sum()) for unit in units]


def heads_of(view: AttentionView, projection: Projection, second: Tensor, mean: Tensor) -> list[Tensor]:
    """Per head ``(dim, dim)``: the mean outer product of what a projection makes of inputs with these moments."""
    weight, bias = view.weight(projection).double().cpu(), view.slots.get(f"{projection}.bias")
    made = weight @ second @ weight.T
    if bias is not None:
        b = bias.cut(bias.values).double().cpu()
        cross = torch.outer(weight @ mean, b)
        made = made + cross + cross.T + torch.outer(b, b)
    return [made[slice(*span), slice(*span)] for span in view.spans(projection)]


def grouped(view: AttentionView, per_query: Sequence[Tensor]) -> list[Tensor]:
    """Per key head, the sum of what its query heads have."""
    return [torch.stack(group).sum(0) for group in view.spec.layout.over_groups(list(per_query), "q")]


def written(view: AttentionView) -> list[Tensor]:
    """Per key head ``W_O^T W_O``, summed over the query heads that share it."""
    return grouped(view, [weight @ weight.T for weight in (w.double().cpu() for w in view.heads("o"))])


def bases_of(view: AttentionView, qk: Any, vo: Any, how: Callable[[Kind], Callable[..., Basis]]) -> HeadBases:
    """The bases of pairs of second moments."""
    by_kind: dict[Kind, tuple[Basis, ...]] = {
        kind: tuple((standing if kind in view.fixed else how(kind))(*pair) for pair in zip(*pairs, strict=True))
        for kind, pairs in (("qk", qk), ("vo", vo))
    }
    return HeadBases(view.spec, by_kind, frozenset(view.fixed))


def clover(model: nn.Module, ratio: float, data: Batches, loss: Loss) -> attnprune.Plan:
    """Singular values of ``W_Q^T W_K`` and ``W_O W_V`` of every head: weights alone; rotary pairs by their norms."""

    def pick(view: AttentionView) -> HeadBases:
        q, k, v = (heads_of(view, p, torch.eye(view.spec.width(p)).double(), torch.zeros(view.spec.width(p)).double())
                   for p in ("q", "k", "v"))  # fmt: skip
        return bases_of(view, (grouped(view, q), k), (v, written(view)), lambda kind: best_basis)

    return factored(model, ratio, pick)


def read_by(moments: LayerMoments, projection: Projection) -> tuple[Tensor, Tensor]:
    """The second moment and the mean of what a projection reads."""
    found = moments.x["qkv".index(projection)]
    return found.second[0], found.mean[0]


def a3(model: nn.Module, ratio: float, data: Batches, loss: Loss) -> attnprune.Plan:
    """The best rank for logits by autocorrelations of queries and keys, for outputs by those of contexts; pairs of a
    rotary embedding as they stand, by the product of their norms."""
    moments = seen(model, data)

    def pick(view: AttentionView) -> HeadBases:
        own = moments[view.name]
        keys = heads_of(view, "k", *read_by(own, "k"))
        contexts = grouped(view, own.contexts(centred=False))
        return bases_of(view, (grouped(view, own.queries()), keys), (contexts, written(view)), lambda kind: best_basis)

    return factored(model, ratio, pick)


def modegpt(model: nn.Module, ratio: float, data: Batches, loss: Loss) -> attnprune.Plan:
    """Channels of Q and K by the product of their norms (CR decomposition); V and O by the SVD of their product,
    weighted with the autocorrelation of V's input."""
    moments = seen(model, data)

    def pick(view: AttentionView) -> HeadBases:
        own = moments[view.name]
        keys, values = heads_of(view, "k", *read_by(own, "k")), heads_of(view, "v", *read_by(own, "v"))
        pairs = (grouped(view, own.queries()), keys), (values, written(view))
        return bases_of(view, *pairs, lambda kind: standing if kind == "qk" else best_basis)

    return factored(model, ratio, pick)


def corp(model: nn.Module, ratio: float, data: Batches, loss: Loss) -> attnprune.Plan:
    """Channels by their energy; logits of those that went as a bilinear form of those that stay, contexts as an affine
    function of those of the head, both by ridge regression (the paper's of hidden units, for V and O)."""
    moments = seen(model, data)

    def pick(view: AttentionView) -> HeadBases:
        own = moments[view.name]
        pairs = (grouped(view, own.queries()), own.keys()), (grouped(view, own.contexts(True)), written(view))
        return bases_of(view, *pairs, lambda kind: standing)

    plan = factored(model, ratio, pick)
    views = {view.name: view for view in find_views(model)}
    return replace(plan, layers=tuple(_corp(views[one.spec.name], one, moments[one.spec.name]) for one in plan))


def _corp(view: AttentionView, layer: LayerPlan, own: LayerMoments) -> LayerPlan:
    spec, maps = layer.spec, layer.maps
    key_of, q = spec.layout.key_of, list(maps.q)
    if "qk" not in view.fixed:
        queries, keys = grouped(view, own.queries()), own.keys()
        for head, key in enumerate(key_of):
            s = list(layer.kept("qk", key))
            left, right = queries[key], keys[key]
            m = ridge(left[s][:, s], left[s]) @ ridge(right[s][:, s], right[s]).T
            q[head] = m.T @ torch.eye(len(left)).double()[s]
    centred, columns, start = spec.bias[3], [], 0
    contexts = own.contexts(centred)
    o = torch.zeros_like(maps.o, dtype=torch.float64)
    for head, key in enumerate(key_of):
        s, whole = list(layer.kept("vo", key)), contexts[head]
        rows = slice(start, start + len(whole))
        o[rows, len(columns) : len(columns) + len(s)] = ridge(whole[s][:, s], whole[s]).T
        columns += [start + one for one in s]
        start += len(whole)
    mean = torch.cat(own.context_means())
    shift = mean - o @ mean[columns] if centred else None
    return replace(layer, fold=ChannelMaps(tuple(q), maps.k, maps.v, o, shift))


def ridge(gram: Tensor, towards: Tensor) -> Tensor:
    """``(gram + ridge)^-1 towards``."""
    return torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).double(), towards)


RIVALS: dict[str, Callable[[nn.Module, float, Batches, Loss], attnprune.Plan]] = {
    "Torch-Pruning, magnitude": coupled("GroupMagnitudeImportance"),
    "Torch-Pruning, Taylor": coupled("GroupTaylorImportance"),
    "Wanda-sp": wanda_sp,
    "LLM-Pruner, Taylor": llm_pruner,
    "FLAP": flap,
    "CLOVER": clover,
    "MoDeGPT": modegpt,
    "A3": a3,
    "CORP": corp,
}
"""By name, ``(model, ratio, data, loss)`` gives a plan; the model is left as found, but for gradients."""
