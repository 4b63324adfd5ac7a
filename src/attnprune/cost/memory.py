"""How much memory a forward pass needs: :func:`peak_bytes`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..calibration.quiet import evaluated
from ..nn.nested import tensors_in
from ..nn.unfused import Unfused
from .counting import run


def peak_bytes(model: nn.Module, example_inputs: Any) -> int:
    """The most bytes of tensors at any moment of one forward pass: weights, buffers, inputs and what is computed.

    Counted, not measured, so that it is the same on every machine that runs the same kernels. What a kernel needs for
    itself, and what the allocator keeps beside, is not in it.

    Args:
        model: any module; run in evaluation mode without gradients, and left as found.
        example_inputs: a mapping (keywords), a tuple or list (positional), or a tensor.

    >>> import torch
    >>> peak_bytes(nn.Linear(4, 8, bias=False), torch.zeros(2, 4)) == 4 * (4 * 8 + 2 * 4 + 2 * 8)
    True
    """
    with evaluated(model), Unfused(), _Watch() as watch:
        for tensor in chain(model.parameters(), model.buffers()):
            watch.see(tensor)
        for tensor in tensors_in(example_inputs):
            watch.see(tensor, tensor.nbytes)  # it may be a part of something large
        run(model, example_inputs)
        found: int = watch.peak
    return found


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that are alive, each once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[UntypedStorage]] = {}

    def see(self, tensor: Tensor, size: int | None = None) -> None:
        """Counts a tensor's storage, or ``size`` bytes of it, until it goes."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if size is None else size
        if key in self._alive:
            return

        def gone(_: object) -> None:
            self._alive.pop(key, None)
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tensors_in(found):
            self.see(tensor)
        return found
