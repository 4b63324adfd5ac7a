"""Attention with one fused ``qkv`` Linear: timm's, and classes of one's own that compute the same."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...errors import AdapterError
from ...nn import host_class
from ...nn.decoupled import forward_of
from ...values.spec import AttentionSpec
from ..base import Adapter, check_linear, linear_of, may_attend
from ..views import AttentionView, Slot
from .forward import DecoupledFusedAttention, calls_kernel

TIMM = frozenset({
    "timm.layers.attention.Attention", "timm.models.vision_transformer.Attention", "timm.models.metaformer.Attention",
    "timm.models.davit.WindowAttention", "timm.models.convit.MHSA",
})  # fmt: skip
"""Classes of timm whose forward is the one that this family has; others rotate, bias or mix besides."""
PLAIN = ("q_norm", "k_norm", "norm", "gate")
"""Attributes of such a class that must be absent, None or an nn.Identity."""


class FusedQKVAdapter(Adapter):
    """``qkv`` of ``(3, heads, head dim)`` rows and ``proj``: timm's ViT, DeiT and whatever else uses its ``Attention``.

    Any change puts ``q_proj``, ``k_proj`` and ``v_proj`` in the place of ``qkv``. A module that normalises queries and
    keys, or its context, or gates it, is not of this family.

    Args:
        classes: attention classes of one's own that compute what timm's does and name their parts alike (``qkv``,
            ``proj``, ``num_heads``; ``scale``, ``attn_drop``, ``proj_drop`` and ``fused_attn`` if they have them).
            None given: timm's.

    >>> class Attention(nn.Module):
    ...     def __init__(self, width, heads):
    ...         super().__init__()
    ...         self.num_heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
    ...
    ...     def forward(self, x):
    ...         q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    ...         x = nn.functional.scaled_dot_product_attention(q, k, v)
    ...         return self.proj(x.transpose(1, 2).flatten(2))
    >>> import attnprune, torch
    >>> mine = attnprune.register_adapter(FusedQKVAdapter(Attention))
    >>> model = Attention(32, 4)
    >>> report = attnprune.prune_attention(model, {"qk": 0.5})
    >>> model(torch.randn(2, 5, 32)).shape, model.q_proj
    (torch.Size([2, 5, 32]), Linear(in_features=32, out_features=16, bias=True))
    >>> attnprune.unregister_adapter(mine)
    """

    decoupled = DecoupledFusedAttention

    def __init__(self, *classes: type[nn.Module]) -> None:
        self.classes = classes

    def matches(self, module: nn.Module) -> bool:
        host = host_class(module)
        if not (any(host.forward is one.forward for one in self.classes) if self.classes else _place(host) in TIMM):
            return False
        parts = (getattr(module, key, None) for key in PLAIN)
        return all(part is None or isinstance(part, nn.Identity) for part in parts)

    def view(self, name: str, module: Any) -> AttentionView:
        if isinstance(module, DecoupledFusedAttention):
            return self.of_linears(
                name, module, q=module.q_proj, k=module.k_proj, v=module.v_proj, o=module.proj,
                heads=len(module.attnprune_state.kept),
            )  # fmt: skip
        for part in ("qkv", "proj"):
            check_linear(f"{name}: {part}", getattr(module, part))
        rows, heads, d_model = module.qkv.out_features, int(module.num_heads), module.proj.out_features
        width = rows // 3
        if rows % (3 * heads) or module.proj.in_features != width:
            raise AdapterError(
                name,
                f"qkv with three times as many rows as proj has columns, divisible by {heads} heads",
                f"qkv {rows}, proj {module.proj.in_features}",
                "write an adapter that tells how this module splits heads",
            )
        slots = {}
        for i, p in enumerate("qkv"):
            for key in ("weight", "bias") if module.qkv.bias is not None else ("weight",):
                slots[f"{p}.{key}"] = Slot(module.qkv, key, width, start=i * width)
        slots["o.weight"] = Slot(module.proj, "weight", width, axis=1)
        bias, read = module.qkv.bias is not None, dict.fromkeys(("q_in", "k_in", "v_in"), module.qkv.in_features)
        kernel = getattr(module, "fused_attn", calls_kernel(host_class(module)))
        ignored = not self.classes and kernel  # timm leaves the scale to the kernel
        scale = None if ignored else getattr(module, "scale", None)
        spec = AttentionSpec.of(
            name, heads=heads, head_dim=width // heads, d_model=d_model, fused=True,
            bias=(bias, bias, bias, module.proj.bias is not None), **read,
            **({} if scale is None else {"scale": float(scale)}),
        )  # fmt: skip
        return AttentionView(spec, module, self, slots)

    def expresses(self, view: AttentionView, spec: AttentionSpec) -> bool:
        return False  # the host reads qkv

    def commit(self, view: AttentionView, tensors: Mapping[str, nn.Parameter], spec: AttentionSpec) -> None:
        module = view.module
        if isinstance(module, DecoupledFusedAttention):
            super().commit(view, tensors, spec)
            return
        training = view.slots["q.weight"].owner.training
        del module._modules["qkv"]
        for p in "qkv":
            linear = linear_of(tensors[f"{p}.weight"], tensors.get(f"{p}.bias"))
            module.add_module(f"{p}_proj", linear.train(training))
        super().commit(view, {"o.weight": tensors["o.weight"]}, spec)

    def attended(self, view: AttentionView, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        given = inspect.signature(host_class(view.module).forward).bind(view.module, *args, **kwargs).arguments
        mask = given.get("attn_mask")
        return None if mask is None else may_attend(mask[(None,) * (4 - mask.dim())])

    def reshape(self, view: AttentionView, spec: AttentionSpec) -> None:
        module, width = view.module, sum(spec.vo_dims)
        values = {"num_heads": spec.heads, "head_dim": spec.qk_dim, "attn_dim": width, "attention_dim": width}
        for key in values.keys() & module.__dict__.keys():
            setattr(module, key, values[key])


def _place(host: type[Any]) -> str:
    """Where the forward of a class is defined."""
    forward = forward_of(host)  # anything that can be called
    return f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', '')}".removesuffix(".forward")
