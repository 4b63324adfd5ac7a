"""What removing a unit does to the loss, to first order."""

from __future__ import annotations

import torch
from torch import Tensor

from ...families.base import AttentionView
from ...values.layout import Projection
from .base import weights_of
from .gradient import Gradients, GradientScorer, columns, head_sums, unit_sums


class Taylor(GradientScorer):
    """What removing a unit does to the loss, to first order: ``|sum of w * g|`` over the unit's weights and biases.

    The absolute value (or the square) is taken per batch, over the unit as a whole (Q and K together, V and O
    together, all four for a head), and averaged over batches (Molchanov et al. 2019, arXiv 1906.10771, eq. 8).

    Args:
        squared: square instead of absolute value.
    """

    def __init__(self, squared: bool = False) -> None:
        self.squared = squared

    @property
    def name(self) -> str:
        return "taylor-squared" if self.squared else "taylor"

    def reduce(self, view: AttentionView, grads: Gradients) -> tuple[Tensor, Tensor, Tensor]:
        sums: dict[Projection, Tensor] = {}
        for key, grad in grads.items():
            slot, side = view.slots[key], view.side(key)
            products = slot.cut(slot.values) * grad
            value = products.flatten(1).sum(1) if grad.dim() > 1 else products
            sums[side] = sums[side] + value.double() if side in sums else value.double()
        size = torch.square if self.squared else torch.abs
        qk, vo = unit_sums(view, sums)
        return size(qk), size(vo), size(head_sums(view, sums))

    def reduce_features(self, view: AttentionView, grads: Gradients, projection: Projection) -> Tensor:
        sums = (weights_of(view, projection) * columns(view, grads, projection)).sum(0, dtype=torch.float64)
        return sums.square() if self.squared else sums.abs()
