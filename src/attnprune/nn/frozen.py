"""The weights of an attention as inference wants them, made once: what :func:`attnprune.freeze` keeps in a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import FrozenError
from ..values.layout import HeadLayout
from .decoupled import Decoupled
from .policy import autocasts, forced, known, layouts_of
from .products import at_once_runs
from .projection import QKV, Projected, padded, side_by_side, spread

_version = attrgetter("_version")


class Arrangement(NamedTuple):
    """Weights of Q, K, V and O for one layout of heads."""

    layout: HeadLayout
    weight: Tensor
    """``(channels of Q, K and V, in)``."""
    bias: Tensor | None
    sizes: tuple[int, ...]
    """Channels of Q, of K and of V."""
    o: tuple[Tensor, Tensor | None] | None
    """O's weight, its columns as the context's channels are, and its bias; None where another module has O."""


class Frozen:
    """What a frozen attention keeps beside its parameters, which stay what they are.

    Args:
        module: the attention, whose Q, K and V are plain Linears of its own.
        names: of these, and of O where the module has it.
        layout: of the module's heads.
        recast: whether the module gets its host's class back when it thaws.
        apart: whether each weight gets storage of its own then.
        inside: the module's name in the attention that it is a part of; empty where it is that itself.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        layout: HeadLayout,
        *,
        recast: bool,
        apart: bool,
        inside: str = "",
    ) -> None:
        self.names, self.layout = tuple(names), layout
        self.recast, self.apart, self.inside = recast, apart, inside
        self.make(module)

    def make(self, module: nn.Module) -> None:
        """Arranges the weights that the module has now."""
        linears: list[Any] = [module._modules[name] for name in self.names]
        held = [(module._modules, name, linear) for name, linear in zip(self.names, linears, strict=True)]
        held += [(one._parameters, key, one._parameters[key]) for one in linears for key in ("weight", "bias")]
        self.places, self.keys, self.things = zip(*held, strict=True)
        """Where each Linear and parameter has to be found for what was arranged to be theirs."""
        self.parameters = tuple(p for one in linears for p in one._parameters.values() if p is not None)
        self.laid = tuple(p for one in linears[:3] for p in one._parameters.values() if p is not None)
        """Parameters of Q, K and V, whose values lie side by side."""
        self.versions: int | None = None
        self.listeners = tuple(hooks for one in linears for hooks in _hooks(one))
        with torch.inference_mode(False), torch.no_grad():
            self._arrange(linears)

    def _arrange(self, linears: Sequence[Any]) -> None:
        q, k, v, *rest = linears
        weights, biases = [x.weight for x in (q, k, v)], [x.bias for x in (q, k, v)]
        weight, bias = beside(weights), None if biases[0] is None else beside(biases)
        o = None
        if rest:
            o = (rest[0].weight.detach(), None if rest[0].bias is None else rest[0].bias.detach())
        self.own = Arrangement(self.layout, weight, bias, _sizes(self.layout), o)
        found = layouts_of(self.layout, weight.device.type, weight.dtype, weight.shape[1])
        self.many = self._wide(found.many, weights, biases)
        self.few = self.many if found.few == found.many else self._wide(found.few, weights, biases)
        self.products = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)
        self.per_pair, self.per_token, self.limit = found.per_pair, found.per_token, found.limit

    def _wide(self, wide: HeadLayout, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Arrangement:
        own = self.own
        if wide == own.layout:
            return own
        weight = padded(weights, own.layout, wide)
        bias = None if biases[0] is None else padded([x for x in biases if x is not None], own.layout, wide)
        o = None if own.o is None else (spread(own.o[0], own.layout, wide), own.o[1])
        return Arrangement(wide, weight, bias, _sizes(wide), o)

    def project(self, module: nn.Module, x: Tensor, widen: bool = True) -> Projected | None:
        """Queries, keys and values of self-attention over ``x`` ``(batch, tokens, in)``, by one product.

        None where the module's Linears have to be called: somebody listens to them, gradients are wanted, or autocast
        or :func:`.policy.execution` ask for something else.

        Raises:
            FrozenError: the module is being trained, or its weights are not those that were arranged.
        """
        how = forced()
        if how not in ("auto", "kernel") or not self._usable(module, x):
            return None
        own = self.own
        arranged = self._fitting(x) if widen and how == "auto" else own
        quick = self.products and how == "auto" and at_once_runs(x)
        q, k, v = F.linear(x, arranged.weight, arranged.bias).split_with_sizes(arranged.sizes, -1)
        return Projected(q, k, v, arranged.layout, own.layout, arranged.o, quick)

    def _fitting(self, x: Tensor) -> Arrangement:
        if self.few is self.many:
            return self.many
        tokens = x.shape[0] * x.shape[1]
        few = tokens * (x.shape[1] * self.per_pair + self.per_token) <= self.limit
        if torch.compiler.is_compiling():
            return self.many if x.device.type == "cpu" or not known(few) else self.few
        return self.few if few else self.many

    def _usable(self, module: nn.Module, x: Tensor) -> bool:
        if torch.is_grad_enabled():
            if module.training:
                raise FrozenError(
                    f"forward of a {type(module).__name__}", "a model for inference", "one in training mode",
                    "call attnprune.thaw(model) before training, or model.eval() or torch.no_grad() for inference",
                )  # fmt: skip
            if x.requires_grad or any(p.requires_grad for p in self.parameters):
                return False
        if autocasts(x):
            return False
        if torch.compiler.is_compiling():
            return True
        if any(self.listeners):
            return False
        versions = sum(map(_version, self.parameters))
        if self.versions is None:
            self.versions = versions
        if versions != self.versions or not all(map(is_, map(dict.get, self.places, self.keys), self.things)):
            raise FrozenError(
                f"forward of a {type(module).__name__}", "the weights that were frozen", "others in their place",
                "call attnprune.thaw(model) before weights change, and attnprune.freeze(model) after",
            )  # fmt: skip
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "versions": None}  # copies of parameters count from zero


def frozen(module: Decoupled, x: Tensor, widen: bool = True) -> Projected | None:
    """What :meth:`Frozen.project` gives; None also for modules that are not frozen."""
    found: Frozen | None = module.attnprune_frozen
    return None if found is None else found.project(module, x, widen)


def beside(parts: Sequence[nn.Parameter]) -> Tensor:
    """Parameters in one tensor, along their first dimension; their own values lie there from now on."""
    found = side_by_side(parts)
    if found is None:
        found = torch.cat([part.detach() for part in parts])
        for part, value in zip(parts, torch.split(found, [len(part) for part in parts]), strict=True):
            part.data = value
    return found


def _sizes(layout: HeadLayout) -> tuple[int, ...]:
    return tuple(layout.channels(p) for p in QKV)


def _hooks(linear: nn.Module) -> Iterator[Mapping[Any, Any]]:
    yield from (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
