"""How long things take: functions in turns (:func:`paired`), and the attention inside a model (:class:`Stopwatch`)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from ...bars import bar
from ...calibration.batches import device_of
from ...calibration.quiet import evaluated
from ...families.base import AttentionView
from ...nn.attempt import undone
from ...nn.nested import tensors_in
from ...surgery import Surgeon
from ..counting import run

FAST = 0.25
"""Seconds of a forward pass up to which passes are repeated after every change of shapes; the least counts."""


Times = dict[str, list[float]]
"""Seconds by round, by what was timed."""


class Clock:
    """Reads the time of what a device does: on CUDA by events on its stream.

    >>> clock = Clock()
    >>> start = clock.now()
    >>> clock.seconds([(start, clock.now())])[0] < 1
    True
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = torch.device("cpu") if device is None else device

    def now(self) -> Any:
        """A moment; opaque."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.device))
            return event
        self.wait()
        return perf_counter()

    def seconds(self, spans: Sequence[tuple[Any, Any]]) -> list[float]:
        """Seconds between the moments of every span."""
        if self.device.type == "cuda":
            self.wait()
            return [start.elapsed_time(stop) / 1000 for start, stop in spans]
        return [stop - start for start, stop in spans]

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def paired(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm_up: int = 1,
    device: torch.device | None = None,
    progress: bool = False,
    seconds: float | None = None,
) -> Times:
    """Seconds per round of every function, run in turns so that a busy machine slows all of them alike.

    The order rotates from round to round; garbage is collected before every call and never during one.

    Args:
        functions: by name. One that returns a mapping of seconds has timed its own steps (and left its preparations
            out); its times are then named ``name: step``, beside ``name``, their sum.
        rounds: how often each function is timed.
        warm_up: rounds before that, which do not count.
        device: where the functions run, if not on the CPU.
        progress: whether to show a progress bar.
        seconds: rounds end before this is over, warm-up after a fifth of it; one counts at least. None: all rounds.

    >>> times = paired({"a": lambda: None, "b": lambda: {"load": 2.0, "run": 1.0}}, rounds=2)
    >>> sorted(times), times["b"]
    (['a', 'b', 'b: load', 'b: run'], [3.0, 3.0])
    """
    with undone() as undo:
        undo += [gc.unfreeze, gc.enable] if gc.isenabled() else [gc.unfreeze]
        gc.collect()
        gc.freeze()  # what is there now is not looked at again and again
        gc.disable()
        return _paired(functions, rounds, warm_up, Clock(device), progress, seconds)


def _paired(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm_up: int,
    clock: Clock,
    progress: bool,
    seconds: float | None,
) -> Times:
    names, times = list(functions), Times()
    begun, number, done = perf_counter(), -warm_up, 0
    shown = bar(what="rounds", shown=progress, total=warm_up + rounds)
    while number < rounds:
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            clock.wait()
            start = clock.now()
            result = functions[name]()
            (took,) = clock.seconds([(start, clock.now())])
            steps = dict(result) if isinstance(result, Mapping) else {}
            found = {name: sum(steps.values()) if steps else took}
            found |= {f"{name}: {step}": value for step, value in steps.items()}
            if number >= 0:
                for key, value in found.items():
                    times.setdefault(key, []).append(value)
        done, spent = done + 1, perf_counter() - begun
        if seconds is not None and spent > 0:
            shown.total = min(warm_up + rounds, max(done, int(done * seconds / spent)))  # so many fit in
        shown.update()
        if seconds is not None and number >= 0 and spent * (done + 1) / done > seconds:
            break
        number = 0 if seconds is not None and number < 0 and spent > seconds / 5 else number + 1
    shown.close()
    return times


def ratios(times: Mapping[str, Sequence[float]], a: str, b: str) -> list[float]:
    """How many times longer ``a`` takes than ``b``, in every round."""
    return [x / y for x, y in zip(times[a], times[b], strict=True)]


def ratio(times: Mapping[str, Sequence[float]], a: str, b: str) -> float:
    """The median of :func:`ratios`."""
    return median(ratios(times, a, b))


@contextmanager
def swapped(surgeon: Surgeon) -> Iterator[None]:
    """Inside the block the model is pruned; on exit it is bitwise as it was."""
    with undone() as undo:
        undo.append(surgeon.undo)
        surgeon.commit()
        yield


class Stopwatch:
    """Times forward passes of a model, and within them the attention of some views; a context.

    Inside it the model is in evaluation mode, without gradients. On CUDA times are those of events on the stream.

    Args:
        model: the model.
        views: attentions to time inside the passes.
        example_inputs: a tensor, tuple or mapping.
        repeat: whether fast passes are repeated.
    """

    def __init__(
        self, model: nn.Module, views: Sequence[AttentionView], example_inputs: Any, repeat: bool = True
    ) -> None:
        self.model, self.views, self.inputs, self.repeat = model, views, example_inputs, repeat
        self.clock = Clock(device_of(model))
        self._stack = ExitStack()
        self._warm, self._repeats = 0, 1

    def __enter__(self) -> Stopwatch:
        self._stack.enter_context(evaluated(self.model))
        try:
            self._settle()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _settle(self) -> None:
        """Runs the model once, and finds how often passes are to be repeated."""
        run(self.model, self.inputs)
        seconds = min(self._whole() for _ in range(3)) if self.repeat else 0.0
        if 0 < seconds < FAST:  # caches hold what a small model needs only after some passes
            self._warm, self._repeats = (1 if seconds > FAST / 10 else 4), max(2, min(10, round(FAST / seconds)))

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def pair(self, surgeon: Surgeon, dense_first: bool) -> tuple[float, tuple[float, list[float]]]:
        """Seconds of the dense model, and of the pruned one with those of its attentions."""
        if dense_first:
            return self._least(self._dense)[0], self.pruned(surgeon)
        found = self.pruned(surgeon)
        return self._least(self._dense)[0], found

    def pruned(self, surgeon: Surgeon) -> tuple[float, list[float]]:
        """Seconds of the pruned model, and those of its attentions."""
        with swapped(surgeon):
            return self._least(self._parts) if self.views else (self._least(self._dense)[0], [])

    def _least(self, timed: Callable[[], tuple[float, list[float]]]) -> tuple[float, list[float]]:
        for _ in range(self._warm):
            run(self.model, self.inputs)
        return min((timed() for _ in range(self._repeats)), key=lambda found: found[0])

    def _dense(self) -> tuple[float, list[float]]:
        return self._whole(), []

    def _whole(self) -> float:
        start = self.clock.now()
        run(self.model, self.inputs)
        return self.clock.seconds([(start, self.clock.now())])[0]

    def _parts(self) -> tuple[float, list[float]]:
        spans: list[list[tuple[Any, Any]]] = [[] for _ in self.views]
        with ExitStack() as hooks:
            for view, own in zip(self.views, spans, strict=True):
                inside = {id(module) for module in view.module.modules()}
                outside = [module for module in view.modules if id(module) not in inside]
                for module in (view.module, *outside):
                    self._listen(module, own, hooks)
            start = self.clock.now()
            run(self.model, self.inputs)
            whole = self.clock.seconds([(start, self.clock.now())])[0]
        return whole, [sum(self.clock.seconds(own)) for own in spans]

    def _listen(self, module: nn.Module, spans: list[tuple[Any, Any]], hooks: ExitStack) -> None:
        begun: list[Any] = []

        def before(*_: Any) -> None:
            begun.append(self.clock.now())

        def after(*_: Any) -> None:
            spans.append((begun.pop(), self.clock.now()))

        hooks.callback(module.register_forward_pre_hook(before).remove)
        hooks.callback(module.register_forward_hook(after).remove)


def shapes_seen(model: nn.Module, views: Sequence[AttentionView], example_inputs: Any) -> dict[str, Any]:
    """By name, dtypes and shapes of the tensors that every attention is called with, in order."""
    seen: dict[str, list[Any]] = {view.name: [] for view in views}
    with ExitStack() as hooks:
        for view in views:

            def before(_: nn.Module, args: Any, kwargs: Any, own: list[Any] = seen[view.name]) -> None:
                own.append([(str(x.dtype), tuple(x.shape)) for x in tensors_in([*args, *kwargs.values()])])

            hooks.callback(view.module.register_forward_pre_hook(before, with_kwargs=True).remove)
        with Stopwatch(model, (), example_inputs, repeat=False):  # runs once
            pass
    return {name: repr(own) for name, own in seen.items()}
