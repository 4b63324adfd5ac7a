"""Passes that leave no trace on the model: :func:`undisturbed`, and the parts that it is made of."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ..nn.attempt import undone
from ..nn.unfused import Unfused


def _settable(model: nn.Module) -> list[nn.Parameter]:
    """Those that were not made in inference mode, whose flags nobody can put back."""
    return [parameter for parameter in model.parameters() if not parameter.is_inference()]


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
    flags = [(parameter, parameter.requires_grad) for parameter in _settable(model)]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})

    def back() -> None:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    with undone() as undo, torch.random.fork_rng(devices=devices):
        undo.append(back)
        yield


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; all is :func:`restored`."""
    with restored(model), torch.no_grad():
        for module in model.modules():
            module.training = False
        yield


@contextmanager
def undisturbed(model: nn.Module, trainable: Iterable[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, :class:`Unfused`, gradients on and for ``trainable`` alone; all is :func:`restored`."""
    chosen = {id(parameter) for parameter in trainable}
    with evaluated(model), Unfused(), torch.enable_grad():
        for parameter in _settable(model):
            parameter.requires_grad_(id(parameter) in chosen)
        yield


@contextmanager
def silenced(kind: type[Warning]) -> Iterator[None]:
    """Warnings of a kind are not shown."""
    with undone() as undo:
        stack = ExitStack()
        undo.append(stack.close)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", kind)
        yield
