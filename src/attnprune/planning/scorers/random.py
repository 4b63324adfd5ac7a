"""Scores drawn at random: the baseline that every other scorer must beat."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...families.base import AttentionView
from ...values.layout import Projection
from ...values.scores import Scores
from .base import Evidence, Scorer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Random(Scorer):
    """Uniform scores in [0, 1) from a seed and the attention's name; the global random state is not touched.

    Args:
        seed: equal seeds give equal scores on every device.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(
        self, model: nn.Module | None, views: Sequence[AttentionView], **_: Unpack[Evidence]
    ) -> dict[str, Scores]:
        return {view.name: self._one(view) for view in views}

    def score_features(
        self,
        model: nn.Module | None,
        views: Sequence[AttentionView],
        which: Sequence[Projection],
        **_: Unpack[Evidence],
    ) -> dict[str, dict[Projection, Tensor]]:
        return {
            view.name: {
                p: torch.rand(
                    view.spec.width(p), generator=self._generator(f"{view.name}:{p}"), device="cpu", dtype=torch.float64
                )
                for p in which
            }
            for view in views
        }

    def _generator(self, what: str) -> torch.Generator:
        key = hashlib.sha256(f"{self.seed}:{what}".encode()).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(key[:7], "big"))

    def _one(self, view: AttentionView) -> Scores:
        generator = self._generator(view.name)
        spec = view.spec
        shapes = ((spec.kv_heads, spec.qk_dim), (spec.kv_heads, spec.vo_dim), (spec.heads,))
        return Scores(*(torch.rand(shape, generator=generator, device="cpu", dtype=torch.float64) for shape in shapes))
