"""The decoupled forward of :class:`torch.nn.MultiheadAttention`."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import StateDictError
from ...nn.attend import attend
from ...nn.decoupled import Decoupled
from ...nn.frozen import frozen
from ...nn.products import Plain
from ...nn.projection import Projected, project
from ...values.layout import Bucket

GONE = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class PrunedAway:
    """What is found where a packed weight or bias was.

    nn.TransformerEncoder asks it whether it requires a gradient: where it would hand its dense layers nested tensors,
    and leave zeros at padded positions, it does so with pruned ones too. Who asks for more is told what to use instead.
    """

    def __init__(self, name: str, requires_grad: bool) -> None:
        self.name, self.requires_grad = name, requires_grad

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(str(gone(self.name)))


class _PrunedAwayInTrace(PrunedAway):
    """In a trace PyTorch's fused paths step aside from what overrides torch functions: no nested tensors in graphs."""

    def __torch_function__(self, *_: Any, **__: Any) -> NoReturn:
        raise gone(self.name)


class _WasPacked:
    """A class attribute in the place of a parameter: None where the dense module had none, else :class:`PrunedAway`."""

    def __init__(self, name: str, part: str) -> None:
        self.name, self.part = name, part

    def __get__(self, module: DecoupledMultiheadAttention | None, owner: type) -> PrunedAway | None:
        if module is None:
            return PrunedAway(self.name, False)
        parts = [getattr(linear, self.part) for linear in (module.q_proj, module.k_proj, module.v_proj)]
        if parts[0] is None:
            return None
        kind = _PrunedAwayInTrace if torch._C._get_tracing_state() is not None else PrunedAway
        return kind(self.name, any(parameter.requires_grad for parameter in parts))


def gone(name: str) -> StateDictError:
    """Says what to use in place of a packed weight."""
    return StateDictError(
        f"nn.MultiheadAttention.{name}",
        "a dense module",
        "one whose heads were pruned, which has no packed weight",
        "use q_proj.weight, k_proj.weight and v_proj.weight",
    )


class DecoupledMultiheadAttention(Decoupled):
    """``nn.MultiheadAttention`` with ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj`` Linears of any head dims."""

    training: bool
    batch_first: bool
    add_zero_attn: bool
    dropout: float
    bias_k: Tensor | None
    bias_v: Tensor | None
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear

    attnprune_replaces = frozenset({"forward", "_reset_parameters"})
    in_proj_weight = _WasPacked("in_proj_weight", "weight")
    in_proj_bias = _WasPacked("in_proj_bias", "bias")

    def _reset_parameters(self) -> None:
        """As in ``nn.MultiheadAttention``, with a weight of its own for each of Q, K and V.

        A host that initialises in its own way keeps doing so, as far as it reads no packed weight.
        """
        host: Any = super()
        if host._reset_parameters.__func__ is not nn.MultiheadAttention._reset_parameters:
            host._reset_parameters()
            return
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
                nn.init.zeros_(self.out_proj.bias)
        for token in (self.bias_k, self.bias_v):
            if token is not None:
                nn.init.xavier_normal_(token)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        dense = [prefix + name for name in GONE if prefix + name in state_dict]
        if dense:
            raise StateDictError(
                prefix.rstrip(".") or "state dict",
                f"keys of the pruned module ({prefix}q_proj.weight and so on)",
                f"keys of a dense nn.MultiheadAttention ({', '.join(dense)})",
                "load the dense weights into a dense model first, then apply the plan to it",
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As in the host class; weights come for the heads that are left, in their order."""
        if query.is_nested:
            return self._nested(query, attn_mask, is_causal), None
        state, itself = self.attnprune_state, query is key and key is value
        batched, seq_first = query.dim() == 3, query.dim() == 3 and not self.batch_first
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif seq_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))

        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        is_causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if is_causal else self._merge(query, key, key_padding_mask, attn_mask)

        if itself:
            extended = self.bias_k is not None or self.add_zero_attn
            ready = frozen(self, query, widen=not extended)
            if ready is None:
                ready = project((self.q_proj, self.k_proj, self.v_proj), query, state, widen=not extended)
            heads = ready
        else:
            layout = state.layout
            heads = Projected(self.q_proj(query), self.k_proj(key), self.v_proj(value), layout, layout)
        k, v, mask = self._extend(heads.k, heads.v, mask)
        output, weights = self._attend(heads._replace(k=k, v=v), mask, is_causal, need_weights)

        if weights is not None:
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        if not batched:
            return output.squeeze(0), weights
        return (output.transpose(0, 1) if seq_first else output), weights

    def _attend(
        self, heads: Projected, mask: Tensor | None, is_causal: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        state = self.attnprune_state
        dropout = self.dropout if self.training else 0.0

        def kernel(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket) -> tuple[Tensor, Tensor | None]:
            rows = None if mask is None else self.head_rows(mask, bucket)
            if not need_weights:
                context = F.scaled_dot_product_attention(q, k, v, rows, dropout, is_causal, scale=state.scale)
                return context, None
            logits = (q * state.scale) @ k.transpose(-1, -2)
            weights = F.dropout((logits if rows is None else logits + rows).softmax(-1), dropout)
            return weights @ v, weights

        plain = None if need_weights or dropout else Plain(state.scale, mask, is_causal, self.head_rows)
        context, weights = attend(*heads[:4], kernel, plain, heads.quick)
        return heads.output(context, self.out_proj), weights

    def _merge(
        self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> Tensor | None:
        """One additive mask ``(batch or 1, heads or 1, queries, keys)`` from the two that may be given."""
        batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
        padding = F._canonical_mask(
            key_padding_mask, "key_padding_mask", F._none_or_dtype(attn_mask), "attn_mask", query.dtype
        )
        mask = F._canonical_mask(attn_mask, "attn_mask", None, "", query.dtype, False)
        if mask is not None:
            state = self.attnprune_state
            rows = [batch * heads for heads in (len(state.kept), state.dense_heads)]
            if mask.dim() == 2 and mask.shape == (queries, keys):
                mask = mask[None, None]
            elif mask.dim() == 3 and mask.shape[0] in rows and mask.shape[1:] == (queries, keys):
                mask = mask.reshape(batch, -1, queries, keys)
            else:
                raise RuntimeError(
                    f"The shape of the attn_mask is {tuple(mask.shape)}, but should be {(queries, keys)} or "
                    f"{(rows[0], queries, keys)} (for the dense model's heads also {rows[1]})."
                )
        if padding is None:
            return mask
        if padding.shape != (batch, keys):
            raise RuntimeError(
                f"The shape of the key_padding_mask is {tuple(padding.shape)}, but should be {(batch, keys)}."
            )
        padding = padding[:, None, None]
        return padding if mask is None else mask + padding

    def _extend(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Appends ``bias_k``, ``bias_v`` and the zero attention token to keys, values and mask."""
        extra = []
        if self.bias_k is not None and self.bias_v is not None:
            extra.append((self.bias_k.expand(len(k), 1, -1), self.bias_v.expand(len(v), 1, -1)))
        if self.add_zero_attn:
            extra.append((k.new_zeros(len(k), 1, k.shape[-1]), v.new_zeros(len(v), 1, v.shape[-1])))
        if not extra:
            return k, v, mask
        keys, values = zip(*extra, strict=True)
        mask = None if mask is None else F.pad(mask, (0, len(extra)))
        return torch.cat([k, *keys], dim=1), torch.cat([v, *values], dim=1), mask

    def _nested(self, query: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """Self-attention over a nested tensor, which nn.TransformerEncoder makes when its first layer is dense."""
        rows = query.unbind()
        padded = query.to_padded_tensor(0.0)
        lengths = torch.tensor([len(row) for row in rows], device=padded.device)
        padding = torch.arange(padded.shape[1], device=padded.device) >= lengths[:, None]
        output, _ = self.forward(
            padded, padded, padded, padding, need_weights=False, attn_mask=attn_mask, is_causal=is_causal
        )
        return torch.nested.as_nested_tensor([one[: len(row)] for one, row in zip(output, rows, strict=True)])
