"""Batches: how a model is called with one, and where it goes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..bars import bar
from ..errors import AttnPruneError, DataError, OptionError
from ..nn.attempt import MACHINE, undone
from ..nn.nested import tensors_in


class Call(NamedTuple):
    """How a model is called with a batch."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    targets: Any = None
    """What the batch has beside inputs; None if it has nothing."""
    sure: bool = True
    """Whether the model's signature says so; else trying it shows."""

    def run(self, model: nn.Module, batch: Any) -> Any:
        """The model's output.

        Raises:
            DataError: the model cannot be called so, or only with samples along the first dimension.
        """
        if self.sure:
            with of_one_dtype(model, batch):
                return called(model, self.args, self.kwargs)
        try:
            return model(*self.args, **self.kwargs)
        except MACHINE:
            raise
        except Exception as error:  # whatever a model raises that does not take a mapping
            raise unfit(model, batch) from error


def call_of(model: nn.Module, batch: Any) -> Call:
    """How a model is called with a batch, by the signature of its forward; the first of these that it takes.

    A tensor is the only argument; a mapping has keywords, or is the only argument itself (as sentence-transformers have
    it). Of a tuple or list the last are targets and the others inputs; else all are inputs. Inputs that are a tuple or
    a mapping in turn are called as such a batch is.

    Raises:
        DataError: the model takes none of them.

    >>> call_of(nn.Linear(2, 1), (1, 2)).targets
    2
    >>> call_of(nn.Bilinear(2, 2, 1), ((1, 2), 3)), call_of(nn.Bilinear(2, 2, 1), (1, 2)).targets
    (Call(args=(1, 2), kwargs={}, targets=3, sure=True), None)
    """
    for call in _calls(batch):
        if not call.sure or _takes(model, call):
            return call
    raise unfit(model, batch)


def _calls(batch: Any) -> Iterator[Call]:
    if isinstance(batch, (tuple, list)):
        if len(batch) == 2:
            yield from (one._replace(targets=batch[1]) for one in _inputs(batch[0]))
        elif len(batch) > 2:
            yield Call(tuple(batch[:-1]), {}, batch[-1])
        yield Call(tuple(batch), {})
    elif isinstance(batch, (Mapping, Tensor)):
        yield from _inputs(batch)


def _inputs(inputs: Any) -> Iterator[Call]:
    if isinstance(inputs, Mapping):
        if all(isinstance(key, str) for key in inputs):
            yield Call((), inputs)
        yield Call((inputs,), {}, sure=False)
    elif isinstance(inputs, (tuple, list)):
        yield Call(tuple(inputs), {})
    yield Call((inputs,), {})


def _takes(model: nn.Module, call: Call) -> bool:
    """Whether the signature of a model's forward takes a call, and labels that it can do without are not given by their
    place."""
    given = _given(model, call)
    if given is None or call.kwargs:
        return given is not None
    optional = [one.name for one in given if one.default is not one.empty]
    return not any("label" in name or "target" in name for name in optional)


def _given(model: nn.Module, call: Call) -> list[inspect.Parameter] | None:
    """The parameters of a model's forward that a call gives, as far as its signature tells; None if it takes no such
    call. Of keywords at least one must be one of its own names."""
    signature = _signature(model)
    if signature is None:
        return []
    try:
        bound = signature.bind(*call.args, **call.kwargs).arguments
    except TypeError:
        return None
    named = {key for key, one in signature.parameters.items() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
    if call.kwargs and named and not named & bound.keys():
        return None
    return [signature.parameters[key] for key in bound]


def _signature(model: nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):  # compiled code has none
        return None


def unfit(model: nn.Module, batch: Any, where: str = "data") -> DataError:
    """The error of a batch that a model cannot be called with: shows the signature and the batch."""
    signature = _signature(model)
    parameters = [] if signature is None else signature.parameters.values()
    takes = ", ".join(str(one.replace(annotation=one.empty)) for one in parameters)
    expected, remedy = "a mapping, a tensor or a tuple", "rename or reorder them"
    if where == "data":
        expected = "batches that are a mapping, a tensor, a pair (inputs, targets) or a tuple"
        remedy = "rename or reorder what batches hold, or pass loss_fn, which then takes batches of any form"
    return DataError(where, f"{expected}, for forward({takes[:160]})", described(batch), remedy)


def called(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], where: str = "data") -> Any:
    """The output of ``model(*args, **kwargs)``.

    Raises:
        DataError: it fails, and its signature takes no such call, there is no tensor in what it is called with, or with
            one more dimension in front it would not fail: that is a sample, not a batch.
    """
    try:
        return model(*args, **kwargs)
    except (AttnPruneError, *MACHINE):
        raise
    except Exception as error:  # whatever a model raises where a dimension is missing
        if _given(model, Call(args, kwargs)) is None:
            raise unfit(model, kwargs or args, where) from error
        if next(tensors_in([args, kwargs]), None) is None:
            remedy = 'make tensors of them: torch.tensor(...), or return_tensors="pt" of a tokenizer'
            raise DataError(where, "tensors", described(kwargs or args), remedy) from error
        if not _runs(model, _lifted(args), _lifted(kwargs)):
            raise
        expected = "a batch, with samples along the first dimension"
        remedy = "put a single sample in a batch with x[None], or take a DataLoader, which makes batches"
        raise DataError(where, expected, described(kwargs or args), remedy) from error


def _runs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a model takes this: a trial, after which the first error is raised, as it is or as the cause."""
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except MACHINE:
        raise
    except Exception:  # whatever a model raises; that it does is the answer
        return False
    return True


def _lifted(value: Any) -> Any:
    """A value whose tensors have one more dimension in front."""
    if isinstance(value, Tensor):
        return value[None]
    if isinstance(value, Mapping):
        return {key: _lifted(one) for key, one in value.items()}
    return tuple(_lifted(one) for one in value) if isinstance(value, (tuple, list)) else value


@contextmanager
def of_one_dtype(model: nn.Module, batch: Any, where: str = "data") -> Iterator[None]:
    """What a model raises about dtypes, where a batch has others than its parameters, as an error of the batch.

    Raises:
        DataError: both dtypes, and how to convert.
    """
    try:
        yield
    except RuntimeError as error:
        own = next((one.dtype for one in model.parameters() if one.is_floating_point()), None)
        given = {one.dtype for one in tensors_in(batch) if one.is_floating_point()} - {own}
        if own is None or not given or "type" not in str(error):
            raise
        found = f"{', '.join(sorted(map(str, given)))} ({str(error).partition(chr(10))[0][:80]})"
        expected, remedy = f"tensors of {own}, as the model's parameters", f"convert them: x.to({own})"
        raise DataError(where, expected, found, remedy) from error


def described(batch: Any) -> str:
    """A batch in words: what it is made of, and shapes.

    >>> described({"x": torch.zeros(2, 3), "y": [1, None]})
    'a dict {x: (2, 3), y: [int, NoneType]}'
    """
    if isinstance(batch, (Tensor, Mapping, tuple, list)):
        return f"a {type(batch).__name__} {_words(batch)}"[:160]
    return f"a {type(batch).__name__}"


def _words(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_words(one)}" for key, one in [*value.items()][:8]) + "}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_words(one) for one in value[:8]) + "]"
    return type(value).__name__


def forward(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch (:func:`call_of`)."""
    return call_of(model, batch).run(model, batch)


@contextmanager
def answers(model: nn.Module) -> Iterator[list[Any]]:
    """Collects what a model returns, call by call, while the block lasts."""
    found: list[Any] = []
    with undone() as undo:
        undo.append(model.register_forward_hook(lambda module, inputs, output: found.append(output)).remove)
        yield found


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
    for batch in bar(data, what=what, shown=progress):
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
