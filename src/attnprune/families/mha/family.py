""":class:`torch.nn.MultiheadAttention`, packed or with separate input weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ...nn import host_class
from ...values.layout import Kind
from ...values.spec import AttentionSpec
from ..base import Adapter, AttentionView
from ..calls import Arguments, Call
from ..linears import Small, linear_of, may_attend
from ..slots import Slot
from .forward import GONE, DecoupledMultiheadAttention


class MultiheadAttentionAdapter(Adapter):
    """Packed ``in_proj_weight`` and separate ``q_proj_weight`` alike become Linears in the same module object."""

    decoupled = DecoupledMultiheadAttention

    def matches(self, module: nn.Module) -> bool:
        # a subclass with a forward of its own may read the packed weight in ways unknown here
        return host_class(module).forward is nn.MultiheadAttention.forward

    def view(self, name: str, module: nn.Module) -> AttentionView:
        assert isinstance(module, nn.MultiheadAttention)
        if isinstance(module, DecoupledMultiheadAttention):
            view = self.of_linears(
                name, module, q=module.q_proj, k=module.k_proj, v=module.v_proj, o=module.out_proj,
                heads=module.num_heads,
            )  # fmt: skip
            spec = replace(view.spec, bias_kv=module.bias_k is not None)
            return AttentionView(spec, module, self, {**view.slots, **self._extra(module, spec)}, _KINDS)
        width, heads = module.embed_dim, module.num_heads
        packed, bias = module.in_proj_weight is not None, module.in_proj_bias is not None
        slots = {}
        for i, p in enumerate("qkv"):
            slots[f"{p}.weight"] = (
                Slot(module, "in_proj_weight", width, start=i * width)
                if packed
                else Slot(module, f"{p}_proj_weight", width)
            )
            if bias:
                slots[f"{p}.bias"] = Slot(module, "in_proj_bias", width, start=i * width)
        slots["o.weight"] = Slot(module.out_proj, "weight", width, axis=1)
        spec = AttentionSpec.of(
            name, heads=heads, head_dim=width // heads, d_model=width, k_in=module.kdim, v_in=module.vdim,
            bias=(bias, bias, bias, module.out_proj.bias is not None), bias_kv=module.bias_k is not None, fused=packed,
        )  # fmt: skip
        return AttentionView(spec, module, self, {**slots, **self._extra(module, spec)}, _KINDS)

    @staticmethod
    def _extra(module: nn.MultiheadAttention, spec: AttentionSpec) -> dict[str, Slot]:
        if module.bias_k is None:
            return {}
        return {key: Slot(module, key, sum(spec.dims(kind)), axis=2) for key, kind in _KINDS.items()}

    def expresses(self, view: AttentionView, spec: AttentionSpec) -> bool:
        return False  # the packed weight's height is the embedding's width

    def commit(self, view: AttentionView, tensors: Mapping[str, nn.Parameter], spec: AttentionSpec) -> None:
        module = view.module
        if isinstance(module, DecoupledMultiheadAttention):
            super().commit(view, tensors, spec)
            return
        linears = {p: linear_of(tensors[f"{p}.weight"], tensors.get(f"{p}.bias")) for p in "qkv"}
        for name in GONE:
            module._parameters[name] = None
        del module._parameters["in_proj_weight"]  # the class has a stand-in of this name
        module._qkv_same_embed_dim = False  # type: ignore[assignment]
        for p, linear in linears.items():
            module.add_module(f"{p}_proj", linear.train(module.training))
        out = view.slots["o.weight"].owner
        if type(out) is NonDynamicallyQuantizableLinear:
            object.__setattr__(out, "__class__", nn.Linear)  # it is called now, so quantisers may replace it
        rest = {key: parameter for key, parameter in tensors.items() if key[:2] not in ("q.", "k.", "v.")}
        super().commit(view, rest, spec)

    def calls(self, view: AttentionView) -> Sequence[Call]:
        return list(_calls(view))

    def small(self, view: AttentionView) -> Small:
        module, spec = view.module, view.spec
        assert isinstance(module, nn.MultiheadAttention)
        width = 4 * spec.heads
        if module.embed_dim <= 256:
            return spec, {}, {}
        sizes = {module.embed_dim: width, module.kdim: 4 * spec.heads if module.kdim == module.embed_dim else 8}
        sizes.setdefault(module.vdim, 16)
        sizes |= {3 * module.embed_dim: 3 * width}
        shapes = {
            id(parameter): torch.Size([sizes.get(size, size) for size in parameter.shape])
            for parameter in module.parameters()
        }
        attributes = {
            id(module): {"embed_dim": width, "kdim": sizes[module.kdim], "vdim": sizes[module.vdim], "head_dim": 4},
            id(module.out_proj): {"in_features": width, "out_features": width},
        }
        small = AttentionSpec.of(
            spec.name, heads=spec.heads, head_dim=4, d_model=width, k_in=sizes[module.kdim], v_in=sizes[module.vdim],
            bias=spec.bias, bias_kv=spec.bias_kv, fused=spec.fused,
        )  # fmt: skip
        return small, shapes, attributes

    def attended(self, view: AttentionView, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        module = view.module
        assert isinstance(module, nn.MultiheadAttention)
        given = _FORWARD.bind(module, *args, **kwargs).arguments
        padding, mask, query = given.get("key_padding_mask"), given.get("attn_mask"), given["query"]
        batch = 1 if query.dim() == 2 else query.shape[0 if module.batch_first else 1]
        allowed: Tensor | None = None
        if mask is not None:
            real = may_attend(mask.reshape(1, -1, *mask.shape[-2:])) if mask.is_floating_point() else ~mask
            allowed = real.reshape(1 if mask.dim() == 2 else batch, -1, *mask.shape[-2:])
        if padding is not None:
            padding = padding if padding.dim() == 2 else padding[None]
            real = padding > torch.finfo(padding.dtype).min / 2 if padding.is_floating_point() else ~padding
            allowed = real[:, None, None] if allowed is None else allowed & real[:, None, None]
        return allowed

    def constant_keys(self, view: AttentionView) -> Tensor | None:
        module = view.module
        assert isinstance(module, nn.MultiheadAttention)
        keys = [] if module.bias_k is None else [module.bias_k.detach().reshape(1, -1)]
        if module.add_zero_attn:
            keys.append(view.weight("k").new_zeros(1, sum(view.spec.qk_dims)))
        return torch.cat(keys) if keys else None

    def reshape(self, view: AttentionView, spec: AttentionSpec) -> None:
        values = {
            "num_heads": spec.heads, "head_dim": spec.qk_dim,
            "embed_dim": spec.d_model, "kdim": spec.k_in, "vdim": spec.v_in,
        }  # fmt: skip
        view.module.__dict__.update(values)


def _calls(view: AttentionView) -> Iterator[Call]:
    """Every option of the forward, in the layout that the module has."""
    module, spec = view.module, view.spec
    assert isinstance(module, nn.MultiheadAttention)
    heads, batch, queries, keys = spec.heads, 2, 5, 6

    def call(what: str, rounding: float = 1.0, size: float = 1.0, keys: int = keys, **more: Any) -> Call:
        def arguments(generator: torch.Generator, dtype: torch.dtype) -> list[Arguments]:
            def tokens(length: int, width: int) -> Tensor:
                x = torch.randn(batch, length, width, generator=generator, dtype=dtype, device="cpu") * size
                return x if module.batch_first else x.transpose(0, 1)

            found: Arguments = {
                "query": tokens(queries, spec.q_in), "key": tokens(keys, spec.k_in), "value": tokens(keys, spec.v_in),
            }  # fmt: skip
            for name, value in more.items():
                found[name] = value(generator, dtype) if callable(value) else value
            return [found]

        return Call(what, arguments, rounding)

    def additive(*shape: int) -> Any:
        return lambda generator, dtype: torch.randn(shape, generator=generator, dtype=dtype, device="cpu")

    def hidden(*shape: int) -> Any:
        def mask(generator: torch.Generator, dtype: torch.dtype) -> Tensor:
            gone = torch.rand(shape, generator=generator, device="cpu") < 0.4
            gone[..., 0] = False
            return gone

        return mask

    yield call("plain inputs", need_weights=False)
    yield call("attention weights", need_weights=True)
    yield call("attention weights of every head", need_weights=True, average_attn_weights=False)
    yield call("large inputs", 1e4, 30.0, need_weights=False)
    yield call("huge inputs", 1e8, 2e3, need_weights=False)
    yield call("an additive mask", need_weights=False, attn_mask=additive(queries, keys))
    yield call("a mask for every head", need_weights=False, attn_mask=additive(batch * heads, queries, keys))
    yield call("a bool mask", need_weights=True, attn_mask=hidden(queries, keys))
    yield call("a padding mask", need_weights=False, key_padding_mask=hidden(batch, keys))
    causal = torch.full((queries, queries), -torch.inf, device="cpu").triu(1)
    yield call(
        "causality", need_weights=False, keys=queries, is_causal=True, attn_mask=lambda g, dtype: causal.to(dtype)
    )


_FORWARD = inspect.signature(nn.MultiheadAttention.forward)
_KINDS: dict[str, Kind] = {"bias_k": "qk", "bias_v": "vo"}
