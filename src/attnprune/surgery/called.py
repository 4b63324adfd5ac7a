"""Projections that can be heard while a model runs: :func:`as_called`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from torch import nn

from ..errors import DataError
from ..families.base import AttentionView
from ..families.slots import Slot
from ..nn.attempt import undone
from ..nn.heard import Calls
from ..values.layer_plan import LayerPlan
from .patch import Operation, snapshot_of


@contextmanager
def as_called(views: Sequence[AttentionView]) -> Iterator[list[AttentionView]]:
    """For a while, each projection of every attention is a module that is called, so that its ports can be heard.

    Attention that holds packed parameters itself gets its decoupled form, over views of its own weights; where a host
    hands a projection's weight to ``F.linear`` the projection is called; the rest stays as it is. Yields views in the
    same order.
    """
    packed = [view for view in views if not view.called]
    with undone() as undo:
        undo.append(snapshot_of(packed).restore)
        for view in packed:
            tensors = {key: _alias(slot) for key, slot in view.slots.items()}
            Operation(view, LayerPlan(view.spec), "decoupled", tensors).run()
        with ExitStack() as stack:
            read = {id(slot.parameter): slot.owner for view in views if view.read for slot in view.slots.values()}
            calls = stack.enter_context(Calls(read, stack)) if read else None
            try:
                yield [
                    replace(view.adapter.view(view.name, view.module), host=view.host) if view in packed else view
                    for view in views
                ]
            except DataError as error:
                silent = [view.name for view in views if view.read and calls and view.owner("o") not in calls.heard]
                if not silent:
                    raise
                raise DataError(
                    ", ".join(silent[:4]),
                    "a host that calls its projections, or hands their weights to F.linear",
                    "one that hands them to something else, so that data cannot be heard there",
                    'score by weights or their gradients: scorer="magnitude", or "fisher" or "taylor" with a loss',
                ) from error


def _alias(slot: Slot) -> nn.Parameter:
    part = slot.cut(slot.parameter.detach()).movedim(0, slot.axis)
    return nn.Parameter(part, requires_grad=slot.parameter.requires_grad)
