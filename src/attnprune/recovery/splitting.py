"""Which batches a model is tuned on, and which are kept aside to stop by: :func:`split`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..calibration.sample import divisible, picked, samples_in
from ..errors import DataError
from ..values.recovery import Recovery

MOST = 16
"""Batches that are held out of the data at most: a look at them must not take longer than the steps between."""
FEW = 4
"""Of fewer batches samples are held out, not whole batches."""


class Split(NamedTuple):
    """Batches to tune on, and batches that are kept aside."""

    train: list[Any]
    held: list[Any]


def split(data: object, recovery: Recovery) -> Split:
    """Reads the data once: no more of them than the steps need.

    Whole batches are held out, chosen by the seed; of fewer than four batches some samples of each.

    Raises:
        DataError: no batches, or a single sample.

    >>> [len(part) for part in split([torch.zeros(2, 3)] * 20, Recovery())]
    [18, 2]
    >>> [len(part[0]) for part in split([torch.zeros(20, 3)], Recovery())]
    [18, 2]
    """
    length = recovery.length
    most = int(length.amount) + MOST if length.unit == "steps" else None
    batches = _read("data", data, most)
    if not isinstance(recovery.held_out, (int, float)):
        return Split(batches, _read("held_out", recovery.held_out, None))
    chance = torch.Generator("cpu").manual_seed(recovery.seed)
    if len(batches) < FEW and any(_parts(batch) > 1 for batch in batches):
        return _of_samples(batches, recovery.held_out, chance)
    if len(batches) < 2:
        remedy = "pass more samples, or batches of their own as held_out="
        raise DataError("data", "samples to tune on, and others to stop by", "a single one", remedy)
    count = min(max(round(recovery.held_out * len(batches)), 1), len(batches) - 1, MOST)
    order = torch.randperm(len(batches), generator=chance, device="cpu").tolist()
    aside = set(order[:count])
    return Split([one for place, one in enumerate(batches) if place not in aside], [batches[i] for i in sorted(aside)])


def _read(where: str, data: object, most: int | None) -> list[Any]:
    if isinstance(data, (str, bytes, Tensor, Mapping)) or not isinstance(data, Iterable):
        remedy = "put a single batch in a list: data=[batch]"
        raise DataError(where, "an iterable of batches", f"a {type(data).__name__}", remedy)
    with torch.random.fork_rng(devices=()):  # a loader that shuffles draws a seed
        found = list(islice(data, most))
    if not found:
        remedy = "check the data set; was the iterator used up before"
        raise DataError(where, "at least one batch", "none", remedy)
    return found


def _parts(batch: Any) -> int:
    """Into how many samples a batch can be divided."""
    return samples_in(batch) if divisible(batch) else 1


def _of_samples(batches: list[Any], share: float, chance: torch.Generator) -> Split:
    """Some samples of every batch that has several."""
    train, held = [], []
    for batch in batches:
        parts = _parts(batch)
        if parts < 2:
            train.append(batch)
            continue
        count = min(ceil(share * parts), parts - 1)
        order = torch.randperm(parts, generator=chance, device="cpu")
        held.append(picked(batch, order[:count].sort().values))
        train.append(picked(batch, order[count:].sort().values))
    return Split(train, held)
