"""Attention with one fused ``qkv`` Linear: timm's, and classes of one's own that compute the same."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...nn import Decoupled, host_class
from ...values.spec import AttentionSpec
from ..base import Adapter, AttentionView
from ..linears import is_linear, linear_of, may_attend, size_of
from ..names import SCALE, finite, first, heads_of, output_of, parts_of, tells_heads
from .forward import DecoupledFusedAttention, calls_kernel


class FusedQKVAdapter(Adapter):
    """``qkv`` of ``(3, heads, head dim)`` rows and ``proj``: timm's ViT, DeiT and whatever else uses its ``Attention``.

    A change puts ``q_proj``, ``k_proj`` and ``v_proj`` in the place of ``qkv``. A module that does more, as normalising
    queries and keys, keeps its forward and its ``qkv``, which becomes compact.

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

    def __init__(self, *classes: type[nn.Module]) -> None:
        self.classes = classes

    def matches(self, module: nn.Module) -> bool:
        host = host_class(module)
        if isinstance(module, DecoupledFusedAttention):
            return not self.classes or any(host.forward is one.forward for one in self.classes)
        if self.classes:
            return any(host.forward is one.forward for one in self.classes)
        return bool(_parts(module)) and tells_heads(module)

    def view(self, name: str, module: Any) -> AttentionView:
        if isinstance(module, DecoupledFusedAttention):
            return self.of_linears(
                name, module, q=module.q_proj, k=module.k_proj, v=module.v_proj, o=module.proj,
                heads=len(module.attnprune_state.kept),
            )  # fmt: skip
        parts = _parts(module)
        scale = first(SCALE, module.__dict__)
        if not self.classes and getattr(module, "fused_attn", calls_kernel(host_class(module))):
            scale = None  # timm leaves the scale to the kernel
        return self.of_linears(
            name, module, heads=heads_of(module, size_of(parts["o"])[1]),
            scale=None if scale is None else finite(getattr(module, scale)), **parts,
        )  # fmt: skip

    def decoupled_for(self, view: AttentionView) -> Sequence[type[Decoupled]]:
        named = {"qkv", "proj"} <= view.module._modules.keys()
        return (DecoupledFusedAttention,) if named or view.mixin_runs else ()

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
        if mask is None:
            return super().attended(view, args, kwargs)
        return may_attend(mask[(None,) * (4 - mask.dim())])

    def expresses(self, view: AttentionView, spec: AttentionSpec) -> bool:
        return False  # the host reads qkv

    def reshape(self, view: AttentionView, spec: AttentionSpec) -> None:
        module, width = view.module, sum(spec.vo_dims)
        values = {"num_heads": spec.heads, "head_dim": spec.qk_dim, "attn_dim": width, "attention_dim": width}
        for key in values.keys() & module.__dict__.keys():
            setattr(module, key, values[key])


def _parts(module: nn.Module) -> dict[str, Any]:
    """The fused projection and O; empty unless the module has both."""
    parts, o = parts_of(module), output_of(module)
    return {**parts, "o": o} if "qkv" in parts and is_linear(o) else {}
