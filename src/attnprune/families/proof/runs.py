"""Runs of stand-ins, in whatever modes the caller is in, and what they gave."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...nn.attempt import MACHINE, undone
from ...nn.exactly import Exactly
from ...nn.nested import tensors_in
from ...nn.unfused import Unfused
from ..calls import LONGER, Call, Stranger, positional
from .record import fresh

ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Share of the largest output by which two ways to compute the same may differ."""


def short(error: Exception) -> str:
    """What an error says of a host that was tried. What the machine lacks says nothing of it, and is raised again."""
    if isinstance(error, MACHINE):
        raise error
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


@contextmanager
def plainly() -> Iterator[None]:
    """Whatever modes the caller is in, code runs plainly here, and leaves no trace."""
    from torch.utils._python_dispatch import _disable_current_modes

    with undone() as undo:
        stack = ExitStack()
        undo.append(stack.close)
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.random.fork_rng(devices=()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # tiny tensors: threads would only wait for one another
        stack.enter_context(Unfused())
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.CRITICAL)
        yield


_ATTENDING = ("softmax", "scaled_dot_product_attention", "multi_head_attention_forward", "flex_attention")


class Softmax(TorchFunctionMode):
    """Sees whether a softmax runs, and how long it is."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: set[int] = set()
        """Of a fused kernel: 0."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _ATTENDING:
            first = next((x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)), None)
            self.lengths.add(first.shape[-1] if name == "softmax" and first is not None and first.dim() else 0)
        return func(*args, **(kwargs or {}))

    @property
    def seen(self) -> bool:
        """Whether there was one."""
        return bool(self.lengths)


def attends(host: nn.Module, calls: Sequence[Call], dtype: torch.dtype, dims: Collection[int]) -> bool:
    """Whether a softmax over keys runs. One that is as long as a head has channels, for any number of tokens, mixes
    channels instead.

    Args:
        host, calls, dtype: as in :func:`run`.
        dims: channels of a head.
    """
    lengths = []
    for call in (calls[0], *(call for call in calls[1:] if call.what == LONGER)):
        with Softmax() as softmax:
            run(host, call, dtype)
        lengths.append(softmax.lengths)
    channels = len(lengths) > 1 and lengths[0] == lengths[1] and lengths[0] <= {*dims}
    return bool(lengths[0]) and not channels


class Result:
    """What a call gave: the output, attention weights if there are any, and gradients."""

    def __init__(
        self, host: nn.Module, call: Call, dtype: torch.dtype, grads: bool = False, heads: Sequence[int] | None = None
    ) -> None:
        outputs, leaves = run(host, call, dtype, grads, heads)
        self.shape = [_structure(output) for output in outputs]
        parts = [list(tensors_in(output)) for output in outputs]
        self.outputs = [found[0].detach().to(dtype) for found in parts]
        self.weights = [one.detach().to(dtype) for found in parts for one in found[1:] if one.dim() == 4]
        self.grads: list[Tensor] = []
        if grads:
            generator = torch.Generator("cpu").manual_seed(3)
            total = sum((f[0] * torch.randn(f[0].shape, generator=generator, dtype=dtype)).sum() for f in parts)
            if isinstance(total, Tensor) and total.requires_grad:
                found = torch.autograd.grad(total, leaves, allow_unused=True)
                self.grads = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def ignores(host: nn.Module, call: Call, name: str, dtype: torch.dtype) -> bool:
    """Whether a host computes the same, whatever an argument is."""
    strange = replace(call, arguments=lambda *how: [{**found, name: Stranger()} for found in call.arguments(*how)])
    try:
        found = Result(host, strange, dtype).outputs
    except Exception as error:
        short(error)  # what the machine lacks is raised again
        return False
    return all(map(torch.equal, found, Result(host, call, dtype).outputs))


def run(
    host: nn.Module, call: Call, dtype: torch.dtype, grads: bool = False, heads: Sequence[int] | None = None
) -> tuple[list[Any], list[Tensor]]:
    """Outputs of a call, and the inputs that are real numbers; with the rows of these heads alone in what has rows for
    heads."""
    torch.default_generator.manual_seed(5)
    outputs: list[Any] = []
    leaves: list[Tensor] = []
    for arguments in call.arguments(torch.Generator("cpu").manual_seed(1), dtype):
        args = [_leaf(value, leaves, grads) for value in _taken(call.recorded, dtype)]
        if heads is not None and call.by_head is not None:
            arguments[call.by_head] = arguments[call.by_head].index_select(1, torch.tensor(heads))
        args += [_leaf(value, leaves, grads) for value in positional(arguments)]
        kwargs = {name: _leaf(value, leaves, grads) for name, value in arguments.items()}
        with torch.set_grad_enabled(grads), Exactly() if call.exactly else nullcontext():
            outputs.append(host(*args, **kwargs))
    return outputs, leaves


def _taken(args: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    return [fresh(value, dtype) for value in args]


def _leaf(value: Any, leaves: list[Tensor], grads: bool) -> Any:
    if grads and isinstance(value, Tensor) and value.is_floating_point():
        value = value.detach().clone().requires_grad_()
        leaves.append(value)
    return value


def _structure(value: Any) -> Any:
    """What kinds of things an output is made of, with the shape of its first tensor."""
    if isinstance(value, Mapping):
        return type(value).__name__, tuple((key, _structure(one)) for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return len(value), tuple(_structure(one) for one in value)
    return "tensor" if isinstance(value, Tensor) else type(value).__name__


_RATES = ("attention_dropout", "dropout_prob", "attention_probs_dropout_prob", "dropout", "attn_dropout", "dropout_p")


def with_dropout(host: nn.Module) -> None:
    """Training mode, with dropout where there can be some."""
    host.train()
    for module in host.modules():
        module.__dict__["attnprune_rates"] = {
            key: module.__dict__[key] for key in (*_RATES, "p") if type(module.__dict__.get(key)) is float
        }
        for key in module.__dict__["attnprune_rates"]:
            if key != "p" or isinstance(module, nn.Dropout):
                module.__dict__[key] = module.__dict__[key] or 0.3


def without_dropout(host: nn.Module) -> None:
    host.eval()
    for module in host.modules():
        module.__dict__.update(module.__dict__.pop("attnprune_rates", {}))
