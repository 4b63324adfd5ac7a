"""PyTorch's fused inference paths off, in one thread: :class:`Unfused`."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode


class Unfused(TorchFunctionMode):
    """Inside the block PyTorch's fused inference paths are off: they go around modules that somebody listens to.

    They step aside for any mode, and modes are a thread's own, where ``torch.backends.mha.set_fastpath_enabled`` is the
    whole process's.

    >>> import torch
    >>> layer = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
    >>> called = layer.self_attn.register_forward_pre_hook(lambda *_: print("called"))
    >>> with torch.no_grad(), Unfused():
    ...     _ = layer(torch.zeros(1, 2, 8))
    called
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))
