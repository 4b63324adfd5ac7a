"""A few inputs of the user's, to run a model on without a trace: :class:`Sample`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..nn.attempt import MACHINE, undone
from ..nn.nested import tensors_in
from ..nn.outputs import OutputFn, outputs_of
from ..nn.unfused import Unfused
from .batches import device_of, forward, to_device
from .losses import LossFn
from .quiet import evaluated

MOST = 4
"""Samples that are run."""


class Sample:
    """A few inputs of the user's: example inputs, or the first samples of the data.

    Data are read once: the first batch is remembered as it goes by. Of data that nobody has read it is taken when it is
    needed, and given back.

    Args:
        example_inputs: a tensor, a tuple of positional arguments or a mapping; they go before data.
        data: batches.
        loss_fn: how the model is called with a batch that it does not take itself.
        output_fn: takes the model's output and gives the tensors to look at; None: :func:`outputs_of` does.
    """

    def __init__(
        self,
        example_inputs: Any,
        data: Iterable[Any] | None,
        loss_fn: LossFn | None = None,
        output_fn: OutputFn | None = None,
    ) -> None:
        self.example_inputs, self.loss_fn, self.output_fn = example_inputs, loss_fn, output_fn
        self._first: Any = _NOTHING
        self.data: Iterable[Any] | None = data
        """The data, to be read instead of what was given."""
        single = isinstance(data, (str, bytes, Tensor, Mapping))
        if example_inputs is None and not single and isinstance(data, Iterable):
            if isinstance(data, Iterator):
                self.data = self.watched(data)
            else:
                self.data = (_SizedWatched if isinstance(data, Sized) else _Watched)(self, data)

    def watched(self, data: Iterable[Any]) -> Iterator[Any]:
        """The same batches; the first is remembered."""
        for batch in data:
            if self._first is _NOTHING:
                self._first = batch
            yield batch

    @property
    def given(self) -> bool:
        """Whether there are inputs; takes the first batch of data that were not read."""
        if self.example_inputs is not None or self._first is not _NOTHING:
            return True
        if isinstance(self.data, Iterator):
            first = next(self.data, _NOTHING)
            self.data = self.data if first is _NOTHING else chain([first], self.data)
        elif isinstance(self.data, _Watched):
            with torch.random.fork_rng(devices=()):  # a loader that shuffles draws a seed
                next(iter(self.data), None)
        return self._first is not _NOTHING

    @property
    def samples(self) -> int:
        """How many samples are run."""
        return samples_in(self.example_inputs if self.example_inputs is not None else first_of(self._first))

    def run(self, model: nn.Module) -> list[Tensor]:
        """The tensors of the model's output (:func:`attnprune.nn.outputs.outputs_of`), in evaluation mode and without
        gradients; the model is left as found. Of a ``loss_fn`` it is what the model, or parts of it, give inside: a
        loss near zero, as of two outputs that agree, is nothing but rounding."""
        with evaluated(model), Unfused():
            torch.default_generator.manual_seed(0)
            if self.example_inputs is not None:
                output = _called(model, self.example_inputs)
            else:
                batch = to_device(first_of(self._first), device_of(model))
                if self.loss_fn is not None:
                    with _outermost(model) as given:
                        loss = self.loss_fn(model, batch)
                    return _tensors(given, self.output_fn) or _tensors([loss])
                output = forward(model, batch)
            return [one.tensor for one in outputs_of(output, self.output_fn)]

    def quietly(self, model: nn.Module) -> object:
        """Runs the model, whatever it raises about the inputs: that is said where they are needed."""
        try:
            return self.run(model) if self.given else None
        except MACHINE:
            raise
        except Exception:  # the result is verified with the same inputs, and the report says why it could not be
            return None


@contextmanager
def _outermost(model: nn.Module) -> Iterator[list[Any]]:
    """What a model gives inside the block; or its parts, where they are called one by one."""
    given: list[Any] = []
    depth = [0]

    def before(*_: Any) -> None:
        depth[0] += 1

    def after(_: nn.Module, inputs: Any, output: Any) -> None:
        depth[0] -= 1
        if not depth[0]:
            given.append(output)

    with undone() as undo:
        for module in model.modules():
            undo.append(module.register_forward_pre_hook(before).remove)
            undo.append(module.register_forward_hook(after, always_call=True).remove)
        yield given


def _tensors(outputs: Sequence[Any], output_fn: OutputFn | None = None) -> list[Tensor]:
    """The tensors of outputs, as far as they have any."""
    found: list[Tensor] = []
    for output in outputs:
        with suppress(DataError):
            found += [one.tensor for one in outputs_of(output, output_fn)]
    return found


class _Watched:
    """Data that can be read again, whose first batch is remembered."""

    def __init__(self, sample: Sample, data: Iterable[Any]) -> None:
        self.sample, self.whole = sample, data

    def __iter__(self) -> Iterator[Any]:
        return self.sample.watched(self.whole)


class _SizedWatched(_Watched):
    """The same of data that have a length."""

    def __len__(self) -> int:
        return len(self.whole)  # type: ignore[arg-type]


_NOTHING = object()


def _called(model: nn.Module, inputs: Any) -> Any:
    inputs = to_device(inputs, device_of(model))
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def spread(data: Iterable[Any], samples: int) -> Iterator[Any]:
    """Evenly spread batches where the data have a length, else the first ones."""
    count = len(data) if isinstance(data, Sized) else 0
    wanted: set[int] = set()
    seen = 0
    for i, batch in enumerate(data):
        if not i:
            batches = min(max(count, 1), -(-samples // max(samples_in(batch), 1)))
            wanted = {int((j + 0.5) * count / batches) for j in range(batches)}
        if not count or i in wanted:
            yield batch
            seen += samples_in(batch)
        if (not count and seen >= samples) or (count and i >= max(wanted)):
            return


def samples_in(batch: Any) -> int:
    """Samples in a batch: the first dimension of its first tensor, at any depth; 1 if there is none."""
    first = next(tensors_in(batch), None)
    return len(first) if first is not None and first.dim() else 1


def counts_in(batch: Any) -> tuple[int, ...]:
    """The first dimensions of a batch's tensors, each once, in their order."""
    return tuple(dict.fromkeys(len(x) for x in tensors_in(batch) if x.dim() and len(x)))


def samples_of(rows: int, counts: Sequence[int]) -> int | None:
    """Of how many samples these sequences are, on which an attention runs; None if that cannot be told.

    They are samples themselves, or windows and frames of samples, those of a sample one after another.

    Args:
        rows: how many sequences.
        counts: of the batch (:func:`counts_in`).

    >>> samples_of(8, (8,)), samples_of(32, (8,)), samples_of(32, (8, 4)), samples_of(9, (8,))
    (8, 8, None, None)
    """
    if rows in counts:
        return rows
    fits = {count for count in counts if count == 1 == len(counts) or (count > 1 and rows % count == 0)}
    return fits.pop() if len(fits) == 1 else None


def first_of(batch: Any, most: int = MOST) -> Any:
    """The first samples of a batch whose tensors all have the samples first; others whole."""
    return picked(batch, slice(most)) if divisible(batch) else batch


def divisible(batch: Any) -> bool:
    """Whether all tensors of a batch have the samples first, as far as their sizes tell."""
    tensors = list(tensors_in(batch))
    return bool(tensors) and not any(not x.dim() or len(x) != len(tensors[0]) or x.is_nested for x in tensors)


def picked(batch: Any, which: slice | Tensor) -> Any:
    """Some samples of a batch that is :func:`divisible`.

    Args:
        which: a run of them, or ``(count,)`` int64.
    """
    if isinstance(batch, Tensor):
        return batch[which if isinstance(which, slice) else which.to(batch.device)]
    if isinstance(batch, Mapping):
        return {key: picked(value, which) for key, value in batch.items()}
    return type(batch)(picked(value, which) for value in batch) if type(batch) in (tuple, list) else batch
