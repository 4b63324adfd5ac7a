"""A plan's effect without surgery."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..plan import LayerPlan, Plan
from ..spec import Kind
from ..views import AttentionView
from .check import check_fit, check_views


def removed_channels(view: AttentionView, layer: LayerPlan, kind: Kind) -> list[int]:
    """The stored channels that a plan removes, those of whole heads among them."""
    rows: list[int] = []
    for head in range(view.spec.heads):
        start, stop = view.spec.layout.span(kind, head)
        rows += range(start, stop) if head in layer.heads else [start + c for c in layer.removed(kind)[head]]
    return rows


@contextmanager
def masked_views(model: nn.Module, views: Sequence[AttentionView], plan: Plan) -> Iterator[None]:
    """Rows of Q, K, V and columns of O that the plan removes are zero inside the block, and as before after it."""
    check_fit(model, views, plan)
    by_name = {view.name: view for view in views}
    work = [(by_name[layer.spec.name], layer) for layer in plan if not layer.empty]
    check_views(model, [view for view, _ in work])
    saved = []
    try:
        with torch.no_grad():
            for view, layer in work:
                rows = {kind: removed_channels(view, layer, kind) for kind in ("qk", "vo")}
                for key, slot in view.slots.items():
                    channels = slot.cut(slot.parameter.detach())
                    index = torch.tensor(rows[view.kinds[key]], dtype=torch.long, device=channels.device)
                    saved.append((channels, index, channels.index_select(0, index)))
                    channels.index_fill_(0, index, 0)
        yield
    finally:
        with torch.no_grad():
            for channels, index, values in reversed(saved):
                channels.index_copy_(0, index, values)
