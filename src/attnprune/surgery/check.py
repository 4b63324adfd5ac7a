"""What cannot be pruned is refused here, by name, before anything moves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..errors import (
    AttnPruneError,
    BusyError,
    FrozenError,
    MetaTensorError,
    NonFiniteError,
    NotExpressibleError,
    ParametrizedError,
    PlanMismatchError,
    QuantizedError,
    ShardedError,
    WrappedModelError,
)
from ..families.base import AttentionView
from ..families.expansion import joints
from ..families.linears import computable, computes_linear, is_tuner
from ..families.registry import attention_names
from ..families.slots import Slot, gathered
from ..values.layer_plan import LayerPlan, difference
from ..values.plan import Plan

_WRAPPERS = {"DistributedDataParallel": "prune model.module, then wrap it again", "FullyShardedDataParallel": (
    "prune before wrapping; a plan made elsewhere can be applied on every rank")}  # fmt: skip
_QUANTIZED = ("quant", "bitsandbytes", "bnb", "awq", "gptq", "qat", "torchao", "hqq")


def check_wrappers(model: nn.Module) -> None:
    """Raises WrappedModelError if a wrapper that holds on to parameters is, or is in, the model."""
    for name, module in model.named_modules():
        remedy = _WRAPPERS.get(type(module).__name__)
        if remedy is not None:
            raise WrappedModelError(name or "model", "a plain module", f"a {type(module).__name__}", remedy)


def check_views(
    model: nn.Module,
    views: Iterable[AttentionView],
    *,
    blank: bool = False,
    shards: bool = False,
    frozen: bool = False,
) -> None:
    """Raises a named error if a projection is wrapped, sharded, parametrised, quantised, without data or not finite.

    Args:
        model: the model that they are from.
        views: the attention modules to check.
        blank: parameters may lack data, as only their shapes are of interest.
        shards: parameters may be shards, as values are only read.
        frozen: attention may be frozen, as nothing changes.
    """
    check_wrappers(model)
    views = list(views)
    for view in views if not frozen else ():
        check_thawed(view)
    for view in views:
        if "forward" in view.module.__dict__:
            raise WrappedModelError(
                view.name,
                "the class's own forward",
                "a forward set on the instance",
                "remove the hook or patch that set it (for accelerate: accelerate.hooks.remove_hook_from_module)",
            )
        seen: set[int] = set()
        for key, slot in view.slots.items():
            if slot.owner is not view.module:
                _check_owner(f"{view.name}: {key}", slot)
            parameter = _check_parameter(f"{view.name}: {key}", slot, blank, shards)
            if id(parameter) not in seen and not blank:
                seen.add(id(parameter))
                _check_finite(f"{view.name}: {key}", parameter)
        bias = view.owner("o")._parameters.get("bias")  # not cut, and still part of the attention
        if bias is not None and not blank:
            _check_finite(f"{view.name}: o.bias", bias)


MASKED: WeakSet[nn.Module] = WeakSet()
"""Attention of models that the user masks."""


def check_unmasked(views: Iterable[AttentionView]) -> None:
    """Raises BusyError where the user masks an attention, in whatever thread: zeros would be kept for weights."""
    for view in views:
        if view.top in MASKED:
            raise BusyError(
                view.name, "a model that is not masked", "one inside attnprune.masked(...)", "leave the block first"
            )


def check_thawed(view: AttentionView) -> None:
    """Raises FrozenError for an attention whose weights are arranged for inference alone."""
    if getattr(view.module, "attnprune_frozen", None) is not None:
        raise FrozenError(
            view.name,
            "attention whose weights may change",
            "a frozen one",
            "call attnprune.thaw(model) first, and attnprune.freeze(model) when all is done",
        )


def _quantized(kind: type) -> bool:
    words = f"{kind.__module__}.{kind.__qualname__}".lower()
    return any(word in words for word in _QUANTIZED)


def _check_owner(where: str, slot: Slot) -> None:
    owner, kind = slot.owner, type(slot.owner)
    if is_tuner(owner):
        found = f"a {kind.__module__}.{kind.__qualname__} whose adapters are not merged"
        raise WrappedModelError(where, "a plain nn.Linear", found, "merge them first: model = model.merge_and_unload()")
    changed = isinstance(owner, nn.Linear) and not computes_linear(owner)
    if not changed and "forward" not in owner.__dict__ and isinstance(owner, nn.Module):
        return
    found = f"a {kind.__module__}.{kind.__qualname__} with a forward of its own"
    if _quantized(kind):
        raise QuantizedError(where, "a plain nn.Linear", found, "prune first, then quantise")
    raise WrappedModelError(where, "a plain nn.Linear", found, "merge or unwrap it, or exclude this layer")


def _check_parameter(where: str, slot: Slot, blank: bool, shards: bool) -> nn.Parameter:
    owner, name = slot.owner, slot.name
    parameter = owner._parameters.get(name)
    if parameter is None:
        raise _not_a_parameter(where, slot)
    kind = type(parameter)
    if shards and kind.__name__ == "DTensor" and parameter.is_floating_point():
        return parameter
    if "DTensor" in kind.__name__ or "FlatParameter" in kind.__name__:
        raise ShardedError(
            where, "a whole parameter", f"a {kind.__name__}", "apply the plan before sharding, on the whole model"
        )
    if hasattr(parameter, "ds_shape") and not shards:
        remedy = "apply the plan before deepspeed.initialize"
        raise ShardedError(where, "a parameter of the model alone", "one that ZeRO-3 partitions", remedy)
    if (parameter.is_meta and not blank) or "Uninitialized" in kind.__name__:
        raise MetaTensorError(where, "a parameter with data", f"one on {parameter.device}", "load the weights first")
    found = f"a {kind.__module__}.{kind.__qualname__} of {parameter.dtype}"
    if not computable(parameter) or _quantized(kind):
        expected = "an nn.Parameter of 16 bits floating point or more"
        raise QuantizedError(where, expected, found, "prune first, then quantise")
    if kind is not nn.Parameter:
        remedy = "assign nn.Parameter(p.detach().as_subclass(torch.Tensor)) in its place, or exclude this layer"
        raise WrappedModelError(where, "an nn.Parameter itself, not of a subclass", found, remedy)
    if parameter.is_inference():
        found = "one that was made in torch.inference_mode, and can never be trained"
        remedy = "make the model outside of it, or a copy of it there: model = copy.deepcopy(model)"
        raise WrappedModelError(where, "an ordinary parameter", found, remedy)
    return parameter


def _not_a_parameter(where: str, slot: Slot) -> AttnPruneError:
    owner, name, expected = slot.owner, slot.name, f"{slot.name} to be a parameter of its module"
    computed = [key for key in owner._parameters if key in (f"{name}_g", f"{name}_orig", f"{name}_v")]
    if computed or name in getattr(owner, "parametrizations", {}):
        found = f"one computed from {computed[0] if computed else 'parametrizations.' + name}"
        remedy = "remove it first (torch.nn.utils.parametrize.remove_parametrizations, or prune.remove and the like)"
        return ParametrizedError(where, expected, found, remedy)
    found = f"a {type(owner).__module__}.{type(owner).__qualname__}"
    value = getattr(owner, name, None)
    if type(value) is Tensor:
        return WrappedModelError(where, expected, "a plain tensor", "make it an nn.Parameter, or exclude this layer")
    if _quantized(type(owner)):
        return QuantizedError(where, expected, found, "prune first, then quantise")
    return WrappedModelError(where, expected, found, "merge or unwrap it, or exclude this layer")


def _check_finite(where: str, parameter: nn.Parameter) -> None:
    # a finite sum proves finite weights without a second pass; an infinite one may be an overflow of finite weights
    values = gathered(parameter.detach())
    if bool(values.sum(dtype=torch.float32).isfinite()):
        return
    bad = int((~values.isfinite()).sum())
    if bad:
        raise NonFiniteError(
            where, "finite weights", f"{bad} of {parameter.numel()} NaN or infinite", "load a checkpoint from before"
        )


def check_expressible(views: Sequence[AttentionView], plan: Plan) -> None:
    """Raises NotExpressibleError where there is no way to run the planned shape."""
    by_name = {view.name: view for view in views}
    for layer in plan:
        view, after = by_name[layer.spec.name], layer.after
        if not layer.empty and view.way(after) is None:
            reasons = view.verdict.reasons.values() if view.verdict is not None else ()
            raise NotExpressibleError(
                view.name,
                "a shape that the host's forward can run (equal heads, as many qk as vo channels)",
                "; ".join([after.describe(), *dict.fromkeys(reasons)]),
                'use granularity="head", or scope="local" with heads="uniform" and equal ratios, or give the adapter '
                "a decoupled forward",
            )
        if view.way(after) == "expanded":
            _check_joints(view, layer)


def _check_joints(view: AttentionView, layer: LayerPlan) -> None:
    """Raises if a host is to read, out of one weight, projections that read other features than one another."""
    if view.read and any(joint.name == "weight" and joint.apart(view, layer.after) for joint in joints(view)):
        raise NotExpressibleError(
            view.name,
            "Q, K and V that read the same features, as the host reads them out of one weight",
            layer.after.describe(),
            "give q and k one ratio and v none above that of o, or exclude= this layer",
        )


def check_fit(model: nn.Module, views: Sequence[AttentionView], plan: Plan) -> None:
    """Raises PlanMismatchError unless every attention that the plan names is there, as the plan expects it."""
    found = {view.name: view.spec for view in views}
    for spec in plan.specs:
        if spec.name not in found:
            names = attention_names(model)
            raise PlanMismatchError(
                spec.name,
                "an attention module of this name, as the plan says",
                f"{', '.join(names[:4]) or 'no attention at all'}{' and others' if len(names) > 4 else ''}",
                "apply the plan to the model it was made for; were modules renamed or wrapped",
            )
        difference(spec, found[spec.name])
