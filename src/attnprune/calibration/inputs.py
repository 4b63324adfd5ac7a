"""What Q, K and V read while a model runs: :class:`Inputs`."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor

from ..families.base import AttentionView
from ..values.layout import PROJECTIONS, Projection
from .moments import Moments, Running

READERS: tuple[Projection, ...] = PROJECTIONS[:3]


class Inputs:
    """Moments of what each of the three reads; what they read together is counted once."""

    def __init__(self, view: AttentionView) -> None:
        self.view = view
        self.own: dict[Projection, Running] = {}
        """By projection; K and V have none as long as they read what Q reads."""

    def add(self, seen: Mapping[str, Tensor], mask: Tensor | None, queries: Tensor | None, keys: Tensor | None) -> None:
        """Adds what was read in a call.

        Args:
            seen: by projection ``(batch, tokens, features)``; a cache may stand in for K and V.
            mask: ``(batch, heads, queries, keys)``.
            queries, keys: ``(batch, tokens)``, which of them are real.
        """
        for p in READERS:
            if p not in seen:
                continue
            x, real = seen[p], queries if p == "q" else keys
            if p not in self.own:
                if self._may_share(p) and same(x, seen["q"]):
                    continue
                shared = self._may_share(p) and "q" in self.own  # so far it read what Q reads
                self.own[p] = copy.deepcopy(self.own["q"]) if shared else Running(1, self.view.spec.width(p))
            running = self.own[p]
            x = x if mask is None else batch_first(x, mask)
            present = torch.tensor(self.view.spec.present(p), device=x.device)
            running.add(tokens_of(x.index_select(-1, present), 1, real))

    def _may_share(self, p: Projection) -> bool:
        """Whether a projection may read the very features that Q reads."""
        spec = self.view.spec
        return p != "q" and spec.features(p) == spec.features("q") and spec.missing(p) == spec.missing("q")

    def moments(self) -> tuple[Moments, ...]:
        """Of Q, K and V."""
        found = {p: running.moments() for p, running in self.own.items()}
        none = {p: Moments.zero(1, self.view.spec.width(p)) for p in READERS}
        first = found.get("q", none["q"])
        return tuple(found.get(p, first if self._may_share(p) else none[p]) for p in READERS)


def sequences(x: Tensor) -> Tensor:
    """``(batch, tokens, channels)`` from any number of leading dimensions."""
    if x.dim() == 3:
        return x
    return x.reshape(1, -1, x.shape[-1]) if x.dim() < 3 else x.flatten(1, -2)


def tokens_of(x: Tensor, heads: int, real: Tensor | None) -> Tensor:
    """``(count, heads, channels)`` from ``(batch, tokens, channels)``, tokens that are not real left out."""
    x = rearrange(x, "b t (h d) -> b t h d", h=heads)
    return x.flatten(0, 1) if real is None else x[real]


def batch_first(x: Tensor, mask: Tensor) -> Tensor:
    """``(batch, tokens, channels)`` of what may be ``(tokens, batch, channels)``, as a mask ``(batch, heads, queries,
    keys)`` tells."""
    batch, tokens = mask.shape[0], mask.shape[-1]
    return x.transpose(0, 1) if batch != tokens and x.shape[:2] == (tokens, batch) else x


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two inputs are the same tokens."""
    return one is other or (one.data_ptr() == other.data_ptr() and one.shape == other.shape)
