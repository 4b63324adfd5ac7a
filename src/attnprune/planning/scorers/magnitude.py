"""The norm of a unit's weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import OptionError
from ...families.base import AttentionView
from ...values.layout import PROJECTIONS, Projection
from ...values.scores import Scores
from .base import WeightScorer, weights_of


class Magnitude(WeightScorer):
    """``MAG`` of the paper: the p-norm of a unit's weights, averaged over the projections that share the unit.

    A qk channel scores ``(|Q row| + |K row|) / 2``, a vo channel ``(|V row| + |O column|) / 2``, a head the mean of
    the norms of its parts of Q, K, V and O. With grouped queries the rows of Q (columns of O) of all query heads that
    share a channel are added up. A feature scores the norm of a projection's weights for it. Biases do not count.
    Computed in float64.

    Args:
        p: 1 or 2, the norm. The paper's public configs have 1: ``scorer="magnitude-l1"``.

    >>> import torch, attnprune
    >>> views = attnprune.adapters.find_views(torch.nn.MultiheadAttention(16, 4))
    >>> attnprune.scorers.Magnitude().score(None, views)[""].qk.shape
    torch.Size([4, 4])
    """

    def __init__(self, p: int = 2) -> None:
        if p not in (1, 2):
            raise OptionError("Magnitude: p", "1 or 2", repr(p), "use 2, or 1 as the paper's public configs")
        self.p = p

    @property
    def name(self) -> str:
        return "magnitude" if self.p == 2 else f"magnitude-l{self.p}"

    def units(self, view: AttentionView) -> Scores:
        norms: dict[Projection, Tensor] = {
            p: torch.linalg.vector_norm(view.weight(p), self.p, dim=-1, dtype=torch.float64).cpu() for p in PROJECTIONS
        }
        qk = view.by_head((view.shared(norms["q"], "q") + norms["k"]) / 2, "qk")
        vo = view.by_head((norms["v"] + view.shared(norms["o"], "o")) / 2, "vo")
        key_of = list(view.spec.layout.key_of)
        whole = []
        for p in PROJECTIONS:
            heads = torch.stack([norms[p][slice(*span)].norm(self.p) for span in view.spans(p)])
            whole.append(heads[key_of] if p in "kv" else heads)
        return Scores(qk, vo, torch.stack(whole).mean(0))

    def features(self, view: AttentionView, projection: Projection) -> Tensor:
        weights = weights_of(view, projection)
        norms: Tensor = torch.linalg.vector_norm(weights, self.p, dim=0, dtype=torch.float64)
        return norms.cpu()
