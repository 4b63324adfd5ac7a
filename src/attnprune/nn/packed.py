"""Q, K and V of self-attention in one matrix product, where that is the same thing and pays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..spec import HeadLayout, Kind
from .decoupled import State
from .layouts import widens

KINDS_OF: tuple[Kind, Kind, Kind] = ("qk", "qk", "vo")
"""Of Q, K and V."""


class Projected(NamedTuple):
    """What attention runs on."""

    q: Tensor
    """``(batch, tokens, sum of qk_dims)``."""
    k: Tensor
    v: Tensor
    """``(batch, tokens, sum of vo_dims)``."""
    layout: HeadLayout
    """Of these; the module's own, or one of equal heads in logical order, padded with zeros."""
    own: HeadLayout
    """The module's own."""

    def cut(self, context: Tensor) -> Tensor:
        """The module's channels of a context ``(batch, tokens, sum of vo_dims of the layout)``, in stored order."""
        if self.layout is self.own:
            return context
        if torch.compiler.is_compiling():
            dim = self.layout.vo[0]
            return torch.cat([context[..., head * dim :][..., : self.own.vo[head]] for head in self.own.order], -1)
        return context.index_select(-1, _places(self.own, self.layout, context.device)[1])


def project(linears: Sequence[nn.Linear], x: Tensor, state: State, *, widen: bool = True) -> Projected:
    """What the Linears of Q, K and V make of ``x`` ``(batch, tokens, width)``; by one product, if that is the same.

    Two kinds of weights allow that: those that :func:`attnprune.pack_qkv` laid side by side, in inference; and those of
    heads of several dims, padded to equal ones (:func:`.layouts.widens`), wherever a product of padded weights costs
    less than to pad what three products gave. Where somebody listens (hooks) or the Linears are not plain ones, each is
    called.
    """
    layout = state.layout
    dims = widens(layout, x) if widen and _plain(linears) else None
    if dims is not None:
        heads = len(layout.qk)
        wide = HeadLayout((dims[0],) * heads, (dims[1],) * heads)
        weight, bias = _wide(linears, layout, wide)
        q, k, v = torch.split(F.linear(x, weight, bias), [heads * dims[0], heads * dims[0], heads * dims[1]], -1)
        return Projected(q, k, v, wide, layout)
    if state.packed and _calls_may_merge(linears, x):
        packed, bias = (side_by_side([getattr(linear, key) for linear in linears]) for key in ("weight", "bias"))
        if packed is not None and (bias is not None or linears[0].bias is None):
            q, k, v = torch.split(F.linear(x, packed, bias), [linear.out_features for linear in linears], -1)
            return Projected(q, k, v, layout, layout)
    q, k, v = (linear(x) for linear in linears)
    return Projected(q, k, v, layout, layout)


def _wide(linears: Sequence[nn.Linear], own: HeadLayout, wide: HeadLayout) -> tuple[Tensor, Tensor | None]:
    """The weights and biases of Q, K and V in one, every head padded with rows of zeros, in logical order."""
    weight = _padded([linear.weight for linear in linears], own, wide)
    return weight, None if linears[0].bias is None else _padded([linear.bias for linear in linears], own, wide)


def _padded(parts: Sequence[Tensor], own: HeadLayout, wide: HeadLayout) -> Tensor:
    """Rows of Q, K and V in one, padded."""
    if not torch.compiler.is_compiling():
        zeros = parts[0].new_zeros(1, *parts[0].shape[1:])
        return torch.cat([*parts, zeros]).index_select(0, _places(own, wide, zeros.device)[0])
    pieces = []  # one kernel is made of them; a list of places would be copied from the CPU
    for part, kind in zip(parts, KINDS_OF, strict=True):
        for head, dim in enumerate(wide.dims(kind)):
            start, stop = own.span(kind, head)
            pieces.append(F.pad(part[start:stop], (*(0, 0) * (part.dim() - 1), 0, dim - (stop - start))))
    return torch.cat(pieces)


@lru_cache(maxsize=4096)
def _places(own: HeadLayout, wide: HeadLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of every padded row its place among Q's, K's, V's and a last row of zeros; of every own channel of a context, its
    place among the padded ones."""
    zero = 2 * sum(own.qk) + sum(own.vo)
    rows: list[int] = []
    first = 0
    for kind in KINDS_OF:
        for head, dim in enumerate(wide.dims(kind)):
            start, stop = own.span(kind, head)
            rows += [*range(first + start, first + stop), *[zero] * (dim - stop + start)]
        first += sum(own.dims(kind))
    back = [head * wide.vo[0] + channel for head in own.order for channel in range(own.vo[head])]
    with torch.inference_mode(False):
        return torch.tensor(rows, device=device), torch.tensor(back, device=device)


def _plain(linears: Sequence[nn.Linear]) -> bool:
    """Whether nobody listens to these Linears or has changed what they do, and they are of one kind."""
    kinds = {(one.weight.dtype, one.weight.device, one.weight.shape[1], one.bias is None) for one in linears}
    return len(kinds) == 1 and not any(
        type(one) is not nn.Linear
        or type(one.weight) not in (nn.Parameter, Tensor)
        or one._forward_hooks
        or one._forward_pre_hooks
        or one._backward_hooks
        or one._backward_pre_hooks
        or "forward" in one.__dict__
        for one in linears
    )


def _calls_may_merge(linears: Sequence[nn.Linear], x: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type) or not _plain(linears):
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or any(one.weight.requires_grad for one in linears)))


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
