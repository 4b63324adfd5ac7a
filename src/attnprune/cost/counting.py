"""What a model costs: parameters, and multiply-adds of a forward pass; of a channel of each attention module, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..calibration.batches import called, of_one_dtype
from ..calibration.quiet import undisturbed
from ..families.base import AttentionView
from ..nn import execution
from ..surgery import as_called
from ..values.layout import Kind
from ..values.spec import AttentionSpec


def run(model: nn.Module, example_inputs: Any) -> Any:
    """Calls the model: a mapping as keywords, a tuple or list as positional arguments, a tensor as it is."""
    with of_one_dtype(model, example_inputs, "example_inputs"):
        if isinstance(example_inputs, Mapping):
            return called(model, (), example_inputs, "example_inputs")
        given = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
        return called(model, given, {}, "example_inputs")


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-adds of one forward pass, half of what ``torch.utils.flop_counter`` counts.

    Zeros that a decoupled forward pads heads with for a kernel's sake are not counted.

    Args:
        model: any module; run in evaluation mode without gradients, and left as found.
        example_inputs: a mapping (keywords), a tuple or list (positional), or a tensor.
    """
    counter = FlopCounterMode(display=False)
    # a parameter that is an argument of a module has no gradient's function here, which the counter would ask for
    with undisturbed(model, ()), torch.no_grad(), _countable(), counter:
        run(model, example_inputs)
    return int(counter.get_total_flops()) // 2


@contextmanager
def _countable() -> Iterator[None]:
    """Plain matrix products instead of fused kernels, which the counter does not know on every device; no padding."""
    with execution("separate"), sdpa_kernel(SDPBackend.MATH):
        yield


Prices = Mapping[Kind, tuple[int, int]]
"""What one channel costs: for every query head that has it, and once for the key head."""


def total(spec: AttentionSpec, prices: Prices) -> int:
    """What all channels of an attention cost, those that Q has beside K's among them."""
    of = spec.layout.channels
    sizes = {"qk": (of("q") + of("x"), of("k")), "vo": (of("o"), of("v"))}
    return sum(sizes[kind][0] * outer + sizes[kind][1] * inner for kind, (outer, inner) in prices.items())


def parameter_prices(spec: AttentionSpec) -> Prices:
    """Parameters that one qk and one vo channel hold, biases included.

    >>> parameter_prices(AttentionSpec.of("attention", heads=4, head_dim=8, d_model=32))
    {'qk': (33, 33), 'vo': (32, 33)}
    """
    q, k, v, _ = spec.bias
    return {
        "qk": (spec.width("q") + q, spec.width("k") + k + spec.bias_kv),
        "vo": (spec.width("o") + spec.gated * (spec.width("q") + q), spec.width("v") + v + spec.bias_kv),
    }


def mac_prices(model: nn.Module, views: Sequence[AttentionView], example_inputs: Any) -> dict[str, Prices]:
    """By name, the multiply-adds that one qk and one vo channel take in a forward pass.

    Counted from the tokens that every attention sees, over all its calls; an attention that is not called costs 0.
    """
    sizes = {view.name: [0, 0, 0] for view in views}
    with as_called(views) as tapped, undisturbed(model, ()), torch.no_grad(), ExitStack() as hooks:
        for view in tapped:
            _count_tokens(view, sizes[view.name], hooks)
        run(model, example_inputs)
    return {
        view.name: {
            "qk": (queries * width("q") + products, keys * width("k")),
            "vo": (queries * (width("o") + view.spec.gated * width("q")) + products, keys * width("v")),
        }
        for view in views
        for width in [view.spec.width]
        for queries, keys, pairs in [sizes[view.name]]
        for products in [0 if view.way(view.spec) == "expanded" else pairs]  # a host's own kernel keeps its dense dims
    }


def _count_tokens(view: AttentionView, size: list[int], hooks: ExitStack) -> None:
    """Adds queries, keys, and pairs of both to ``size`` at every call."""
    extra = view.spec.bias_kv + bool(getattr(view.module, "add_zero_attn", False))
    seen: list[torch.Size] = []

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0].shape[:-1])
        if len(seen) == 2:
            (*batch, queries), (*_, keys) = seen
            rows = torch.Size(batch).numel()
            for i, count in enumerate((rows * queries, rows * keys, rows * queries * (keys + extra))):
                size[i] += count
            seen.clear()

    for projection in ("q", "k"):
        hooks.callback(view.owner(projection).register_forward_pre_hook(before).remove)
