"""A few inputs of the user's, to run a model on without a trace: :class:`Sample`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .batches import device_of, forward, to_device
from .losses import LossFn
from .quiet import evaluated, unfused

MOST = 4
"""Samples that are run."""


class Sample(NamedTuple):
    """A few inputs, and how the model takes them."""

    call: Callable[[nn.Module], Any]
    samples: int

    def run(self, model: nn.Module) -> Any:
        """The model's output, in evaluation mode and without gradients; the model is left as found."""
        with evaluated(model), unfused():
            torch.default_generator.manual_seed(0)
            return self.call(model)


def sample_of(
    example_inputs: Any, data: Iterable[Any] | None, loss_fn: LossFn | None = None
) -> tuple[Sample | None, Iterable[Any] | None]:
    """A sample of what the user gave, and the data, of which nothing is used up.

    Args:
        example_inputs: a tensor, a tuple of positional arguments or a mapping; they go before data.
        data: batches; a few samples of the first one are taken.
        loss_fn: how the model is called with a batch that it does not take itself.
    """
    if example_inputs is not None:
        return Sample(lambda model: _called(model, example_inputs), _size(example_inputs)), data
    if data is None or isinstance(data, (str, bytes, Tensor, Mapping)) or not isinstance(data, Iterable):
        return None, data
    with torch.random.fork_rng(devices=()):  # a loader that shuffles draws a seed
        batches = iter(data)
        first = next(batches, _NOTHING)
    if first is _NOTHING:
        return None, data
    if isinstance(data, Iterator):
        data = chain([first], batches)
    batch = first_of(first)

    def call(model: nn.Module) -> Any:
        moved = to_device(batch, device_of(model))
        return forward(model, moved) if loss_fn is None else loss_fn(model, moved)

    return Sample(call, _size(batch)), data


_NOTHING = object()


def _called(model: nn.Module, inputs: Any) -> Any:
    inputs = to_device(inputs, device_of(model))
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from _tensors(value)


def _size(batch: Any) -> int:
    """Samples in a batch: the first dimension of its first tensor."""
    first = next(_tensors(batch), None)
    return len(first) if first is not None and first.dim() else 1


def first_of(batch: Any, most: int = MOST) -> Any:
    """The first samples of a batch whose tensors all have the samples first; others whole."""
    tensors = list(_tensors(batch))
    if any(not x.dim() or len(x) != len(tensors[0]) or x.is_nested for x in tensors) or not tensors:
        return batch
    return _cut(batch, most)


def _cut(batch: Any, most: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[:most]
    if isinstance(batch, Mapping):
        return {key: _cut(value, most) for key, value in batch.items()}
    return type(batch)(_cut(value, most) for value in batch) if type(batch) in (tuple, list) else batch


def quietly(sample: Sample | None, model: nn.Module) -> Callable[[], object] | None:
    """Runs the model on a sample, whatever it raises; None where there is no sample."""
    if sample is None:
        return None

    def run() -> object:
        try:
            return sample.run(model)
        except Exception:  # what a model raises about inputs is said where they are needed
            return None

    return run
