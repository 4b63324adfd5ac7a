""":class:`torch.nn.MultiheadAttention`, packed or with separate input weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ...nn import host_class
from ...values.layout import Kind
from ...values.spec import AttentionSpec
from ..base import Adapter, linear_of, may_attend
from ..views import AttentionView, Slot
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
        view.module.num_heads, view.module.head_dim = spec.heads, spec.qk_dim  # type: ignore[assignment]


_FORWARD = inspect.signature(nn.MultiheadAttention.forward)
_KINDS: dict[str, Kind] = {"bias_k": "qk", "bias_v": "vo"}
