"""Passes that leave no trace on the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module, trainable: Iterable[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, gradients on and for ``trainable`` alone; modes, flags and random state restored afterwards.

    PyTorch's fused inference paths, which go around the modules that a pass listens to, are off meanwhile.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = {id(parameter) for parameter in trainable}
    devices = sorted({p.device.index or 0 for p, _ in flags if p.device.type == "cuda"})
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            for module, _ in modes:
                module.training = False
            for parameter, _ in flags:
                parameter.requires_grad_(id(parameter) in chosen)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
