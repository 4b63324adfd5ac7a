"""Models in float64 that compute a part in float32 all the same, computed in float64 throughout: :class:`Exactly`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Exactly(TorchFunctionMode):
    """Inside the block, float64 tensors are not rounded to float32.

    Norms and rotary embeddings of transformers compute in float32 whatever the model's dtype, which is meant for half
    precision. Where two ways to compute the same are compared in float64, that rounding would hide what differs.

    >>> x = torch.tensor([1 / 3], dtype=torch.float64)
    >>> with Exactly():
    ...     x.float().dtype, x.to(torch.float32).dtype, torch.softmax(x, -1, dtype=torch.float32).dtype
    (torch.float64, torch.float64, torch.float64)
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.dtype == torch.float64:
            if func is Tensor.float:
                return first
            if torch.float32 in args[1:]:
                args = (first, *(torch.float64 if one is torch.float32 else one for one in args[1:]))
            if kwargs.get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)
