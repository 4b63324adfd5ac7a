"""Attention over heads of any dims as one launch of a Triton kernel; imported on a GPU alone, or by the interpreter.

The usual online softmax: a program holds a block of a head's queries, walks over its keys in blocks, and keeps for
every query the largest logit so far, the sum of exponentials below it, and their average of the values.

Two things are not usual. Dims of queries and keys, and of values, are apart and need be no power of two: a dim is
covered by one or two blocks of channels (48 by 32 and 16), of which loads leave out what is beyond it. And heads of one
launch may differ: a table says where the channels of each lie and how many there are; large heads come first, in blocks
of their own sizes, small ones after, in theirs.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .table import Table, sizes

COLUMNS = tl.constexpr(7)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(x, tokens, channels, stride_t, stride_c, count, dim):
    """``(tokens, channels)`` of a head, zeros beyond its last token and channel."""
    inside = (tokens[:, None] < count) & (channels[None, :] < dim)
    return tl.load(x + tokens[:, None] * stride_t + channels[None, :] * stride_c, mask=inside, other=0.0)


@triton.jit
def _columns(x, tokens, channels, stride_t, stride_c, count, dim):
    """The same as ``(channels, tokens)``."""
    inside = (tokens[None, :] < count) & (channels[:, None] < dim)
    return tl.load(x + tokens[None, :] * stride_t + channels[:, None] * stride_c, mask=inside, other=0.0)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """``acc + a @ b``; widened for the interpreter, which cannot multiply bfloat16."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision=PRECISION)


@triton.jit
def _head(
    q, k, v, o, mask, qk_dim, vo_dim, first, queries, keys, scale, softcap, window,
    q_t, q_c, k_t, k_c, v_t, v_c, o_t, o_c, mask_t, mask_s,
    QK1: tl.constexpr, QK2: tl.constexpr, VO1: tl.constexpr, VO2: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Context of a block of queries of one head; pointers are those of the head's first channel."""
    rows = first + tl.arange(0, M)
    qk1, vo1 = tl.arange(0, QK1), tl.arange(0, VO1)
    q1 = _rows(q, rows, qk1, q_t, q_c, queries, qk_dim)
    if QK2 > 0:
        qk2 = QK1 + tl.arange(0, QK2)
        q2 = _rows(q, rows, qk2, q_t, q_c, queries, qk_dim)
    most = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    mean1 = tl.zeros([M, VO1], tl.float32)
    if VO2 > 0:
        vo2 = VO1 + tl.arange(0, VO2)
        mean2 = tl.zeros([M, VO2], tl.float32)
    start, stop = 0, keys
    if CAUSAL:
        stop = tl.minimum(keys, first + M)
    if WINDOW:
        start = tl.maximum(0, first - window + 1) // N * N
        stop = tl.minimum(stop, first + M - 1 + window)
    for at in range(start, stop, N):
        columns = at + tl.arange(0, N)
        logits = tl.zeros([M, N], tl.float32)
        logits = _dot(q1, _columns(k, columns, qk1, k_t, k_c, keys, qk_dim), logits, PRECISION, WIDEN)
        if QK2 > 0:
            logits = _dot(q2, _columns(k, columns, qk2, k_t, k_c, keys, qk_dim), logits, PRECISION, WIDEN)
        logits = logits * scale
        if SOFTCAP:
            logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)  # tanh
        seen = (columns[None, :] < keys) & (rows[:, None] < queries)
        if MASK > 0:
            given = tl.load(mask + rows[:, None] * mask_t + columns[None, :] * mask_s, mask=seen, other=0)
            if MASK == 1:
                seen = seen & (given != 0)
            else:
                logits = logits + given.to(tl.float32)
        if CAUSAL:
            seen = seen & (columns[None, :] <= rows[:, None])
        if WINDOW:
            seen = seen & (rows[:, None] - columns[None, :] < window) & (columns[None, :] - rows[:, None] < window)
        logits = tl.where(seen, logits * LOG2E, float("-inf"))
        larger = tl.maximum(most, tl.max(logits, 1))
        finite = tl.where(larger == float("-inf"), 0.0, larger)  # no key yet: exponentials below are zero, not NaN
        shrink = tl.exp2(most - finite)
        weights = tl.exp2(logits - finite[:, None])
        total = total * shrink + tl.sum(weights, 1)
        values = _rows(v, columns, vo1, v_t, v_c, keys, vo_dim)
        mean1 = _dot(weights.to(values.dtype), values, mean1 * shrink[:, None], PRECISION, WIDEN)
        if VO2 > 0:
            values = _rows(v, columns, vo2, v_t, v_c, keys, vo_dim)
            mean2 = _dot(weights.to(values.dtype), values, mean2 * shrink[:, None], PRECISION, WIDEN)
        most = larger
    total = tl.where(total == 0, 1.0, total)[:, None]  # queries that attend to nothing give zeros
    kept = rows[:, None] < queries
    place = o + rows[:, None] * o_t
    tl.store(place + vo1[None, :] * o_c, (mean1 / total).to(o.dtype.element_ty), mask=kept & (vo1[None, :] < vo_dim))
    if VO2 > 0:
        found = (mean2 / total).to(o.dtype.element_ty)
        tl.store(place + vo2[None, :] * o_c, found, mask=kept & (vo2[None, :] < vo_dim))


@triton.jit
def _kernel(
    q, k, v, o, mask, table, batch, large, queries, keys, scale, softcap, window,
    q_b, q_t, q_c, k_b, k_t, k_c, v_b, v_t, v_c, o_b, o_t, o_c, mask_b, mask_h, mask_t, mask_s,
    QK1: tl.constexpr, QK2: tl.constexpr, VO1: tl.constexpr, VO2: tl.constexpr,
    SMALL_QK1: tl.constexpr, SMALL_QK2: tl.constexpr, SMALL_VO1: tl.constexpr, SMALL_VO2: tl.constexpr,
    QK: tl.constexpr, VO: tl.constexpr, ALIGN: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A program for every block of queries of every head of every sequence; the first ``large`` heads are the large.

    Loads are vectors, and run ahead of products, only where the compiler knows how dims and addresses are aligned:
    equal heads have their dims at compile time (``QK``, ``VO``), and all others are multiples of ``ALIGN``, by
    which strides of sequences and tokens are divided (a hint is lost on arguments).
    """
    first = tl.program_id(0) * M
    head, item = tl.program_id(1) // batch, (tl.program_id(1) % batch).to(tl.int64)
    row = table + head * COLUMNS
    if QK > 0:
        qk_dim = QK
        vo_dim = VO
    else:
        qk_dim = tl.multiple_of(tl.load(row), ALIGN)
        vo_dim = tl.multiple_of(tl.load(row + 1), ALIGN)
    q += item * (q_b * ALIGN) + tl.multiple_of(tl.load(row + 2), ALIGN) * q_c
    k += item * (k_b * ALIGN) + tl.multiple_of(tl.load(row + 3), ALIGN) * k_c
    v += item * (v_b * ALIGN) + tl.multiple_of(tl.load(row + 4), ALIGN) * v_c
    o += item * (o_b * ALIGN) + tl.multiple_of(tl.load(row + 5), ALIGN) * o_c
    q_t, k_t, v_t, o_t = q_t * ALIGN, k_t * ALIGN, v_t * ALIGN, o_t * ALIGN
    if MASK > 0:
        mask += item * mask_b + tl.load(row + 6) * mask_h
    if SMALL_QK1 == 0 or head < large:
        _head(q, k, v, o, mask, qk_dim, vo_dim, first, queries, keys, scale, softcap, window, q_t, q_c, k_t, k_c,
              v_t, v_c, o_t, o_c, mask_t, mask_s, QK1, QK2, VO1, VO2, M, N, MASK, CAUSAL, WINDOW, SOFTCAP,
              PRECISION, WIDEN)  # fmt: skip
    else:
        _head(q, k, v, o, mask, qk_dim, vo_dim, first, queries, keys, scale, softcap, window, q_t, q_c, k_t, k_c,
              v_t, v_c, o_t, o_c, mask_t, mask_s, SMALL_QK1, SMALL_QK2, SMALL_VO1, SMALL_VO2, M, N, MASK, CAUSAL,
              WINDOW, SOFTCAP, PRECISION, WIDEN)  # fmt: skip


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    table: Table,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """Fills ``out`` ``(batch, queries, channels of O)``; arguments as :func:`.operator.attention`'s, any strides."""
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    if not (batch and queries):
        return
    kind, given = 0, q
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        given = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        kind = 1 if mask.dtype == torch.bool else 2
        full = mask.expand(batch, table.heads if mask.shape[1] > 1 else 1, queries, keys)
        strides = full.stride() if mask.shape[1] > 1 else (full.stride(0), 0, *full.stride()[2:])
    block_m, block_n, warps, stages = sizes(table, q.dtype)
    align = gcd(table.align, *(x.stride(at) for x in (q, k, v, out) for at in (0, 1)))
    places = [x.stride(at) // (1 if at == 2 else align) for x in (q, k, v, out) for at in range(3)]
    exact = q.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
    _kernel[(triton.cdiv(queries, block_m), table.heads * batch)](
        q, k, v, out, given, table.rows(q.device), batch, table.large, queries, keys, scale, softcap or 1.0, window,
        *places, *strides, *table.blocks, *table.even, ALIGN=align,
        M=block_m, N=block_n, MASK=kind, CAUSAL=causal, WINDOW=window > 0, SOFTCAP=softcap > 0,
        PRECISION="ieee" if exact else "tf32", WIDEN=q.device.type == "cpu", **options,
    )  # fmt: skip
