"""Work that threads share, each computing alone: :func:`shared`.

PyTorch splits every operation among its threads, and then waits for the slowest of them. On a machine that does
something else too, that is the one which shares a core, and many small operations wait for it again and again. Here
every thread takes whole pieces of work, the next as soon as one is done, and waits for nobody.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

import torch

from .kept import eager

Work = Callable[[Any, int], object]
_THREADS: list[Thread] = []
"""Each of them waits for orders, and computes alone."""
_ORDERS: SimpleQueue[Order] = SimpleQueue()
_BUSY = Lock()
"""Held while an order is carried out."""


class Order:
    """Tasks that some threads take one by one.

    Args:
        tasks: what there is to do.
        work: is called with a task, and with a number below ``threads`` that no other thread has.
        threads: how many threads take part.
    """

    def __init__(self, tasks: Iterable[Any], work: Work, threads: int) -> None:
        self.tasks, self.work, self.threads = deque(tasks), work, threads
        self.places, self.ended = deque(range(threads)), SimpleQueue[BaseException | None]()
        self.inference = torch.is_inference_mode_enabled()

    def take_part(self) -> None:
        """Takes tasks until none is left."""
        place, error = self.places.popleft(), None
        try:
            with torch.inference_mode(self.inference), torch.no_grad():
                for task in self._left():
                    self.work(task, place)
        except BaseException as found:  # raised where the order was given
            self.tasks.clear()
            error = found
        self.ended.put(error)

    def _left(self) -> Iterator[Any]:
        while True:
            try:
                yield self.tasks.popleft()
            except IndexError:
                return

    def wait(self) -> None:
        """Until all threads are done.

        Raises:
            BaseException: what one of them raised.
        """
        try:
            errors = [self.ended.get() for _ in range(self.threads)]
        finally:
            self.tasks.clear()
        for error in errors:
            if error is not None:
                raise error


def shared(tasks: Iterable[Any], work: Work, threads: int) -> bool:
    """Runs ``work(task, place)`` for all tasks, each in one of some threads, and waits for them.

    Only plain eager code without gradients: threads know of no mode that is on here, but for inference mode.

    Args:
        tasks: what there is to do.
        work: is called with a task, and with a number below ``threads`` that no other thread has.
        threads: how many take part. Each computes with one thread of its own.

    Returns:
        Whether that was done. Else nothing was: another thread has given an order, or a mode or a profiler would miss
        what runs in other threads.

    >>> done = []
    >>> shared("abc", lambda task, place: done.append((task, place < 2)), 2), sorted(done)
    (True, [('a', True), ('b', True), ('c', True)])
    """
    taken = False
    try:
        taken = _unobserved() and _BUSY.acquire(blocking=False)
        if taken:
            _raise_to(threads)
            order = Order(tasks, work, threads)
            for _ in range(threads):
                _ORDERS.put(order)
            order.wait()
        return taken
    finally:
        if taken:
            _BUSY.release()


def _unobserved() -> bool:
    quiet = torch._C._len_torch_function_stack() == 0 and not torch._C._autograd._profiler_enabled()
    return quiet and eager()


def _raise_to(threads: int) -> None:
    """Starts what threads are missing."""
    if len(_THREADS) >= threads:
        return
    own, ready = torch.get_num_threads(), SimpleQueue[None]()
    try:
        for _ in range(threads - len(_THREADS)):
            thread = Thread(target=_serve, args=(_ORDERS, ready), name="attnprune", daemon=True)
            thread.start()
            _THREADS.append(thread)
            ready.get()
    finally:
        torch.set_num_threads(own)  # of threads to come: _serve says it of its own, and of these


def _serve(orders: SimpleQueue[Order], ready: SimpleQueue[None]) -> None:
    torch.get_num_threads()  # PyTorch sets the number where a thread first asks
    torch.set_num_threads(1)
    ready.put(None)
    while True:
        orders.get().take_part()


def _forget() -> None:
    """In a forked process no thread but one is left."""
    global _ORDERS, _BUSY
    _THREADS.clear()
    _ORDERS, _BUSY = SimpleQueue(), Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget)
