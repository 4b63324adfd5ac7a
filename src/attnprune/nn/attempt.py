"""Calls that succeed or leave everything as it was, one at a time: :class:`Attempt`."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _pop_mode
from torch.utils.hooks import RemovableHandle

from ..errors import BusyError

T = TypeVar("T")
_TURN: dict[str, int] = {}
"""Which thread's call is at work; one at a time, as random state and several settings of PyTorch are the process's."""
_RUNNING = threading.local()
"""Of every thread, the innermost attempt."""
_LOOK = threading.RLock()
"""Held while the garbage collector is off for :func:`_frames`."""
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_TURN.clear)
    os.register_at_fork(before=_LOOK.acquire, after_in_parent=_LOOK.release, after_in_child=_LOOK.release)
MACHINE = MemoryError, OSError, torch.cuda.OutOfMemoryError
"""What fails for reasons of the machine, and so says nothing about a model that was tried: it is passed on."""
PATIENCE = 60.0
"""Seconds to wait for a forward pass of another thread to end, or for a call that waits itself."""


class Attempt:
    """A call that changes something, or runs a model: where it fails, everything is put back.

    Of modules that is all that :class:`Snapshot` holds, of other objects their attributes, of PyTorch its modes; what
    else a call changes it says by :func:`undoing_with`. Values that are written in place are not put back. Calls of
    other threads wait until it is over, and forward passes of the same model in other threads are refused.

    Args:
        model: what the call is about; None: no model yet.
        owner: an object whose attributes the call may set.

    >>> model = nn.Linear(2, 2)
    >>> attempt = Attempt(model)
    >>> attempt.take()
    >>> _ = model.eval()
    >>> attempt.restore()
    >>> model.training
    True
    """

    def __init__(self, model: nn.Module | None, owner: Any = None) -> None:
        self.model: nn.Module | None = getattr(model, "_orig_mod", model)  # inside what torch.compile gave
        self.owner = owner
        self.outer: Attempt | None = getattr(_RUNNING, "attempt", None)
        self.modes = _modes()
        self.undo: list[Callable[[], object]] = []
        self.end: list[Callable[[], object]] = []
        self.handle: RemovableHandle | None = None

    def take(self) -> None:
        """Waits for its turn, and remembers everything.

        Raises:
            BusyError: the model runs in another thread, and does not come to an end; or a call in another thread does
                not, as it waits itself, maybe for this one.
        """
        _take_turn(me := threading.get_ident())
        _RUNNING.attempt = self
        if self.owner is not None:
            self.undo.append(_attributes(self.owner))
        if self.model is not None:
            self.undo.append(Snapshot(self.model.modules()).restore)
            if self.outer is None or self.outer.model is not self.model:
                self.handle = self.model.register_forward_pre_hook(_Refusal(me))
                _wait(self.model)

    def give(self) -> None:
        """Lets others take their turn."""
        if self.handle is not None:
            self.handle.remove()
        self.modes()
        _RUNNING.attempt = self.outer
        if self.outer is None and _TURN.get("thread") == threading.get_ident():
            del _TURN["thread"]

    def close(self, result: T) -> T:
        """The result of a call that is over: nothing is undone any more, but by a call around it."""
        self.give()
        if self.outer is not None:
            self.outer.undo += self.undo
            self.outer.end += self.end
            return result
        stack = ExitStack()
        for one in (*self.end, self.undo.clear):  # the latest first, and each, whatever another raises
            stack.callback(one)
        return (stack.__exit__(None, None, None), result)[1]  # in one line, as whatever is interrupted before is undone

    def restore(self) -> None:
        """Puts everything back, the latest first."""
        try:
            self.modes()
            _call(self.undo)
        finally:
            self.give()


def undoing_with(undo: Callable[[], object]) -> None:
    """Where the call that is running fails, even after this, ``undo`` is called; it may be twice."""
    attempt: Attempt | None = getattr(_RUNNING, "attempt", None)
    if attempt is not None:
        attempt.undo.append(undo)


def ending_with(end: Callable[[], object]) -> None:
    """Once the call that is running has succeeded, ``end`` is called: what could not be undone, such as removing files.

    It is no function of ours, so that nothing of ours can be interrupted then.
    """
    attempt: Attempt | None = getattr(_RUNNING, "attempt", None)
    if attempt is None:
        end()
    else:
        attempt.end.append(end)


@contextmanager
def undone() -> Iterator[list[Callable[[], object]]]:
    """What is put into the list is called when the block ends, the latest first; again, where that is interrupted.

    >>> with undone() as undo:
    ...     undo.append(lambda: print("last"))
    ...     undo.append(lambda: print("first"))
    first
    last
    """
    undo: list[Callable[[], object]] = []
    try:
        try:
            yield undo
        finally:
            _call(undo)
    except BaseException:
        _call(undo)
        raise


def _call(undo: Sequence[Callable[[], object]]) -> None:
    """Calls all, the latest first, also where one of them fails."""
    with ExitStack() as stack:
        for one in undo:
            stack.callback(one)


class Snapshot:
    """Class and attributes of some modules, what their tensors hold, flags and gradients, to put back.

    Values are not copied: what is written in place stays.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        each = {id(module): module for module in modules}
        self._saved = [(module, type(module), _shallow(module.__dict__)) for module in each.values()]
        tables = (table for module in each.values() for table in (module._parameters, module._buffers))
        tensors = {id(one): one for table in tables for one in table.values() if one is not None}
        grads = [one.grad for one in tensors.values() if one.is_leaf and one.grad is not None]
        self._tensors = [_told(one) for one in (*grads, *tensors.values())]

    def restore(self) -> None:
        """Puts everything back."""
        for module, kind, state in self._saved:
            if type(module) is not kind:
                object.__setattr__(module, "__class__", kind)
            _refill(module.__dict__, {key: value for key, (value, _) in state.items()})
            for value, content in state.values():
                if content is not None:
                    _refill(value, content)
        for tensor, data, flag, grad in self._tensors:
            if data is not None and not _same(tensor, data):
                tensor.data = data
            if tensor.requires_grad is not flag:
                tensor.requires_grad_(flag)
            if tensor.is_leaf and tensor.grad is not grad:
                tensor.grad = grad


def _told(tensor: Tensor) -> tuple[Tensor, Tensor | None, bool, Tensor | None]:
    """A tensor, what it holds (of plain ones), its flag and gradient."""
    plain = type(tensor) in (Tensor, nn.Parameter) and not torch._C._len_torch_dispatch_stack()
    return tensor, tensor.data if plain else None, tensor.requires_grad, tensor.grad if tensor.is_leaf else None


def _same(tensor: Tensor, data: Tensor) -> bool:
    """Whether a tensor holds still what it held."""
    facts: Sequence[Callable[[Tensor], object]] = (
        lambda x: (x.shape, x.dtype, x.device, x.layout),
        lambda x: x.layout is not torch.strided or (x.stride(), x.data_ptr()),
    )
    return all(fact(tensor) == fact(data) for fact in facts)


def _shallow(state: dict[str, Any]) -> dict[str, tuple[Any, dict[str, Any] | None]]:
    """Every attribute, and for the dicts of a module also what they hold."""
    return {key: (value, dict(value) if isinstance(value, dict) else None) for key, value in state.items()}


def _refill(table: dict[str, Any], content: Mapping[str, Any]) -> None:
    if [*table] != [*content] or any(table[key] is not value for key, value in content.items()):
        table.clear()
        table.update(content)


def _attributes(owner: Any) -> Callable[[], None]:
    before = dict(owner.__dict__)
    return lambda: _refill(owner.__dict__, before)


def _modes() -> Callable[[], None]:
    """Puts back what a block that was left by an error at its very end may have left on."""
    grad, functions = torch.is_grad_enabled(), torch._C._len_torch_function_stack()
    dispatch = torch._C._len_torch_dispatch_stack()

    def restore() -> None:
        while torch._C._len_torch_function_stack() > functions:
            torch._C._pop_torch_function_stack()
        while torch._C._len_torch_dispatch_stack() > dispatch:
            _pop_mode()
        torch.set_grad_enabled(grad)

    return restore


class _Refusal:
    """A hook of a model's forward, for as long as a call is at work on it."""

    def __init__(self, thread: int) -> None:
        self.thread = thread

    def __call__(self, module: nn.Module, _: object) -> None:
        if _TURN.get("thread") == self.thread != threading.get_ident():
            raise BusyError(
                type(module).__name__,
                "a model that no other thread is planning for, or changing",
                "one that a call of attnprune is at work on in another thread",
                "wait for it, or give each thread a copy of the model",
            )


def _take_turn(me: int) -> None:
    """Waits until no other thread's call is at work, however long it works; not for one that does but wait."""
    place, until = None, 0.0
    while (holder := _TURN.setdefault("thread", me)) != me:
        frame = _frames().get(holder)
        here = None if frame is None or frame.f_code.co_filename != threading.__file__ else (frame, frame.f_lasti)
        if here is None or here != place:
            place, until = here, time.monotonic() + PATIENCE
        elif time.monotonic() > until:
            raise BusyError(
                "attnprune",
                "a call in another thread that comes to an end",
                f"one that has waited for {PATIENCE:.0f} s, maybe for this thread",
                "let no loss_fn, evaluate or data set wait for calls of attnprune in other threads",
            )
        time.sleep(0.001)


def _wait(model: nn.Module) -> None:
    """Waits until no other thread is inside the model's forward."""
    until = time.monotonic() + PATIENCE
    while _runs_elsewhere(model):
        if time.monotonic() > until:
            raise BusyError(
                type(model).__name__,
                "a model that runs in no other thread",
                f"a forward pass in another one, for {PATIENCE:.0f} s",
                "wait for it, or give each thread a copy of the model",
            )
        time.sleep(0.001)


def _runs_elsewhere(model: nn.Module) -> bool:
    for thread, top in _frames().items():
        frame: FrameType | None = top if thread != threading.get_ident() else None
        while frame is not None:
            if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is model:
                return True
            frame = frame.f_back
    return False


def _frames() -> dict[int, FrameType]:
    """The innermost frame of every thread.

    Before Python 3.12 garbage may be collected inside ``sys._current_frames``, and wait for ever for a lock that it
    holds itself (CPython issue 106883). So none is collected then.
    """
    if sys.version_info >= (3, 12):
        return sys._current_frames()
    with _LOOK, undone() as undo:
        if gc.isenabled():
            undo.append(gc.enable)
            gc.disable()
        return sys._current_frames()
