"""Stopwatches around a model's attention, and the cache of what they gave."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ...calibration.batches import device_of
from ...calibration.quiet import evaluated
from ...families.views import AttentionView
from ...surgery import Surgeon
from ..counting import run

FAST = 0.25
"""Seconds of a forward pass up to which passes are repeated after every change of shapes; the least counts."""


@contextmanager
def swapped(surgeon: Surgeon) -> Iterator[None]:
    """Inside the block the model is pruned; on exit it is bitwise as it was."""
    surgeon.commit()
    try:
        yield
    finally:
        surgeon.undo()


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
        self.device = device_of(model)
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

        def pruned() -> tuple[float, list[float]]:
            with swapped(surgeon):
                return self._least(self._parts) if self.views else (self._least(self._dense)[0], [])

        if dense_first:
            return self._least(self._dense)[0], pruned()
        found = pruned()
        return self._least(self._dense)[0], found

    def _least(self, timed: Callable[[], tuple[float, list[float]]]) -> tuple[float, list[float]]:
        for _ in range(self._warm):
            run(self.model, self.inputs)
        return min((timed() for _ in range(self._repeats)), key=lambda found: found[0])

    def _dense(self) -> tuple[float, list[float]]:
        return self._whole(), []

    def _whole(self) -> float:
        start = self._now()
        run(self.model, self.inputs)
        return self._seconds([(start, self._now())])[0]

    def _parts(self) -> tuple[float, list[float]]:
        spans: list[list[tuple[Any, Any]]] = [[] for _ in self.views]
        with ExitStack() as hooks:
            for view, own in zip(self.views, spans, strict=True):
                inside = {id(module) for module in view.module.modules()}
                outside = [module for module in view.modules if id(module) not in inside]
                for module in (view.module, *outside):
                    self._listen(module, own, hooks)
            start = self._now()
            run(self.model, self.inputs)
            whole = self._seconds([(start, self._now())])[0]
        return whole, [sum(self._seconds(own)) for own in spans]

    def _listen(self, module: nn.Module, spans: list[tuple[Any, Any]], hooks: ExitStack) -> None:
        begun: list[Any] = []

        def before(*_: Any) -> None:
            begun.append(self._now())

        def after(*_: Any) -> None:
            spans.append((begun.pop(), self._now()))

        hooks.callback(module.register_forward_pre_hook(before).remove)
        hooks.callback(module.register_forward_hook(after).remove)

    def _now(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.device))
            return event
        if self.device.type == "mps":
            torch.mps.synchronize()
        return perf_counter()

    def _seconds(self, spans: Sequence[tuple[Any, Any]]) -> list[float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [start.elapsed_time(stop) / 1000 for start, stop in spans]
        return [stop - start for start, stop in spans]


def shapes_seen(model: nn.Module, views: Sequence[AttentionView], example_inputs: Any) -> dict[str, Any]:
    """By name, dtypes and shapes of the tensors that every attention is called with, in order."""
    seen: dict[str, list[Any]] = {view.name: [] for view in views}
    with ExitStack() as hooks:
        for view in views:

            def before(_: nn.Module, args: Any, kwargs: Any, own: list[Any] = seen[view.name]) -> None:
                own.append([(str(x.dtype), tuple(x.shape)) for x in _tensors([*args, *kwargs.values()])])

            hooks.callback(view.module.register_forward_pre_hook(before, with_kwargs=True).remove)
        with Stopwatch(model, (), example_inputs, repeat=False):  # runs once
            pass
    return {name: repr(own) for name, own in seen.items()}


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values.values() if isinstance(values, Mapping) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple, Mapping)):
            yield from _tensors(value)


# the cache


def fingerprint(model: nn.Module, example_inputs: Any, more: Mapping[str, str]) -> dict[str, str]:
    """What latency depends on: machine, threads, versions, the model's structure, its inputs."""
    device = device_of(model)
    inputs = [example_inputs] if isinstance(example_inputs, Tensor) else example_inputs
    structure = [(name, type(module).__qualname__) for name, module in model.named_modules()]
    weights = [(name, str(p.dtype), tuple(p.shape)) for name, p in model.named_parameters()]
    kernel = getattr(getattr(model, "config", None), "_attn_implementation", None)
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "attnprune": _own_version(),
        "kernels": f"{kernel}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_float32_matmul_precision()}",
        "inputs": repr([(str(x.dtype), tuple(x.shape)) for x in _tensors(inputs)]),
        "model": hashlib.sha256(repr((structure, weights)).encode()).hexdigest(),
    }
    return found | {key: hashlib.sha256(value.encode()).hexdigest()[:16] for key, value in more.items()}


def _own_version() -> str:
    """The version, and a digest of the code that runs pruned attention."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parent / "nn").glob("*.py")):
        digest.update(path.read_bytes())
    try:
        return f"{version('attnprune')} {digest.hexdigest()[:12]}"
    except PackageNotFoundError:  # run from a checkout
        return digest.hexdigest()[:12]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cache_file(machine: Mapping[str, str], cache: bool | str | os.PathLike[str]) -> Path:
    """Where the table of a machine lies."""
    digest = hashlib.sha256(repr(sorted(machine.items())).encode()).hexdigest()
    return (_user_cache() if cache is True else Path(str(cache))) / f"latency-{digest[:24]}.json"


def _user_cache() -> Path:
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "attnprune"


def read_cache(machine: Mapping[str, str], cache: bool | str | os.PathLike[str]) -> str | None:
    """The text of a cache file; None if there is none that can be read."""
    try:
        return cache_file(machine, cache).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def write_cache(machine: Mapping[str, str], cache: bool | str | os.PathLike[str], text: str) -> None:
    """Replaces a cache file in one step; a directory that cannot be written to is no error."""
    path = cache_file(machine, cache)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
