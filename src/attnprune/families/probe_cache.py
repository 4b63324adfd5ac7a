"""A cache for hosts that are being proven: :class:`ProbeCache`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class ProbeCache:
    """A cache that keeps whatever it is given: what any version's dynamic cache does."""

    def __init__(self) -> None:
        self.layers: dict[int, Any] = {}
        self.is_updated: dict[int, bool] = {}

    @property
    def self_attention_cache(self) -> ProbeCache:
        return self

    @property
    def cross_attention_cache(self) -> ProbeCache:
        return self

    def update(self, k: Tensor, v: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values ``(batch, heads, tokens, dim)``, and gives all so far."""
        old = self.layers.get(int(layer))
        if old is not None:
            k, v = torch.cat([old.keys, k], -2), torch.cat([old.values, v], -2)
        self.layers[int(layer)] = SimpleNamespace(keys=k, values=v)
        return k, v

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens so far."""
        found = self.layers.get(int(layer))
        return 0 if found is None else int(found.keys.shape[-2])
