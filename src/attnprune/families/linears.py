"""Attention whose projections are Linears: its spec and slots, and small things about Linears and masks."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, DataError, WrappedModelError
from ..nn.attempt import MACHINE
from ..nn.decoupled import State, host_class
from ..nn.expanded import ExpandedApart
from ..nn.rotary import Pairs
from ..nn.selected import features_of
from ..values.layout import PROJECTIONS, HeadLayout
from ..values.spec import AttentionSpec
from .calls import KEYS, SOURCES, VALUES
from .orders import check_order, orders_of, places_of
from .slots import FOLLOWS, Slot

Small = tuple[AttentionSpec, Mapping[int, torch.Size], Mapping[int, Mapping[str, Any]]]
SLIM = 64
"""Model width of stand-ins."""


def slim(spec: AttentionSpec, slots: Mapping[str, Slot], host: nn.Module) -> Small:
    """:meth:`attnprune.Adapter.small` of projections that are called: the model's width is :data:`SLIM`."""
    width = spec.d_model
    if reads_low_rank(spec, host):
        return _slim_ranks(spec, slots, host)
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


def _slim_ranks(spec: AttentionSpec, slots: Mapping[str, Slot], host: nn.Module) -> Small:
    """The same where Q, K or V reads a low rank: the ranks shrink too, in all that makes, norms or reads them."""
    widths = {size for size in (spec.d_model, spec.q_in, spec.k_in, spec.v_in) if size > 4 * SLIM}

    def small(size: int) -> int:  # what K and V read may come with the shared keys of the heads
        more = spec.q_extra if size not in widths and size - spec.q_extra in widths else 0
        return SLIM + more if size - more in widths else size

    shapes: dict[int, torch.Size] = {}
    attributes: dict[int, dict[str, Any]] = {}
    axes = {id(slot.owner): slot.axis for slot in slots.values()}
    for module in host.modules():
        own = {key: small(value) for key, value in module.__dict__.items() if "rank" in key and type(value) is int}
        for parameter in module._parameters.values():
            if parameter is not None and (id(module) not in axes or parameter.dim() > 1 or axes[id(module)]):
                kept = axes.get(id(module)) if parameter.dim() > 1 else None
                sizes = [size if axis == kept else small(size) for axis, size in enumerate(parameter.shape)]
                shapes[id(parameter)] = torch.Size(sizes)
                if isinstance(module, nn.Linear) and parameter.dim() > 1:
                    own |= {"out_features": sizes[0], "in_features": sizes[1]}
        attributes[id(module)] = own
    q, k, v = small(spec.q_in), small(spec.k_in), small(spec.v_in)
    return replace(spec, d_model=small(spec.d_model), q_in=q, k_in=k, v_in=v), shapes, attributes


def reads_low_rank(spec: AttentionSpec, host: nn.Module) -> bool:
    """Whether keys are made from less than what comes in, through a low rank, as in multi-head latent attention: K
    reads another width than O writes, and there is no other stream to read."""
    names = inspect.signature(inspect.unwrap(host_class(host).forward)).parameters
    return spec.k_in != spec.d_model and not any(name in names for name in (*SOURCES, *KEYS, *VALUES))


Slots = dict[str, Slot]


def described(
    name: str,
    parts: Mapping[str, Any],
    heads: int,
    scale: float | None,
    state: State | None,
    kv_heads: int | None = None,
    order: str | None = None,
) -> tuple[AttentionSpec, Slots, dict[str, Slots]]:
    """The spec and the slots of an attention whose projections are Linears (:meth:`attnprune.Adapter.of_linears`), and
    by order all slots that may be meant where one of them holds several projections."""
    for p, linear in parts.items():
        check_linear(f"{name}: {p}", linear)
    sizes = {p: size_of(linear) for p, linear in parts.items()}
    if state is None and _gates(heads, {p: sizes[p][p == "o"] for p in parts}, kv_heads):
        parts, sizes = ({"qg" if p == "q" else p: one for p, one in found.items()} for found in (parts, sizes))
    fused = next((p for p in parts if len(p) > 1), "")
    channels = {p: sizes[p][p == "o"] for p in parts}
    if state is not None:
        layout, scale = state.layout, state.scale
    else:
        layout = _layout_of_parts(heads, channels, fused, kv_heads)
    if not _fits(layout, channels):
        raise AdapterError(
            name,
            f"Q divisible by {heads} heads, K and V by a number of key heads that divides it, O as the heads of V",
            ", ".join(f"{p} {tuple(size)}" for p, size in sizes.items()),
            "write an adapter that tells how this module splits heads",
        )
    owners: dict[str, Any] = {p: linear for part, linear in parts.items() for p in part}
    read = {p: sizes[part][1] for part in parts for p in part}
    selected = {p: some for p in PROJECTIONS if (some := features_of(owners[p])) is not None}
    read |= {p: total for p, (total, _) in selected.items() if p != "o"}
    writes = selected["o"][0] if "o" in selected else sizes["o"][0]
    bias = tuple([owners[p].bias is not None for p in PROJECTIONS])
    spec = AttentionSpec(
        name,
        writes,
        layout.qk,
        layout.vo,
        layout.qk[0] ** -0.5 if scale is None else float(scale),
        read["q"],
        read["k"],
        read["v"],
        bias,  # type: ignore[arg-type]
        fused=fused == "qkv",
        gated=fused == "qg",
        groups=layout.groups,
        q_extra=layout.extra,
        left_out=tuple(selected[p][1] if p in selected else () for p in PROJECTIONS),  # type: ignore[arg-type]
        **({} if state is None or state.pairs is None else rotary_facts(state.pairs)),
    )

    def slots(places: Mapping[str, Sequence[int]]) -> Slots:
        found = {}
        for p in (*PROJECTIONS, *"g" * (fused == "qg"), *"x" * (layout.extra > 0)):
            owner, lies = owners["q" if p == "x" else p], places.get(p, range(layout.channels(FOLLOWS[p])))
            start, apart = (lies.start, None) if isinstance(lies, range) else (0, tuple(lies))
            turned = int(transposed(owner))
            found[f"{p}.weight"] = Slot(owner, "weight", len(lies), 1 - turned if p == "o" else turned, start, apart)
            if p != "o" and owner.bias is not None:
                found[f"{p}.bias"] = Slot(owner, "bias", len(lies), 0, start, apart)
        return found

    if order is not None:
        check_order(name, order, fused)
    choices = [([order] if order else orders_of(fused, layout)) if fused else []]
    choices += [orders_of("qx", layout)] if layout.extra else []
    found = {
        ", ".join(words): slots({p: where for one in words for p, where in places_of(one, layout).items()})
        for words in product(*filter(None, choices))
        if words
    }
    return spec, next(iter(found.values()), None) or slots({}), found


def _gates(heads: int, channels: Mapping[str, int], kv_heads: int | None) -> bool:
    """Whether Q also makes a gate for every channel that O reads, by the projections' sizes."""
    apart = channels.keys() == {*PROJECTIONS} and channels["q"] == 2 * channels["o"]
    return apart and not _fits(_usual_layout(heads, channels, "", kv_heads), channels)


def _fits(layout: HeadLayout, channels: Mapping[str, int]) -> bool:
    """Whether projections of so many channels hold such heads; Q holds what K has not, too."""
    of: dict[str, int] = {p: layout.channels(side) for p, side in FOLLOWS.items()}
    held = {part: f"{part}x" if "q" in part else part for part in channels}
    return all(sum(of[p] for p in held[part]) == size for part, size in channels.items())


def _layout_of_parts(heads: int, channels: Mapping[str, int], fused: str, kv_heads: int | None) -> HeadLayout:
    """How equal heads lie in projections of so many channels, one of which may hold several projections."""
    layout = _usual_layout(heads, channels, fused, kv_heads)
    if fused == "qkv" and not _fits(layout, channels):  # values of another dim
        rest = (channels[fused] - channels["o"]) // 2
        layout = layout_of(heads, rest, rest, channels["o"], channels["o"])
    if _fits(layout, channels) or fused not in ("", "kv"):
        return layout
    other = _layout_by_output(heads, channels, kv_heads)
    return layout if other is None or not _fits(other, channels) else other


def _layout_by_output(heads: int, channels: Mapping[str, int], kv_heads: int | None = None) -> HeadLayout | None:
    """How equal heads lie by what O reads, where Q may have more channels than K; None where none can.

    >>> _layout_by_output(4, {"q": 48, "kv": 56, "o": 24})
    HeadLayout(qk=(8, 8, 8, 8), vo=(6, 6, 6, 6), groups=(1, 1, 1, 1), extra=4)
    """
    vo = channels["o"] // heads
    keys = kv_heads or (channels["v"] // max(vo, 1) if "v" in channels else heads)
    qk = (channels["k"] if "k" in channels else channels["kv"] - keys * vo) // max(keys, 1)
    extra = channels["q"] // heads - qk
    if min(vo, keys, qk) < 1 or extra < 0 or heads % keys:
        return None
    return HeadLayout((qk,) * keys, (vo,) * keys, (heads // keys,) * keys, extra)


def _usual_layout(heads: int, channels: Mapping[str, int], fused: str, kv_heads: int | None) -> HeadLayout:
    """How equal heads lie where Q and K have as many channels in each."""
    of = dict(channels)
    if fused == "qkv":
        left = max(of[fused] - of["o"], 0) // 2
        of.update(q=of["o"], k=left, v=left)
    elif fused == "kv":
        of.update(k=of[fused] // 2, v=of[fused] // 2)
    elif fused == "qg" or fused == "qg":
        of.update(q=of[fused] - of["o"])
    elif fused == "qk":
        of.update(q=of[fused] // 2, k=of[fused] // 2)
    layout = layout_of(heads, *(of[p] for p in PROJECTIONS))
    if kv_heads is not None and len(layout.qk) != kv_heads:
        return HeadLayout((1,) * kv_heads, (1,) * kv_heads, (max(heads // kv_heads, 1),) * kv_heads)  # fits nothing
    return layout


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


def computable(parameter: Any) -> bool:
    """Whether a parameter holds numbers to compute with: floating point, of 16 bits or more."""
    return isinstance(parameter, nn.Parameter) and parameter.is_floating_point() and parameter.itemsize > 1


def check_linear(where: str, module: Any) -> None:
    """Raises WrappedModelError unless a module has what a Linear has."""
    if not all(hasattr(module, key) for key in ("in_features", "out_features", "weight")) and not transposed(module):
        remedy = "unwrap, merge or dequantise it, or exclude this layer"
        raise WrappedModelError(where, "an nn.Linear", f"a {type(module).__name__}", remedy)


def is_linear(module: Any) -> bool:
    """Whether a module may be a projection: an nn.Linear, or what stands in for one."""
    return isinstance(module, nn.Module) and (hasattr(module, "out_features") or transposed(module))


def is_tuner(module: object) -> bool:
    """Whether a module is one of PEFT's: LoRA and its kind."""
    return any(base.__name__ == "BaseTunerLayer" for base in type(module).__mro__)


def computes_linear(module: nn.Linear) -> bool:
    """Whether an nn.Linear's forward, or a subclass's, makes of weight and bias alone what nn.Linear does."""
    kind = host_class(module)
    if kind.forward is nn.Linear.forward:
        return True
    own = {key for key in module._buffers if not key.startswith("attnprune")}
    ours = isinstance(module, ExpandedApart)  # holds several weights
    if own or module._modules or not (ours or {*module._parameters} <= {"weight", "bias"}):
        return False
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=()):
        usual = nn.Linear(3, 2, bias=module.bias is not None, dtype=torch.float64)
        x, probe = torch.randn(2, 4, 3, dtype=torch.float64), copy.copy(usual)
        object.__setattr__(probe, "__class__", kind)
        probe.__dict__.update({key: value for key, value in module.__dict__.items() if key not in usual.__dict__})
        try:
            found = [probe.train(mode)(x) for mode in (True, False)]
            return all(torch.allclose(one, usual(x), rtol=1e-10, atol=1e-12) for one in found)
        except MACHINE:
            raise
        except Exception:  # whatever a class raises that is more than a Linear
            return False


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
    if hasattr(owner, "out_features") and not transposed(owner):
        owner.out_features, owner.in_features = parameter.shape  # type: ignore[assignment]
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
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3, 4):
        found = f"a tensor of {mask.dim()} dimensions" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise DataError(
            f"{name}: attention_mask",
            "a tensor (batch, keys), (batch, queries, keys) or (batch, heads, queries, keys)",
            found,
            'calibrate with the "sdpa" or "eager" attention implementation, or exclude= this layer',
        )
    return may_attend(mask)


def may_attend(mask: Tensor) -> Tensor:
    """A mask as bool ``(batch, heads, queries, keys)``, True attends; ``(batch, keys)`` serves all queries, and
    ``(batch, queries, keys)`` all heads.

    Floating-point masks are added to the logits: what they lower by half of the dtype's range or more is cut off. Those
    of ``(batch, keys)`` that have ones, and else nothing but zeros, are not added: there zero is cut off.
    """
    ones = mask.dim() == 2 and bool(((mask == 0) | (mask == 1)).all()) and bool(mask.any())
    if mask.is_floating_point() and not ones:
        allowed = mask > torch.finfo(mask.dtype).min / 2
    else:
        allowed = mask.bool()
    while allowed.dim() < 4:
        allowed = allowed[:, None]
    return allowed
