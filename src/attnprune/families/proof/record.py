"""Calls of the user's own model, for hosts whose arguments have names that tell nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..base import AttentionView
from ..calls import Arguments, Call

MOST = 2
"""Calls of one module that are kept."""


def recorded_calls(views: Sequence[AttentionView], run: Callable[[], object]) -> dict[str, list[Call]]:
    """By name, how each view's host was called while the model ran."""
    found: dict[str, list[Call]] = {view.name: [] for view in views}
    with ExitStack() as hooks:
        for view in views:

            def before(_: nn.Module, args: Any, kwargs: Any, own: list[Call] = found[view.name]) -> None:
                if len(own) < MOST:
                    own.append(recorded_call(args, kwargs))

            hooks.callback(view.top.register_forward_pre_hook(before, with_kwargs=True).remove)
        run()
    return {name: calls for name, calls in found.items() if calls}


def recorded_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """A call of the user's own model, again."""

    def arguments(generator: torch.Generator, dtype: torch.dtype) -> list[Arguments]:
        return [{key: fresh(value, dtype) for key, value in kwargs.items()}]

    return Call("the model's own call", arguments, recorded=tuple(args))


def fresh(value: Any, dtype: torch.dtype) -> Any:
    """A recorded value as a stand-in takes it: on the CPU, real numbers in its dtype, caches left out."""
    if isinstance(value, Tensor):
        value = value.detach().to("cpu")
        return value.to(dtype) if value.is_floating_point() else value.clone()
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(fresh(one, dtype) for one in value)
    if isinstance(value, dict):
        return {key: fresh(one, dtype) for key, one in value.items()}
    return None if hasattr(value, "update") and hasattr(value, "get_seq_length") else value
