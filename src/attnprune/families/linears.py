"""Attention whose projections are Linears: its spec and slots, and small things about Linears and masks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, DataError, WrappedModelError
from ..nn.decoupled import State, host_class
from ..nn.rotary import Pairs
from ..values.layout import PROJECTIONS, HeadLayout, Projection
from ..values.spec import AttentionSpec
from .slots import Slot

Small = tuple[AttentionSpec, Mapping[int, torch.Size], Mapping[int, Mapping[str, Any]]]
SLIM = 64
"""Model width of stand-ins."""


def slim(spec: AttentionSpec, slots: Mapping[str, Slot], host: nn.Module) -> Small:
    """:meth:`attnprune.Adapter.small` of projections that are called: the model's width is :data:`SLIM`."""
    width = spec.d_model
    if not spec.q_in == spec.k_in == spec.v_in == width or width <= 4 * SLIM:
        return spec, {}, {}
    shapes: dict[int, torch.Size] = {}
    attributes: dict[int, dict[str, Any]] = {}
    for name, slot in slots.items():
        if name.endswith(".weight"):
            shape = list(slot.parameter.shape)
            shape[1 - slot.axis] = SLIM
            shapes[id(slot.parameter)] = torch.Size(shape)
            if isinstance(slot.owner, nn.Linear):
                attributes[id(slot.owner)] = {"out_features" if name[0] == "o" else "in_features": SLIM}
    owners = {id(slot.owner) for name, slot in slots.items() if name[0] != "o"}
    for module in host.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(module) not in owners and parameter.shape == (width,):
                shapes[id(parameter)] = torch.Size([SLIM])
        if getattr(module, "normalized_shape", None) == (width,):
            attributes[id(module)] = {"normalized_shape": (SLIM,)}
    return replace(spec, d_model=SLIM, q_in=SLIM, k_in=SLIM, v_in=SLIM), shapes, attributes


def described(
    name: str, linears: Mapping[Projection, Any], heads: int, scale: float | None, state: State | None
) -> tuple[AttentionSpec, dict[str, Slot]]:
    """The spec and the slots of an attention with four Linears (:meth:`attnprune.Adapter.of_linears`)."""
    for p, linear in linears.items():
        check_linear(f"{name}: {p}", linear)
    sizes: dict[Projection, tuple[int, int]] = {p: size_of(linear) for p, linear in linears.items()}
    (qs, q_in), (ks, k_in), (vs, v_in), (d_model, os) = (sizes[p] for p in PROJECTIONS)
    if state is not None:
        layout, scale = state.layout, state.scale
    else:
        layout = layout_of(heads, qs, ks, vs, os)
    if [layout.channels(p) for p in PROJECTIONS] != [qs, ks, vs, os]:
        raise AdapterError(
            name,
            f"Q divisible by {heads} heads, K and V by a number of key heads that divides it, O as the heads of V",
            ", ".join(f"{p} {tuple(size)}" for p, size in sizes.items()),
            "write an adapter that tells how this module splits heads",
        )
    bias = tuple(linears[p].bias is not None for p in PROJECTIONS)
    slots = {}
    for p in PROJECTIONS:
        turned = int(transposed(linears[p]))
        size = layout.channels(p)
        slots[f"{p}.weight"] = Slot(linears[p], "weight", size, 1 - turned if p == "o" else turned)
        if p != "o" and linears[p].bias is not None:
            slots[f"{p}.bias"] = Slot(linears[p], "bias", size)
    spec = AttentionSpec(
        name,
        d_model,
        layout.qk,
        layout.vo,
        layout.qk[0] ** -0.5 if scale is None else float(scale),
        q_in,
        k_in,
        v_in,
        bias,  # type: ignore[arg-type]
        groups=layout.groups,
        **({} if state is None or state.pairs is None else rotary_facts(state.pairs)),
    )
    return spec, slots


def rotary_facts(pairs: Pairs) -> dict[str, Any]:
    """What a spec says of rotary pairs."""
    return {"rotary": pairs.style, "rotary_dims": pairs.turned}


def layout_of(heads: int, q: int, k: int, v: int, o: int) -> HeadLayout:
    """How equal heads lie in projections of so many channels; key heads are fewer where K has fewer channels than Q.

    >>> layout_of(8, 64, 16, 16, 64).groups
    (4, 4)
    """
    dim = max(q // heads, 1)
    keys = max(k // dim, 1)
    keys = keys if heads % keys == 0 else heads
    return HeadLayout((dim,) * keys, (max(v // keys, 1),) * keys, (heads // keys,) * keys)


def check_linear(where: str, module: Any) -> None:
    """Raises WrappedModelError unless a module has what a Linear has."""
    if not all(hasattr(module, key) for key in ("in_features", "out_features", "weight")) and not transposed(module):
        remedy = "unwrap, merge or dequantise it, or exclude this layer"
        raise WrappedModelError(where, "an nn.Linear", f"a {type(module).__name__}", remedy)


def is_linear(module: Any) -> bool:
    """Whether a module may be a projection: an nn.Linear, or what stands in for one."""
    return isinstance(module, nn.Module) and (hasattr(module, "out_features") or transposed(module))


def transposed(module: Any) -> bool:
    """Whether a projection's weight is ``(in, out)``, as in transformers' Conv1D."""
    return any(kind.__name__ == "Conv1D" and "nf" in getattr(module, "__dict__", ()) for kind in type(module).__mro__)


def size_of(linear: Any) -> tuple[int, int]:
    """What a projection writes and reads."""
    if transposed(linear):
        return int(linear.weight.shape[1]), int(linear.weight.shape[0])
    return int(linear.out_features), int(linear.in_features)


def put(owner: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Gives a projection a new weight or bias; its own attributes follow."""
    setattr(owner, name, parameter)
    if name != "weight":
        return
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = parameter.shape
    elif transposed(owner):
        owner.__dict__.update(nx=parameter.shape[0], nf=parameter.shape[1])


def linear_of(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A Linear that holds these very parameters."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=torch.device("meta"))
    linear.weight = weight
    linear.bias = bias  # type: ignore[assignment]
    return linear


def attended(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Which keys each query may attend to in a call of a module, by its ``attention_mask``."""
    forward = inspect.signature(inspect.unwrap(host_class(module).forward))
    bound = forward.bind_partial(module, *args, **kwargs).arguments
    mask = bound.get("attention_mask", bound.get("kwargs", {}).get("attention_mask"))
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        found = f"a tensor of {mask.dim()} dimensions" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise DataError(
            f"{name}: attention_mask",
            "a tensor (batch, keys) or (batch, heads, queries, keys)",
            found,
            'calibrate with the "sdpa" or "eager" attention implementation',
        )
    return may_attend(mask)


def may_attend(mask: Tensor) -> Tensor:
    """A mask as bool ``(batch, heads, queries, keys)``, True attends; ``(batch, keys)`` serves all queries.

    Floating-point masks are added to the logits: what they lower by half of the dtype's range or more is cut off.
    """
    if mask.is_floating_point() and mask.dim() == 4:
        allowed = mask > torch.finfo(mask.dtype).min / 2
    else:
        allowed = mask.bool()
    return allowed if allowed.dim() == 4 else allowed[:, None, None]
