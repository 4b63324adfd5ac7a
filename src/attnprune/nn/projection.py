"""Q, K and V of self-attention in one matrix product, where that is the same thing and pays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..values.layout import HeadLayout, Projection
from .decoupled import State
from .kept import kept
from .policy import autocasts, widened
from .selected import SelectedInputs

QKV: tuple[Projection, ...] = ("q", "k", "v")


class Projected(NamedTuple):
    """What attention runs on."""

    q: Tensor
    """``(batch, tokens, sum of qk_dims)``."""
    k: Tensor
    v: Tensor
    """``(batch, tokens, sum of vo_dims)``."""
    layout: HeadLayout
    """Of these; the module's own, or one of wider heads, padded with zeros."""
    own: HeadLayout
    """The module's own."""
    o: tuple[Tensor, Tensor | None] | None = None
    """O's weight and bias, its columns as the context's channels are, where that was arranged before
    (:mod:`attnprune.nn.frozen`)."""
    quick: bool = False
    """Whether :func:`.products.at_once` may run: eager inference on a CPU, in float32 or float64."""

    def output(self, context: Tensor, linear: nn.Linear | None) -> Tensor:
        """What O makes of a context ``(batch, tokens, sum of vo_dims of the layout)``; without O, the module's own
        channels of it, in stored order."""
        if self.o is not None:
            return F.linear(context, *self.o)
        if self.layout is self.own:
            return context if linear is None else linear(context)
        if linear is not None and _plain((linear,)):  # zeros in the context meet any columns of O
            return F.linear(context, spread(linear.weight, self.own, self.layout), linear.bias)
        context = self._cut(context)
        return context if linear is None else linear(context)

    def _cut(self, context: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return context.index_select(-1, _places(self.own, self.layout, context.device)[1])
        starts = [self.layout.span("o", head)[0] for head in self.own.order]
        dims = [self.own.sizes("o")[head] for head in self.own.order]
        return torch.cat([context[..., a : a + dim] for a, dim in zip(starts, dims, strict=True)], -1)


def project(linears: Sequence[nn.Linear], x: Tensor, state: State, *, widen: bool = True) -> Projected:
    """What the Linears of Q, K and V make of ``x`` ``(batch, tokens, width)``; by one product, if that is the same.

    Two kinds of weights allow that: those that :func:`attnprune.pack_qkv` laid side by side, in inference; and padded
    ones, where heads are to be wider (:func:`.policy.widened`), as weights take less to pad than what they give. Where
    somebody listens (hooks) or the Linears are not plain ones, each is called.
    """
    layout = state.layout
    wide = widened(layout, x) if widen else None
    if wide is not None and _plain(linears):
        parts = [[getattr(linear, key) for linear in linears] for key in ("weight", "bias")]
        weight, bias = (None if rows[0] is None else padded(rows, layout, wide) for rows in parts)
        assert weight is not None
        q, k, v = F.linear(x, weight, bias).split_with_sizes([wide.channels(p) for p in QKV], -1)
        return Projected(q, k, v, wide, layout)
    if state.packed and _calls_may_merge(linears, x):
        weight, bias = (side_by_side([getattr(linear, key) for linear in linears]) for key in ("weight", "bias"))
        if weight is not None and (bias is not None or linears[0].bias is None):
            q, k, v = torch.split(F.linear(x, weight, bias), [linear.out_features for linear in linears], -1)
            return Projected(q, k, v, layout, layout)
    reading = _read_together(linears)
    if reading is not None:
        x = reading.selected(x)
        q, k, v = (F.linear(x, linear.weight, linear.bias) for linear in linears)
    else:
        q, k, v = (linear(x) for linear in linears)
    return Projected(q, k, v, layout, layout)


def _read_together(linears: Sequence[nn.Linear]) -> SelectedInputs | None:
    """The first of Linears that read the same features and to which nobody listens; these are then selected once."""
    first = linears[0]
    if type(first).__bases__ != (SelectedInputs, nn.Linear) or not isinstance(first, SelectedInputs):
        return None
    same = all(type(one) is type(first) and one.attnprune_features == first.attnprune_features for one in linears)
    return first if same and not any(_heard(one) for one in linears) else None


def _heard(one: nn.Linear) -> bool:
    """Whether somebody listens to a Linear, or has changed what it does."""
    hooks = one._forward_hooks or one._forward_pre_hooks or one._backward_hooks or one._backward_pre_hooks
    return bool(hooks) or "forward" in one.__dict__


def spread(weight: Tensor, own: HeadLayout, wide: HeadLayout) -> Tensor:
    """O's columns, apart as the channels of a context of wider heads are."""
    if not torch.compiler.is_compiling():
        return weight.index_select(-1, _places(own, wide, weight.device)[2])
    dims = wide.sizes("o")
    spans = [(head, *own.span("o", head)) for head in wide.order]
    return torch.cat([F.pad(weight[:, a:b], (0, dims[head] - b + a)) for head, a, b in spans], -1)


def padded(parts: Sequence[Tensor], own: HeadLayout, wide: HeadLayout) -> Tensor:
    """Rows of Q, K and V in one, every head padded with zeros."""
    if not torch.compiler.is_compiling():
        zeros = _zeros(parts[0].shape[1:], parts[0].dtype, parts[0].device)
        return torch.cat([*parts, zeros]).index_select(0, _places(own, wide, zeros.device)[0])
    pieces = []  # one kernel is made of them; a list of places would be copied from the CPU
    for part, p in zip(parts, QKV, strict=True):
        for head in wide.stored(p):
            start, stop = own.span(p, head)
            more = wide.sizes(p)[head] - (stop - start)
            pieces.append(F.pad(part[start:stop], (*(0, 0) * (part.dim() - 1), 0, more)))
    return torch.cat(pieces)


@kept
def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A row of zeros."""
    return torch.zeros(1, *shape, dtype=dtype, device=device)


@kept
def _places(own: HeadLayout, wide: HeadLayout, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of every padded row its place among Q's, K's, V's and a last row of zeros; of every own channel of a context its
    place among the padded ones; of every padded one its column of O, any where it is zero."""
    zero = sum(own.channels(p) for p in QKV)
    rows: list[int] = []
    first = 0
    for p in QKV:
        for head in wide.stored(p):
            start, stop = own.span(p, head)
            rows += [*range(first + start, first + stop), *[zero] * (wide.sizes(p)[head] - stop + start)]
        first += own.channels(p)
    back = [wide.span("o", head)[0] + channel for head in own.order for channel in range(own.sizes("o")[head])]
    columns = [0] * wide.channels("o")
    for column, place in enumerate(back):
        columns[place] = column
    return tuple(torch.tensor(one, device=device) for one in (rows, back, columns))  # type: ignore[return-value]


def _plain(linears: Sequence[nn.Linear]) -> bool:
    """Whether nobody listens to these Linears or has changed what they do, and they are of one kind."""
    kind = None
    for one in linears:
        weight = one._parameters.get("weight") if type(one) is nn.Linear else None
        if type(weight) is not nn.Parameter or _heard(one):
            return False
        found = (weight.dtype, weight.device, weight.shape[1], one._parameters["bias"] is None)
        if kind is not None and kind != found:
            return False
        kind = found
    return True


def _calls_may_merge(linears: Sequence[nn.Linear], x: Tensor) -> bool:
    if torch.compiler.is_compiling() or autocasts(x) or not _plain(linears):
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
