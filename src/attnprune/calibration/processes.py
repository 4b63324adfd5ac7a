"""Several processes of ``torch.distributed`` that work out one result together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ..errors import PlanMismatchError, ProcessError
from ..nn.attempt import undone

T = TypeVar("T")
_sharing: ContextVar[bool] = ContextVar("attnprune_sharing", default=False)
_agreeing: ContextVar[bool] = ContextVar("attnprune_agreeing", default=False)


def active() -> bool:
    """Whether this process is one of several of ``torch.distributed``."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def sharing() -> bool:
    """Whether what is summed here is to be summed over all processes."""
    return _sharing.get() and active()


@contextmanager
def across_processes() -> Iterator[None]:
    """Inside the block, every process's ``data`` are its share of all data, and one plan comes of them everywhere.

    Scores and calibration sums are added up over all processes of ``torch.distributed``, as if one had seen all data;
    where planning fails in one process it fails in all, before anything changes. Every process must make the same calls
    inside. In a single process it does nothing.

    >>> import torch, attnprune
    >>> model = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True)
    >>> data = [torch.randn(2, 5, 32)]  # of this process
    >>> with attnprune.across_processes():
    ...     plan = attnprune.make_plan(model, 0.5, data=data)
    """
    with undone() as undo:
        undo.append(partial(_sharing.set, _sharing.get()))
        _sharing.set(True)
        yield


def agree(make: Callable[[], T], digest: Callable[[T], str] = lambda _: "") -> T:
    """What ``make`` gives, if it gives the same in every process; simply what it gives where nothing is shared.

    Exchanges carry either what they are about or the error that came in between, so that the processes that wait for
    one that failed hear of it, whatever they wait for.

    Raises:
        ProcessError: it failed in another process; in that one its own error goes on.
        PlanMismatchError: in every process, if any two digests differ.
    """
    if _agreeing.get() or not sharing():
        return make()
    try:
        with undone() as undo:
            undo.append(partial(_agreeing.set, False))
            _agreeing.set(True)
            made = make()
            digests = exchange(digest(made))
    except (ProcessError, PlanMismatchError):
        raise
    except Exception as error:
        with suppress(ProcessError):
            _gather(None, f"{type(error).__name__}: {error}"[:500])
        raise
    if len(set(digests)) > 1:
        found = ", ".join(f"{one[:8]} on rank {rank}" for rank, one in enumerate(digests[:4]))
        remedy = "give every process the same model and options, or send one plan to all (Plan.to_json)"
        raise PlanMismatchError("plan", "the same plan in every process", found, remedy)
    return made


def exchange(value: Any) -> list[Any]:
    """This value of every process, in the order of ranks.

    Raises:
        ProcessError: one of them sent an error instead.
    """
    return _gather(value, None)


def _gather(value: Any, error: str | None) -> list[Any]:
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, (error, value))
    failed = [f"on rank {rank}, {text}" for rank, (text, _) in enumerate(found) if text is not None]
    if failed:
        raise ProcessError("planning", "success in every process", "; ".join(failed), "mend it there; nothing changed")
    return [one for _, one in found]


def of_first(value: T) -> T:
    """What the first process has, in every process: times are told by one clock. The value where nothing is shared."""
    found: T = exchange(value)[0] if sharing() else value
    return found


def pooled(value: T) -> T:
    """The sum over all processes of tensors and numbers, at any depth of mappings, lists and tuples.

    Where nothing is shared it is the value itself. Tensors are summed in float64 and come back as they were.
    """
    if not sharing():
        return value
    shapes = exchange([tuple(one.shape) for one in _leaves(value)])
    if any(theirs != shapes[0] for theirs in shapes):
        found = f"{len(shapes[0])} sums on rank 0, and others elsewhere"
        raise PlanMismatchError("planning", "sums of one shape in every process", found, "give all the same model")
    summed: T = _rebuilt(value, iter(add_up(list(_leaves(value)))))
    return summed


def add_up(tensors: list[Tensor], group: Any = None) -> list[Tensor]:
    """Every tensor's sum over the processes of a group, in float64; as they were in shape, type and device."""
    nccl = distributed.get_backend(group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
    totals = [one.detach().to(device, torch.float64, copy=True) for one in tensors]
    for total in totals:
        distributed.all_reduce(total, group=group)
    return [total.to(one.device, one.dtype) for total, one in zip(totals, tensors, strict=True)]


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _leaves(one)
    else:
        yield value if isinstance(value, Tensor) else torch.tensor(value, device="cpu", dtype=torch.float64)


def _rebuilt(value: Any, summed: Iterator[Tensor]) -> Any:
    if isinstance(value, Mapping):
        return {key: _rebuilt(one, summed) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_rebuilt(one, summed) for one in value)
    total = next(summed)
    return total if isinstance(value, Tensor) else type(value)(total)
