"""Scores drawn at random: the baseline that every other scorer must beat."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ...families.base import AttentionView
from ...values.layout import Projection
from ...values.scores import Scores
from .base import WeightScorer


class Random(WeightScorer):
    """Uniform scores in [0, 1) from a seed and the attention's name; the global random state is not touched.

    Args:
        seed: equal seeds give equal scores on every device.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def features(self, view: AttentionView, projection: Projection) -> Tensor:
        generator = self._generator(f"{view.name}:{projection}")
        return torch.rand(view.spec.width(projection), generator=generator, device="cpu", dtype=torch.float64)

    def _generator(self, what: str) -> torch.Generator:
        key = hashlib.sha256(f"{self.seed}:{what}".encode()).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(key[:7], "big"))

    def units(self, view: AttentionView) -> Scores:
        generator = self._generator(view.name)
        spec = view.spec
        shapes = ((spec.kv_heads, spec.qk_dim), (spec.kv_heads, spec.vo_dim), (spec.heads,))
        return Scores(*(torch.rand(shape, generator=generator, device="cpu", dtype=torch.float64) for shape in shapes))
