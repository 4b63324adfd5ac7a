"""Attention over heads of any dims as one operator of PyTorch: our kernel where it runs, the vendor's elsewhere."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import OptionError
from ...values.layout import HeadLayout
from ..kept import eager, kept
from ..policy import asked_once
from .table import table_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 256
"""Channels of a head up to which a block of queries fits a GPU's registers."""


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


@asked_once
def available(device: torch.device) -> bool:
    """Whether our kernel runs there: on CUDA with Triton, or on a CPU by its interpreter (``TRITON_INTERPRET=1``)."""
    if device.type not in ("cuda", "cpu") or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"):
        return False
    return _has_triton()


def heads_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: HeadLayout,
    *,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Attention over heads of any dims, all of them in one launch; nothing is padded or moved in memory.

    Forward by our kernel on CUDA, in float16, bfloat16 or float32 (without tf32, unless torch allows it), heads up to
    256 channels wide; else, and for gradients, by PyTorch's.

    Args:
        q: ``(batch, queries, channels of Q)``, in stored order, any strides, as of a slice of one product.
        k: ``(batch, keys, channels of K)``.
        v: ``(batch, keys, channels of V)``.
        layout: where heads lie; query heads may share key heads.
        scale: what logits are multiplied with.
        mask: ``(batch, query heads, queries, keys)``, any may be 1; bool (True attends) or added to the logits.
        causal: whether query i attends to keys up to i.
        window: if above 0, query i attends to keys j with ``|i - j| < window``.
        softcap: if above 0, logits become ``softcap * tanh(logits / softcap)``, before the mask.

    Returns:
        Context ``(batch, queries, channels of O)``, in stored order; zeros for queries that attend to nothing.

    Raises:
        OptionError: tensors of other shapes than the layout and each other's.

    >>> layout = HeadLayout(qk=(4, 2), vo=(3, 5), groups=(2, 1))
    >>> q, k, v = torch.randn(1, 7, 10), torch.randn(1, 7, 6), torch.randn(1, 7, 8)
    >>> heads_attention(q, k, v, layout, scale=0.5, window=3).shape
    torch.Size([1, 7, 11])
    """
    shapes = (tuple(q.shape[2:]), tuple(k.shape), tuple(v.shape))
    wanted = ((layout.channels("q"),), (len(q), k.shape[1], layout.channels("k")),
              (len(q), k.shape[1], layout.channels("v")))  # fmt: skip
    if shapes != wanted:
        remedy = "give tensors (batch, tokens, channels of all heads)"
        raise OptionError("heads_attention", f"Q, K and V of {wanted}", str(shapes), remedy)
    learned = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, mask))
    if not learned and not torch.compiler.is_compiling() and eager():
        return _context(q, k, v, layout, mask, causal, scale, window, softcap)  # an operator of Python costs its call
    context: Tensor = _operator(
        q, k, v, list(layout.qk), list(layout.vo), list(layout.groups), mask, causal, scale, window, softcap
    )
    return context


def _run(
    q: Tensor, k: Tensor, v: Tensor, qk: list[int], vo: list[int], groups: list[int], mask: Tensor | None,
    causal: bool, scale: float, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    layout = HeadLayout(tuple(qk), tuple(vo), tuple(groups))
    return _context(q, k, v, layout, mask, causal, scale, window, softcap)


def _context(
    q: Tensor, k: Tensor, v: Tensor, layout: HeadLayout, mask: Tensor | None, causal: bool, scale: float, window: int,
    softcap: float,
) -> Tensor:  # fmt: skip
    if not _fits(q, k, v, layout):
        return vendors(q, k, v, layout, mask, causal, scale, window, softcap)
    out = q.new_empty(q.shape[0], q.shape[1], layout.channels("o"))
    import_module(".forward", __package__).launch(q, k, v, out, table_of(layout), mask, causal, scale, window, softcap)
    return out


def _fits(q: Tensor, k: Tensor, v: Tensor, layout: HeadLayout) -> bool:
    alike = q.dtype == k.dtype == v.dtype and q.dtype in DTYPES
    return alike and max(*layout.qk, *layout.vo) <= WIDEST and k.shape[1] > 0 and available(q.device)


def vendors(
    q: Tensor, k: Tensor, v: Tensor, layout: HeadLayout, mask: Tensor | None, causal: bool, scale: float, window: int,
    softcap: float,
) -> Tensor:  # fmt: skip
    """The same by PyTorch's own operations, which have gradients; a call for every shape of heads."""
    hidden = _hidden(q, k, causal, window) if window else None
    found: list[Tensor] = []
    for part in layout.buckets:
        left = _split(q[..., part.qk_start : part.qk_stop], part.qk_dim)
        right = _split(k[..., part.k_start : part.k_start + len(part.keys) * part.qk_dim], part.qk_dim)
        values = _split(v[..., part.v_start : part.v_start + len(part.keys) * part.vo_dim], part.vo_dim)
        if len(part.keys) < len(part.heads):
            index = _shared(layout, part.heads, part.keys, q.device)
            right, values = right.index_select(1, index), values.index_select(1, index)
        rows = mask if mask is None or mask.shape[1] == 1 else mask[:, list(part.heads)]
        found.append(_plain(left, right, values, rows, hidden, causal, scale, softcap).transpose(1, 2).flatten(2))
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, hidden: Tensor | None, causal: bool, scale: float,
    softcap: float,
) -> Tensor:  # fmt: skip
    if not softcap and hidden is None and (mask is None or not causal) and (mask is None or mask.dtype != torch.bool):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    logits = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if causal and hidden is None:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    if hidden is not None:
        logits = logits.masked_fill(hidden, -torch.inf)
    nothing = (logits == -torch.inf).all(-1, keepdim=True)
    weights = logits.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
    return weights.to(v.dtype) @ v


def _hidden(q: Tensor, k: Tensor, causal: bool, window: int) -> Tensor:
    """``(queries, keys)`` bool: keys outside of a query's window."""
    apart = torch.arange(q.shape[1], device=q.device)[:, None] - torch.arange(k.shape[1], device=q.device)
    return (apart.abs() >= window) | (apart < 0) if causal else apart.abs() >= window


def _split(x: Tensor, dim: int) -> Tensor:
    return x.unflatten(-1, (-1, dim)).transpose(1, 2)  # type: ignore[no-untyped-call,no-any-return]


@kept
def _shared(layout: HeadLayout, heads: tuple[int, ...], keys: tuple[int, ...], device: torch.device) -> Tensor:
    """For every query head of a bucket, the place of its key head."""
    return torch.tensor([keys.index(layout.key_of[head]) for head in heads], device=device)


_operator = torch.library.custom_op(
    "attnprune::heads",
    _run,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, int[] qk, int[] vo, int[] groups, Tensor? mask, bool causal, float scale, "
    "int window, float softcap) -> Tensor",
)


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, qk: list[int], vo: list[int], groups: list[int], *_: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], sum(dim * count for dim, count in zip(vo, groups, strict=True)))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, qk, vo, groups, mask, *rest = inputs
    ctx.save_for_backward(q, k, v, mask)
    ctx.layout, ctx.rest = HeadLayout(tuple(qk), tuple(vo), tuple(groups)), rest


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """By PyTorch's own operations, which compute the context again."""
    *tensors, mask = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in tensors]
        learned = mask is not None and mask.is_floating_point() and ctx.needs_input_grad[6]
        given = mask.detach().requires_grad_() if learned else mask
        q, k, v = leaves
        context = vendors(q, k, v, ctx.layout, given, *ctx.rest)
        found = torch.autograd.grad(context, [*leaves, given] if learned else leaves, grad)
    return (*found[:3], None, None, None, found[3] if learned else None, None, None, None, None)


_operator.register_autograd(_backward, setup_context=_remember)
