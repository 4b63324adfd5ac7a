"""Random numbers that are the same at every run, and leave no trace: :func:`repeatable`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import nn

from ..nn.attempt import undone


@contextmanager
def repeatable(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Inside the block Python's, numpy's and PyTorch's generators start from a seed; after it they are as before.

    Args:
        model: whose devices' generators are meant beside the CPU's.
        seed: where they start.

    >>> before = random.getstate()
    >>> with repeatable(nn.Linear(1, 1)):
    ...     first = random.random(), float(torch.rand(()))
    >>> with repeatable(nn.Linear(1, 1)):
    ...     again = random.random(), float(torch.rand(()))
    >>> first == again, random.getstate() == before
    (True, True)
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with undone() as undo, torch.random.fork_rng(devices=devices):
        undo.append(partial(random.setstate, random.getstate()))
        undo.append(partial(np.random.set_state, np.random.get_state()))
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield
