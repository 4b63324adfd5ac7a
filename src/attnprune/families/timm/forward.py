"""The decoupled forward of attention with one fused ``qkv`` Linear, as in timm."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.attend import attend
from ...nn.decoupled import Decoupled, forward_of
from ...nn.frozen import frozen
from ...nn.products import Plain
from ...nn.projection import Projected, project
from ...values.layout import Bucket


class DecoupledFusedAttention(Decoupled):
    """Self-attention with ``q_proj``, ``k_proj``, ``v_proj`` of any head dims in place of ``qkv``; ``proj`` stays."""

    training: bool
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    proj: nn.Linear

    _kernel: ClassVar[bool]

    @classmethod
    def facts(cls, host: type[Any]) -> dict[str, Any]:
        return {"_kernel": calls_kernel(host)}

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """As in the host class.

        Args:
            x: ``(batch, tokens, width)``.
            attn_mask: broadcastable to ``(batch, heads, tokens, tokens)``; bool (True attends) or added to the logits.
            is_causal: whether a token attends to itself and those before it only.
        """
        heads = frozen(self, x)
        if heads is None:
            heads = project((self.q_proj, self.k_proj, self.v_proj), x, self.attnprune_state)
        context = self._attend(heads, attn_mask, is_causal)
        return self._finish(heads.output(context, self.proj))

    def _attend(self, heads: Projected, mask: Tensor | None, causal: bool) -> Tensor:
        state = self.attnprune_state
        drop = getattr(self, "attn_drop", None)
        dropout = float(drop.p) if isinstance(drop, nn.Dropout) and self.training else 0.0
        if mask is not None:
            mask = mask[(None,) * (4 - mask.dim())]

        def fused(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket) -> tuple[Tensor, None]:
            rows = None if mask is None else self.head_rows(mask, bucket)
            return F.scaled_dot_product_attention(q, k, v, rows, dropout, causal, scale=state.scale), None

        def written_out(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket) -> tuple[Tensor, None]:
            logits = (q * state.scale) @ k.mT
            if causal:  # timm: in place of a mask
                hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
                logits = logits.masked_fill(hidden, -torch.inf)
            elif mask is not None:
                rows = self.head_rows(mask, bucket)
                logits = logits.masked_fill(~rows, -torch.inf) if rows.dtype == torch.bool else logits + rows
            weights = logits.softmax(-1)
            return (weights if drop is None else drop(weights)) @ v, None

        if not getattr(self, "fused_attn", self._kernel):  # somebody may listen to attn_drop
            return attend(*heads[:4], written_out)[0]
        plain = None if dropout or (causal and mask is not None) else Plain(state.scale, mask, causal, self.head_rows)
        return attend(*heads[:4], fused, plain, heads.quick)[0]

    def _finish(self, output: Tensor) -> Tensor:
        drop = getattr(self, "proj_drop", None)
        return output if drop is None else drop(output)


def calls_kernel(host: type[Any]) -> bool:
    """Whether a class's code names the fused kernel; an attribute ``fused_attn`` of a module says more."""
    return "scaled_dot_product_attention" in forward_of(host).__code__.co_names
