"""Where a model attends, whatever attnprune says of it: :func:`attended`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_FUSED = (
    "scaled_dot_product_attention", "flex_attention", "multi_head_attention_forward", "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
)  # fmt: skip

_CASTS = ("float", "to", "type", "type_as")


class Seen(NamedTuple):
    """What running a model showed."""

    attends: dict[str, str]
    """Modules in which a softmax or a fused kernel of attention runs, by name with what was seen."""
    ran: set[str]
    """Modules that ran."""
    single: bool
    """Whether the model itself, in double precision, rounds to single precision on its way (some norms and rotary
    embeddings do)."""


class _Watch(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = [""]
        self.found: dict[str, str] = {}
        self.single = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        keys = name in ("softmax", "_softmax") and first is not None and first.dim() >= 3
        if keys and first is not None:  # over what lies last
            keys = kwargs.get("dim", args[1] if len(args) > 1 else -1) in (-1, first.dim() - 1)
        if first is not None and (name in _FUSED or keys):
            self.found.setdefault(self.stack[-1], f"{name} of {first.dim()} dimensions")
        result = func(*args, **kwargs)
        if first is not None and first.dtype == torch.float64 and name in _CASTS and isinstance(result, Tensor):
            self.single |= result.dtype == torch.float32
        return result


def attended(model: nn.Module, run: Callable[[], object]) -> Seen:
    """Runs a model and looks on."""
    watch, ran = _Watch(), set()
    with ExitStack() as hooks:
        for name, module in model.named_modules():

            def enter(*_: Any, name: str = name) -> None:
                watch.stack.append(name)
                ran.add(name)

            def leave(*_: Any) -> None:
                watch.stack.pop()

            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        with watch:
            run()
    return Seen(watch.found, ran, watch.single)


def unsaid(model: nn.Module, seen: dict[str, str], said: Iterable[str]) -> list[str]:
    """Attention of which nothing was said: seen to attend, or named so, and in no module that was found or skipped.

    A softmax of three dimensions counts only in what is called attention, as routers of experts take one too.

    Args:
        model: the model.
        seen: where :func:`attended` saw it attend.
        said: names of modules that were found or skipped.
    """
    tops = set(said)

    def covered(name: str) -> bool:
        return any(name == top or not top or name.startswith(f"{top}.") for top in tops)

    found = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        what = seen.get(name)
        called = "attention" in kind.lower() or kind.lower().endswith("attn")
        if covered(name) or what is None or (what.endswith("3 dimensions") and "softmax" in what and not called):
            continue
        found[kind] = f"{kind}: {what}"
    return list(found.values())
