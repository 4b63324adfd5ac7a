"""Attention by plain matrix products, every head at its own dims.

On a CPU a fused kernel wants equal qk and vo dims, and what it pads for ragged or decoupled heads costs more than what
it saves. Plain products take any dims. Where the scores of all heads fit a cache, they are made at once; else a head,
and a run of its queries, at a time in one buffer that stays there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..values.layout import KINDS, Bucket, HeadLayout
from .policy import autocasts, forced

WHOLE = 1 << 20
"""Scores (batch x heads x queries x keys) up to which several heads are one batched product."""
PIECE = 1 << 22
"""Scores of one head that are worked on at a time: 16 MB in float32."""
EQUAL = 1 << 18
"""Scores up to which products also beat a fused kernel on equal dims."""
THREADS = 8
"""Threads up to which a head at a time keeps them busy."""
CAUSAL = 256
"""Queries of a piece under a causal mask: keys after the last of them are left out."""


class Plain(NamedTuple):
    """What a kernel computes where that is ``softmax(scale q k^T + mask) v`` and nothing else."""

    scale: float
    mask: Tensor | None
    """``(batch, rows, queries, keys)``, any but the last may be 1; bool (True attends) or added to the logits."""
    causal: bool
    """Whether query i attends to keys up to i; there is no mask then."""
    rows: Callable[[Tensor, Bucket], Tensor]
    """The rows of the mask that belong to a bucket's heads."""


def possible(q: Tensor) -> bool:
    """Whether products, or our kernel, may be what runs for these queries."""
    return q.device.type == "cpu" or forced() in ("products", "kernel")


def pays(layout: HeadLayout, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether products are the layout to run: what is forced, or on a CPU in float32 or float64, for inference.

    Training keeps the kernels' memory. Compiled models come here when they run (:func:`.policy.at_run_time`).
    """
    how = forced()
    if how != "auto":
        return how == "products"
    if (
        torch.compiler.is_compiling()
        or type(q) is not Tensor
        or q.device.type != "cpu"
        or q.dtype not in (torch.float32, torch.float64)
        or torch.get_num_threads() > THREADS
        or torch._C._get_tracing_state() is not None
        or not _in_place(q, k, v)
    ):
        return False
    buckets = layout.buckets
    even = len(buckets) == 1 and buckets[0].qk_dim == buckets[0].vo_dim
    return not even or q.shape[0] * len(buckets[0].heads) * q.shape[1] * k.shape[1] <= EQUAL


def _in_place(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether results may be written into buffers: nobody differentiates, vectorises or casts them."""
    return not (
        torch.compiler.is_compiling()  # first: the rest cannot be compiled
        or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        or autocasts(q)
        or torch._C._functorch.is_functorch_wrapped_tensor(q)
    )


def at_once_runs(x: Tensor) -> bool:
    """Whether operations on a plain tensor run as they are, on few enough threads for products to be what pays."""
    return not (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or torch.get_num_threads() > THREADS
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def at_once(q: Tensor, k: Tensor, v: Tensor, layout: HeadLayout, plain: Plain) -> Tensor | None:
    """What :func:`products` gives, by the shortest way, where heads are alike, tokens few and masks none; else None.

    Only for eager inference on a CPU, in float32 or float64.
    """
    buckets = layout.buckets
    first = buckets[0]
    heads = len(first.heads)
    most = EQUAL if first.qk_dim == first.vo_dim else WHOLE
    if len(buckets) > 1 or plain.mask is not None or q.shape[0] * heads * q.shape[1] * k.shape[1] > most:
        return None
    return _whole(q, k, v, heads, plain.scale, None, None, plain.causal, True)


def products(q: Tensor, k: Tensor, v: Tensor, layout: HeadLayout, plain: Plain) -> Tensor:
    """Context ``(batch, queries, sum of vo_dims)``, in stored order; arguments as in :func:`attnprune.nn.attend`."""
    dtype = q.dtype
    if dtype in (torch.float16, torch.bfloat16):  # scores of a fused kernel have more digits
        with torch.autocast(q.device.type, enabled=False):
            return products(q.float(), k.float(), v.float(), layout, plain).to(dtype)
    mask, dead = _mask(plain.mask)
    pairs = q.shape[0] * q.shape[1] * k.shape[1]
    in_place, buckets = _in_place(q, k, v), layout.buckets
    most = max([len(bucket.heads) for bucket in buckets])
    pieces = in_place and pairs * most > WHOLE
    if len(buckets) == 1 and not pieces:
        all_heads = buckets[0]
        rows = None if mask is None else plain.rows(mask, all_heads)
        gone = None if dead is None else plain.rows(dead, all_heads)
        return _whole(q, k, v, most, plain.scale, rows, gone, plain.causal, in_place)
    qk, vo = ([bucket.width(kind) for bucket in buckets] for kind in KINDS)
    qs, ks, vs = q.split_with_sizes(qk, -1), k.split_with_sizes(qk, -1), v.split_with_sizes(vo, -1)
    context = q.new_empty(*q.shape[:2], v.shape[-1]) if pieces else None
    buffer = q.new_empty(_size(most, q.shape[1], k.shape[1])) if pieces else None
    contexts = []
    for bucket, q, k, v in zip(buckets, qs, ks, vs, strict=True):
        rows = None if mask is None else plain.rows(mask, bucket)
        gone = None if dead is None else plain.rows(dead, bucket)
        if context is None or buffer is None:
            contexts.append(_whole(q, k, v, len(bucket.heads), plain.scale, rows, gone, plain.causal, in_place))
        else:
            out = _split(context[..., bucket.vo_start : bucket.vo_stop], len(bucket.heads))
            _pieces(q * plain.scale, k, v, rows, plain.causal, buffer, out)
            if gone is not None:
                out.masked_fill_(gone, 0)
    if context is not None:
        return context
    return torch.cat(contexts, dim=-1)


def _mask(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The mask, and which queries attend to nothing (None if none): they attend to all, and their context is zeroed."""
    if mask is None:
        return None, None
    dead = ~mask.any(-1, keepdim=True) if mask.dtype == torch.bool else (mask == -torch.inf).all(-1, keepdim=True)
    if not torch.compiler.is_compiling() and not bool(dead.any()):
        return mask, None
    return mask.masked_fill(dead, True if mask.dtype == torch.bool else 0.0), dead


def _split(x: Tensor, heads: int) -> Tensor:
    """``(batch, heads, tokens, dim)``, a view of ``(batch, tokens, heads x dim)``."""
    return x.view(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(1, 2)


def _whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    scale: float,
    mask: Tensor | None,
    gone: Tensor | None,
    causal: bool,
    in_place: bool,
) -> Tensor:
    """Context of a bucket at once, in tensors ``(batch x heads, tokens, channels)``, which cost least to call."""
    batch, queries, keys = len(q), q.shape[1], k.shape[1]
    later = _later(q, k) if causal else None
    q, k, v = (_flat(x, batch, heads) for x in (q, k, v))
    if in_place:
        logits = q.new_empty(len(q), queries, keys).baddbmm_(q, k.mT, beta=0, alpha=scale)
    else:
        logits = torch.bmm(q * scale, k.mT)
    if mask is not None or later is not None:
        _hide(logits.view(batch, heads, queries, keys), mask, later)
    weights = torch.softmax(logits, -1, out=logits) if in_place else logits.softmax(-1)
    context = torch.bmm(weights, v)
    if gone is not None:
        context = context.view(batch, heads, queries, -1).masked_fill(gone, 0).flatten(0, 1)
    if heads == 1:
        return context
    if batch == 1:
        return context.transpose(0, 1).reshape(1, queries, -1)
    return context.view(batch, heads, queries, -1).transpose(1, 2).flatten(2)


def _flat(x: Tensor, batch: int, heads: int) -> Tensor:
    """``(batch x heads, tokens, dim)`` of ``(batch, tokens, heads x dim)``; a view where one of the two is 1."""
    if heads == 1:
        return x
    if batch == 1:
        return x.view(x.shape[1], heads, -1).transpose(0, 1)
    return _split(x, heads).flatten(0, 1)


def _together(heads: int, queries: int, keys: int) -> int:
    """How many whole heads are worked on at a time; 1 also where a head is cut into runs of queries."""
    return max(1, min(heads, WHOLE // (queries * keys)))


def _size(heads: int, queries: int, keys: int) -> int:
    """Scores that a buffer needs room for: of all of these heads, or of a piece, or of one query each."""
    together = _together(heads, queries, keys)
    return max(min(PIECE, together * queries * keys), together * keys)


def _pieces(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, buffer: Tensor, context: Tensor
) -> None:
    """Fills ``context`` ``(batch, heads, queries, dim)``: a run of a head's queries at a time, or a few whole heads."""
    heads, dim, queries, keys = context.shape[1], context.shape[3], q.shape[1], k.shape[1]
    together = _together(heads, queries, keys)
    run = min(queries, max(1, PIECE // (together * keys)), CAUSAL if causal else queries)
    later = _later(q, k) if causal else None
    q, k = _split(q, heads), _split(k, heads).mT
    v = F.pad(_split(v, heads), (0, -dim % 8))  # products of other widths are slow
    mask = None if mask is None else mask.expand(len(q), heads, queries, keys)
    product = torch.bmm if together > 1 else torch.mm
    for item in range(len(q)):
        for first in range(0, heads, together):
            some = (item, slice(first, first + together) if together > 1 else first)
            for start in range(0, queries, run):
                stop = min(start + run, queries)
                last = min(stop, keys) if causal else keys
                left, right = q[some][..., start:stop, :], k[some][..., :last]
                shape = torch.Size((*left.shape[:-1], last))
                scores = buffer[: shape.numel()].view(shape)
                product(left, right, out=scores)
                rows = None if mask is None else mask[some][..., start:stop, :]
                _hide(scores, rows, None if later is None else later[start:stop, :last])
                torch.softmax(scores, -1, out=scores)
                context[some][..., start:stop, :] = product(scores, v[some][..., :last, :])[..., :dim]


def _later(q: Tensor, k: Tensor) -> Tensor:
    """``(queries, keys)`` bool: keys after the query, for q, k ``(batch, tokens, channels)``."""
    return torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).triu(1)


def _hide(logits: Tensor, mask: Tensor | None, later: Tensor | None) -> None:
    """Adds the mask, in place."""
    if mask is not None and mask.dtype == torch.bool:
        logits.masked_fill_(~mask, -torch.inf)
    elif mask is not None:
        logits.add_(mask)
    if later is not None:
        logits.masked_fill_(later, -torch.inf)
