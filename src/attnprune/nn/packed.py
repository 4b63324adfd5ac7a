"""Q, K and V in one matrix product, where their weights lie side by side in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def project(linears: Sequence[nn.Linear], x: Tensor) -> list[Tensor]:
    """What every Linear makes of ``x`` ``(batch, tokens, width)``; by one product, if that is the same thing.

    It is for inference with weights that :func:`attnprune.pack_qkv` laid side by side. Where somebody differentiates or
    listens (hooks), or the weights have been moved apart (``model.to``, another surgery), each Linear is called.
    """
    if _calls_may_merge(linears, x):
        weight, bias = (side_by_side([getattr(linear, key) for linear in linears]) for key in ("weight", "bias"))
        if weight is not None and (bias is not None or all(linear.bias is None for linear in linears)):
            return list(torch.split(F.linear(x, weight, bias), [linear.out_features for linear in linears], -1))
    return [linear(x) for linear in linears]


def _calls_may_merge(linears: Sequence[nn.Linear], x: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or any(linear.weight.requires_grad for linear in linears)):
        return False
    return not any(
        type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks
        for linear in linears
    )


def side_by_side(parts: Sequence[Tensor | None]) -> Tensor | None:
    """One view of tensors that follow one another in one storage, along their first dimension; None if they do not."""
    first = parts[0]
    if first is None:
        return None
    place, storage, rows = first.data_ptr(), first.untyped_storage().data_ptr(), 0
    for part in parts:
        if (
            part is None
            or part.data_ptr() != place
            or part.untyped_storage().data_ptr() != storage
            or part.dtype != first.dtype
            or part.shape[1:] != first.shape[1:]
            or not part.is_contiguous()
        ):
            return None
        rows += len(part)
        place += part.numel() * part.element_size()
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
