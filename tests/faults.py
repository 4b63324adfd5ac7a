"""Faults at lines of ours, and what they may leave: :class:`Call`."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import attnprune
from attnprune import AttentionPruner
from attnprune.families.table import _ADAPTERS
from attnprune.nn import attempt
from attnprune.nn.policy import forced
from attnprune.surgery.check import MASKED

OURS = str(Path(attnprune.__file__).parent)
FAULTS = (KeyboardInterrupt, MemoryError, OSError)


def digest(value: Any) -> Any:
    """Something to compare that no longer changes: of tensors dtype, shape and bits."""
    if isinstance(value, Tensor):
        bits = value.detach().reshape(-1).view(torch.uint8).numpy().tobytes() if not value.is_meta else b""
        grad = digest(value.grad) if value.is_leaf and value.grad is not None else None
        return str(value.dtype), tuple(value.shape), hashlib.md5(bits).hexdigest(), value.requires_grad, grad
    if isinstance(value, Mapping):
        return {str(key): digest(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [digest(one) for one in value]
    if type(value).__module__.startswith("attnprune.nn") and hasattr(value, "__dict__") and not callable(value):
        return digest(vars(value))
    return re.sub(r" at 0x\w+", "", repr(value))


def of_model(model: nn.Module) -> Any:
    """Classes, attributes, hooks and tensors of all modules."""
    hidden = ("_parameters", "_buffers", "_modules")
    return [
        (name, type(module), digest({key: value for key, value in vars(module).items() if key not in hidden}),
         digest(module._parameters), digest(module._buffers), list(module._modules))
        for name, module in model.named_modules()
    ]  # fmt: skip


def of_optimizer(optimizer: Any, model: nn.Module) -> Any:
    held = [[p is q for p in group["params"]] for group in optimizer.param_groups for q in model.parameters()]
    return held, [digest(optimizer.state[p]) for p in model.parameters() if p in optimizer.state], len(optimizer.state)


def of_pruner(pruner: AttentionPruner) -> Any:
    return digest(pruner.state_dict())


def of_folder(folder: Path) -> Any:
    return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def settings() -> dict[str, Any]:
    """What is the process's or the thread's."""
    return {
        "gradients": torch.is_grad_enabled(), "inference mode": torch.is_inference_mode_enabled(),
        "threads": torch.get_num_threads(), "layout": forced(), "fast path": torch.backends.mha.get_fastpath_enabled(),
        "logging": logging.root.manager.disable, "warnings": [*warnings.filters],
        "function modes": torch._C._len_torch_function_stack(), "modes": torch._C._len_torch_dispatch_stack(),
        "device": torch.get_default_device(), "dtype": torch.get_default_dtype(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "turn": dict(attempt._TURN), "attempt": getattr(attempt._RUNNING, "attempt", None), "masked": len(MASKED),
        "collector": gc.isenabled(), "looks": attempt._LOOK._is_owned(),  # type: ignore[attr-defined]
        "sharing": attnprune.calibration.processes._sharing.get(), "tracing": torch._C._get_tracing_state(),
        "random": hashlib.md5(torch.get_rng_state().numpy()).hexdigest(), "python's random": hash(random.getstate()),
        "numpy's random": hashlib.md5(np.random.get_state()[1].tobytes()).hexdigest(),  # type: ignore[index]
        "hooks": dict(nn.modules.module._global_parameter_registration_hooks), "variables": len(os.environ),
        "directory": os.getcwd(), "adapters": [*_ADAPTERS],
        "temporary files": [one for one in os.listdir(tempfile.gettempdir()) if "attnprune" in one],
    }  # fmt: skip


class Trial(NamedTuple):
    """What may be interrupted."""

    call: Callable[[], object]
    state: Callable[[], Any]


class Point(NamedTuple):
    """Where a fault comes."""

    place: tuple[str, str, int]
    """File, function and number of the line."""
    turn: int
    """How often the line is passed before."""
    kind: type[BaseException]


def faulted(call: Callable[[], object], point: Point | None = None) -> tuple[bool, dict[Any, int]]:
    """Calls, with a fault before a line of ours.

    Returns:
        Whether the fault came out of it, and how often every line was passed, in the order of their first turns.
    """
    passed: dict[Any, int] = {}
    name = None if point is None else point.place[1]

    def trace(frame: Any, event: str, _: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(OURS) or (name is not None and code.co_name != name):
            return None
        if event == "line":
            here = code.co_filename[len(OURS) + 1 :], code.co_name, frame.f_lineno
            if point is not None and here == point.place and passed.get(here, 0) == point.turn:
                passed[here] = point.turn + 1
                raise point.kind("injected")
            passed[here] = passed.get(here, 0) + 1
        return trace

    sys.settrace(trace)
    try:
        call()
    except BaseException as error:
        if point is None or "injected" not in _texts(error):
            raise
        return True, passed
    finally:
        sys.settrace(None)
    return False, passed


def _texts(error: BaseException | None) -> str:
    """What an error says, and those that it was raised from."""
    return "" if error is None else f"{error} {_texts(error.__cause__ or error.__context__)}"


class Call:
    """A public call, what it passes, and what it changes.

    Args:
        make: a trial anew, each time of equal values.
    """

    def __init__(self, make: Callable[[], Trial]) -> None:
        self.make = make
        make().call()  # what is cached takes fewer lines the second time
        trial = make()
        self.before = trial.state()
        torch.manual_seed(0)
        _, self.passed = faulted(trial.call)
        self.after = trial.state()

    def points(self, share: int, turns: str = "one", kinds: int = 1) -> Iterator[Point]:
        """Where faults come: at every ``share``-th line and at the last four.

        Args:
            share: 1 for all lines.
            turns: of each line the first or the last in turns (``"one"``), or ``"both"``.
            kinds: how many kinds of faults come at each.
        """
        lines = [*self.passed]
        ends = lines[-4:]
        chosen = lines if share == 1 else sorted({*lines[::share], *ends}, key=lines.index)
        for number, place in enumerate(chosen):
            last = self.passed[place] - 1
            for turn in sorted({0, last} if turns == "both" or place in ends else {last if number % 2 else 0}):
                for kind in range(kinds):
                    yield Point(place, turn, FAULTS[(number + kind) % len(FAULTS)])

    def problem(self, point: Point) -> str:
        """What is wrong after a fault; empty if nothing is."""
        trial = self.make()
        torch.manual_seed(0)
        then = settings()
        try:
            came, _ = faulted(trial.call, point)
        except Exception as error:  # of what an earlier fault has left, most likely
            return f"{point}: {type(error).__name__}: {str(error)[:80]}"
        found = [f"{key} changed" for key, value in settings().items() if came and value != then[key]]
        try:
            now = trial.state()
        except Exception as error:
            now = f"{type(error).__name__}: {str(error)[:80]}"
        if now != (self.before if came else self.after):
            found.append("done all the same" if now == self.after else "a mixture")
        torch.set_grad_enabled(then["gradients"])
        attempt._TURN.clear()
        attempt._RUNNING.__dict__.clear()
        MASKED.clear()
        where = f"{point.kind.__name__} at {point.place}, turn {point.turn}{'' if came else ', swallowed'}"
        return f"{where}: {', '.join(found)}" if found else ""
