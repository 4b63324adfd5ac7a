"""Attention by plain matrix products, every head at its own dims.

On a CPU a fused kernel wants equal qk and vo dims, and what it pads for ragged or decoupled heads costs more than what
it saves. Plain products take any dims. Where the scores of all heads fit a cache, they are made at once; else those of
some heads, and a run of their queries, at a time in one buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..values.layout import KINDS, Bucket, HeadLayout
from .policy import autocasts, forced
from .thread_pool import shared

WHOLE = 1 << 20
"""Scores (batch x heads x queries x keys) up to which several heads are one batched product."""
PIECE = 1 << 22
"""Scores that are worked on at a time: 16 MB in float32."""
OWN = 1 << 20
"""Scores that a thread works on at a time where each has a head of its own."""
MANY = 1 << 23
"""Scores of all heads from which on that is so: for fewer, waking the threads costs more than it saves."""
RUN = 512
"""Queries of several heads that are worked on at a time, at least."""
EQUAL = 1 << 18
"""Scores up to which products also beat a fused kernel on equal dims."""
THREADS = 8
"""Threads up to which heads keep them busy."""
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
    contexts, parts, zeroed = [], [], []
    for bucket, q, k, v in zip(buckets, qs, ks, vs, strict=True):
        rows = None if mask is None else plain.rows(mask, bucket)
        gone = None if dead is None else plain.rows(dead, bucket)
        if context is None:
            contexts.append(_whole(q, k, v, len(bucket.heads), plain.scale, rows, gone, plain.causal, in_place))
        else:
            out = _split(context[..., bucket.vo_start : bucket.vo_stop], len(bucket.heads))
            parts.append(_part(q * plain.scale, k, v, rows, plain.causal, out))
            zeroed += [] if gone is None else [(out, gone)]
    if context is None:
        return torch.cat(contexts, dim=-1)
    _fill(parts)
    for out, gone in zeroed:
        out.masked_fill_(gone, 0)
    return context


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


class Part(NamedTuple):
    """Heads of the same dims, whose context is filled piece by piece."""

    q: Tensor
    """``(batch, heads, queries, qk_dim)``, scaled."""
    k: Tensor
    """``(batch, heads, qk_dim, keys)``."""
    v: Tensor
    """``(batch, heads, keys, dim)``, no narrower than the context."""
    mask: Tensor | None
    """``(batch, heads, queries, keys)``."""
    later: Tensor | None
    """``(queries, keys)`` bool, under a causal mask."""
    context: Tensor
    """``(batch, heads, queries, vo_dim)``, to be filled."""


class Piece(NamedTuple):
    """A run of the queries of some heads."""

    part: Part
    item: int
    first: int
    heads: int
    start: int
    stop: int


def _part(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, context: Tensor) -> Part:
    heads, dim = context.shape[1], context.shape[3]
    later = _later(q, k) if causal else None
    mask = None if mask is None else mask.expand(len(q), heads, q.shape[1], k.shape[1])
    q, k, v = _split(q, heads), _split(k, heads).mT, _split(v, heads)
    return Part(q, k, F.pad(v, (0, -dim % 8)) if dim % 8 else v, mask, later, context)  # other widths are slow


def cut(heads: int, queries: int, keys: int, causal: bool) -> tuple[int, int]:
    """How many heads all threads work on at a time, and how many of their queries: few pieces, of like size.

    >>> cut(12, 1214, 1214, causal=False)
    (6, 405)
    """
    run = min(queries, CAUSAL if causal else RUN)
    together = _like(heads, max(1, min(heads, PIECE // (run * keys))))
    return together, _run(queries, keys, PIECE // together, causal)


def _run(queries: int, keys: int, scores: int, causal: bool) -> int:
    """How many queries of a head are worked on at a time, in parts of like size."""
    longest = max(1, scores // keys)
    return _like(queries, min(longest, CAUSAL) if causal else longest)


def _like(whole: int, most: int) -> int:
    """The size of parts of like size, none above a limit."""
    return -(-whole // -(-whole // most))


def _fill(parts: Sequence[Part]) -> None:
    """Fills the contexts: each thread heads of its own where that can be, else all threads one piece at a time."""
    queries, keys = parts[0].q.shape[2], parts[0].v.shape[2]
    causal, threads = parts[0].later is not None, torch.get_num_threads()
    run = _run(queries, keys, OWN, causal)
    if threads > 1 and sum(part.q.shape[:2].numel() for part in parts) * queries * keys >= MANY:
        widest = sorted(parts, key=lambda part: -part.q.shape[3] - part.v.shape[3])
        pieces = [piece for part in widest for piece in _pieces(part, 1, run)]
        buffers = parts[0].q.new_empty(threads, run * keys)
        if shared(pieces, lambda piece, place: _work(piece, buffers[place]), threads):
            return
    cuts = [(1, run) if threads == 1 else cut(part.q.shape[1], queries, keys, causal) for part in parts]
    buffer = parts[0].q.new_empty(max([together * run for together, run in cuts]) * keys)
    for part, (together, run) in zip(parts, cuts, strict=True):
        for piece in _pieces(part, together, run):
            _work(piece, buffer)


def _pieces(part: Part, together: int, run: int) -> Iterator[Piece]:
    batch, heads, queries, _ = part.q.shape
    for item in range(batch):
        for first in range(0, heads, together):
            for start in range(0, queries, run):
                yield Piece(part, item, first, min(together, heads - first), start, min(start + run, queries))


def _work(piece: Piece, buffer: Tensor) -> None:
    """Fills the context of a piece; its scores lie in the buffer."""
    part, item, first, heads, start, stop = piece
    some = (item, first if heads == 1 else slice(first, first + heads))
    product, dim, keys = torch.mm if heads == 1 else torch.bmm, part.context.shape[3], part.v.shape[2]
    last = keys if part.later is None else min(stop, keys)
    left, right, values = part.q[some][..., start:stop, :], part.k[some][..., :last], part.v[some][..., :last, :]
    shape = torch.Size((*left.shape[:-1], last))
    scores, out = buffer[: shape.numel()].view(shape), part.context[some][..., start:stop, :]
    product(left, right, out=scores)
    rows = None if part.mask is None else part.mask[some][..., start:stop, :last]
    _hide(scores, rows, None if part.later is None else part.later[start:stop, :last])
    torch.softmax(scores, -1, out=scores)
    if heads == 1 and dim % 8 == 0:
        torch.mm(scores, values, out=out)
    else:
        out.copy_(product(scores, values)[..., :dim])


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
