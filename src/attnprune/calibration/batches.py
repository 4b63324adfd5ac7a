"""Batches: how a model is called with one, and where it goes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from ..errors import DataError, OptionError


def forward(model: nn.Module, batch: Any) -> Any:
    """Calls the model with a batch: a mapping as keywords, a pair's first, a tensor as it is."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return model(batch[0])
    if isinstance(batch, Tensor):
        return model(batch)
    raise DataError(
        "data",
        "batches that are a mapping, a pair (inputs, targets) or a tensor",
        f"a {type(batch).__name__}",
        "pass loss_fn, which then takes batches of any form",
    )


def batches(data: Iterable[Any] | None, device: torch.device, progress: bool, what: str) -> Iterator[Any]:
    """The batches of ``data`` on the model's device, with a progress bar; an empty iterable raises."""
    if data is None or isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        raise DataError(
            "data",
            f"an iterable of batches, which {what} scores need",
            repr(data),
            "pass data=, for example a DataLoader",
        )
    if isinstance(data, (Tensor, Mapping)):
        raise DataError("data", "an iterable of batches", "a single batch", "put it in a list: data=[batch]")
    count = 0
    for batch in tqdm(data, desc=f"attnprune: {what}", disable=not progress or not sys.stderr.isatty(), leave=False):
        count += 1
        yield to_device(batch, device)
    if count == 0:
        raise DataError("data", "at least one batch", "none", "check the data set; was the iterator used up before")


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device; mappings, tuples and lists are followed."""
    if isinstance(batch, Tensor):
        moved = batch.to(device)
        return moved.clone() if moved.is_inference() else moved  # else no gradient can be taken through it
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch) if type(batch) in (tuple, list) else batch
    return batch


def device_of(model: nn.Module) -> torch.device:
    """Where a model's inputs go: the device of its first parameter."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def device_named(device: str | torch.device, where: str = "device", *, here: bool = True) -> torch.device:
    """A device, of this machine unless ``here`` is False.

    Raises:
        OptionError: there is no such device.

    >>> device_named("cpu")
    device(type='cpu')
    """
    try:
        place = torch.device(device)
        if here:
            torch.empty(0, device=place)
    except Exception as error:  # torch raises four kinds, by the kind of device
        expected = "a device of this machine" if here else "a device"
        found = f"{device!r} ({str(error).partition(chr(10))[0][:80]})"
        raise OptionError(where, expected, found, 'write "cpu", or "cuda" where there is one') from error
    return place
