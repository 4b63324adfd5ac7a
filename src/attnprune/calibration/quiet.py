"""Passes that leave no trace on the model: :func:`undisturbed`, and the parts that it is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Modes, ``requires_grad`` flags and random state are, when the block ends, as they were.

    >>> model = nn.Dropout(0.5)
    >>> with restored(model):
    ...     _ = model.eval()
    >>> model.training
    True
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = sorted({p.device.index or 0 for p, _ in flags if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def unfused() -> Iterator[None]:
    """PyTorch's fused inference paths are off: they go around the modules that a pass listens to or changes."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; all is :func:`restored`."""
    with restored(model), torch.no_grad():
        for module in model.modules():
            module.training = False
        yield


@contextmanager
def undisturbed(model: nn.Module, trainable: Iterable[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, :func:`unfused`, gradients on and for ``trainable`` alone; all is :func:`restored`."""
    chosen = {id(parameter) for parameter in trainable}
    with evaluated(model), unfused(), torch.enable_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
        yield
