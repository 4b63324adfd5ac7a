"""Random bands of features, for augmentation (SpecAugment); also used by the speech example."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(n: int, low: int, high: int) -> Tensor:
    """Integers of [low, high], int64 (n, 1)."""
    return torch.randint(low, high + 1, (n, 1))


def mask(n: int, size: int, widest: int) -> Tensor:
    """One random band of at most ``widest`` positions in each of n rows, bool (n, size)."""
    start, width = draw(n, 0, size - 1), draw(n, 0, widest)
    position = torch.arange(size)
    return (position >= start) & (position < start + width)
