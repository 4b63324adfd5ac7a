"""Calls of the user's own model, for hosts whose arguments have names that tell nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from ..base import AttentionView
from ..calls import Call, recorded_call

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
