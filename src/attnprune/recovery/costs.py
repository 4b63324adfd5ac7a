"""What tuning costs, said beforehand: :class:`Estimate`."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bars import bar
from .tuned import LowRank
from .tuning import CHECKS, Tuner

TRIES = 3
"""Steps of either kind that are timed."""


class Estimate(NamedTuple):
    """What :func:`attnprune.recover` will take."""

    steps: int
    """How many steps; of a time how many fit into it."""
    seconds: float
    """How long it takes, but for the reading of the data."""
    bytes: int
    """Memory beside both models and the data."""
    step: float
    """Seconds of a step, on average."""
    look: float
    """Seconds of a look at what is held out."""

    def __str__(self) -> str:
        parts = f"{self.steps:,} steps of {1000 * self.step:,.1f} ms, "
        parts += f"{CHECKS + 1} looks at what is held out of {1000 * self.look:,.1f} ms"
        return f"about {self.seconds:,.1f} s ({parts}), {self.bytes / 2**20:,.1f} MB beside both models"


def estimated(tuner: Tuner) -> Estimate:
    """Takes a few steps, measures them, and undoes them."""
    count = len(tuner.data.train)
    with bar(what="estimate", shown=tuner.progress, total=3 + 2 * TRIES) as shown:
        try:
            opening = _seconds(tuner, tuner.held_loss, shown)  # the dense model tells what it says
            look = _seconds(tuner, tuner.held_loss, shown)
            saved = _Saved()
            with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda kept: kept.tensor):
                tuner.step(0.0)
            shown.update()
            new, known = (
                [_step(tuner, number, shown) for number in numbers] for numbers in (range(1, 1 + TRIES), [0] * TRIES)
            )
            told = max(one.size for one in tuner.objective.kept.values()) if tuner.objective.kept else 0
        finally:
            tuner.write(tuner.first)
    first, again = median(new[: max(count - 1, 1)]), median(known)
    looks = opening + CHECKS * look
    if tuner.total is None:
        left = max(tuner.recovery.length.amount - looks, first)
        steps = int(left / first if left <= count * first else count + (left - count * first) / again)
    else:
        steps = tuner.total
    spent = min(steps, count) * first + max(steps - count, 0) * again
    return Estimate(steps, looks + spent, _bytes(tuner, saved.most, told), spent / steps, look)


def _step(tuner: Tuner, number: int, shown: Any) -> float:
    """Seconds of a step on a batch of the first epoch."""
    tuner.now.steps = number
    return _seconds(tuner, lambda: tuner.step(0.0), shown)


def _bytes(tuner: Tuner, activations: int, told: int) -> int:
    """What is in memory at most: moments, copies of the beginning and the best, gradients, activations, and states."""
    values = sum(tensor.nbytes for tensor in tuner.tensors)
    shared = {parameter.data_ptr() for parameter in tuner.parameters}
    masters = sum(tensor.nbytes for tensor in tuner.tensors if tensor.data_ptr() not in shared)
    bases = sum(update.base.nbytes for update in tuner.updates if isinstance(update, LowRank))
    grads = sum(parameter.nbytes for parameter in tuner.parameters)
    repeats = tuner.again and not tuner.recovery.layerwise
    batches = len(tuner.data.held) + (len(tuner.data.train) if repeats else 1)
    room = sum(one.size for one in tuner.objective.kept.values()) + tuner.objective.room
    return int(4 * values + 2 * masters + bases + grads + activations + min(batches * told, room + told))


class _Saved:
    """Counts what is kept for the pass back at a time, each storage once, parameters left out."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.users: Counter[int] = Counter()

    def pack(self, tensor: Tensor) -> _Kept:
        return _Kept(tensor, self)


class _Kept:
    """A tensor that is kept for the pass back, counted as long as it is."""

    def __init__(self, tensor: Tensor, counts: _Saved) -> None:
        storage = tensor.untyped_storage()
        self.tensor, self.counts, self.key = tensor, counts, storage.data_ptr()
        self.size = 0 if isinstance(tensor, torch.nn.Parameter) else storage.nbytes()
        counts.users[self.key] += 1
        counts.now += self.size * (counts.users[self.key] == 1)
        counts.most = max(counts.most, counts.now)

    def __del__(self) -> None:
        self.counts.users[self.key] -= 1
        self.counts.now -= self.size * (self.counts.users[self.key] == 0)


def _seconds(tuner: Tuner, run: Callable[[], object], shown: Any) -> float:
    began = time.perf_counter()
    run()
    if tuner.device.type == "cuda":
        torch.cuda.synchronize(tuner.device)
    shown.update()
    return time.perf_counter() - began


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device; of a CPU's as far as the system tells, else 0."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return 0.0
