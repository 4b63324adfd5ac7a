"""A plan's effect without surgery."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import TiedWeightsError
from ..families.base import AttentionView
from ..families.slots import Slot
from ..families.tied import tied_to
from ..nn.attempt import undoing_with, undone
from ..values.layer_plan import LayerPlan
from ..values.layout import Projection
from ..values.plan import Plan
from .changes import bias_gain, gain_of, gains
from .check import MASKED, check_fit, check_views
from .maps import channel_maps, feature_changes, kept_channels


def removed_channels(view: AttentionView, layer: LayerPlan, projection: Projection) -> list[int]:
    """The stored channels of a projection that a plan removes, those of whole heads among them."""
    kept = set(kept_channels(view, layer, projection))
    return [row for row in range(view.spec.layout.channels(projection)) if row not in kept]


@contextmanager
def masked_views(model: nn.Module, views: Sequence[AttentionView], plan: Plan) -> Iterator[None]:
    """Rows of Q, K, V and columns of O that the plan removes are zero inside the block, and as before after it.

    Where a plan rotates heads, directions that stay take the places of channels of the same numbers.
    """
    check_fit(model, views, plan)
    by_name = {view.name: view for view in views}
    work = [(by_name[layer.spec.name], layer) for layer in plan if not layer.empty]
    check_views(model, [view for view, _ in work])
    tied, layers = tied_to([view for view, _ in work]), {view.name: layer for view, layer in work}
    work = [(view, layer) for view, layer in work if view.name not in tied or not layer.same(layers[tied[view.name]])]
    _check_shared(work)
    with undone() as undo:
        for view, layer in work:
            for slot, values in _masked(view, layer):
                undo.append(partial(_write, slot, slot.cut(slot.parameter.detach()).clone()))
                _write(slot, values)
        yield


@contextmanager
def masked_by_user(model: nn.Module, views: Sequence[AttentionView], plan: Plan) -> Iterator[None]:
    """:func:`masked_views` for as long as the user likes; the model is not pruned then (:func:`check_unmasked`)."""
    tops = [view.top for view in views]
    with masked_views(model, views, plan), undone() as undo:
        for put_back in (undo.append, undoing_with):  # the latter where a call of ours is interrupted around this
            put_back(lambda: MASKED.difference_update(tops))
        MASKED.update(tops)
        yield


@torch.no_grad()
def _write(slot: Slot, values: Tensor) -> None:
    slot.write(values)


def _masked(view: AttentionView, layer: LayerPlan) -> Iterator[tuple[Slot, Tensor]]:
    """The slots of a view, and what their channels are inside the block."""
    maps, features = channel_maps(view, layer), feature_changes(view, layer)
    bias = view.owner("o")._parameters.get("bias")
    if gains(layer) and bias is not None:
        gained = gain_of(view.weight("o"), layer)  # before O changes
        yield Slot(view.owner("o"), "bias", len(bias)), (bias.detach().double() + gained).to(bias.dtype)
    slots = sorted(
        view.slots.items(), key=lambda item: item[0].endswith("weight")
    )  # what biases gain is of old weights
    for key, slot in slots:
        channels = slot.cut(slot.parameter.detach())
        gain = bias_gain(view, key, layer)
        if gain is not None:
            channels = (channels.double() + gain().to(channels.device)).to(channels.dtype)
        if layer.fold is None:
            values = channels.clone()
            rows = removed_channels(view, layer, view.side(key))
            values.index_fill_(0, torch.tensor(rows, dtype=torch.long, device=channels.device), 0)
        else:
            places = torch.tensor(kept_channels(view, layer, view.side(key)), device=channels.device)
            values = torch.zeros_like(channels).index_copy_(0, places, maps[key](channels))
        change = features.get(key)
        if change is not None:
            stays = torch.tensor(change.places, dtype=torch.long, device=channels.device)
            values = torch.zeros_like(channels).index_copy_(1, stays, change(values))
        yield slot, values


def _check_shared(work: Sequence[tuple[AttentionView, LayerPlan]]) -> None:
    """Raises if a parameter that is rotated serves two projections: it would be rotated twice."""
    users: dict[int, str] = {}
    for view, layer in work:
        for key, slot in view.slots.items():
            if layer.fold is None and layer.refit is None:
                continue
            place = id(slot.parameter) if slot.whole else hash((id(slot.parameter), slot.places[0]))
            other = users.setdefault(place, f"{view.name}: {key}")
            if other != f"{view.name}: {key}":
                raise TiedWeightsError(
                    f"{view.name}: {key}",
                    "projections of their own to rotate",
                    f"a parameter that {other} uses too",
                    'untie the weights (assign a clone), or pass basis="channels" and compensate=False',
                )
