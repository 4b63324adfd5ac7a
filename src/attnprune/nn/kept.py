"""Tensors that no mode of PyTorch owns: what is made once (:func:`kept`), and what verbs make (:func:`ordinary`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from .attempt import Attempt

Args = ParamSpec("Args")
Made = TypeVar("Made")


def kept(make: Callable[Args, Made]) -> Callable[Args, Made]:
    """A function of hashable arguments that makes tensors once in plain eager code, and anew for every mode.

    What is made under ``FakeTensorMode``, ``torch.jit.trace``, ``vmap`` or ``grad`` belongs to that mode, and what is
    made outside is foreign to it, so nothing is taken from one to the other. On a GPU keeping is needed: making these
    tensors waits for a copy, which a CUDA graph must not hold.

    >>> @kept
    ... def ramp(count: int) -> torch.Tensor:
    ...     return torch.arange(count)
    >>> ramp(3) is ramp(3), torch.func.vmap(lambda x: x + ramp(3))(torch.zeros(2, 3)).shape
    (True, torch.Size([2, 3]))
    """

    @lru_cache(maxsize=4096)
    def once(*args: Args.args, **kwargs: Args.kwargs) -> Made:
        with torch.inference_mode(False), torch._C.DisableTorchFunction():
            return make(*args, **kwargs)

    @wraps(make)
    def found(*args: Args.args, **kwargs: Args.kwargs) -> Made:
        if torch.compiler.is_compiling():  # first: what comes after cannot be compiled
            return make(*args, **kwargs)
        return once(*args, **kwargs) if eager() else make(*args, **kwargs)  # type: ignore[arg-type]

    return found


def ordinary(verb: Callable[Args, Made]) -> Callable[Args, Made]:
    """A public call: all or nothing, one at a time (:class:`.attempt.Attempt`), and it makes ordinary tensors.

    In ``torch.inference_mode`` too, where it runs as in ``torch.no_grad``: inference tensors can never be trained, and
    that would show long after the call.

    >>> @ordinary
    ... def ramp() -> torch.Tensor:
    ...     return torch.arange(3)
    >>> with torch.inference_mode():
    ...     found = ramp()
    >>> found.is_inference()
    False
    """

    @wraps(verb)
    def run(*args: Args.args, **kwargs: Args.kwargs) -> Made:
        call = verb
        if torch.is_inference_mode_enabled():
            call = torch.inference_mode(False)(torch.no_grad()(verb))
        attempt = Attempt(*_about(args, kwargs))
        try:
            attempt.take()
            made = call(*args, **kwargs)
            return attempt.close(made)
        except BaseException:
            attempt.restore()
            raise

    return run


def _about(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[nn.Module | None, Any]:
    """The model that a call is about, and the object that it is a method of."""
    first = args[0] if args else None
    owner = first if hasattr(first, "__dict__") and not isinstance(first, (nn.Module, type)) else None
    given = [kwargs.get("model"), *args[:2], getattr(owner, "model", None)]
    return next((one for one in given if isinstance(one, nn.Module)), None), owner


def eager() -> bool:
    """Whether operations run as they are: no dispatch mode, no tracing, no function transform."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
    )
