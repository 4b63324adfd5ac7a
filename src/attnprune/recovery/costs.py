"""What tuning costs, said beforehand: :class:`Estimate`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..bars import bar
from ..nn.nested import tensors_in
from .tuned import LowRank
from .tuning import CHECKS, Tuner

TRIES = 3
"""Batches, beside the largest, on which a step is timed twice: what the dense model says unknown, and known."""


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
    sizes = _sizes(tuner)
    *steps, largest = _typical(sizes)
    with bar(what="estimate", shown=tuner.progress, total=4 + 2 * TRIES) as shown:
        try:
            opening = _seconds(tuner, tuner.held_loss, shown)  # the dense model tells what it says
            look = _seconds(tuner, tuner.held_loss, shown)
            saved = _Saved()
            with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda kept: kept.tensor):
                _step(tuner, largest, shown)
            told = max(one.size for one in tuner.objective.kept.values()) if tuner.objective.kept else 0
            new = [_step(tuner, step, shown) for step in steps]
            known = [_step(tuner, step, shown) for step in (*steps, largest)]
        finally:
            tuner.write(tuner.first)
    times, more = _of_all(sizes, [*steps, largest], new, known)
    count, looks, again = len(times), opening + CHECKS * look, mean(times)
    if tuner.total is None:
        left = max(tuner.recovery.length.amount - looks, more * again)
        epoch = more * again * count
        total = int(left / (more * again) if left <= epoch else count + (left - epoch) / again)
    else:
        total = tuner.total
    spent = more * sum(times[:total]) + max(total - count, 0) * again
    room = _bytes(tuner, saved.most, told, told * sum(sizes) / max(sizes) / count)
    return Estimate(total, looks + spent, room, spent / total, look)


def _sizes(tuner: Tuner) -> list[int]:
    """How many elements the batches of the first epoch have, in its order."""
    data = (tuner.data.train[number] for number in tuner.order(0))
    return [max(1, sum(tensor.numel() for tensor in tensors_in(batch))) for batch in data]


def _typical(sizes: Sequence[int]) -> list[int]:
    """Which batches to time: the smallest, from there two up to the largest, and that at last.

    >>> _typical([8, 1, 3, 5, 7, 2, 4])
    [1, 2, 3, 0]
    """
    *rest, largest = sorted(range(len(sizes)), key=sizes.__getitem__)
    rest = rest or [largest]
    return [*(rest[part * len(rest) // TRIES] for part in range(TRIES)), largest]


def _of_all(
    sizes: Sequence[int], steps: Sequence[int], new: Sequence[float], known: Sequence[float]
) -> tuple[list[float], float]:
    """Seconds of a step on each batch, and how many times that it takes where the dense model has not told of it.

    In between what was timed, time is linear in size.

    Args:
        sizes: of all batches.
        steps: what was timed; where there are few batches, some of them again.
        new: seconds, first; of all but the last.
        known: seconds when it was met again.

    >>> times, more = _of_all([10, 20, 40, 30], [0, 1, 2], [1.5, 3.0], [1.0, 2.0, 6.0])
    >>> [round(time, 6) for time in times], more
    ([1.0, 2.0, 6.0, 4.0], 1.5)
    """
    first = dict(reversed([*zip(steps, new, strict=False)]))  # of one that is there twice, when it was new
    more = median(first[step] / again for step, again in zip(steps, known, strict=True) if step in first)
    found: dict[int, list[float]] = {}
    for step, again in zip(steps, known, strict=True):
        found.setdefault(sizes[step], []).append(min(again, first.get(step, again)))
    places = sorted(found)
    times: list[float] = np.interp(sizes, places, [median(found[size]) for size in places]).tolist()
    return times, max(1.0, more)


def _step(tuner: Tuner, number: int, shown: Any) -> float:
    """Seconds of a step on a batch of the first epoch."""
    tuner.now.steps = number
    return _seconds(tuner, lambda: tuner.step(0.0), shown)


def _bytes(tuner: Tuner, activations: int, most: int, usual: float) -> int:
    """What is in memory at most: moments, copies of the beginning and the best, gradients, activations, and states.

    Args:
        tuner: what it is about.
        activations: of the largest batch.
        most: what the dense model says of the largest batch.
        usual: what it says of one of mean size.
    """
    values = sum(tensor.nbytes for tensor in tuner.tensors)
    shared = {parameter.data_ptr() for parameter in tuner.parameters}
    masters = sum(tensor.nbytes for tensor in tuner.tensors if tensor.data_ptr() not in shared)
    bases = sum(update.base.nbytes for update in tuner.updates if isinstance(update, LowRank))
    grads = sum(parameter.nbytes for parameter in tuner.parameters)
    repeats = tuner.again and not tuner.recovery.layerwise
    batches = len(tuner.data.held) + (len(tuner.data.train) if repeats else 1)
    room = sum(one.size for one in tuner.objective.kept.values()) + tuner.objective.room
    return int(4 * values + 2 * masters + bases + grads + activations + min(batches * usual, room + most))


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
