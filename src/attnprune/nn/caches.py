"""Caches of keys and values that a model is handed: :func:`check_cache`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import DataError


def check_cache(cache: Any, keys: Tensor, layer: Any) -> None:
    """Raises DataError where a cache holds keys of another width than an attention that was pruned makes.

    Such caches are made from a config, which tells the dense dims: peft's prefix tuning, for one.

    Args:
        cache: of transformers.
        keys: ``(batch, tokens, channels)``, new ones.
        layer: its number there.
    """
    if torch.compiler.is_compiling():
        return
    layers = getattr(cache, "layers", None) or getattr(cache, "key_cache", None) or ()
    one = layers[layer] if layer < len(layers) else None
    known = getattr(one, "keys", one)
    if isinstance(known, Tensor) and known.dim() == 4 and known.numel():
        heads, width = known.shape[1], known.shape[-1]
        if (heads, width) != (1, keys.shape[-1]):
            raise DataError(
                f"past_key_values: layer {layer}",
                f"keys of 1 head of {keys.shape[-1]} channels, as this pruned attention caches them",
                f"keys of {heads} heads of {width}",
                "start from an empty cache; prefix tuning makes prefixes of the dense dims: train a prompt or LoRA",
            )
